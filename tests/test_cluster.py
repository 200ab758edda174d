"""Ray's start, the hardware that a run asks for, and the errors that come back through Ray."""

import socket
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import ray
import torch

from dreambooth import cluster
from dreambooth.cli import UserError


def chain(error, *causes):
    """`error` with the first of `causes` as its cause, that with the next one as its own, ..."""
    effect = error
    for cause in causes:
        effect.__cause__ = cause
        effect = cause
    return error


def test_a_user_error_is_found_itself():
    assert cluster.user_error_in(UserError("a.png: gone")) == "a.png: gone"


def test_a_user_error_is_found_in_a_chain_of_causes():
    error = chain(RuntimeError("task failed"), ValueError("batch 3"), UserError("a.png: gone"))
    assert cluster.user_error_in(error) == "a.png: gone"


def test_a_user_error_is_found_as_the_cause_of_a_ray_task_error():
    error = ray.exceptions.RayTaskError("map", "Traceback ...", UserError("a.png: gone"))
    assert cluster.user_error_in(error) == "a.png: gone"
    assert cluster.user_error_in(error.as_instanceof_cause()) == "a.png: gone"
    assert cluster.user_error_in(chain(RuntimeError("worker failed"), error)) == "a.png: gone"


def test_a_user_error_is_found_as_the_cause_of_the_cause_of_a_ray_task_error():
    inner = chain(RuntimeError("in the map function"), UserError("a.png: gone"))
    error = ray.exceptions.RayTaskError("map", "Traceback ...", inner)
    assert cluster.user_error_in(error) == "a.png: gone"


def test_a_user_error_is_found_in_a_text_that_is_all_ray_has_kept():
    text = (
        "ray::map() (pid=1)\n  File x.py, line 1\n"
        "dreambooth.cli.UserError: a.png: truncated image\n\nmore"
    )
    assert cluster.user_error_in(RuntimeError(text)) == "a.png: truncated image"


def test_of_several_in_a_text_the_last_one_is_it():
    """A traceback ends with what was raised."""
    text = "UserError: first\nDuring handling of it:\nUserError: second"
    assert cluster.user_error_in(RuntimeError(text)) == "second"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        ValueError("not a UserError"),
        RuntimeError("MyUserError: of another library"),
        chain(RuntimeError("task failed"), KeyError("bug")),
        ray.exceptions.RayTaskError("map", "Traceback ...", KeyError("bug")),
        ray.exceptions.ActorDiedError(),
    ],
)
def test_a_bug_is_no_user_error(error):
    assert cluster.user_error_in(error) is None


def test_a_user_error_really_crosses_ray(ray_address):
    @ray.remote
    def fail():
        raise UserError("a.png: gone")

    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(fail.remote())
    assert cluster.user_error_in(raised.value) == "a.png: gone"


def test_a_failed_training_is_the_users_if_a_workers_failure_is():
    error = RuntimeError("training failed")
    error.worker_failures = {0: KeyError("rank 0 waits"), 1: UserError("a.png: gone")}
    found = cluster.training_error(error)
    assert type(found) is UserError
    assert str(found) == "a.png: gone"


def test_too_little_gpu_memory_is_a_user_error_with_the_remedies():
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    for failure in (memory, RuntimeError("torch.OutOfMemoryError: CUDA out of memory")):
        found = cluster.training_error(SimpleNamespace(worker_failures={0: failure}))
        assert type(found) is UserError
        assert "--gradient_checkpointing" in str(found)


def test_a_failed_training_keeps_its_own_error_if_it_is_a_bug():
    error = RuntimeError("shape mismatch")
    error.worker_failures = {0: ValueError("shape mismatch")}
    assert cluster.training_error(error) is error
    assert cluster.training_error(RuntimeError("no workers")).args == ("no workers",)


def test_there_is_a_gpu_or_else_a_core_for_each_worker():
    """Otherwise Ray would wait for ever."""
    cluster.check_num_workers(4, 4, 16)
    cluster.check_num_workers(2, 0, 2)
    with pytest.raises(
        UserError, match="--num_workers 5: the cluster has 4 GPUs,.*give --num_workers 4 or less"
    ):
        cluster.check_num_workers(5, 4, 16)
    with pytest.raises(UserError, match="the cluster has 1 GPU,"):
        cluster.check_num_workers(2, 1, 16)
    with pytest.raises(UserError, match="the cluster has 2 CPU cores,"):
        cluster.check_num_workers(3, 0, 2)


@pytest.mark.parametrize(
    ("address", "error"),
    [("auto", ConnectionError("not found")), ("127.0.0.1", ValueError("no port"))],
)
def test_an_address_at_which_ray_finds_no_cluster(monkeypatch, address, error):
    """As RAY_ADDRESS=auto, the README's own, before `ray start`; and what is not an address."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", MagicMock(side_effect=error))
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address}: no Ray cluster"):
        cluster.start_ray()


def test_without_an_address_a_ray_of_its_own_is_started(monkeypatch):
    """Never one that happens to run on this machine, as ray.init() alone would join."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", MagicMock())
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert cluster.start_ray() == (2, 8)
    (call,) = cluster.ray.init.call_args_list
    assert call.kwargs["address"] == "local"


def test_an_address_at_which_nothing_listens_is_found_at_once():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "127.0.0.1"):
            cluster.check_address(address)
    with pytest.raises(OSError):
        cluster.check_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize("argv", [["train.py"], ["-m", "dreambooth.gpus"]])
def test_a_command_with_an_address_at_which_there_is_no_cluster(
    assert_one_line, run_script, train_argv, tmp_path, argv
):
    """Both ways into Ray: a script, and the number of GPUs for run.sh. Ray would try for minutes."""
    if argv == ["train.py"]:
        argv = ["train.py", *train_argv(tmp_path / "out")]
    result = run_script(*argv, RAY_ADDRESS="127.0.0.1:1")
    assert_one_line(result, "RAY_ADDRESS=127.0.0.1:1", "ray start --head")
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_gpus_of_this_machine_and_of_a_cluster(run_script, ray_address):
    """There are none: conftest.py hides what this machine may have."""
    for environment in ({}, {"RAY_ADDRESS": ray_address}):
        result = run_script("-m", "dreambooth.gpus", **environment)
        assert result.stdout == "0\n", result.stderr
        assert result.stderr == ""


def test_more_workers_than_the_cluster_has_cores(
    assert_one_line, run_script, train_argv, tmp_path, ray_address
):
    argv = train_argv(tmp_path / "out", num_workers=50)
    result = run_script("train.py", *argv, RAY_ADDRESS=ray_address)
    assert_one_line(result, "--num_workers 50", "2 CPU cores")
    assert list(tmp_path.iterdir()) == []


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(cluster.os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert cluster.num_cores() == 3
    monkeypatch.delattr(cluster.os, "sched_getaffinity")
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 7)
    assert cluster.num_cores() == 7
