"""What a user can get wrong: one clear line, exit code 2, before any model is loaded, nothing written."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from PIL import Image

import generate
import train
from dreambooth import checks, files
from dreambooth.checks import UserError


@pytest.fixture
def folder_of(tmp_path, flat_image):
    """Make a folder with one good picture and what is given: folder_of(lambda folder: ...)."""

    def make(spoil, good=True):
        folder = tmp_path / "given"
        folder.mkdir()
        if good:
            flat_image("good.png", (1, 2, 3), folder=folder)
        spoil(folder)
        return folder

    return make


@pytest.fixture
def refusal(train_argv, tmp_path):
    """The one line with which train.py refuses the given arguments; nothing is written."""

    def refuse(**changes):
        out = tmp_path / "deep" / "out"
        with pytest.raises(UserError) as error:
            train.check_args(train.parse_args(train_argv(changes.pop("output_dir", out), **changes)))
        message = str(error.value)
        assert "\n" not in message
        assert not out.parent.exists()
        return message

    return refuse


FOLDERS = ["instance_images_dir", "class_images_dir"]


@pytest.mark.parametrize("which", FOLDERS)
def test_missing_image_folder(refusal, tmp_path, which):
    message = refusal(**{which: tmp_path / "nowhere"})
    assert str(tmp_path / "nowhere") in message
    assert "no such folder" in message


@pytest.mark.parametrize("which", FOLDERS)
def test_empty_image_folder(refusal, folder_of, which):
    folder = folder_of(lambda folder: None, good=False)
    assert f"{folder}: no images there" in refusal(**{which: folder})


def test_folder_of_junk(refusal, folder_of):
    def spoil(folder):
        for name in (".DS_Store", "Thumbs.db", "notes.txt", "._a.png"):
            (folder / name).write_text("junk")
        (folder / ".ipynb_checkpoints").mkdir()

    assert "no images there" in refusal(instance_images_dir=folder_of(spoil, good=False))


def test_junk_beside_photos_is_no_fault(train_argv, folder_of, tmp_path):
    def spoil(folder):
        for name in (".DS_Store", "Thumbs.db"):
            (folder / name).write_text("junk")
        (folder / ".ipynb_checkpoints").mkdir()

    argv = train_argv(tmp_path / "out", instance_images_dir=folder_of(spoil))
    _, instance_paths, class_paths = train.check_args(train.parse_args(argv))
    assert [p.name for p in instance_paths] == ["good.png"]
    assert len(class_paths) == 4


@pytest.mark.parametrize("which", FOLDERS)
def test_truncated_image(refusal, folder_of, class_dir, which):
    def spoil(folder):
        (folder / "cut.png").write_bytes((class_dir / "0.png").read_bytes()[:-500])

    message = refusal(**{which: folder_of(spoil)})
    assert "cut.png" in message
    assert "truncated" in message


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_unreadable_image(refusal, folder_of, content):
    folder = folder_of(lambda folder: (folder / "odd.jpg").write_bytes(content))
    message = refusal(instance_images_dir=folder)
    assert "odd.jpg" in message
    assert "unreadable" in message


def test_image_bomb(refusal, folder_of, flat_image, monkeypatch):
    """Pillow refuses pictures of hundreds of megapixels; here the limit is lowered instead."""
    folder = folder_of(lambda folder: flat_image("vast.png", 0, size=(400, 400), folder=folder))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    assert "vast.png" in refusal(instance_images_dir=folder)


def test_image_too_small(refusal, folder_of, flat_image, train_argv, tmp_path):
    folder = folder_of(lambda folder: flat_image("icon.png", 0, size=(15, 300), folder=folder))
    message = refusal(class_images_dir=folder)
    assert "icon.png: 15 x 300 pixels are too small to train at 64" in message
    flat_image("icon.png", 0, size=(16, 300), folder=folder)  # a quarter of the resolution is enough
    train.check_args(train.parse_args(train_argv(tmp_path / "out", class_images_dir=folder)))


def test_unreadable_format(refusal, folder_of):
    folder = folder_of(lambda folder: (folder / "IMG_0001.HEIC").write_bytes(b"ftypheic"))
    message = refusal(instance_images_dir=folder)
    assert "IMG_0001.HEIC" in message
    assert ".jpg" in message


def test_model_dir_that_does_not_exist(refusal, tmp_path):
    message = refusal(model_dir=tmp_path / "nowhere")
    assert "--model_dir" in message
    assert "cache_model.py" in message


@pytest.fixture
def model_without(model_dir, tmp_path):
    """A copy of the model without one file or folder."""

    def copy(missing):
        folder = tmp_path / "model"
        shutil.copytree(model_dir, folder)
        shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
        return folder

    return copy


PARTS = ["model_index.json", "tokenizer", "text_encoder", "vae", "unet", "scheduler"]
FILES = [
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json",
]


@pytest.mark.parametrize("missing", PARTS)
def test_model_dir_without_a_part(refusal, model_without, missing):
    message = refusal(model_dir=model_without(missing))
    assert f": {missing}" in message
    assert "is missing" in message


@pytest.mark.parametrize("missing", FILES)
def test_model_dir_with_half_a_part(refusal, model_without, missing):
    """An interrupted copy: the folder is there, its file is not."""
    message = refusal(model_dir=model_without(missing))
    assert missing.partition("/")[0] in message
    assert "is missing" in message


def test_model_dir_with_half_precision_copies_alone(refusal, model_without):
    """Of this name the loaders would not read them."""
    folder = model_without("unet/diffusion_pytorch_model.safetensors")
    shutil.copy(
        folder / "vae/diffusion_pytorch_model.safetensors", folder / "unet/diffusion_pytorch_model.fp16.safetensors"
    )
    assert "unet/diffusion_pytorch_model.safetensors is missing" in refusal(model_dir=folder)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json"])
def test_model_dir_with_a_file_cut_off(refusal, model_dir, tmp_path, file):
    shutil.copytree(model_dir, tmp_path / "model")
    whole = (tmp_path / "model" / file).read_bytes()
    (tmp_path / "model" / file).write_bytes(whole[: len(whole) - 100])
    assert f"{file} is damaged" in refusal(model_dir=tmp_path / "model")


@pytest.mark.parametrize("name", ["lr", "prior_loss_weight"])
def test_numbers_without_end(refusal, name):
    assert f"--{name} is inf" in refusal(**{name: "inf"})


def test_equal_prompts(refusal):
    assert "equal" in refusal(instance_prompt="photo of a car", class_prompt="photo of a car")


@pytest.mark.parametrize("which", ["instance_prompt", "class_prompt"])
def test_prompt_too_long(refusal, which):
    """The pocket model takes 48 tokens, two of them the marks of beginning and end."""
    message = refusal(**{which: "photo of a car " + "on the beach " * 14 + "at night"})
    assert "too long" in message
    assert "takes 48" in message
    assert "'at night' would be cut" in message


def test_prompt_of_the_greatest_length(train_argv, tmp_path):
    """46 words and the two marks: taken, and nothing is cut."""
    prompt = "photo of a car " + "on the " * 21
    tokenizer, *_ = train.check_args(train.parse_args(train_argv(tmp_path / "out", class_prompt=prompt)))
    assert len(tokenizer(prompt).input_ids) == tokenizer.model_max_length == 48


SIZES = ["num_workers", "train_batch_size", "num_epochs", "max_train_steps", "lora_rank", "log_every", "resolution"]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one(refusal, name, value):
    message = refusal(**{name: value})
    assert f"--{name} {'is ' if name != 'resolution' else ''}{value}" in message


@pytest.mark.parametrize("name", ["lr_warmup_steps", "prior_loss_weight", "seed"])
def test_negative_numbers(refusal, name):
    assert f"--{name} is -1" in refusal(**{name: -1})


@pytest.mark.parametrize("name", ["lr", "max_grad_norm", "snr_gamma"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_with_which_nothing_is_learned(refusal, name, value):
    """A gradient clipped to the length 0 is 0."""
    assert f"--{name} is {float(value)}: it must be above 0" in refusal(**{name: value})


def test_warmup_longer_than_the_run(train_argv, tmp_path, monkeypatch):
    """Four class images, four epochs, two pairs a step: eight steps, and a warm-up of seven is the longest."""

    def warm_up(steps):
        recipe = {"train_batch_size": 2, "max_train_steps": 100, "lr_scheduler": "cosine", "lr_warmup_steps": steps}
        args = train.parse_args(train_argv(tmp_path / "out", **recipe))
        train.build_trainer(args, *train.check_args(args), num_gpus=0, num_cpus=2)

    monkeypatch.setattr(train.dataset, "pair_images", MagicMock(side_effect=EOFError))  # what comes after the check
    with pytest.raises(UserError, match="--lr_warmup_steps 8: the run has only 8 steps"):
        warm_up(8)
    with pytest.raises(EOFError):
        warm_up(7)


def test_class_images_that_are_the_photos(refusal, instance_dir):
    assert "the same" in refusal(class_images_dir=instance_dir / ".." / instance_dir.name)


def test_disk_too_small_for_the_result(refusal, train_argv, tmp_path, monkeypatch):
    """13 MB of weights, and 12 MB are free; a LoRA has room there, and a model in bfloat16."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=12e6))
    assert "0.0 GB are free" in refusal()
    for smaller in ({"use_lora": True}, {"precision": "bf16"}):
        train.check_args(train.parse_args(train_argv(tmp_path / "out", **smaller)))


@pytest.mark.parametrize("name", ["lr", "prior_loss_weight", "max_grad_norm"])
def test_numbers_that_are_none(refusal, name):
    assert f"--{name}" in refusal(**{name: "nan"})


def test_resolution_that_the_model_does_not_take(refusal):
    assert "multiples of 4" in refusal(resolution=66)


def test_more_workers_than_the_cluster_has():
    """Said at once with the numbers: Ray would wait for ever."""
    checks.check_gpus(4, 4, 16)
    checks.check_gpus(2, 0, 2)
    with pytest.raises(UserError, match="--num_workers 5: the cluster has 4 GPUs,.* give --num_workers 4 or less"):
        checks.check_gpus(5, 4, 16)
    with pytest.raises(UserError, match="the cluster has 1 GPU,"):
        checks.check_gpus(2, 1, 16)
    with pytest.raises(UserError, match="the cluster has 2 CPU cores,"):
        checks.check_gpus(3, 0, 2)


@pytest.mark.parametrize("script", [train, generate])
def test_output_folder_that_cannot_be_written(script, train_argv, generate_argv, tmp_path):
    """Below a file, a file itself, or where the system keeps its own (these tests may run as root)."""
    argv = train_argv if script is train else generate_argv
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "below", tmp_path / "file", Path("/proc/here")):
        with pytest.raises(UserError, match=f"--output_dir {out} ") as error:
            script.check_args(script.parse_args(argv(out)))
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_output_folder_with_files_of_others(refusal, folder_of):
    folder = folder_of(lambda folder: (folder / "thesis.tex").write_text("years"))
    assert "holds other files" in refusal(output_dir=folder)
    assert sorted(f.name for f in folder.iterdir()) == ["good.png", "thesis.tex"]


def test_files_of_generate_that_are_no_text_and_no_lora(generate_argv, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfecar")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / files.LORA_FILE).write_bytes(b"\xff" * 5000)
    for changes, words in (
        ({"prompts_file": tmp_path / "prompts.txt"}, "prompts.txt is no UTF-8 text"),
        ({"lora_weights_dir": tmp_path / "lora"}, f"{files.LORA_FILE} is damaged"),
    ):
        with pytest.raises(UserError, match=words):
            generate.check_args(generate.parse_args(generate_argv(tmp_path / "out", **changes)))


GENERATE = [
    ({"prompts": False}, "no prompt"),
    ({"prompts": ["a car", "a car"]}, "given twice"),
    ({"prompts": ["on the beach " * 20]}, "would be cut"),
    ({"prompts_file": "/nowhere.txt"}, "/nowhere.txt"),
    ({"model_dir": "/nowhere"}, "--model_dir /nowhere"),
    ({"lora_weights_dir": "/nowhere"}, "--lora_weights_dir /nowhere"),
    ({"num_samples_per_prompt": 0}, "--num_samples_per_prompt is 0"),
    ({"num_inference_steps": 0}, "--num_inference_steps is 0"),
    ({"num_workers": 0}, "--num_workers is 0"),
    ({"batch_size": -1}, "--batch_size is -1"),
    ({"seed": -1}, "--seed is -1"),
]


@pytest.mark.parametrize(("changes", "words"), GENERATE)
def test_generate_refuses(generate_argv, tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        generate.main(generate.parse_args(generate_argv(tmp_path / "out", **changes)))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
