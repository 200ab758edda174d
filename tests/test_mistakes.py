"""Mistakes that users have made: each refused in one line that says what to do, before anything
starts."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.pocket import render


def test_prompts_that_no_tokenizer_takes(generate_args, train_args, capsys):
    """An empty one, of a shell variable that is not set; and one that is not UTF-8, which Python
    passes on as lone surrogates, on which the tokenizer ends in a trace."""
    surrogate = b"photo of caf\xe9".decode(errors="surrogateescape")
    for text, expected in (("", "an empty prompt; is a shell"), (surrogate, "is not UTF-8")):
        for parse, name in (
            (train_args, "instance_prompt"),
            (train_args, "class_prompt"),
            (train_args, "preview_prompts"),
            (generate_args, "prompts"),
        ):
            with pytest.raises(SystemExit) as stopped:
                parse("out", **{name: text})
            assert stopped.value.code == 2
            line = capsys.readouterr().err
            assert line.startswith(f"error: argument --{name}: ")
            assert expected in line
            assert len(line.splitlines()) == 1


def test_the_command_train_refuses_in_one_line(run_script, assert_one_line, train_argv, tmp_path):
    """The tokenizer's own warning of a long prompt must not stand beside it."""
    prompt = "photo of unqtkn car " + "on the beach " * 20
    result = run_script("train.py", *train_argv(tmp_path / "out", instance_prompt=prompt))
    assert_one_line(result, "prompt too long", "would be cut off")
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


class RunsCode:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


WEIGHTS = {"conv_in.weight": torch.zeros(30, 4, 3, 3)}


@pytest.fixture
def pickled(model_dir, tmp_path):
    """A copy of the model whose U-Net is a pickle, which is to be written."""
    unet = tmp_path / "pickled" / "unet"
    unet.mkdir(parents=True)
    for path in model_dir.iterdir():
        if path.name != "unet":
            (unet.parent / path.name).symlink_to(path)
    (unet / "config.json").symlink_to(model_dir / "unet" / "config.json")
    return unet / "diffusion_pytorch_model.bin"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_accepted_if_it_is_of_weights_and_runs_no_code(pickled, tmp_path, zipped):
    """Also one from before torch 1.6, which is no zip archive."""
    folder = pickled.parents[1]
    torch.save(WEIGHTS, pickled, _use_new_zipfile_serialization=zipped)
    pipeline_dir.check_model_dir(folder)
    content = {**WEIGHTS, "more": RunsCode(tmp_path / "ran")}
    torch.save(content, pickled, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=f"{pickled} is damaged, or holds code") as error:
        pipeline_dir.check_model_dir(folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_pickle_is_refused(pickled):
    torch.save(WEIGHTS, pickled)
    content = pickled.read_bytes()
    for length in range(0, len(content), len(content) // 20):
        pickled.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"{pickled} is damaged"):
            pipeline_dir.check_model_dir(pickled.parents[1])


def test_the_command_generate_refuses_in_one_line(
    run_script, assert_one_line, pickled, generate_argv, tmp_path
):
    """A plain pickle that would run code, of which torch warns as well."""
    pickled.write_bytes(pickle.dumps(RunsCode(tmp_path / "ran"), protocol=4))
    argv = generate_argv(tmp_path / "out", model_dir=pickled.parents[1])
    assert_one_line(run_script("generate.py", *argv), f"{pickled} is damaged, or holds code")
    assert [path.name for path in tmp_path.iterdir()] == ["pickled"]


def test_pocket_knows_its_classes_and_no_other():
    """As whole words, in any case."""
    for name in render.CLASSES:
        render.check_classes([f"photo of a {name}", f"Photo of unqtkn {name.upper()}, at night"])
    for text in ("photo of a dog", "photo of a boathouse", "cars", "写真"):
        with pytest.raises(UserError, match="car, house, boat, ball, cup and tree; real photos"):
            render.check_classes(["photo of a car", text])


def test_run_sh_ends_with_a_steps_mistake_such_as_a_class_that_pocket_does_not_know(
    root, tmp_path, flat_image, assert_one_line
):
    """It trained for two minutes, and what came out was garbage."""
    for name in ("a.png", "b.png", "c.png"):
        photos = flat_image(name, 0, folder=tmp_path / "tom").parent
    variables = {"PYTHON": sys.executable, "NUM_GPUS": "0", "DATA_PREFIX": str(tmp_path / "data")}
    variables |= {"CLASS_NAME": "dog", "INSTANCE_DIR": str(photos)}
    result = subprocess.run(
        ["./run.sh"], cwd=root, env={**os.environ, **variables}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert_one_line(result, "car, house, boat, ball, cup and tree", "Stable Diffusion", "GPU")
    assert "step 2" not in result.stdout
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["model-orig"]
