"""Mistakes that users have made: each refused in one line that says what to do, or asked about in a
warning, before anything starts."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

import generate
from dreambooth import cli
from dreambooth import model_dir as directory
from dreambooth.cli import UserError
from dreambooth.pocket import classes, render
from dreambooth.training_checks import check_flags
from dreambooth.training_plan import make_plan

SURROGATE = b"photo of caf\xe9".decode(errors="surrogateescape")


def check_and_plan(args):
    check_flags(args)
    return make_plan(args)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
@pytest.mark.parametrize("name", ["instance_prompt", "class_prompt"])
def test_an_empty_prompt_is_refused_by_train(train_args, capsys, name, text):
    """A shell variable that is not set."""
    with pytest.raises(SystemExit) as stopped:
        train_args("out", **{name: text})
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: argument --{name}: an empty prompt; is a shell"
    )


def test_an_empty_prompt_is_refused_by_generate(generate_args, capsys):
    with pytest.raises(SystemExit) as stopped:
        generate_args("out", prompts=["photo of a car", ""])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument --prompts: an empty prompt")


def test_a_prompt_that_is_not_utf_8_is_refused_in_one_line(generate_args, train_args, capsys):
    """Python passes such bytes on as lone surrogates, on which the tokenizer ends in a trace."""
    for parse, flags in (
        (generate_args, {"prompts": [SURROGATE]}),
        (train_args, {"instance_prompt": SURROGATE}),
        (train_args, {"preview_prompts": [SURROGATE]}),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse("out", **flags)
        assert stopped.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("error: argument --")
        assert "caf" in line
        assert "is not UTF-8" in line
        assert len(line.splitlines()) == 1


def test_a_line_break_in_a_name_does_not_break_the_line(run_script, assert_one_line, tmp_path):
    (tmp_path / "a\nb").mkdir()
    (tmp_path / "a\nb" / "c\u2028d.psd").write_bytes(b"8BPS")
    result = run_script("-m", "dreambooth.images", tmp_path / "a\nb", tmp_path / "own")
    assert_one_line(result, "a\\nb/c\\nd.psd: .psd cannot be read")


def test_a_line_break_in_what_argparse_refuses(capsys):
    with pytest.raises(SystemExit):
        cli.ArgumentParser("").parse_args(["--a\nb"])
    assert "--a\\nb" in capsys.readouterr().err


def test_comments_in_a_file_of_prompts(tmp_path):
    """A line that begins with #; elsewhere it is a character like any other. Windows' editors
    put an invisible signature before the first line."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfphoto of car #1\n# places\n  # indented\n\nphoto of car #2\n")
    assert cli.read_lines(file, "--prompts_file") == ["photo of car #1", "photo of car #2"]


def test_a_name_of_the_hub_in_place_of_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = cli.absolute_path("CompVis/stable-diffusion-v1-4")
    with pytest.raises(UserError, match="stable-diffusion-v1-4: no such directory.*cache_model.py"):
        directory.check_model_dir(folder)


def test_the_loras_file_in_place_of_its_folder(lora_dir):
    file = lora_dir / directory.LORA_FILE
    with pytest.raises(UserError, match=f"is a file: give its folder, {lora_dir}$"):
        directory.check_lora_dir(file)


class RunsCode:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture
def pickled_model(model_dir, tmp_path):
    """A copy of the model whose U-Net is a pickle: pickled_model(write)."""

    def copy(write):
        folder = tmp_path / "pickled"
        (folder / "unet").mkdir(parents=True)
        for path in model_dir.iterdir():
            if path.name != "unet":
                (folder / path.name).symlink_to(path)
        (folder / "unet" / "config.json").symlink_to(model_dir / "unet" / "config.json")
        file = folder / "unet" / "diffusion_pytorch_model.bin"
        write(file)
        return folder, file

    return copy


WEIGHTS = {"conv_in.weight": torch.zeros(30, 4, 3, 3)}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_weights_is_accepted(pickled_model, zipped):
    """Also one from before torch 1.6, which is no zip archive."""
    folder, file = pickled_model(
        lambda file: torch.save(WEIGHTS, file, _use_new_zipfile_serialization=zipped)
    )
    directory.check_model_dir(folder)
    assert file in directory.weight_files(folder)  # it was looked at


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(pickled_model, tmp_path, zipped):
    content = {**WEIGHTS, "more": RunsCode(tmp_path / "ran")}
    folder, file = pickled_model(
        lambda file: torch.save(content, file, _use_new_zipfile_serialization=zipped)
    )
    with pytest.raises(UserError, match=f"--model_dir: {file} is damaged, or holds code") as error:
        directory.check_model_dir(folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_pickle_is_refused(pickled_model):
    folder, file = pickled_model(lambda file: torch.save(WEIGHTS, file))
    content = file.read_bytes()
    for length in range(0, len(content), len(content) // 20):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=f"{file} is damaged"):
            directory.check_model_dir(folder)


def test_a_pickle_that_would_run_code_is_one_line(
    run_script, assert_one_line, pickled_model, generate_argv, tmp_path
):
    """A plain pickle, of which torch warns as well."""
    folder, file = pickled_model(
        lambda file: file.write_bytes(pickle.dumps(RunsCode(tmp_path / "ran"), protocol=4))
    )
    result = run_script("generate.py", *generate_argv(tmp_path / "out", model_dir=folder))
    assert_one_line(result, f"{file} is damaged, or holds code")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


SWAPPED = {
    "swapped": ("photo of a dog", "photo of unqtkn dog"),
    "both with the identifier": ("photo of unqtkn dog", "a photo of unqtkn dog"),
    "no identifier": ("photo of a dog", "photo of the dog"),
    "more in the class prompt": ("photo of sks dog", "photo of a dog in the snow"),
}
RIGHT = [
    ("photo of unqtkn dog", "photo of a dog"),
    ("photo of sks owl", "a photo of an owl"),
    ("Photo of sks dog on grass", "photo of a dog"),
]


@pytest.mark.parametrize("name", SWAPPED)
def test_prompts_that_look_swapped_are_asked_about(train_args, tmp_path, capsys, name):
    instance_prompt, class_prompt = SWAPPED[name]
    prompts = {"instance_prompt": instance_prompt, "class_prompt": class_prompt}
    check_and_plan(train_args(tmp_path / "out", **prompts))
    warning = capsys.readouterr().err
    assert warning.startswith("warning: --class_prompt is usually --instance_prompt without")
    assert len(warning.splitlines()) == 1


@pytest.mark.parametrize("prompts", RIGHT)
def test_prompts_as_they_should_be_are_not(train_args, tmp_path, capsys, prompts):
    instance_prompt, class_prompt = prompts
    check_and_plan(
        train_args(tmp_path / "out", instance_prompt=instance_prompt, class_prompt=class_prompt)
    )
    assert capsys.readouterr().err == ""


def test_one_photo_is_asked_about(train_args, flat_image, tmp_path, capsys):
    photo = flat_image("banner.png", 0, folder=tmp_path / "images")
    check_and_plan(train_args(tmp_path / "out", instance_images_dir=photo.parent))
    assert "images holds 1 photo (banner.png): is it the right folder?" in capsys.readouterr().err


@pytest.mark.parametrize("name", render.CLASSES)
def test_pocket_knows_its_classes(name):
    prompts = [f"photo of a {name}", f"Photo of unqtkn {name.upper()}, at night"]
    classes.check_classes(prompts)
    for prompt in prompts:
        with pytest.raises(UserError):
            classes.check_classes([prompt.lower().replace(name, "dog")])


@pytest.mark.parametrize("text", ["photo of a dog", "photo of a boathouse", "cars", "写真"])
def test_pocket_knows_no_other_class(text):
    with pytest.raises(UserError, match="knows car, house, boat, ball, cup and tree; real photos"):
        classes.check_classes(["photo of a car", text])


def test_only_pocket_is_asked_for_its_classes(train_args, generate_args, model_dir, tmp_path):
    classes.check_prompts(model_dir, ["photo of a dog"])
    classes.check_prompts(classes.POCKET_DIR, ["photo of a car"])
    args = train_args(
        tmp_path / "out", model_dir=classes.POCKET_DIR, class_prompt="photo of a dog",
        instance_prompt="photo of unqtkn dog",
    )  # fmt: skip
    with pytest.raises(UserError, match="pocket model is a world of drawings"):
        check_and_plan(args)


def test_generate_with_pocket_refuses_other_classes(generate_args, tmp_path):
    """Two hundred images of nothing would be the first step by hand."""
    flags = {"model_dir": classes.POCKET_DIR, "prompts": ["photo of a dog"]}
    with pytest.raises(UserError, match="'photo of a dog': the pocket model"):
        generate.check_args(generate_args(tmp_path / "out", **flags))


def run_sh(root, tmp_path, **environment):
    """./run.sh on a machine without a GPU, results below `tmp_path`."""
    names = {"PYTHON": sys.executable, "NUM_GPUS": "0", "DATA_PREFIX": str(tmp_path / "data")}
    return subprocess.run(
        ["./run.sh"],
        cwd=root,
        env={**os.environ, **names, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_run_sh_refuses_a_class_that_pocket_does_not_know(
    root, tmp_path, flat_image, assert_one_line
):
    """It trained for two minutes, and what came out was garbage."""
    photos = flat_image("a.png", 0, folder=tmp_path / "tom").parent
    result = run_sh(root, tmp_path, CLASS_NAME="dog", INSTANCE_DIR=str(photos))
    assert_one_line(result, "car, house, boat, ball, cup and tree", "Stable Diffusion", "GPU")
    assert "step 1" not in result.stdout
    assert not (tmp_path / "data").exists()


def test_run_sh_gives_each_subject_its_folder_and_shares_class_images(
    root, tmp_path, flat_image, assert_one_line
):
    """It says where, and then stops at photos of another kind."""
    for name in ("red car", "tom"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.psd").write_bytes(b"8BPS")
        result = run_sh(root, tmp_path, INSTANCE_DIR=str(folder))
        assert_one_line(result, "a.psd: .psd cannot be read")
        lines = result.stdout.splitlines()
        expected = f"results go to {tmp_path}/data/subjects/{name} and replace earlier ones there"
        assert expected in lines[2]
        assert lines[2].endswith(f"class images to {tmp_path}/data/images-reg/pocket-car")
