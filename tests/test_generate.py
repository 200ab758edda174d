"""generate.py: every image once, found again, and nothing replaced unless asked for."""

import json
import math
import os
import shutil

import pytest
from PIL import Image

import generate
from dreambooth import image_generator
from dreambooth.cli import UserError
from dreambooth.files import atomic, generated_images
from dreambooth.files.photos import find_images
from tests.test_pipeline_dir import set_json


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


def metadata(folder):
    lines = (folder / generated_images.METADATA).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_every_image_is_there_with_its_record(generated, digests):
    """A PNG that carries it, and a line of metadata.jsonl. A comma stays in its prompt (fault 9 of
    the published example, which split prompts at commas). The folder can be given to train.py."""
    found = digests(generated.folder)
    assert len(found) == len(set(found.values())) == 10
    first, second = generated.prompts
    lines = metadata(generated.folder)
    assert [line["file_name"] for line in lines] == list(found)
    assert [line["text"] for line in lines] == [first] * 5 + [second] * 5
    for line in lines:
        record = generated_images.read_record(generated.folder / line["file_name"])
        own = {"file_name": record.pop("file"), "text": record.pop("prompt")}
        assert line == {**own, **record}
        assert Image.open(generated.folder / line["file_name"]).size == (64, 64)
    names = {file.name for file in generated.folder.iterdir()}
    assert names == {*found, generated_images.METADATA, generated_images.CONTACT_SHEET}
    assert [path.name for path in find_images(generated.folder)] == sorted(found)


def test_the_contact_sheet_has_a_row_for_each_prompt(generated):
    """Two rows of five images of 192 pixels, with gaps of 6 and captions of 26."""
    size = Image.open(generated.folder / generated_images.CONTACT_SHEET).size
    assert size == (5 * 198 + 6, 2 * (192 + 26 + 6) + 6)


def test_a_plan_has_all_that_an_image_depends_on(sampling_args, broken_model_dir, lora_dir):
    """Each setting changes every record; how the plan is carried out changes none."""

    def plan(folder, **changes):
        return generate.list_records(sampling_args(folder, **changes))

    (record,) = plan("out")
    assert record["file"] == "000-0000-seed0.png"
    changes = {
        "model_dir": broken_model_dir,
        "lora_weights_dir": lora_dir,
        "scheduler": "model",
        "num_inference_steps": 3,
        "guidance_scale": 1,
        "resolution": 32,
        "seed": 1,
        "prompts": ["photo of a house"],
    }
    for name, value in changes.items():
        (changed,) = plan("out", **{name: value})
        assert {**changed, "file": None} != {**record, "file": None}, name
    scaled = [plan("out", lora_weights_dir=lora_dir, lora_scale=scale) for scale in (1, 0.5)]
    assert scaled[0] != scaled[1]
    assert plan("out", lora_scale=0.5) == [record]  # there is no LoRA
    for name, value in {"use_ray_data": True, "num_workers": 2, "batch_size": 1}.items():
        assert plan("elsewhere", **{name: value}) == [record]


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


def test_a_dry_run_generates_nothing(generate_args, tmp_path, capsys):
    """Nor deletes, with --overwrite; and finds what a run would find."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "000-0000-seed0.png").write_bytes(b"an image")
    generate.main(generate_args(folder, dry_run=True, overwrite=True))
    assert [file.name for file in folder.iterdir()] == ["000-0000-seed0.png"]
    with pytest.raises(UserError, match="a prompt is given twice"):
        generate.main(generate_args(folder, dry_run=True, prompts=["photo of a car"] * 2))


def test_a_models_own_side_must_be_one_that_its_pipeline_generates(
    generate_args, model_dir, tmp_path
):
    """One of 68 pixels ended in a trace, also that of the model to compare with."""
    odd = shutil.copytree(model_dir, tmp_path / "odd")
    set_json(odd / "unet" / "config.json", sample_size=17)
    for flags in ({"model_dir": odd}, {"compare_to": odd, "resolution": 68}):
        with pytest.raises(UserError, match="--resolution 68: this model takes multiples of 8"):
            generate.check_args(generate_args(tmp_path / "out", **flags))


def test_a_flag_without_effect_is_named(generate_args, tmp_path, capsys):
    generate.check_args(generate_args(tmp_path / "out", num_workers=2))
    assert "--num_workers is for --use_ray_data" in capsys.readouterr().err
    generate.check_args(generate_args(tmp_path / "out", lora_scale=0.5))
    assert "--lora_scale is for --lora_weights_dir" in capsys.readouterr().err
    generate.check_args(generate_args(tmp_path / "out", num_workers=2, use_ray_data=True))
    assert capsys.readouterr().err == ""


REFUSED = {
    "no prompt": {"prompts": False},
    "given twice": {"prompts": ["a car", "a car"]},
    "would be cut off": {"prompts": ["on the beach " * 20]},
    "--prompts_file /nowhere.txt: no such file": {"prompts_file": "/nowhere.txt"},
    "--model_dir /nowhere": {"model_dir": "/nowhere"},
    "--compare_to /nowhere": {"compare_to": "/nowhere"},
    "--lora_weights_dir /nowhere": {"lora_weights_dir": "/nowhere"},
    "--num_samples_per_prompt is 0": {"num_samples_per_prompt": 0},
    "--num_samples_per_prompt must be at most 999999": {"num_samples_per_prompt": 10**12},
    "--num_inference_steps is 0": {"num_inference_steps": 0},
    "--num_workers is 0": {"num_workers": 0},
    "--batch_size is 0": {"batch_size": 0},
    "--seed is -1": {"seed": -1},
    "--guidance_scale is -1": {"guidance_scale": -1},
    "--lora_scale is nan: must be finite": {"lora_scale": math.nan},
    "--resolution 68: this model takes multiples of 8": {"resolution": 68},  # whole latents: of 4
}


def test_bad_arguments_are_refused_before_anything_is_written(run, tmp_path):
    for text, changes in REFUSED.items():
        with pytest.raises(UserError) as error:
            run(tmp_path / "out", **changes)
        assert text in str(error.value)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_generates_nothing(generated, copied, run, monkeypatch, capsys):
    """Fault 9 of the published example: a restart began from nothing."""
    monkeypatch.setattr(generate, "ImageGenerator", None)
    before = times(copied)
    run(copied, **generated.flags)
    assert times(copied) == before
    assert f"10 images of 2 prompts in {copied}: 0 to generate" in capsys.readouterr().out
    assert metadata(copied) == metadata(generated.folder)


def test_what_is_lost_truncated_or_new_is_generated_and_no_more(generated, copied, digests, run):
    files = sorted(copied.glob("*-seed*.png"))
    before = times(copied)
    lost, truncated = files[1], files[4]
    lost.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    leftover = copied / f".000-0000-seed0.png.{atomic.HOST}.99999999.tmp"
    leftover.write_bytes(b"half an image")
    run(copied, **{**generated.flags, "num_samples_per_prompt": 6})
    found = digests(copied)
    new = {"000-0005-seed0.png", "001-0005-seed0.png"}
    assert {name: found[name] for name in found if name not in new} == digests(generated.folder)
    after = times(copied)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {lost.name, truncated.name, *new}
    assert sorted(line["file_name"] for line in metadata(copied)) == sorted(found)
    assert not leftover.exists()


def test_other_images_are_not_replaced_unless_asked_for(generated, copied, run, monkeypatch):
    """A folder never mixes the images of two runs."""
    monkeypatch.setattr(generate, "ImageGenerator", None)
    before = contents(copied)
    for change in ({"prompts": ["photo of a house"]}, {"seed": 1, "num_inference_steps": 3}):
        with pytest.raises(UserError, match="--overwrite"):
            run(copied, **{**generated.flags, **change})
    assert contents(copied) == before


def test_overwrite_replaces_other_images_and_leaves_the_users_files(
    generated, copied, digests, run
):
    """Even one whose name looks like ours."""
    Image.new("RGB", (64, 64), "red").save(copied / "my-seedling.png")
    (copied / "notes.txt").write_text("mine")
    mine = {name: contents(copied)[name] for name in ("my-seedling.png", "notes.txt")}
    prompts = ["photo of a house", generated.prompts[1]]
    run(copied, prompts=prompts, num_samples_per_prompt=4, overwrite=True)
    old = digests(generated.folder)
    new = {name: digest for name, digest in digests(copied).items() if name not in mine}
    assert len(new) == 8  # those of number 5 are gone
    assert sorted(line["file_name"] for line in metadata(copied)) == sorted(new)
    kept = [name for name in new if new[name] == old[name]]
    assert kept == [name for name in new if name.startswith("001-")]
    assert {name: contents(copied)[name] for name in mine} == mine


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
    with pytest.raises(UserError, match="--num_workers 9: the cluster has 2 CPU cores"):
        run(copied, overwrite=True, **flags)
    assert contents(copied) == before
    assert "0%" not in capsys.readouterr().err  # no progress bar above the error
    with pytest.raises(UserError, match="--num_workers 9"):
        run(tmp_path / "fresh", **flags)
    assert not (tmp_path / "fresh").exists()


def test_a_comparison_shows_both_models_from_the_same_noise(
    generated, run, digests, model_dir, lora_dir, tmp_path
):
    """Each prompt has two rows, and the second model, without the LoRA, a folder below."""
    out = tmp_path / "out"
    prompts = generated.prompts[:1]
    flags = {"num_samples_per_prompt": 2, "lora_weights_dir": lora_dir, "compare_to": model_dir}
    run(out, prompts=prompts, **flags)
    plain = list(digests(generated.folder).items())[:2]
    assert list(digests(out / "compared").items()) == plain
    assert not set(digests(out).values()) & {digest for _, digest in plain}
    _, height = Image.open(out / generated_images.CONTACT_SHEET).size
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


def test_a_smaller_model_is_compared_at_the_size_of_the_first_ones_images(
    run, sampling_args, model_dir, tmp_path
):
    """Its images, which are there already, are of 64 pixels, not of its own 32."""
    small = shutil.copytree(model_dir, tmp_path / "small")
    set_json(small / "unet" / "config.json", sample_size=8)
    out = tmp_path / "out"
    (out / "compared").mkdir(parents=True)
    (record,) = generate.list_records(sampling_args(out, model_dir=small, resolution=64))
    file = out / "compared" / record["file"]
    generated_images.save_image(Image.new("RGB", (64, 64)), record, file)
    run(out, compare_to=small, dry_run=True)
    with pytest.raises(UserError, match="compared holds 1 images made with another"):
        run(out, compare_to=small, dry_run=True, resolution=32)


def test_zero_is_a_guidance_scale_and_no_default(sampling_args):
    """Samples without the prompt; 7.5 is what is taken where none is given."""
    assert sampling_args("out").guidance_scale == 7.5
    assert sampling_args("out", guidance_scale=0).guidance_scale == 0


def test_prompts_must_fit_the_model_to_compare_with_as_well(generate_args, model_dir, tmp_path):
    short = shutil.copytree(model_dir, tmp_path / "short")
    set_json(short / "tokenizer" / "tokenizer_config.json", model_max_length=5)
    with pytest.raises(UserError, match="has 6 tokens, the model takes 5"):
        generate.check_args(generate_args(tmp_path / "out", compare_to=short))
