"""Generated images on disk, which carry their records, and contact sheets."""

import json
import os
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

from dreambooth import atomic, outputs
from dreambooth.cli import UserError
from dreambooth.images import find_images


def random_image(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels)


def make_record(index, **changes):
    record = {
        "file": outputs.file_name(0, index, 0),
        "prompt": "photo of a car, at night; Straße",
        "seed": 0,
        "index": index,
        "guidance_scale": 7.5,
    }
    return {**record, **changes}


def save(folder, record):
    """Save an image for `record`; returns its file."""
    finished = {**record, "digest": "0" * 16}
    outputs.save_image(random_image(record["index"]), finished, folder / record["file"])
    return folder / record["file"]


def test_an_image_carries_its_record(tmp_path):
    record = make_record(0, digest="ab12")
    outputs.save_image(random_image(), record, tmp_path / "a.png")
    assert outputs.read_record(tmp_path / "a.png") == record
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(random_image()))
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_file_that_is_not_ours_has_no_record(tmp_path):
    random_image().save(tmp_path / "photo.png")
    random_image().save(tmp_path / "photo.jpg")
    (tmp_path / "notes.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    for name in ("photo.png", "photo.jpg", "notes.png", "empty.png", "nowhere.png"):
        assert outputs.read_record(tmp_path / name) is None
    assert outputs.read_record(tmp_path) is None


def test_a_truncated_image_has_no_record_at_any_length(tmp_path):
    """The record stands at the beginning of the file, before the pixels."""
    content = save(tmp_path, make_record(0)).read_bytes()
    truncated = tmp_path / "truncated.png"
    for length in [*range(0, 400, 7), *range(400, len(content) - 20, 997), len(content) - 1]:
        truncated.write_bytes(content[:length])
        assert outputs.read_record(truncated) is None


def test_digests_are_of_the_pixels_alone(tmp_path):
    image = random_image()
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    digests = {outputs.pixel_digest(Image.open(tmp_path / name)) for name in ("a.png", "a.bmp")}
    assert digests == {outputs.pixel_digest(image)}
    assert outputs.pixel_digest(random_image(1)) not in digests


def test_existing_images_are_finished_or_others_or_stale_or_neither(tmp_path):
    planned = [make_record(i) for i in range(4)]
    save(tmp_path, planned[0])
    other_settings = save(tmp_path, make_record(1, guidance_scale=1.0))
    save(tmp_path, make_record(9))
    truncated = save(tmp_path, planned[2])
    truncated.write_bytes(truncated.read_bytes()[:-100])
    random_image().save(tmp_path / "my photo.png")
    random_image().save(tmp_path / planned[3]["file"])  # by its name ours, but without a record
    finished, others, stale = outputs.find_existing(tmp_path, planned)
    assert [record["file"] for record in finished] == [planned[0]["file"]]
    assert [record["file"] for record in others] == [make_record(9)["file"]]
    assert stale == [other_settings]


def test_a_file_of_another_name_is_neither(tmp_path):
    """A copy that the user has renamed, say, though it carries a record."""
    save(tmp_path, make_record(0)).rename(tmp_path / "my favourite-seed0.png")
    assert outputs.find_existing(tmp_path, [make_record(0)]) == ([], [], [])


def test_a_folder_that_does_not_exist_has_no_images(tmp_path):
    assert outputs.find_existing(tmp_path / "nowhere", [make_record(0)]) == ([], [], [])


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    """Not what another process is writing now, such as the run of another subject of the class."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = atomic.HOST
    leftovers = [f".000-0000-seed0.png.{here}.{ended.pid}.tmp", ".000-0004-seed0.png.other.1.tmp"]
    leftovers += [f".images.jsonl.{here}.{ended.pid}.tmp"]
    others = ["000-0001-seed0.png", "images.jsonl", ".hidden", "notes.tmp"]
    others += [f".000-0002-seed0.png.{here}.{os.getpid()}.tmp", ".000-0003-seed0.png.other.1.tmp"]
    for name in leftovers + others:
        (tmp_path / name).touch()
    long_ago = time.time() - 4000
    os.utime(tmp_path / ".000-0004-seed0.png.other.1.tmp", (long_ago, long_ago))
    outputs.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_records_are_lines_of_json(tmp_path):
    records = [make_record(i) for i in range(3)]
    outputs.write_records(tmp_path, records[:1])
    outputs.write_records(tmp_path, records[:2])
    outputs.append_record(tmp_path, records[2])
    lines = (tmp_path / outputs.RECORDS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert os.listdir(tmp_path) == [outputs.RECORDS]


def test_a_contact_sheet_has_a_row_for_each_caption(flat_image, tmp_path):
    """Images of 192 pixels, with gaps of 6, below captions of 26; at most eight per row."""
    red = flat_image("red.png", (255, 0, 0))
    blue = flat_image("blue.png", (0, 0, 255))
    sheet = tmp_path / "sheet.png"
    outputs.contact_sheet({"red": [red] * 9, "blue": [blue] * 2}, sheet)
    image = Image.open(sheet)
    assert image.size == (8 * 198 + 6, 2 * (26 + 192 + 6) + 6)
    pixels = np.asarray(image)
    for column in range(8):
        corner = pixels[6 + 26, 6 + column * 198]
        assert corner.tolist() == [255, 0, 0]
    second_row = pixels[6 + 224 + 26 + 100]
    is_blue = (second_row == [0, 0, 255]).all(1)
    assert is_blue.sum() == 2 * 192


def test_images_are_fitted_into_their_squares(flat_image):
    """Small ones keep their hard edges; wide ones get white above and below."""
    small = Image.fromarray(np.uint8([[0, 255], [255, 0]]).repeat(3).reshape(2, 2, 3))
    fitted = np.asarray(outputs.fit_into_square(small, 192))
    assert fitted.shape == (192, 192, 3)
    assert set(np.unique(fitted)) == {0, 255}
    wide = Image.new("RGB", (400, 200))
    fitted = np.asarray(outputs.fit_into_square(wide, 192))
    assert fitted.shape == (192, 192, 3)
    assert (fitted[:40] == 255).all()
    assert (fitted[60:130] == 0).all()


def test_a_contact_sheet_is_not_an_image_of_its_folder(flat_image, tmp_path):
    """The folder can be given to train.py as it is."""
    photo = flat_image("a.png", 0)
    outputs.contact_sheet({"a": [photo]}, tmp_path / outputs.CONTACT_SHEET)
    outputs.write_records(tmp_path, [])
    assert find_images(tmp_path) == [photo]


def test_the_module_makes_a_sheet_of_folders(run_script, assert_one_line, flat_image, tmp_path):
    flat_image("a.png", 0, folder=tmp_path / "a")
    flat_image("b.png", 0, folder=tmp_path / "b")
    sheet = tmp_path / "sheet.png"
    rows = [f"first={tmp_path / 'a'}", f"second={tmp_path / 'b'}"]
    done = run_script("-m", "dreambooth.outputs", "--output", sheet, *rows)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {sheet}\n"
    assert Image.open(sheet).size[1] == 2 * 224 + 6
    refused = run_script("-m", "dreambooth.outputs", "--output", sheet, "first")
    assert_one_line(refused, "'first': give rows as caption=folder")


def test_a_sheet_that_cannot_be_written_is_refused(flat_image, run_script, assert_one_line):
    photo = flat_image("a.png", 0)
    refused = run_script(
        "-m", "dreambooth.outputs", "--output", "/proc/here/sheet.png", f"a={photo.parent}"
    )
    assert_one_line(refused, "--output /proc/here cannot be written")


def test_user_error_of_a_damaged_image_on_a_sheet_names_it(flat_image, tmp_path):
    photo = flat_image("a.png", 0)
    photo.write_bytes(photo.read_bytes()[:-60])
    with pytest.raises(UserError, match="a.png"):
        outputs.contact_sheet({"a": [photo]}, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
