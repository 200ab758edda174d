"""Folders of images: how each is read, what is skipped or refused; the folder of one subject."""

import errno

import numpy as np
import pytest
from PIL import Image

from dreambooth import decode, images
from dreambooth.cli import UserError

WHITE = (255, 255, 255)


def first_pixel(path):
    image = images.open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def random_image(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Mode, colour in that mode, what it becomes in RGB on white.
COLOURS = [
    ("L", 100, (100, 100, 100)),
    ("1", 1, WHITE),
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("RGBA", (0, 0, 0, 0), WHITE),
    ("LA", (0, 255), (0, 0, 0)),
    ("LA", (0, 64), (191, 191, 191)),
]


@pytest.mark.parametrize(("mode", "colour", "expected"), COLOURS)
def test_every_mode_becomes_rgb_on_white(flat_image, mode, colour, expected):
    """Fault 6 of the published example: no mode="RGB", so that grey, palette, CMYK and transparent
    images broke the run, or were trained on as nonsense (transparency as black)."""
    assert first_pixel(flat_image("a.png", colour, mode=mode)) == expected


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "transparent.png", transparency=1)
    image.save(tmp_path / "other colour transparent.png", transparency=2)
    image.save(tmp_path / "transparent.gif", transparency=1)
    assert first_pixel(tmp_path / "opaque.png") == (200, 100, 50)
    assert first_pixel(tmp_path / "transparent.png") == WHITE
    assert first_pixel(tmp_path / "other colour transparent.png") == (200, 100, 50)
    assert first_pixel(tmp_path / "transparent.gif") == WHITE


def test_cmyk_is_converted(flat_image):
    red = flat_image("red.tif", (0, 255, 255, 0), mode="CMYK")
    dark = flat_image("dark.tif", (0, 0, 0, 204), mode="CMYK")
    lossy = flat_image("red.jpg", (0, 255, 255, 0), mode="CMYK")
    assert first_pixel(red) == (255, 0, 0)
    assert first_pixel(dark) == (51, 51, 51)
    assert np.allclose(first_pixel(lossy), (255, 0, 0), atol=4)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, name):
    """257 steps of 16 bits are one step of 8; Pillow's own conversion makes all above 255 white."""
    row = np.array([0, 257, 25700, 32896, 65535], np.uint16)
    Image.fromarray(np.tile(row, (5, 1))).save(tmp_path / name)
    pixels = np.asarray(images.open_image(tmp_path / name))
    assert pixels[0, :, 0].tolist() == [0, 1, 100, 128, 255]
    assert (pixels == pixels[..., :1]).all()


# How a camera stores an upright image, by the orientation that it writes beside it.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(tmp_path, orientation):
    """Fault 6 of the published example: photos of a phone held upright were trained on lying on
    their side."""
    upright = random_image(32, 48)
    stored = upright
    if STORED[orientation] is not None:
        stored = upright.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    image = images.open_image(tmp_path / "a.png")
    assert image.size == (48, 32)
    assert np.array_equal(np.asarray(image), np.asarray(upright))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"])
def test_truncated_files_are_refused_by_name(tmp_path, suffix):
    """At any length a truncated file is an error that names it, never another exception."""
    complete = tmp_path / f"complete{suffix}"
    truncated = tmp_path / f"truncated{suffix}"
    random_image(32, 32).save(complete)
    content = complete.read_bytes()
    refused = 0
    for length in np.linspace(0, len(content) - 1, 40).astype(int):
        truncated.write_bytes(content[:length])
        try:
            images.open_image(truncated)
        except UserError as error:
            assert str(truncated) in str(error)
            refused += 1
    assert refused >= 35  # some formats do not need their last bytes


def test_storage_that_fails_for_a_while_is_not_the_images_fault(tmp_path, flat_image, monkeypatch):
    """Ray then reads it again; a damaged image would end the run."""
    path = flat_image("a.png", (255, 0, 0))

    def stale(file):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(decode.Image, "open", stale)
    with pytest.raises(OSError, match="Stale file handle") as error:
        images.open_image(path)
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize(
    "content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"]
)
def test_files_that_are_no_images_are_refused_by_name(tmp_path, content):
    (tmp_path / "odd.jpg").write_bytes(content)
    with pytest.raises(UserError, match="odd.jpg: unreadable or truncated image"):
        images.open_image(tmp_path / "odd.jpg")


def test_decompression_bombs_are_refused_by_name(flat_image, monkeypatch):
    """Pillow refuses images of hundreds of megapixels; here its limit is lowered instead."""
    path = flat_image("vast.png", 0, size=(400, 400))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(UserError, match="vast.png: unreadable"):
        images.open_image(path)


def test_images_that_are_too_small_are_refused_by_name(flat_image):
    """A quarter of the resolution is enough."""
    enough = flat_image("enough.png", 0, size=(16, 300))
    small = flat_image("icon.png", 0, size=(15, 300))
    images.check_images([enough], 64)
    with pytest.raises(UserError, match="icon.png: 15 x 300 pixels are too small to train at 64"):
        images.check_images([enough, small], 64)


def test_every_image_is_checked(flat_image, tmp_path):
    good = flat_image("good.png", 0)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(good.read_bytes()[:-50])
    with pytest.raises(UserError, match="truncated.png"):
        images.check_images([good, good, truncated], 64)


@pytest.mark.parametrize("size", [(200, 100), (100, 201), (64, 64), (31, 50)])
def test_the_shorter_side_becomes_the_resolution(flat_image, size):
    """Scaled down or up, in landscape or portrait format; one colour stays that colour."""
    crop, _ = images.crop_image(flat_image("a.png", (0, 51, 255), size=size), 64, seed=0)
    assert crop.shape == (3, 64, 64)
    assert crop.dtype == np.uint8
    assert (crop == np.array([0, 51, 255])[:, None, None]).all()


def test_resizing_is_antialiased(tmp_path):
    """A fine chequerboard of black and white becomes grey, not a pattern."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    crop, _ = images.crop_image(tmp_path / "board.png", 64, seed=0)
    assert np.abs(crop.astype(int) - 127.5).max() < 6


@pytest.fixture
def ramp(tmp_path):
    """An image, 96 x 64, whose column x has the value x: a crop tells where it is from."""
    values = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    Image.fromarray(values).save(tmp_path / "ramp.png")
    return str(tmp_path / "ramp.png")


def test_crops_follow_from_the_seed_and_lie_inside_the_image(ramp):
    """The left edge can be at any of the columns 0 to 32."""
    edges = set()
    for seed in range(40):
        crop, _ = images.crop_image(ramp, 64, seed)
        again, _ = images.crop_image(ramp, 64, seed)
        assert np.array_equal(crop, again)
        left = int(crop[0, 0, 0])
        assert (crop[0] == np.arange(left, left + 64)).all()
        edges.add(left)
    assert len(edges) > 16
    assert min(edges) >= 0
    assert max(edges) <= 32


def test_keys_tell_crops_apart(ramp):
    """One key for each place, one place for each key."""
    places = set()
    for seed in range(40):
        crop, key = images.crop_image(ramp, 64, seed)
        places.add((key, int(crop[0, 0, 0])))
    keys = {key for key, _ in places}
    edges = {left for _, left in places}
    assert len(keys) == len(edges) == len(places)


def test_files_that_are_no_images_are_skipped(flat_image, tmp_path):
    folder = tmp_path / "photos"
    photos = [flat_image(name, 0, folder=folder) for name in ("b.JPG", "a.png", "c.webp")]
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "images.jsonl", "._a.png", "desktop.ini"):
        (folder / name).write_text("no image")
    flat_image("contact_sheet.png", 0, folder=folder)
    flat_image("a-checkpoint.png", 0, folder=folder / ".ipynb_checkpoints")
    flat_image("d.png", 0, folder=folder / "rejected")
    assert images.find_images(folder) == sorted(photos)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no images there"):
        images.find_images(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._a.png"):
        (tmp_path / name).write_text("no image")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    with pytest.raises(UserError, match="no images there"):
        images.find_images(tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path / 'nowhere'}: no such folder"):
        images.find_images(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["IMG_1.DNG", "b.psd", "c.cr2", "d.svg"])
def test_unreadable_formats_are_refused_by_name(flat_image, tmp_path, name):
    """Fault 6 of the published example: what it could not read was skipped silently."""
    flat_image("a.png", 0)
    (tmp_path / name).write_bytes(b"some camera's own")
    with pytest.raises(UserError, match="cannot be read") as error:
        images.find_images(tmp_path)
    assert name in str(error.value)
    assert ".jpg" in str(error.value)


def test_no_format_is_both_readable_and_unreadable():
    assert not images.READABLE & images.UNREADABLE


def test_readable_formats_are_those_that_this_pillow_opens():
    assert {".webp", ".gif", ".tif", ".avif"} <= images.READABLE
    registered = Image.registered_extensions()
    for suffix in images.READABLE:
        assert registered[suffix] in Image.OPEN


def test_own_photos_are_those_of_this_subject_alone(flat_image, tmp_path):
    """Fault 11 of the published example: the folder of own images was never cleared, so that the
    last subject's photos mixed with the next one's."""
    flat_image("tom1.png", 0, folder=tmp_path / "tom")
    flat_image("tom2.png", 0, folder=tmp_path / "tom")
    flat_image("rex.png", 0, folder=tmp_path / "rex")
    (tmp_path / "rex" / "notes.txt").write_text("a dog")
    own = tmp_path / "deep" / "images-own"
    images.copy_images(tmp_path / "tom", own)
    assert [path.name for path in images.find_images(own)] == ["tom1.png", "tom2.png"]
    for _ in range(2):
        images.copy_images(tmp_path / "rex", own)
        assert [path.name for path in images.find_images(own)] == ["rex.png"]
    assert names_in(tmp_path / "rex") == ["notes.txt", "rex.png"]


def test_a_folder_copied_onto_itself_stays_as_it_is(flat_image, tmp_path):
    flat_image("rex.png", 0, folder=tmp_path / "rex")
    own = tmp_path / "own"
    images.copy_images(tmp_path / "rex", own)
    images.copy_images(own, own)
    assert [path.name for path in images.find_images(own)] == ["rex.png"]


def test_the_users_own_folder_is_never_emptied(flat_image, tmp_path):
    """With the arguments the wrong way round, say: only what copy_images has made is replaced."""
    flat_image("a.png", 0, folder=tmp_path / "new")
    flat_image("tom.png", 0, folder=tmp_path / "tom")
    with pytest.raises(UserError, match="tom.png"):
        images.copy_images(tmp_path / "new", tmp_path / "tom")
    assert names_in(tmp_path / "tom") == ["tom.png"]


def test_bad_photos_leave_the_own_folder_as_it_is(flat_image, tmp_path):
    flat_image("a.png", 0, folder=tmp_path / "own")
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError):
            images.copy_images(source, tmp_path / "own")
        assert names_in(tmp_path / "own") == ["a.png"]


def test_photos_kept_inside_the_own_folder_survive(flat_image, tmp_path):
    """The folder is replaced: photos that lie below it would be lost."""
    own = tmp_path / "own"
    images.copy_images(flat_image("rex.png", 0, folder=tmp_path / "rex").parent, own)
    photo = flat_image("tom.png", 0, folder=own / "tom")
    with pytest.raises(UserError, match="is inside"):
        images.copy_images(photo.parent, own)
    assert photo.exists()


def test_the_module_runs_as_a_command(run_script, assert_one_line, flat_image, tmp_path):
    flat_image("tom.png", 0, folder=tmp_path / "tom")
    done = run_script("-m", "dreambooth.images", tmp_path / "tom", tmp_path / "own")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in images.find_images(tmp_path / "own")] == ["tom.png"]
    refused = run_script("-m", "dreambooth.images", tmp_path / "nowhere", tmp_path / "own")
    assert_one_line(refused, "no such folder")
