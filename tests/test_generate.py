"""generate.py: every image once, found again, and nothing replaced unless asked for."""

import json
import os

import pytest
from PIL import Image

import generate
from dreambooth import atomic, image_generator, outputs
from dreambooth.cli import UserError
from dreambooth.images import find_images


@pytest.fixture
def run(generate_args):
    """Run generate.py in this process: run(output_dir, seed=1)."""
    return lambda output_dir, **changes: generate.main(generate_args(output_dir, **changes))


@pytest.fixture
def copied(generated, tmp_path):
    """A copy of the folder of `generated` that a test may damage."""
    folder = tmp_path / "new"
    folder.mkdir()
    for file in generated.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def times(folder):
    return {file.name: os.stat(file).st_mtime_ns for file in folder.glob("*-seed*.png")}


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_every_image_is_there_with_its_record(generated, digests):
    """A line of images.jsonl, and a PNG that carries the same record. A comma stays in its prompt
    (fault 9 of the published example, which split prompts at commas)."""
    lines = (generated.folder / outputs.RECORDS).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = digests(generated.folder)
    assert len(found) == len(set(found.values())) == 10
    assert {record["file"]: record["digest"] for record in records} == found
    first, second = generated.prompts
    assert [record["prompt"] for record in records] == [first] * 5 + [second] * 5
    for record in records:
        assert outputs.read_record(generated.folder / record["file"]) == record
        assert Image.open(generated.folder / record["file"]).size == (64, 64)
    names = {file.name for file in generated.folder.iterdir()}
    assert names == {*found, outputs.RECORDS, outputs.CONTACT_SHEET}


def test_the_contact_sheet_has_a_row_for_each_prompt(generated):
    """Two rows of five images of 192 pixels, with gaps of 6 and captions of 26."""
    size = Image.open(generated.folder / outputs.CONTACT_SHEET).size
    assert size == (5 * 198 + 6, 2 * (192 + 26 + 6) + 6)


def test_the_folder_can_be_given_to_train(generated, digests):
    """The sheet and the records are skipped."""
    names = [path.name for path in find_images(generated.folder)]
    assert names == sorted(digests(generated.folder))


def test_a_plan_has_all_that_an_image_depends_on(generate_args, model_dir, lora_dir):
    """Each setting changes every record."""
    (record,) = generate.plan(generate_args("out"))
    assert record["file"] == "000-0000-seed0.png"
    changes = {
        "model_dir": lora_dir,  # a plan takes its fingerprint alone
        "lora_weights_dir": lora_dir,
        "lora_scale": 0.5,
        "scheduler": "model",
        "num_inference_steps": 3,
        "guidance_scale": 1,
        "seed": 1,
        "prompts": ["photo of a house"],
    }
    for name, value in changes.items():
        (changed,) = generate.plan(generate_args("out", **{name: value}))
        assert {**changed, "file": None} != {**record, "file": None}, name


def test_a_plan_does_not_depend_on_how_it_is_carried_out(generate_args):
    plan = generate.plan(generate_args("out"))
    for name, value in {"use_ray_data": True, "num_workers": 2, "batch_size": 1}.items():
        assert generate.plan(generate_args("elsewhere", **{name: value})) == plan


def test_an_image_depends_on_its_prompt_and_not_on_the_prompts_place(
    generated, digests, run, tmp_path
):
    """The second prompt's images are the same without the first."""
    run(tmp_path / "alone", prompts=generated.prompts[1:], num_samples_per_prompt=2)
    alone = list(digests(tmp_path / "alone").values())
    assert alone == list(digests(generated.folder).values())[5:7]


def test_prompts_come_from_flag_and_file_together(generate_args, tmp_path):
    (tmp_path / "prompts.txt").write_text("photo of a boat\n\nphoto of a cup, in the snow\n")
    args = generate_args(tmp_path / "out", prompts_file=tmp_path / "prompts.txt")
    generate.check_args(args)
    assert args.prompts == ["photo of a car", "photo of a boat", "photo of a cup, in the snow"]


REFUSED = [
    ({"prompts": False}, "no prompt"),
    ({"prompts": ["a car", "a car"]}, "given twice"),
    ({"prompts": ["on the beach " * 20]}, "would be cut off"),
    ({"prompts_file": "/nowhere.txt"}, "--prompts_file /nowhere.txt: no such file"),
    ({"model_dir": "/nowhere"}, "--model_dir /nowhere"),
    ({"compare_to": "/nowhere"}, "--compare_to /nowhere"),
    ({"lora_weights_dir": "/nowhere"}, "--lora_weights_dir /nowhere"),
    ({"num_samples_per_prompt": 0}, "--num_samples_per_prompt is 0"),
    ({"num_inference_steps": 0}, "--num_inference_steps is 0"),
    ({"num_workers": 0}, "--num_workers is 0"),
    ({"batch_size": -1}, "--batch_size is -1"),
    ({"seed": -1}, "--seed is -1"),
    ({"guidance_scale": -1}, "--guidance_scale is -1"),
    ({"lora_scale": -1}, "--lora_scale is -1"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSED)
def test_bad_arguments_are_refused_before_anything_is_written(run, tmp_path, changes, text):
    with pytest.raises(UserError) as error:
        run(tmp_path / "out", **changes)
    assert text in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"--output_dir {tmp_path / 'file' / 'below'} "):
        run(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_user_error_of_the_command_is_one_line(
    assert_one_line, run_script, generate_argv, tmp_path
):
    argv = generate_argv(tmp_path / "out", model_dir=tmp_path / "nowhere")
    assert_one_line(run_script("generate.py", *argv), "--model_dir", "cache_model.py")
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_generates_nothing(generated, copied, run, monkeypatch, capsys):
    """Fault 9 of the published example: a restart began from nothing."""
    monkeypatch.setattr(generate, "ImageGenerator", None)
    before = times(copied)
    run(copied, **generated.flags)
    assert times(copied) == before
    assert f"10 images of 2 prompt(s) in {copied}: 0 to generate" in capsys.readouterr().out
    assert len((copied / outputs.RECORDS).read_text().splitlines()) == 10


def test_lost_and_truncated_images_are_generated_again_and_no_others(
    generated, copied, digests, run
):
    files = sorted(copied.glob("*-seed*.png"))
    before = times(copied)
    lost = files[1]
    truncated = files[4]
    lost.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    leftover = copied / f".000-0000-seed0.png.{atomic.HOST}.99999999.tmp"
    leftover.write_bytes(b"half an image")
    run(copied, **generated.flags)
    assert digests(copied) == digests(generated.folder)
    after = times(copied)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {lost.name, truncated.name}
    assert len((copied / outputs.RECORDS).read_text().splitlines()) == 10
    assert not leftover.exists()


def test_more_samples_are_added_to_those_that_are_there(generated, copied, digests, run):
    before = times(copied)
    run(copied, **{**generated.flags, "num_samples_per_prompt": 6})
    after = times(copied)
    assert len(after) == 12
    assert {name: after[name] for name in before} == before


CHANGES = [
    {"prompts": ["photo of a house", "photo of a car"]},
    {"seed": 1, "num_inference_steps": 3},
    {"num_inference_steps": 3},
]


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_are_not_replaced_unless_asked_for(
    generated, copied, digests, run, monkeypatch, change
):
    """A folder never mixes the images of two runs."""
    monkeypatch.setattr(generate, "ImageGenerator", None)
    before = contents(copied)
    with pytest.raises(UserError, match="--overwrite"):
        run(copied, **{**generated.flags, **change})
    assert contents(copied) == before


def test_overwrite_replaces_other_images_and_leaves_the_users_files(
    generated, copied, digests, run
):
    (copied / "my photo.png").write_bytes(b"mine")
    (copied / "notes.txt").write_text("mine")
    prompts = ["photo of a house", generated.prompts[1]]
    run(copied, prompts=prompts, num_samples_per_prompt=4, overwrite=True)
    old = digests(generated.folder)
    new = digests(copied)
    assert len(new) == 8  # those of number 5 are gone
    kept = [name for name in new if new[name] == old[name]]
    assert kept == [name for name in new if name.startswith("001-")]
    assert (copied / "my photo.png").read_bytes() == b"mine"
    assert (copied / "notes.txt").read_text() == "mine"


def test_files_that_are_not_ours_are_left_alone(generated, copied, run):
    """Even one whose name looks like ours."""
    Image.new("RGB", (64, 64), "red").save(copied / "my-seedling.png")
    content = (copied / "my-seedling.png").read_bytes()
    run(copied, **generated.flags)
    assert (copied / "my-seedling.png").read_bytes() == content


def test_nothing_is_replaced_by_a_run_that_generates_nothing(
    copied, run, broken_model_dir, monkeypatch
):
    """Old images go only when the first new one is there."""
    monkeypatch.setattr(image_generator, "MAX_ATTEMPTS", 1)
    before = contents(copied)
    with pytest.raises(UserError, match="generates nothing"):
        run(copied, model_dir=broken_model_dir, overwrite=True)
    assert contents(copied) == before


def test_nothing_is_replaced_if_there_are_too_few_cores(copied, run, ray_address, tmp_path, capsys):
    """Only Ray can tell how many there are."""
    before = contents(copied)
    flags = {"prompts": ["photo of a house"], "use_ray_data": True, "num_workers": 9}
    with pytest.raises(UserError, match="--num_workers 9"):
        run(copied, overwrite=True, **flags)
    assert contents(copied) == before
    assert "0%" not in capsys.readouterr().err  # no progress bar above the error
    with pytest.raises(UserError, match="--num_workers 9"):
        run(tmp_path / "fresh", **flags)
    assert not (tmp_path / "fresh").exists()


def test_a_comparison_shows_both_models_from_the_same_noise(
    run, digests, model_dir, lora_dir, tmp_path
):
    """Each prompt has two rows, and the second model has a folder below."""
    out = tmp_path / "out"
    run(out, num_samples_per_prompt=2, lora_weights_dir=lora_dir, compare_to=model_dir)
    run(tmp_path / "plain", num_samples_per_prompt=2)
    assert digests(out / "compared") == digests(tmp_path / "plain")
    assert not set(digests(out).values()) & set(digests(tmp_path / "plain").values())
    _, height = Image.open(out / outputs.CONTACT_SHEET).size
    assert height == 2 * (192 + 26 + 6) + 6


def test_both_folders_of_a_comparison_are_checked_before_anything_is_generated(
    copied, run, model_dir, tmp_path
):
    """The second one holds images of another number of steps."""
    out = tmp_path / "out"
    out.mkdir()
    copied.rename(out / "compared")
    with pytest.raises(UserError, match="compared holds 10 images made with another"):
        run(out, num_inference_steps=3, compare_to=model_dir)
    assert [file.name for file in out.iterdir()] == ["compared"]
