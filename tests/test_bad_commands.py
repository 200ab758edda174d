"""What a user gets wrong, as they meet it: the scripts as commands, a line on stderr and exit code 2."""

import shutil
from unittest.mock import MagicMock

import pytest

from dreambooth import checks, cluster
from dreambooth.checks import UserError


def test_train_as_a_command(assert_one_line, run_script, train_argv, tmp_path):
    """The tokenizer library's own warning of a long prompt must not come beside the line."""
    argv = train_argv(tmp_path / "out", instance_prompt="photo of unqtkn car " + "on the beach " * 20)
    result = run_script("train.py", *argv)
    assert_one_line(result, "too long", "would be cut")
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_more_workers_than_cores_as_a_command(assert_one_line, run_script, train_argv, tmp_path, ray_address):
    result = run_script("train.py", *train_argv(tmp_path / "out", num_workers=50), RAY_ADDRESS=ray_address)
    assert_one_line(result, "--num_workers 50", "2 CPU cores")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["train.py", "dreambooth/cluster.py"])
def test_address_where_no_cluster_is(assert_one_line, run_script, train_argv, tmp_path, root, script):
    """Ray itself would try for minutes. Both ways into Ray: a script, and the count of GPUs for run.sh."""
    argv = train_argv(tmp_path / "out") if script == "train.py" else []
    result = run_script(script, *argv, RAY_ADDRESS="127.0.0.1:1", PYTHONPATH=str(root))
    assert_one_line(result, "RAY_ADDRESS=127.0.0.1:1", "ray start --head")
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_cluster_that_ray_does_not_find(monkeypatch):
    """As RAY_ADDRESS=auto, README's own, before `ray start`; and what is no address, of which Ray says ValueError."""
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    for address, error in (("auto", ConnectionError("not found")), ("127.0.0.1", ValueError("invalid"))):
        monkeypatch.setenv("RAY_ADDRESS", address)
        monkeypatch.setattr(cluster.ray, "init", MagicMock(side_effect=error))
        with pytest.raises(UserError, match=f"RAY_ADDRESS={address}: no Ray cluster"):
            cluster.start_ray()


def test_generate_as_a_command(assert_one_line, run_script, generate_argv, tmp_path):
    result = run_script("generate.py", *generate_argv(tmp_path / "out", model_dir=tmp_path / "nowhere"))
    assert_one_line(result, "--model_dir", "cache_model.py")
    assert not list(tmp_path.iterdir())


def test_user_error_is_a_line_and_other_errors_keep_their_trace(capsys):
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as exit_of_user:
        checks.run_main(fail, UserError("a.png: gone"))
    assert exit_of_user.value.code == 2
    assert capsys.readouterr().err == "error: a.png: gone\n"
    with pytest.raises(ZeroDivisionError):
        checks.run_main(fail, ZeroDivisionError())
    with pytest.raises(SystemExit) as exit_of_interrupt:
        checks.run_main(fail, KeyboardInterrupt())
    assert exit_of_interrupt.value.code == 130


# train.py, with a picture that is cut off after the check and before the training.
SPOILED = """
import train
from pathlib import Path
check = train.check_args
def check_then_cut(args):
    found = check(args)
    found[1][0].write_bytes(found[1][0].read_bytes()[:-500])
    return found
train.check_args = check_then_cut
train.checks.run_main(train.main, train.parse_args())
"""


def test_training_that_diverges_is_told_in_one_line(run_script, train_argv, tmp_path, ray_address):
    """It arises in the worker itself: a loss that is not finite."""
    result = run_script("train.py", *train_argv(tmp_path / "out", lr=1e30), RAY_ADDRESS=ray_address)
    assert result.returncode == 2, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: the loss is ")
    assert "--lr" in last
    assert "Traceback" not in result.stderr + result.stdout
    assert not list(tmp_path.iterdir())


def test_image_damaged_during_the_run_is_told_in_one_line(run_script, train_argv, tmp_path, ray_address, class_dir):
    """It arises in a task of Ray Data on behalf of a worker: still a line with its name, no result."""
    (tmp_path / "spoiled.py").write_text(SPOILED)
    shutil.copytree(class_dir, tmp_path / "photos")
    argv = train_argv(tmp_path / "out", instance_images_dir=tmp_path / "photos")
    result = run_script(tmp_path / "spoiled.py", *argv, RAY_ADDRESS=ray_address)
    assert result.returncode == 2, result.stderr
    assert "0.png: unreadable or truncated image" in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr + result.stdout
    assert not (tmp_path / "out").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["photos", "spoiled.py"]
