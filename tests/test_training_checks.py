"""Flags of train.py that are refused before anything is loaded or written."""

import json
import shutil
from types import SimpleNamespace

import pytest

from dreambooth.cli import UserError
from dreambooth.model_dir import num_parameters
from dreambooth.training_checks import check_flags, check_space_for_checkpoints
from dreambooth.training_plan import make_plan


def check_and_plan(args):
    """What train.py does before it trains."""
    check_flags(args)
    return make_plan(args)


@pytest.fixture
def plan(train_args, tmp_path):
    """The plan for some flags: plan(train_batch_size=2)."""
    return lambda **changes: check_and_plan(train_args(tmp_path / "out", **changes))


@pytest.fixture
def refusal(train_args, tmp_path):
    """The line with which some flags are refused: refusal(lr=0). Nothing is written."""

    def refuse(**changes):
        output_dir = changes.pop("output_dir", tmp_path / "deep" / "out")
        with pytest.raises(UserError) as error:
            check_and_plan(train_args(output_dir, **changes))
        message = str(error.value)
        assert "\n" not in message
        assert not (tmp_path / "deep").exists()
        return message

    return refuse


SIZES = [
    "train_batch_size",
    "gradient_accumulation_steps",
    "num_epochs",
    "max_train_steps",
    "lora_rank",
    "log_every",
    "checkpoints_total_limit",
]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one(refusal, name, value):
    assert f"--{name} is {value}: must be at least 1" in refusal(**{name: value})


NOT_NEGATIVE = [
    "lr_warmup_steps",
    "prior_loss_weight",
    "seed",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "checkpointing_steps",
    "max_failures",
    "wait_for_gpus",
]


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_negative_numbers(refusal, name):
    assert f"--{name} is -1" in refusal(**{name: -1})


@pytest.mark.parametrize("name", ["lr", "max_grad_norm", "snr_gamma"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_with_which_nothing_is_learned(refusal, name, value):
    """A gradient clipped to the norm 0 is 0."""
    assert f"--{name} is {float(value)}: must be above 0" in refusal(**{name: value})


@pytest.mark.parametrize(
    "name", ["lr", "prior_loss_weight", "max_grad_norm", "snr_gamma", "adam_epsilon"]
)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_not_finite(refusal, name, value):
    assert f"--{name} is {value}" in refusal(**{name: value})


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"lr_warmup_steps": 1}, "give --lr_scheduler constant_with_warmup"),
        ({"adam_beta1": 1.0}, "below 1"),
        ({"adam_beta2": 1.0}, "below 1"),
        ({"adam_beta2": 0.999, "param_dtype": "bf16"}, "give 0.99"),
        ({"use_lora": True, "param_dtype": "bf16"}, "full fine-tuning"),
    ],
)
def test_flags_that_do_not_go_together(refusal, flags, text):
    assert text in refusal(**flags)


@pytest.mark.parametrize("resolution", [66, 0, -4, 2])
def test_a_resolution_that_the_model_does_not_take(refusal, resolution):
    message = refusal(resolution=resolution)
    assert f"--resolution {resolution}: this model takes multiples of 4" in message


def test_equal_prompts(refusal):
    assert "are equal" in refusal(instance_prompt="photo of a car", class_prompt="photo of a car")


@pytest.mark.parametrize("name", ["instance_prompt", "class_prompt"])
def test_a_prompt_that_is_too_long(refusal, name):
    message = refusal(**{name: "photo of a car " + "on the beach " * 14 + "at night"})
    assert "prompt too long" in message
    assert "'at night' would be cut off" in message


FOLDERS = ["instance_images_dir", "class_images_dir"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_image_folder(refusal, tmp_path, name):
    message = refusal(**{name: tmp_path / "nowhere"})
    assert f"{tmp_path / 'nowhere'}: no such folder" in message


@pytest.mark.parametrize("name", FOLDERS)
def test_an_empty_image_folder(refusal, tmp_path, name):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: no images there" in refusal(**{name: tmp_path / "empty"})


@pytest.mark.parametrize("name", FOLDERS)
def test_a_truncated_image(refusal, flat_image, tmp_path, name):
    photo = flat_image("good.png", 0, folder=tmp_path / "photos")
    photo.with_name("truncated.png").write_bytes(photo.read_bytes()[:-50])
    message = refusal(**{name: photo.parent})
    assert "truncated.png: unreadable or truncated image" in message


@pytest.mark.parametrize("name", FOLDERS)
def test_an_image_in_an_unreadable_format(refusal, flat_image, tmp_path, name):
    photo = flat_image("good.png", 0, folder=tmp_path / "photos")
    photo.with_name("IMG_0001.HEIC").write_bytes(b"ftypheic")
    assert "IMG_0001.HEIC" in refusal(**{name: photo.parent})


@pytest.mark.parametrize("name", FOLDERS)
def test_an_image_that_is_too_small_for_the_resolution(plan, refusal, flat_image, tmp_path, name):
    """The resolution of the flag, not that of the model."""
    photo = flat_image("icon.png", 0, size=(15, 300), folder=tmp_path / "photos")
    assert "icon.png: 15 x 300 pixels are too small" in refusal(**{name: photo.parent})
    plan(**{name: photo.parent}, resolution=60)


def test_class_images_that_are_the_photos(refusal, instance_dir):
    message = refusal(class_images_dir=instance_dir / ".." / instance_dir.name)
    assert "are the same folder" in message


def test_a_model_directory_that_does_not_exist(refusal, tmp_path):
    message = refusal(model_dir=tmp_path / "nowhere")
    assert f"--model_dir {tmp_path / 'nowhere'}: no such directory" in message
    assert "cache_model.py" in message


def test_a_model_that_predicts_something_else(refusal, model_dir, tmp_path):
    copied = shutil.copytree(model_dir, tmp_path / "model")
    file = copied / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "prediction_type": "sample"}))
    assert "predicts sample" in refusal(model_dir=copied)


def test_an_output_directory_that_cannot_be_written(train_args, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "below", tmp_path / "file"):
        with pytest.raises(UserError, match=f"--output_dir {folder} "):
            check_and_plan(train_args(folder))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_directory_with_other_files(refusal, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    assert "holds other files (thesis.tex)" in refusal(output_dir=folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_an_earlier_result_may_be_replaced(train_args, model_dir, tmp_path):
    earlier = shutil.copytree(model_dir, tmp_path / "tuned")
    assert check_and_plan(train_args(earlier)).num_steps == 3
    assert num_parameters(earlier) == num_parameters(model_dir)  # and is still there


@pytest.mark.parametrize("name", ["", "..", "link"])
def test_the_model_itself_is_not_replaced(refusal, model_dir, tmp_path, name):
    """By whatever path it is given."""
    folder = model_dir
    if name == "..":
        folder = model_dir / ".." / model_dir.name
    if name == "link":
        folder = tmp_path / "link"
        folder.symlink_to(model_dir)
    assert "--output_dir is --model_dir" in refusal(output_dir=folder)


def test_a_disk_that_is_too_small_for_the_result(plan, refusal, monkeypatch):
    """13 MB of weights, and 12 MB are free: enough for a LoRA."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=12e6))
    assert "0.0 GB are free" in refusal()
    plan(use_lora=True)


def test_a_range_of_workers_that_cannot_share_a_step_is_refused(refusal, plan):
    """Three cannot share four pairs."""
    message = refusal(num_workers="2:4")
    assert "--num_workers 2:4: 3 workers cannot share 4 pairs per step" in message
    plan(num_workers="2:4", train_batch_size=3)


def test_a_warm_up_is_shorter_than_the_run(plan, refusal):
    """Four class images, four epochs, two pairs per step: eight steps."""
    flags = {"train_batch_size": 2, "max_train_steps": 100, "lr_scheduler": "cosine"}
    assert plan(**flags, lr_warmup_steps=7).num_steps == 8
    message = refusal(**flags, lr_warmup_steps=8)
    assert "--lr_warmup_steps 8: the run has 8 steps" in message


def test_the_result_needs_space_for_float32(plan, model_dir, monkeypatch):
    """Whatever the precision of the original model (here float16)."""
    usage = SimpleNamespace(free=4 * sum(num_parameters(model_dir).values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    plan(checkpointing_steps=0)
    usage.free -= 1
    with pytest.raises(UserError, match="GB are free, and the result"):
        plan(checkpointing_steps=0)


def test_what_a_killed_save_has_left_is_space_for_the_result(
    train_args, model_dir, tmp_path, monkeypatch
):
    """The next one deletes it."""
    usage = SimpleNamespace(free=4 * sum(num_parameters(model_dir).values()) - 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    args = train_args(tmp_path / "out", checkpointing_steps=0)
    with pytest.raises(UserError, match="GB are free, and the result"):
        check_flags(args)
    (tmp_path / ".out.new" / "unet").mkdir(parents=True)
    (tmp_path / ".out.new" / "unet" / "half.safetensors").write_bytes(bytes(1000))
    check_flags(args)


def test_checkpoints_go_into_a_directory(refusal, tmp_path):
    (tmp_path / "file").touch()
    message = refusal(storage_path=tmp_path / "file")
    assert message.startswith("the checkpoints' directory,")
    assert "cannot be written" in message


@pytest.mark.parametrize(("dtype", "num_bytes"), [("fp32", 12), ("bf16", 8)])
def test_checkpoints_need_space_for_one_more(
    train_args, monkeypatch, tmp_path, sd14_dir, dtype, num_bytes
):
    """While that is written. What is there already counts, so that a run can resume: also what a
    killed process has not finished, which the next one deletes."""
    sizes = num_parameters(sd14_dir)
    needed = 3 * num_bytes * (sizes["unet"] + sizes["text_encoder"])
    args = train_args(tmp_path / "out", param_dtype=dtype, checkpoints_total_limit=2)
    usage = SimpleNamespace(free=needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check_space_for_checkpoints(args, sizes)
    usage.free -= 1000
    with pytest.raises(UserError, match=r"2 \+ 1 checkpoints"):
        check_space_for_checkpoints(args, sizes)
    for name, size in (("step_000003", 600), (".step_000006.tmp", 400)):
        with pytest.raises(UserError):
            check_space_for_checkpoints(args, sizes)
        state = tmp_path / "out.checkpoints" / name / "state.pt"
        state.parent.mkdir(parents=True)
        state.write_bytes(bytes(size))
    check_space_for_checkpoints(args, sizes)
    args.checkpointing_steps = 0
    usage.free = 0
    check_space_for_checkpoints(args, sizes)
