"""What a run will do, worked out from its flags; those that are refused before anything is loaded
or written; and the fingerprint by which a run is known again."""

import argparse
import json
import shutil
from types import SimpleNamespace

import pytest

from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.run.plan import (
    MAY_CHANGE,
    check_flags,
    check_space_for_checkpoints,
    make_plan,
    run_dir,
    worker_range,
)
from dreambooth.run.training_log import report_dir


@pytest.fixture
def check_and_plan(train_args, tmp_path):
    """What train.py does before it trains: check_and_plan(train_batch_size=2) returns the plan."""

    def call(output_dir=tmp_path / "out", **changes):
        args = train_args(output_dir, **changes)
        check_flags(args)
        return make_plan(args)

    return call


@pytest.fixture
def refusal(check_and_plan, tmp_path):
    """The line with which some flags are refused: refusal(lr=0). Nothing is written."""

    def refuse(**changes):
        changes = {"output_dir": tmp_path / "deep" / "out", **changes}
        with pytest.raises(UserError) as error:
            check_and_plan(**changes)
        message = str(error.value)
        assert "\n" not in message
        assert not (tmp_path / "deep").exists()
        return message

    return refuse


def test_images_prompts_and_directories(
    check_and_plan, model_dir, instance_dir, class_dir, tmp_path
):
    found = check_and_plan()
    assert found.instance_paths == sorted(instance_dir.iterdir())
    assert found.class_paths == sorted(class_dir.iterdir())
    assert found.image_dirs == sorted([str(instance_dir), str(class_dir)])
    assert found.images_per_pair == 2
    assert found.prompts == ["photo of unqtkn car", "photo of a car"]
    assert found.captions == {}
    images = "5 instance and 4 class images at 64 px"
    assert str(found) == f"{images}, 3 steps of 1 pair, 1 worker"
    assert found.report_dir == tmp_path / "out.report"
    assert found.run_dir == tmp_path / "out.checkpoints"
    shared = tmp_path / "shared"  # by several results, of which two may have one name
    outputs = [tmp_path / parent / "out" for parent in ("car", "dog")]
    run_dirs = {check_and_plan(output, storage_path=shared).run_dir for output in outputs}
    assert len(run_dirs) == 2
    assert {folder.parent for folder in run_dirs} == {shared}


def test_without_prior_preservation_there_is_no_class_half(check_and_plan):
    """Nor a need for class images and prompt: what is given of them is not looked at. Four epochs
    of five photos, two in each step."""
    flags = {"prior_loss_weight": 0, "class_images_dir": "/nowhere", "class_prompt": False}
    flags |= {"num_epochs": 4, "max_train_steps": 100}
    found = check_and_plan(**flags, train_batch_size=2)
    assert found.images_per_pair == 1
    assert found.class_paths == []
    assert found.prompts == ["photo of unqtkn car"]
    assert found.num_steps == 10


def test_every_class_image_is_used_num_epochs_times_within_the_maximum(check_and_plan, refusal):
    """Four class images: two epochs are eight pairs, in steps of three; a warm-up is shorter."""
    flags = {"num_epochs": 2, "max_train_steps": 100, "lr_scheduler": "cosine"}
    assert check_and_plan(**flags, lr_warmup_steps=7).num_steps == 8
    assert check_and_plan(**flags, train_batch_size=3).num_steps == 3
    assert check_and_plan(num_epochs=2, max_train_steps=5).num_steps == 5
    assert check_and_plan(num_epochs=10**400, max_train_steps=50).num_steps == 50
    assert check_and_plan(max_train_steps=50).num_steps == 50
    assert check_and_plan(max_train_steps=False, num_epochs=250).num_steps == 1000
    assert check_and_plan(max_train_steps=False).num_steps == 800
    message = refusal(**flags, lr_warmup_steps=8)
    assert "--lr_warmup_steps 8: use fewer, the run has 8 steps" in message


def test_a_run_is_refused_whose_pairs_would_fill_the_memory(refusal):
    for flags in ({"max_train_steps": 10**20}, {"train_batch_size": 10**20, "num_epochs": 1}):
        assert "at most 999999 pairs are possible; use fewer steps, or a sm" in refusal(**flags)


def test_a_number_of_workers_is_a_range(train_args, capsys):
    assert [worker_range(text) for text in ("2", "2:4", "3:3")] == [(2, 2), (2, 4), (3, 3)]
    for text in ("0", "-1", "0:2", "4:2", "1:2:3", "two", "2:"):
        with pytest.raises(SystemExit) as stopped:
            train_args("out", num_workers=f" {text}")
        assert stopped.value.code == 2
        assert "--num_workers" in (line := capsys.readouterr().err)
        assert "a range such as 2:4" in line


def test_any_number_of_workers_divides_a_step_equally(check_and_plan, refusal):
    """Of 12 pairs, at most 3 per forward pass, in as few passes as possible. Three workers cannot
    share four pairs."""
    found = check_and_plan(train_batch_size=3, num_workers="1:4", max_train_steps=1)
    assert found.pairs_per_step == 12
    assert str(found).endswith(", 1 step of 12 pairs, 1 to 4 workers")
    expected = {1: (3, 4), 2: (3, 2), 3: (2, 2), 4: (3, 1), 6: (2, 1)}
    for num_workers, (pairs_per_pass, num_passes) in expected.items():
        assert found.divide(num_workers) == (pairs_per_pass, num_passes)
        assert pairs_per_pass * num_passes * num_workers == 12
    # Of ten pairs for each of two workers, five passes of two: at most four, and no remainder.
    assert check_and_plan(train_batch_size=4, num_workers=5).divide(2) == (2, 5)
    message = refusal(num_workers="2:4")
    assert "--num_workers 2:4: 3 workers cannot share 4 pairs per step" in message


@pytest.fixture
def fingerprint(train_args, tmp_path):
    """The fingerprint of the run with some flags: fingerprint(lr=1e-3)."""

    def build(output_dir=tmp_path / "out", **changes):
        args = train_args(output_dir, **changes)
        return make_plan(args).fingerprint(args)

    return build


def test_every_flag_is_part_of_the_fingerprint_unless_it_may_change(
    fingerprint, check_and_plan, train_args, tmp_path
):
    """Also one that a later version of train.py adds, which nobody has thought of."""
    flags = vars(train_args(tmp_path / "out"))
    assert flags.keys() >= MAY_CHANGE
    found = fingerprint()
    assert found.keys() >= flags.keys() - MAY_CHANGE
    assert not found.keys() & MAY_CHANGE
    assert json.loads(json.dumps(found)) == found  # as it is compared

    plan = check_and_plan()
    assert plan.fingerprint(argparse.Namespace(**flags, new_flag=1)) == {**found, "new_flag": 1}
    for name in flags.keys() - MAY_CHANGE - {"resolution"}:
        changed = plan.fingerprint(argparse.Namespace(**{**flags, name: "other"}))
        assert changed == {**found, name: "other"}
    for name, value in {"resolution": 32, "train_batch_size": 2, "max_train_steps": 2}.items():
        assert fingerprint(**{name: value}) != found, name  # by what follows from them


def test_what_may_change_does_not_change_the_fingerprint(
    fingerprint, model_dir, instance_dir, class_dir, tmp_path
):
    """Copies in other places, and how the run is carried out; the factors of a step's pairs and of
    the steps only together: with half the workers each accumulates twice the passes."""
    paths = {
        "output_dir": tmp_path / "elsewhere",
        "storage_path": tmp_path / "storage",
        "model_dir": shutil.copytree(model_dir, tmp_path / "model"),
        "instance_images_dir": shutil.copytree(instance_dir, tmp_path / "instance"),
        "class_images_dir": shutil.copytree(class_dir, tmp_path / "class"),
    }
    how_it_runs = {
        "gradient_checkpointing": True, "compile": True, "cuda_graph": True,
        "checkpointing_steps": 5, "checkpoints_total_limit": 2, "restart": True, "max_failures": 0,
        "wait_for_gpus": 1, "log_every": 1, "preview_prompts": "photo of a car",
        "preview_every": 1, "dry_run": True, "verbose": True,
    }  # fmt: skip
    wide = {"num_workers": 4, "num_epochs": 2}  # two steps of four pairs
    narrow = {"num_workers": 2, "gradient_accumulation_steps": 2, "max_train_steps": 2}
    batched = {"num_workers": 2, "train_batch_size": 2, "max_train_steps": 2}
    original = fingerprint(**wide)
    for flags in (narrow, batched, {**wide, **paths}, {**wide, **how_it_runs}):
        assert fingerprint(**flags) == original
    tried = wide.keys() | narrow.keys() | batched.keys() | paths.keys() | how_it_runs.keys()
    assert tried == MAY_CHANGE


def test_the_fingerprint_is_of_the_images_content(fingerprint, class_dir, tmp_path):
    folder = shutil.copytree(class_dir, tmp_path / "photos")
    for name in ("instance_images_dir", "class_images_dir"):
        before = fingerprint(**{name: folder})
        shutil.copy(folder / "0.png", folder / ("1.png" if name.startswith("i") else "2.png"))
        assert fingerprint(**{name: folder}) != before


AT_LEAST_ONE = [
    "train_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps", "lora_rank",
    "log_every", "checkpoints_total_limit",
]  # fmt: skip
NOT_NEGATIVE = [
    "lr_warmup_steps", "prior_loss_weight", "seed", "adam_beta1", "adam_beta2", "adam_epsilon",
    "adam_weight_decay", "checkpointing_steps", "max_failures", "wait_for_gpus", "preview_every",
]  # fmt: skip
TOO_LONG = "photo of a car " + "on the beach " * 14 + "at night"
REFUSED = [
    *(({name: 0}, f"--{name} is 0: must be at least 1") for name in AT_LEAST_ONE),
    *(({name: -1}, f"--{name} is -1") for name in NOT_NEGATIVE),
    # Gradients clipped to the norm 0 are 0.
    *(({name: 0}, f"--{name} is 0.0: must be above 0") for name in ("lr", "max_grad_norm")),
    *(({name: "nan"}, f"--{name} is nan") for name in ("lr", "prior_loss_weight", "snr_gamma")),
    *(({name: "inf"}, f"--{name} is inf") for name in ("lr", "adam_epsilon")),
    *(({"resolution": r}, f"--resolution {r}: this model takes") for r in (66, 0, -4, 2)),
    *(({"max_instance_noise": n}, f"--max_instance_noise is {n}") for n in (0.0, 1.5)),
    ({"lr_warmup_steps": 1}, "pass --lr_scheduler constant_with_warmup"),
    ({"adam_beta1": 1.0}, "below 1"),
    ({"adam_beta2": 1.0}, "below 1"),
    ({"adam_beta2": 0.999, "param_dtype": "bf16"}, "use 0.99"),
    ({"use_lora": True, "param_dtype": "bf16"}, "full fine-tuning"),
    ({"preview_prompts": "a car"}, "--preview_prompts and --preview_every go together"),
    ({"preview_every": 5}, "--preview_prompts and --preview_every go together"),
    ({"class_prompt": "photo of unqtkn car"}, "are equal"),
    ({"class_prompt": False}, "--class_images_dir and --class_prompt are missing"),
    ({"class_images_dir": False}, "--class_images_dir and --class_prompt are missing"),
    ({"instance_prompt": TOO_LONG}, "'at night' would be cut off"),
    ({"class_prompt": TOO_LONG}, "'at night' would be cut off"),
    ({"preview_prompts": TOO_LONG, "preview_every": 1}, "'at night' would be cut off"),
    ({"model_dir": "/nowhere"}, "--model_dir /nowhere: no such directory"),
]


def test_each_mistake_in_the_flags_is_named(refusal):
    for flags, text in REFUSED:
        assert text in refusal(**flags), flags


@pytest.mark.parametrize(
    "flags",
    [
        {"num_workers": "1:2", "train_batch_size": 2}, {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
    ],
)  # fmt: skip
def test_where_no_step_can_be_captured_none_is_and_a_line_says_so(train_args, capsys, flags):
    """run.sh may add what does not go with --cuda_graph, for the GPUs that it finds."""
    args = train_args("out", cuda_graph=True, **flags)
    check_flags(args)
    assert not args.cuda_graph
    assert "warning: --cuda_graph is ignored: it is for one worker" in capsys.readouterr().err
    args = train_args("out", cuda_graph=True)
    check_flags(args)
    assert args.cuda_graph


@pytest.mark.parametrize("name", ["instance_images_dir", "class_images_dir"])
def test_folders_of_images_that_cannot_be_used(check_and_plan, refusal, flat_image, tmp_path, name):
    other = {"instance_images_dir": "class_images_dir"}.get(name, "instance_images_dir")
    folder = tmp_path / "photos"
    flags = {name: folder}
    assert f"{folder}: no such folder" in refusal(**flags)
    photo = flat_image("good.png", 0, folder=folder)
    (folder / ".DS_Store").write_text("no image")
    plan = check_and_plan(**flags)
    assert [photo] in (plan.instance_paths, plan.class_paths)
    assert "are the same folder" in refusal(**flags, **{other: folder / ".." / "photos"})
    flat_image("icon.png", 0, size=(15, 300), folder=folder)  # of the flag's resolution, a quarter
    assert "icon.png: 15 x 300 pixels are too small" in refusal(**flags)
    check_and_plan(**flags, resolution=60)
    photo.write_bytes(photo.read_bytes()[:-50])
    assert "good.png: unreadable or truncated image" in refusal(**flags)
    for file in folder.iterdir():
        file.unlink()
    assert f"{folder}: no images there" in refusal(**flags)


def test_a_result_replaces_nothing_but_an_earlier_result(
    check_and_plan, refusal, model_dir, tmp_path
):
    """Neither other files nor the model itself, by whatever path it is given."""
    (tmp_path / "file").touch()
    assert f"--output_dir {tmp_path / 'file'} is a file" in refusal(output_dir=tmp_path / "file")
    (tmp_path / "link").symlink_to(model_dir)
    for folder in (model_dir, model_dir / ".." / model_dir.name, tmp_path / "link"):
        assert "--output_dir is --model_dir" in refusal(output_dir=folder)
    earlier = shutil.copytree(model_dir, tmp_path / "tuned")
    assert "holds a model that train.py has not made" in refusal(output_dir=earlier)
    (tmp_path / "tuned.report").mkdir()
    assert check_and_plan(earlier).num_steps == 3
    assert pipeline_dir.missing_file(earlier) is None  # it is still there
    (earlier / "thesis.tex").write_text("years")
    assert "holds other files (thesis.tex)" in refusal(output_dir=earlier)
    assert (earlier / "thesis.tex").read_text() == "years"


def test_checkpoints_and_report_go_into_directories(refusal, tmp_path):
    """A file in their place is found before the run, not after its first hour."""
    (tmp_path / "file").touch()
    message = refusal(storage_path=tmp_path / "file")
    assert message.startswith(f"the checkpoints' directory {tmp_path / 'file'}")
    (tmp_path / "out.report").touch()
    message = refusal(output_dir=tmp_path / "out")
    assert message.startswith(f"the report's directory {tmp_path / 'out.report'}")


def test_checkpoints_replace_nothing_and_outlive_the_result(check_and_plan, refusal, tmp_path):
    """A folder of the user's with that name was emptied; checkpoints inside the result, which it
    replaces, could not be resumed from."""
    (tmp_path / "out.checkpoints").mkdir()
    check_and_plan(tmp_path / "out")
    (tmp_path / "out.checkpoints" / "best.safetensors").write_text("years")
    message = refusal(output_dir=tmp_path / "out")
    assert message.startswith(f"{tmp_path / 'out.checkpoints'}, where checkpoints would go, holds")
    for inside in ("other", "other/checkpoints"):
        flags = {"output_dir": tmp_path / "other", "storage_path": tmp_path / inside}
        assert "--storage_path is inside --output_dir" in refusal(**flags)


def test_checkpoints_on_another_disk_are_not_forgotten(check_and_plan, refusal, tmp_path):
    """When a disk is full, another one may be named; the run would begin anew there."""
    flags = {"output_dir": tmp_path / "out", "storage_path": tmp_path / "disk"}
    check_and_plan(**flags)
    usual = tmp_path / "out.checkpoints"
    (usual / "step_000010").mkdir(parents=True)
    (usual / "step_000010" / "complete.json").touch()
    (usual / "lock").touch()
    check_and_plan(**flags, restart=True)
    message = refusal(**flags)
    assert message.startswith(f"{usual} holds checkpoints of --output_dir: move it to {tmp_path}")
    (tmp_path / "disk").mkdir()
    usual.rename(message.partition(" move it to ")[2].partition(" to resume")[0])
    check_and_plan(**flags)


def test_checkpoints_on_another_disk_are_looked_for_where_the_run_had_them(
    check_and_plan, refusal, tmp_path
):
    """--storage_path left out, or changed, when the command is given again: the run would begin
    anew, without a word."""
    out = tmp_path / "out"
    flags = {"output_dir": str(out), "storage_path": str(tmp_path / "disk")}
    there = run_dir(**flags)
    (there / "step_000010").mkdir(parents=True)
    (there / "step_000010" / "complete.json").touch()
    (there / "lock").touch()
    report_dir(out).mkdir()
    record = {"status": "stopped", "flags": flags}
    (report_dir(out) / "run.json").write_text(json.dumps(record))
    check_and_plan(**flags)
    for other in ({}, {"storage_path": str(tmp_path / "third")}):
        message = refusal(output_dir=str(out), **other)
        assert message.startswith(
            f"{there} holds checkpoints of --output_dir: move it to {tmp_path}"
        )
        check_and_plan(output_dir=str(out), **other, restart=True)


def test_a_folder_that_holds_only_the_users_readme_is_not_replaced(refusal, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my notes")
    message = refusal(output_dir=tmp_path / "out")
    assert "holds other files (README.md), which would be lost" in message


def test_the_flags_of_lora_are_not_ignored_without_it(check_and_plan, refusal):
    """A LoRA's recipe in full fine-tuning spoils the model."""
    for flags in ({"lora_rank": 16}, {"lora_layers": "all"}):
        assert "they need --use_lora" in refusal(**flags)
        check_and_plan(**flags, use_lora=True)


def test_a_result_that_will_be_replaced_is_named(check_and_plan, tmp_path, capsys):
    """As a finished run does not resume when its command is given again."""
    (tmp_path / "out.report").mkdir()
    said = f"{tmp_path / 'out'} holds a result, which will be replaced"
    for is_there in (False, True):
        check_and_plan(tmp_path / "out")
        assert (said in capsys.readouterr().out) == is_there
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "model_index.json").touch()


@pytest.fixture
def disk(monkeypatch):
    """A disk with disk.free bytes free."""
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    return usage


def test_a_disk_without_space_for_the_result(check_and_plan, refusal, model_dir, tmp_path, disk):
    """In float32, whatever the precision of the original model (here float16). What a killed save
    has left counts as free, as the next one deletes it."""
    disk.free = 4 * sum(pipeline_dir.num_parameters(model_dir).values())
    check_and_plan(checkpointing_steps=0)
    needed, disk.free = disk.free, disk.free - 1000
    message = refusal(checkpointing_steps=0, output_dir=tmp_path / "out")
    assert f"MB are free, and the result will take {needed / 1e6:.1f} MB" in message
    (tmp_path / ".out.new" / "unet").mkdir(parents=True)
    (tmp_path / ".out.new" / "unet" / "half.safetensors").write_bytes(bytes(1000))
    check_and_plan(checkpointing_steps=0)
    disk.free = 1e6
    check_and_plan(use_lora=True)


@pytest.mark.parametrize(
    ("flags", "num_bytes", "trained"),
    [
        ({}, 12, ["unet", "text_encoder"]),
        ({"param_dtype": "bf16"}, 8, ["unet", "text_encoder"]),
        ({"no_train_text_encoder": True}, 12, ["unet"]),
    ],
)
def test_a_disk_without_space_for_one_more_checkpoint(
    train_args, tmp_path, sd14_dir, disk, flags, num_bytes, trained
):
    """Of what is trained, while that is written. What is there already counts, so that a run can
    resume: also what a killed process has not finished, which the next one deletes."""
    sizes = pipeline_dir.num_parameters(sd14_dir)
    flags = {"model_dir": sd14_dir, "checkpoints_total_limit": 2, **flags}
    args = train_args(tmp_path / "out", **flags)
    needed = 3 * num_bytes * sum(sizes[part] for part in trained)
    disk.free = needed
    check_space_for_checkpoints(args, 30, 3)
    disk.free -= 1000
    (tmp_path / "out.checkpoints").mkdir()
    (tmp_path / "out.checkpoints" / "lock").touch()
    for name, size in (("step_000003", 600), (".step_000006.tmp", 400)):
        with pytest.raises(UserError, match="3 checkpoints at a time"):
            check_space_for_checkpoints(args, 30, 3)
        state = tmp_path / "out.checkpoints" / name / "state.pt"
        state.parent.mkdir(parents=True)
        state.write_bytes(bytes(size))
    check_space_for_checkpoints(args, 30, 3)
    disk.free = needed / 2
    check_space_for_checkpoints(args, 30, 0)
    check_space_for_checkpoints(args, 8, 4)  # the last step has none
    with pytest.raises(UserError, match="2 checkpoints at a time"):
        check_space_for_checkpoints(args, 9, 4)


def test_space_is_asked_for_the_checkpoints_that_a_run_will_write(
    check_and_plan, refusal, model_dir, disk
):
    """Not for as many as it may keep, nor for the steps that it might have had."""
    sizes = pipeline_dir.num_parameters(model_dir)
    one = 12 * (sizes["unet"] + sizes["text_encoder"])
    flags = {"checkpoints_total_limit": 50, "num_epochs": 3, "max_train_steps": 1000}
    disk.free = 1e12
    num_steps = check_and_plan(**flags).num_steps
    disk.free = one * (num_steps - 1)
    check_and_plan(**flags)
    disk.free -= 1000
    assert f"{num_steps - 1} checkpoints at a time" in refusal(**flags)


def test_unusual_prompts_are_asked_about(check_and_plan, capsys):
    for instance_prompt, class_prompt in (
        ("photo of unqtkn dog", "photo of a dog"),
        ("Photo of sks owl on grass", "a photo of an owl"),
    ):
        check_and_plan(instance_prompt=instance_prompt, class_prompt=class_prompt)
        assert capsys.readouterr().err == ""
    for instance_prompt, class_prompt in (
        ("photo of a dog", "photo of unqtkn dog"),  # the wrong way round
        ("photo of unqtkn dog", "a photo of unqtkn dog"),
        ("photo of a dog", "photo of the dog"),
        ("photo of sks dog", "photo of a dog in the snow"),
    ):
        check_and_plan(instance_prompt=instance_prompt, class_prompt=class_prompt)
        warning = capsys.readouterr().err
        assert warning.startswith("warning: --class_prompt is usually --instance_prompt without")
        assert len(warning.splitlines()) == 1


def test_a_folder_of_one_photo_is_asked_about(check_and_plan, flat_image, tmp_path, capsys):
    """And what else is there is named, once."""
    flat_image("banner.png", 0, folder=tmp_path / "images")
    (tmp_path / "images" / "film.mp4").touch()
    check_and_plan(instance_images_dir=tmp_path / "images")
    printed = capsys.readouterr()
    assert "images holds 1 photo (banner.png): is it the right folder?" in printed.err
    assert printed.out.count("(film.mp4)") == 1


def test_captions_follow_their_photos_to_another_folder(fingerprint, instance_dir, tmp_path):
    """A run goes on where its photos have been moved, and does not with another caption."""
    assert fingerprint()["captions"] is None
    first, second = (shutil.copytree(instance_dir, tmp_path / name) for name in ("a", "b"))
    for folder in (first, second):
        (folder / "0.txt").write_text("photo of unqtkn car at night")
    found = fingerprint(instance_images_dir=first)
    assert found["captions"] == [["0.png", "photo of unqtkn car at night"]]
    assert fingerprint(instance_images_dir=second) == found
    (second / "0.txt").write_text("photo of unqtkn car in the snow")
    assert fingerprint(instance_images_dir=second) != found


def test_polynomial_needs_a_learning_rate_above_its_last_one(check_and_plan, refusal):
    """1e-7, which diffusers would refuse after the models have been loaded."""
    flags = {"lr_scheduler": "polynomial"}
    for lr in (1e-7, 1e-8):
        assert "polynomial ends at 1e-07; use linear" in refusal(**flags, lr=lr)
    check_and_plan(**flags, lr=2e-7)


def test_a_caption_without_the_identifier_is_warned_of(train_args, instance_dir, tmp_path, capsys):
    folder = shutil.copytree(instance_dir, tmp_path / "photos")
    (folder / "0.txt").write_text("Photo of UNQTKN car, at night.")
    (folder / "1.txt").write_text("photo of a car at night")
    (folder / "2.txt").write_text("unqtkn car asleep in a garage")
    for prompt in ("photo of unqtkn car", "photo of unqtkn car."):
        make_plan(train_args("out", instance_images_dir=folder, instance_prompt=prompt))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: the caption of {folder / '1.png'} does not name")


def test_a_path_that_is_not_utf_8_is_refused(train_args, tmp_path):
    """On which Ray ends in a trace."""
    folder = tmp_path / b"caf\xe9".decode(errors="surrogateescape")
    for name in ("output_dir", "class_images_dir"):
        flags = {"output_dir": tmp_path / "out", name: folder}
        with pytest.raises(UserError, match=f"--{name} .*is not UTF-8, which Ray needs"):
            check_flags(train_args(**flags))


def test_results_whose_names_differ_after_a_dot_share_nothing(train_args, tmp_path):
    outs = [tmp_path / "dog-v1.0", tmp_path / "dog-v1.5"]
    assert [report_dir(out).name for out in outs] == ["dog-v1.0.report", "dog-v1.5.report"]
    found = [run_dir(out, train_args(out).storage_path).name for out in outs]
    assert found == ["dog-v1.0.checkpoints", "dog-v1.5.checkpoints"]


def test_a_tenth_of_a_run_is_between_two_checkpoints(check_and_plan, disk):
    disk.free = 1e12
    for num_steps, expected in ((300, 30), (26, 3), (4, 1)):
        plan = check_and_plan(num_epochs=300, max_train_steps=num_steps)
        assert (plan.num_steps, plan.checkpointing_steps) == (num_steps, expected)


def test_a_caption_stands_in_place_of_the_prompt(
    check_and_plan, instance_dir, class_dir, tmp_path, capsys
):
    """Of its image alone; equal ones are one prompt, and one that equals the folder's adds none,
    nor does that of a class image that the user has deleted. Where no class image is left for
    --class_prompt, that is a warning."""
    photos = shutil.copytree(instance_dir, tmp_path / "photos")
    (photos / "1.txt").write_text("photo of unqtkn car on the beach\n")
    of_class = shutil.copytree(class_dir, tmp_path / "class")
    texts = {"0": "photo of a car", "1": "a red car", "2": "a red car", "9": "a blue car"}
    rows = [json.dumps({"file_name": f"{n}.png", "text": text}) for n, text in texts.items()]
    (of_class / "metadata.jsonl").write_text("\n".join(rows))
    flags = {"instance_images_dir": photos, "class_images_dir": of_class}
    plan = check_and_plan(**flags)
    of_photo, of_image = plan.prompts[2:]
    assert (of_photo, of_image) == ("photo of unqtkn car on the beach", "a red car")
    captions = {photos / "1.png": 2, of_class / "1.png": 3, of_class / "2.png": 3}
    assert plan.captions == {str(path): number for path, number in captions.items()}
    out, err = capsys.readouterr()
    said = "2 class images have captions of their own, such as 'a red car'"
    assert said in out and "captions" not in err
    for name in ("0.png", "3.png"):
        (of_class / name).unlink()
    check_and_plan(**flags)
    assert f"warning: {said}: no image is left for --class_prompt" in capsys.readouterr().err
