"""What a run will do, worked out from its flags."""

import dataclasses
import json
import shutil

import pytest

from dreambooth import model_dir as directory
from dreambooth.training_plan import RECIPE_FLAGS, make_plan, worker_range


@pytest.fixture
def plan(train_args, tmp_path):
    """The plan for some flags: plan(train_batch_size=2)."""
    return lambda **changes: make_plan(train_args(tmp_path / "out", **changes))


def test_images_and_resolution(plan, instance_dir, class_dir):
    found = plan()
    assert found.instance_paths == sorted(instance_dir.iterdir())
    assert found.class_paths == sorted(class_dir.iterdir())
    assert found.resolution == 64
    assert plan(resolution=32).resolution == 32


def test_prompts_are_padded_to_the_models_length(plan, model_dir):
    tokenizer = directory.load_tokenizer(model_dir)
    prompt_ids = plan(instance_prompt="photo of unqtkn car", class_prompt="photo").prompt_ids
    assert [len(ids) for ids in prompt_ids] == [48, 48]
    assert tokenizer.decode(prompt_ids[0], skip_special_tokens=True) == "photo of unqtkn car"
    assert tokenizer.decode(prompt_ids[1], skip_special_tokens=True) == "photo"


def test_pairs_per_step_are_those_of_all_workers_and_forward_passes(plan):
    found = plan(train_batch_size=3, gradient_accumulation_steps=2, num_workers=4)
    assert found.pairs_per_step == 24
    assert found.divide(4) == (3, 2)


# Four class images: an epoch is four pairs.
@pytest.mark.parametrize(
    ("changes", "num_steps"),
    [
        ({"num_epochs": 2, "max_train_steps": 100}, 8),
        ({"num_epochs": 2, "max_train_steps": 100, "train_batch_size": 3}, 3),  # 8 / 3, rounded up
        ({"num_epochs": 2, "max_train_steps": 5}, 5),
        ({"num_epochs": 1, "max_train_steps": 100, "train_batch_size": 9}, 1),
    ],
)
def test_every_class_image_is_used_num_epochs_times_within_the_maximum(plan, changes, num_steps):
    assert plan(**changes).num_steps == num_steps


def test_a_plan_reads_like_a_sentence(plan):
    images = "5 instance and 4 class images at 64 px"
    assert str(plan(train_batch_size=2)) == f"{images}, 3 steps of 2 pairs, 1 worker(s)"
    several = plan(train_batch_size=2, num_workers="2:3", max_train_steps=1)
    assert str(several) == f"{images}, 1 steps of 6 pairs, 2 to 3 worker(s)"


def test_a_plan_reaches_the_workers_as_a_dict(plan):
    """Ray Train's configuration."""
    found = plan()
    assert type(found)(**dataclasses.asdict(found)) == found


@pytest.mark.parametrize(
    ("text", "expected"), [("2", (2, 2)), ("1", (1, 1)), ("2:4", (2, 4)), ("3:3", (3, 3))]
)
def test_a_number_of_workers_is_a_range(text, expected):
    assert worker_range(text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "0:2", "4:2", "1:2:3", "two", "", "2:"])
def test_other_numbers_of_workers_are_refused_by_the_parser(train_args, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_args("out", num_workers=f" {text}")
    assert stopped.value.code == 2
    assert "--num_workers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_workers", "expected"),
    [(1, (3, 4)), (2, (3, 2)), (3, (2, 2)), (4, (3, 1)), (6, (2, 1)), (12, (1, 1))],
)
def test_any_number_of_workers_divides_a_step_equally(plan, num_workers, expected):
    """Of 12 pairs, at most 3 per forward pass, in as few passes as possible."""
    found = plan(train_batch_size=3, num_workers="1:4", max_train_steps=1)
    assert found.pairs_per_step == 12
    pairs_per_pass, num_passes = found.divide(num_workers)
    assert (pairs_per_pass, num_passes) == expected
    assert pairs_per_pass * num_passes * num_workers == 12


def test_the_identity_of_a_run_is_what_decides_its_result(plan, train_args, lora_dir):
    """Each flag of the recipe, the images and the model change it; how the run is carried out does
    not."""

    def identity(**changes):
        return plan(**changes).identity(train_args("out", **changes))

    original = identity()
    assert json.loads(json.dumps(original)) == original
    for name in RECIPE_FLAGS:
        assert name in original
    decisive = {
        "use_lora": True,
        "lora_rank": 2,
        "no_train_text_encoder": True,
        "instance_prompt": "photo of zwxqj car",
        "class_prompt": "photo of a boat",
        "lr": 1e-3,
        "lr_scheduler": "cosine",
        "prior_loss_weight": 0.5,
        "snr_gamma": 5.0,
        "max_grad_norm": 2.0,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_weight_decay": 0.1,
        "adam_epsilon": 1e-6,
        "seed": 1,
        "param_dtype": "bf16",
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": 2,
    }
    for name, value in decisive.items():
        assert identity(**{name: value}) != original, name
    indifferent = {
        "log_every": 1,
        "checkpointing_steps": 5,
        "gradient_checkpointing": True,
        "verbose": True,
        "storage_path": "/elsewhere",
    }
    for name, value in indifferent.items():
        assert identity(**{name: value}) == original, name
    two_passes = identity(train_batch_size=2)
    assert identity(gradient_accumulation_steps=2) == two_passes
    assert identity(num_workers=2) == two_passes


def test_the_identity_of_a_run_is_of_its_images_content(plan, train_args, tmp_path, class_dir):
    photos = shutil.copytree(class_dir, tmp_path / "photos")
    flags = {"instance_images_dir": photos}
    before = plan(**flags).identity(train_args("out", **flags))
    shutil.copy(photos / "0.png", photos / "1.png")
    assert plan(**flags).identity(train_args("out", **flags)) != before


def test_other_files_beside_the_photos_are_skipped(plan, flat_image, tmp_path):
    photo = flat_image("good.png", 0, folder=tmp_path / "photos")
    for name in (".DS_Store", "Thumbs.db"):
        photo.with_name(name).write_text("no image")
    photo.with_name(".ipynb_checkpoints").mkdir()
    assert plan(instance_images_dir=photo.parent).instance_paths == [photo]
