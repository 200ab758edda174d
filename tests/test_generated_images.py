"""Generated images: they carry their records, are found again, listed, and shown on sheets.

A folder takes more images, fewer, and another seed's; images of another model, prompt or setting
are never mixed in.
"""

import errno
import json
import os
import subprocess
import textwrap
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFont

import generate
from dreambooth.cli import UserError
from dreambooth.files import atomic, generated_images
from dreambooth.files.generated_images import Existing, find_existing

FONT = ImageFont.load_default(size=16)
SETTINGS = {"model": "abc", "guidance_scale": 7.5, "resolution": 64}


def random_image(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return Image.fromarray(pixels)


def make_record(prompt_number=0, index=0, seed=0, **changes):
    own = {
        "file": generated_images.file_name(prompt_number, index, seed),
        "prompt": f"photo of a car, place {prompt_number}; Straße",
        "seed": seed,
        "index": index,
    }
    return {**own, **SETTINGS, **changes}


PLANNED = [make_record(number, index) for number in (0, 1) for index in (0, 1)]
OTHERS = [  # more images of a prompt, also with another seed; more prompts
    make_record(index=2),
    make_record(index=7, seed=1),
    make_record(prompt_number=2),
]
STALE = {
    "another setting": make_record(guidance_scale=1.0),
    "another model, another seed": make_record(seed=1, model="def"),
    "another model, more prompts": make_record(prompt_number=2, model="def"),
    "another prompt": make_record(prompt="photo of a house"),
    "another prompt, more images": make_record(index=2, prompt="photo of a house"),
}


def save(folder, record, name=None):
    """Save an image for `record`; returns its file."""
    folder.mkdir(exist_ok=True)
    file = folder / (name or record["file"])
    generated_images.save_image(random_image(record["index"]), record, file)
    return file


def metadata(folder):
    lines = (folder / generated_images.METADATA).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_an_image_carries_its_record(tmp_path):
    file = save(tmp_path, make_record())
    assert generated_images.read_record(file) == make_record()
    assert np.array_equal(np.asarray(Image.open(file)), np.asarray(random_image()))
    assert os.listdir(tmp_path) == [file.name]


def test_a_file_that_is_truncated_or_not_ours_has_no_record(tmp_path):
    """The record stands at the beginning of an image, before the pixels."""
    content = save(tmp_path, make_record()).read_bytes()
    truncated = tmp_path / "truncated.png"
    for length in [*range(0, 400, 7), *range(400, len(content) - 20, 997), len(content) - 1]:
        truncated.write_bytes(content[:length])
        assert generated_images.read_record(truncated) is None
    random_image().save(tmp_path / "photo.png")
    random_image().save(tmp_path / "photo.jpg")
    (tmp_path / "notes.png").write_text("no image")
    generated_images.save_image(random_image(), ["another program's"], tmp_path / "list.png")
    for name in ("photo.png", "photo.jpg", "notes.png", "list.png", "nowhere.png", ""):
        assert generated_images.read_record(tmp_path / name) is None


def test_planned_images_are_finished_and_others_with_the_same_settings_may_stay(tmp_path):
    for record in PLANNED + OTHERS:
        save(tmp_path, record)
    assert find_existing(tmp_path, PLANNED) == Existing(PLANNED, OTHERS, [])
    first, *more = PLANNED
    finished, others, stale = find_existing(tmp_path, [first])
    assert (finished, stale) == ([first], [])
    assert len(others) == len(more + OTHERS)


def test_images_that_would_be_mixed_up_are_stale(tmp_path):
    for name, record in STALE.items():
        file = save(tmp_path / name, record)
        assert find_existing(file.parent, PLANNED) == Existing([], [], [file]), name
    renamed = save(tmp_path / "renamed", make_record(seed=2), "000-0000-seed1.png")
    assert find_existing(renamed.parent, PLANNED) == Existing([], [], [renamed])


def test_truncated_images_and_other_files_are_absent(tmp_path):
    """Also a copy under a name that is not ours, though it carries a record. One that an image
    editor has saved is not generated anew without being asked."""
    truncated = save(tmp_path, PLANNED[0])
    truncated.write_bytes(truncated.read_bytes()[:-100])
    save(tmp_path, make_record(), "my favourite-seed0.png")
    assert find_existing(tmp_path, PLANNED) == Existing([], [], [])
    retouched = tmp_path / PLANNED[1]["file"]
    random_image().save(retouched)
    assert find_existing(tmp_path, PLANNED) == Existing([], [], [retouched])
    retouched.unlink()
    assert find_existing(tmp_path / "nowhere", PLANNED) == Existing([], [], [])
    with pytest.raises(UserError, match="notes.txt is a file: name a directory"):
        (tmp_path / "notes.txt").touch()
        find_existing(tmp_path / "notes.txt", PLANNED)


def test_a_record_is_judged_by_the_fields_that_it_shares_with_the_planned_one(tmp_path):
    """What an earlier version recorded beyond, and what it did not record, makes no difference."""
    earlier = make_record(digest="0123456789abcdef")
    save(tmp_path, earlier)
    planned = [make_record(sampler_of_tomorrow="x")]
    assert find_existing(tmp_path, planned) == Existing([earlier], [], [])
    more = make_record(index=1, sampler_of_tomorrow="y")
    file = save(tmp_path, more)
    assert find_existing(tmp_path, planned) == Existing([earlier], [], [file])
    planned = [make_record(sampler_of_tomorrow="x", guidance_scale=1.0)]
    stale = [tmp_path / earlier["file"], file]
    assert find_existing(tmp_path, planned) == Existing([], [], stale)


@pytest.fixture
def earlier(sampling_args, tmp_path):
    """A folder of an earlier run, with three images of one prompt and the seed 0."""
    folder = tmp_path / "new"
    folder.mkdir()
    for record in generate.list_records(sampling_args(folder, num_samples_per_prompt=3)):
        save(folder, record)
    return folder


def test_another_seed_and_fewer_images_leave_the_first_ones_as_they_are(
    earlier, generate_args, sampling_args, digests
):
    """One line of metadata.jsonl for each image, as Hugging Face's ImageFolder reads it, with all
    that the image depends on; the sheet shows those that were asked for."""
    before = digests(earlier)
    args = sampling_args(earlier, num_samples_per_prompt=2, seed=1)
    generate.main(args)
    new = generate.list_records(args)
    generate.main(generate_args(earlier, num_samples_per_prompt=1))
    after = digests(earlier)
    assert before.items() < after.items()
    assert len(after) == len(set(after.values())) == 5
    lines = {line["file_name"]: line for line in metadata(earlier)}
    assert sorted(lines) == sorted(after)
    assert len(metadata(earlier)) == 5
    for record in new:
        text, name = record.pop("prompt"), record.pop("file")
        assert lines[name] == {"file_name": name, "text": text, **record}
    assert Image.open(earlier / generated_images.CONTACT_SHEET).size[0] == 480


def test_captions_of_a_users_own_images_stay(earlier, generate_args):
    """Those of class images, say, that generate.py is to complete: they were lost."""
    own = '{"file_name": "mine.png", "text": "photo of a red car by the sea"}'
    wrong = '{"file_nam": "mistyped.png"}'
    file = earlier / "metadata.jsonl"
    file.write_text(f'{own}\n{wrong}\n{{"file_name": "half of a li')
    generate.main(generate_args(earlier, num_samples_per_prompt=3))
    generate.main(generate_args(earlier, num_samples_per_prompt=3))
    assert file.read_text().splitlines()[:2] == [own, wrong]
    assert len(metadata(earlier)) == 5
    file.write_text(f"\ufeff{own}")  # as Windows signs it, without a line break
    generate.main(generate_args(earlier, num_samples_per_prompt=3))
    assert file.read_text().splitlines()[0] == own
    file.write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(UserError, match="metadata.jsonl is not a UTF-8 text file"):
        generate.main(generate_args(earlier, num_samples_per_prompt=3))


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    """Not what another process is writing now, such as the run of another subject of the class."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = atomic.HOST
    leftovers = [f".000-0000-seed0.png.{here}.{ended.pid}.tmp", ".000-0004-seed0.png.other.1.tmp"]
    leftovers += [f".metadata.jsonl.{here}.{ended.pid}.tmp"]
    others = ["000-0001-seed0.png", "metadata.jsonl", ".hidden", "notes.tmp"]
    others += [f".000-0002-seed0.png.{here}.{os.getpid()}.tmp"]
    others += [f".000-0003-seed0.png.other.{ended.pid}.tmp"]
    for name in leftovers + others:
        (tmp_path / name).touch()
    long_ago = time.time() - 4000
    os.utime(tmp_path / ".000-0004-seed0.png.other.1.tmp", (long_ago, long_ago))
    lately = time.time() - 3000  # another machine may still be writing it
    os.utime(tmp_path / others[-1], (lately, lately))
    generated_images.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_contact_sheet_has_a_row_for_each_caption(flat_image, tmp_path):
    """Images of 192 pixels, with gaps of 6, below captions of 26; at most eight per row, and the
    caption says so."""
    red = flat_image("red.png", (255, 0, 0))
    blue = flat_image("blue.png", (0, 0, 255))
    sheet = tmp_path / "sheet.png"
    generated_images.contact_sheet({"red": [red] * 9, "blue": [blue] * 2}, sheet)
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (2 * (26 + 192 + 6) + 6, 8 * 198 + 6, 3)
    for column in range(8):
        corner = pixels[6 + 26, 6 + column * 198]
        assert corner.tolist() == [255, 0, 0]
    second_row = pixels[6 + 224 + 26 + 100]
    is_blue = (second_row == [0, 0, 255]).all(1)
    assert is_blue.sum() == 2 * 192
    generated_images.contact_sheet({"red (8 of 9 shown)": [red] * 8, "blue": [blue] * 2}, sheet)
    assert np.array_equal(np.asarray(Image.open(sheet)), pixels)


def test_images_are_fitted_into_their_squares(tmp_path):
    """Small ones keep their hard edges; wide ones get white above and below."""
    small, wide = tmp_path / "small.png", tmp_path / "wide.png"
    Image.fromarray(np.uint8([[0, 255], [255, 0]]).repeat(3).reshape(2, 2, 3)).save(small)
    Image.new("RGB", (400, 200)).save(wide)
    generated_images.contact_sheet({"": [small, wide]}, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))[-198:-6]
    first, second = pixels[:, 6:198], pixels[:, 204:396]
    assert set(np.unique(first)) == {0, 255}
    assert (second[:40] == 255).all()
    assert (second[60:130] == 0).all()


LONG = "photo of unqtkn car in the snow beside a red house with a white door, by embedded"


def test_a_long_caption_takes_lines_that_fit_and_loses_nothing():
    """And no word is broken that fits into a line."""
    for text in (LONG, "W" * 200, "/a/long/path" * 20, "写真 " * 60):
        for width in (60, 468):
            lines = generated_images.wrap(text, FONT, width)
            assert max(FONT.getlength(line) for line in lines) <= width
            assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    lines = generated_images.wrap(LONG, FONT, 468)
    assert len(lines) == 2
    assert " ".join(lines) == LONG
    assert generated_images.wrap("", FONT, 468) == [""]


def test_the_lines_of_a_caption_are_found_in_few_trials():
    """One of 2,000 characters, as FLUX.2-klein takes, cost 5 s per row and sheet."""
    measured = []
    font = SimpleNamespace(getlength=lambda line: measured.append(line) or 8 * len(line))
    lines = generated_images.wrap("photo of a car " * 130, font, 468)
    assert lines == textwrap.wrap("photo of a car " * 130, 58)
    assert len(measured) < 500


def test_a_sheet_has_a_hundred_rows_at_most(flat_image, tmp_path):
    """And says so: thousands would not fit the memory."""
    red = flat_image("red.png", (255, 0, 0), size=(4, 4))
    heights = []
    for count in (100, 300):
        rows = {f"prompt {number}": [red] for number in range(count)}
        generated_images.contact_sheet(rows, tmp_path / "sheet.png", side=4)
        heights.append(Image.open(tmp_path / "sheet.png").size[1])
    assert heights == [100 * (20 + 6 + 4 + 6) + 6] * 2


def test_a_caption_that_does_not_fit_pushes_its_images_down(flat_image, tmp_path):
    """One image of 192 pixels per row: the sheet is as wide as it always is at least, 480."""
    red = flat_image("red.png", (255, 0, 0))
    sheet = tmp_path / "sheet.png"
    generated_images.contact_sheet({"short": [red], LONG: [red], "last": [red]}, sheet)
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape == (3 * (26 + 192 + 6) + 20 + 6, 480, 3)
    is_red = (pixels[:, 10] == (255, 0, 0)).all(axis=1)
    tops = np.flatnonzero(is_red[1:] & ~is_red[:-1]) + 1
    assert tops.tolist() == [32, 32 + 224 + 20, 32 + 2 * 224 + 20]
    assert (pixels[:, -6:] == 255).all()  # no caption runs into the margin
    lines = (pixels[6 + 224 :][:40] < 128).all(axis=2).any(axis=1).reshape(2, 20)
    assert lines.sum(axis=1).min() > 8  # each has its place


def test_a_sheet_of_folders(flat_image, tmp_path, capsys):
    """What it cannot be made of, or written to, is refused, and leaves no half of it."""
    photo = flat_image("a.png", 0, folder=tmp_path / "a")
    flat_image("b.png", 0, folder=tmp_path / "b")
    sheet = tmp_path / "sheet.png"
    rows = [f"first={tmp_path / 'a'}", f"second={tmp_path / 'b'}"]

    def run(rows, output):
        generated_images.main(SimpleNamespace(rows=rows, output=output, columns=8))

    for row in ("first", "first="):
        with pytest.raises(UserError, match=f"'{row}': write rows as caption=folder"):
            run([row], sheet)
    run([f"size=big, at=night={tmp_path / 'a'}"], sheet)  # prompts may hold a "="
    sheet.unlink()
    capsys.readouterr()
    with pytest.raises(UserError, match="--output /proc/here cannot be written"):
        run(rows, "/proc/here/sheet.png")
    content = photo.read_bytes()
    photo.write_bytes(content[:-60])
    with pytest.raises(UserError, match="a.png"):
        run(rows, sheet)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    photo.write_bytes(content)
    run(rows, sheet)
    assert capsys.readouterr().out == f"wrote {sheet}\n"
    assert Image.open(sheet).size == (480, 2 * 224 + 6)


def test_what_is_small_on_one_side_alone_is_scaled_smoothly():
    """A wide photo's fine stripes become grey; of sharp pixels every other one would be left."""
    stripes = np.tile(np.uint8([0, 255]), (90, 192))
    image = generated_images.fit_into_square(Image.fromarray(stripes).convert("RGB"), 192)
    middle = np.asarray(image)[96, 8:-8].astype(int)
    assert np.abs(middle - 127).max() < 60


def test_a_caption_ends_before_the_margin(flat_image, tmp_path):
    """Wherever its words end: six pixels are free at the right."""
    red, sheet = flat_image("red.png", (255, 0, 0)), tmp_path / "sheet.png"
    captions = {"i" * number + " car": [red] for number in range(100, 140)}
    generated_images.contact_sheet(captions, sheet, side=32)
    assert (np.asarray(Image.open(sheet))[:, -6:] == 255).all()


def test_a_sheet_replaces_none_of_its_images(flat_image, tmp_path):
    photo = flat_image("a.png", 0)
    args = SimpleNamespace(rows=[f"photos={tmp_path}"], output=str(photo), columns=8)
    (tmp_path / "link").symlink_to(tmp_path)
    for output in (photo, tmp_path / "link" / "a.png"):
        args.output = str(output)
        with pytest.raises(UserError, match="is one of the images: choose another file"):
            generated_images.main(args)
    with pytest.raises(UserError, match="--columns is 0: must be at least 1"):
        generated_images.main(SimpleNamespace(**{**vars(args), "columns": 0}))


def test_thousands_of_prompts_and_images_are_recognized(tmp_path):
    records = [make_record(1000, 10_000)]
    save(tmp_path, records[0])
    assert find_existing(tmp_path, records) == Existing(records, [], [])


def test_what_another_users_process_is_writing_is_left_alone(tmp_path, monkeypatch):
    """The system says that there is one, and no more."""

    def kill(process_id, number):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", kill)
    file = tmp_path / f".000-0000-seed0.png.{atomic.HOST}.1.tmp"
    file.touch()
    generated_images.remove_leftovers(tmp_path)
    assert file.exists()
