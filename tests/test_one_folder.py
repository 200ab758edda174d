"""A folder takes more images, fewer, and another seed's; images of another model, prompt or setting
are never mixed in."""

import json

import numpy as np
import pytest
from PIL import Image

import generate
from dreambooth import outputs
from dreambooth.cli import UserError

SETTINGS = {"model": "abc", "guidance_scale": 7.5}


def make_record(prompt_number=0, index=0, seed=0, **changes):
    own = {
        "file": outputs.file_name(prompt_number, index, seed),
        "prompt": f"photo of a car, place {prompt_number}",
        "seed": seed,
        "index": index,
    }
    return {**own, **SETTINGS, **changes}


PLANNED = [make_record(number, index) for number in (0, 1) for index in (0, 1)]
OTHERS = {
    "more images of a prompt": make_record(index=2),
    "another seed": make_record(seed=1),
    "another seed, more images": make_record(index=7, seed=1),
    "more prompts": make_record(prompt_number=2),
}
STALE = {
    "another setting": make_record(guidance_scale=1.0),
    "another setting, more images": make_record(index=2, guidance_scale=1.0),
    "another model, another seed": make_record(seed=1, model="def"),
    "another model, more prompts": make_record(prompt_number=2, model="def"),
    "another prompt": make_record(prompt="photo of a house"),
    "another prompt, another seed": make_record(seed=1, prompt="photo of a house"),
    "another setting more": make_record(seed=1, lora_scale=0.5),
    "a record of another file": make_record(seed=1, file="000-0000-seed2.png"),
}


def save(folder, record, name=None):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = folder / (name or record["file"])
    outputs.save_image(Image.fromarray(pixels), {**record, "digest": "0" * 16}, file)
    return file


def test_planned_images_are_finished(tmp_path):
    for record in PLANNED:
        save(tmp_path, record)
    finished, others, stale = outputs.find_existing(tmp_path, PLANNED)
    assert [record["file"] for record in finished] == [record["file"] for record in PLANNED]
    assert others == stale == []


@pytest.mark.parametrize("name", OTHERS)
def test_others_with_the_same_settings_may_stay(tmp_path, name):
    save(tmp_path, OTHERS[name])
    finished, others, stale = outputs.find_existing(tmp_path, PLANNED)
    assert finished == stale == []
    assert others == [{**OTHERS[name], "digest": "0" * 16}]


@pytest.mark.parametrize("name", STALE)
def test_others_that_would_be_mixed_up_are_stale(tmp_path, name):
    file_name = "000-0000-seed1.png" if "record" in name else None
    file = save(tmp_path, STALE[name], file_name)
    assert outputs.find_existing(tmp_path, PLANNED) == ([], [], [file])


@pytest.fixture
def folder(generate_args, tmp_path):
    """Three images of one prompt, with the seed 0."""
    generate.main(generate_args(tmp_path / "new", num_samples_per_prompt=3))
    return tmp_path / "new"


def listed(folder):
    lines = (folder / outputs.RECORDS).read_text().splitlines()
    return sorted(json.loads(line)["file"] for line in lines)


def test_another_seed_and_fewer_images_leave_the_first_ones_as_they_are(
    folder, generate_args, digests
):
    """One line of images.jsonl for each image; the sheet shows those that were asked for."""
    before = digests(folder)
    generate.main(generate_args(folder, num_samples_per_prompt=2, seed=1))
    generate.main(generate_args(folder, num_samples_per_prompt=1))
    after = digests(folder)
    assert before.items() < after.items()
    assert listed(folder) == sorted(after)
    assert len(after) == len(set(after.values())) == 5
    assert Image.open(folder / outputs.CONTACT_SHEET).size[0] == 480


def test_another_prompt_is_refused(folder, generate_args, digests):
    before = digests(folder)
    for seed in (0, 1):
        with pytest.raises(UserError, match="holds 3 images made with another prompt, model or"):
            generate.main(generate_args(folder, prompts=["photo of a house"], seed=seed))
    assert digests(folder) == before


def test_overwrite_keeps_nothing_that_was_not_asked_for(folder, generate_args, digests):
    """So that what run.sh trains on does not depend on what it did before."""
    before = digests(folder)
    (folder / "mine.png").write_bytes(b"mine")
    generate.main(generate_args(folder, num_samples_per_prompt=1, overwrite=True))
    (name,) = digests(folder)
    assert digests(folder)[name] == before[name]
    assert listed(folder) == [name]
    assert (folder / "mine.png").exists()
