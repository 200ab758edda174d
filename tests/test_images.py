"""Folders of images: how each is read, what is passed over, what is refused, and the folder of one subject."""

import numpy as np
import pytest
from PIL import Image

from dreambooth import images
from dreambooth.checks import UserError


def pixel(path):
    image = images.open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


# mode, colour in that mode, what it becomes in RGB on white
COLOURS = [
    ("L", 100, (100, 100, 100)),
    ("1", 1, (255, 255, 255)),
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
    ("LA", (0, 255), (0, 0, 0)),
    ("LA", (0, 64), (191, 191, 191)),
]


@pytest.mark.parametrize(("mode", "colour", "expected"), COLOURS)
def test_every_mode_becomes_rgb_on_white(flat_image, mode, colour, expected):
    """Fault 6 of the original: no mode="RGB", so that grey, palette, CMYK and transparent images
    broke the run, or were trained on as nonsense (transparency as black)."""
    assert pixel(flat_image("a.png", colour, mode=mode)) == expected


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "other.png", transparency=2)
    image.save(tmp_path / "clear.gif", transparency=1)
    found = {name: pixel(tmp_path / name) for name in ("opaque.png", "clear.png", "other.png", "clear.gif")}
    white, own = (255, 255, 255), (200, 100, 50)
    assert found == {"opaque.png": own, "clear.png": white, "other.png": own, "clear.gif": white}


def test_cmyk_is_converted(flat_image):
    assert pixel(flat_image("red.tif", (0, 255, 255, 0), mode="CMYK")) == (255, 0, 0)
    assert pixel(flat_image("dark.tif", (0, 0, 0, 204), mode="CMYK")) == (51, 51, 51)
    assert np.allclose(pixel(flat_image("red.jpg", (0, 255, 255, 0), mode="CMYK")), (255, 0, 0), atol=4)  # lossy


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    """257 steps of 16 bits are one step of 8; Pillow's own conversion makes all above 255 white."""
    row = np.array([0, 257, 25700, 32896, 65535], np.uint16)
    Image.fromarray(np.tile(row, (5, 1))).save(tmp_path / name)
    found = np.asarray(images.open_image(tmp_path / name))
    assert found[0, :, 0].tolist() == [0, 1, 100, 128, 255]
    assert (found == found[..., :1]).all()


# What a camera that was held so has stored, given the upright picture.
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
    """Fault 6 of the original: photos of a telephone held upright were trained on lying down."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    how = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if how is None else upright.transpose(how)).save(tmp_path / "a.png", exif=exif)
    found = images.open_image(tmp_path / "a.png")
    assert found.size == (48, 32)
    assert np.array_equal(np.asarray(found), np.asarray(upright))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".bmp", ".tif"])
def test_damaged_files_are_refused_by_name_or_read(tmp_path, suffix):
    """Cut off at any length, a file is an error that names it, never another exception."""
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(whole)
    content, refused = whole.read_bytes(), 0
    for length in np.linspace(0, len(content) - 1, 40).astype(int):
        cut.write_bytes(content[:length])
        try:
            images.open_image(cut)
        except UserError as error:
            assert str(cut) in str(error)
            refused += 1
    assert refused >= 35  # the last byte or two of some formats are not missed


@pytest.mark.parametrize("size", [(200, 100), (100, 201), (64, 64), (31, 50)])
def test_the_shorter_side_becomes_the_resolution(flat_image, size):
    """Larger or smaller, in landscape or portrait format; of one colour it stays of that colour."""
    crop, _ = images.crop_image(flat_image("a.png", (0, 51, 255), size=size), 64, seed=0)
    assert crop.shape == (3, 64, 64)
    assert crop.dtype == np.uint8
    assert (crop == np.array([0, 51, 255])[:, None, None]).all()


def test_resizing_is_antialiased(tmp_path):
    """A fine chequerboard of black and white shrinks to grey, not to a pattern."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    crop, _ = images.crop_image(tmp_path / "board.png", 64, seed=0)
    assert np.abs(crop.astype(int) - 127.5).max() < 6


def test_crop_follows_from_the_seed_and_lies_inside(tmp_path):
    """Column x has the value x, so that a crop tells its place: any of 0 to 32 in a 96 x 64 photo."""
    ramp = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    path, places, keys = str(tmp_path / "ramp.png"), set(), set()
    for seed in range(40):
        crop, key = images.crop_image(path, 64, seed)
        place = int(crop[0, 0, 0])
        assert (crop[0] == np.arange(place, place + 64)).all()
        assert np.array_equal(crop, images.crop_image(path, 64, seed)[0])
        places.add(place)
        keys.add((key, place))
    assert len(places) > 16
    assert len({key for key, _ in keys}) == len(keys) == len(places)  # a key a place, a place a key
    assert min(places) >= 0
    assert max(places) <= 32


def test_junk_is_passed_over(flat_image, tmp_path):
    folder = tmp_path / "photos"
    photos = [flat_image(name, 0, folder=folder) for name in ("b.JPG", "a.png", "c.webp")]
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "images.jsonl", "._a.png", "desktop.ini"):
        (folder / name).write_text("no image")
    flat_image("contact_sheet.png", 0, folder=folder)
    flat_image("a-checkpoint.png", 0, folder=folder / ".ipynb_checkpoints")
    flat_image("d.png", 0, folder=folder / "rejected")
    assert images.find_images(folder) == sorted(photos)


def test_own_photos_are_those_of_this_subject_alone(flat_image, tmp_path):
    """Fault 11 of the original: the folder of own images was never cleared, so that the last subject's
    photos mixed into the next one's."""
    for name in ("tom1.png", "tom2.png"):
        flat_image(name, 0, folder=tmp_path / "tom")
    flat_image("rex.png", 0, folder=tmp_path / "rex")
    (tmp_path / "rex" / "notes.txt").write_text("a dog")
    own = tmp_path / "deep" / "images-own"
    for subject, expected in (("tom", ["tom1.png", "tom2.png"]), ("rex", ["rex.png"]), ("rex", ["rex.png"])):
        images.copy_images(tmp_path / subject, own)
        assert [f.name for f in images.find_images(own)] == expected
    images.copy_images(own, own)
    assert [f.name for f in images.find_images(own)] == ["rex.png"]
    assert sorted(f.name for f in (tmp_path / "rex").iterdir()) == ["notes.txt", "rex.png"]


def test_folder_of_the_users_is_never_emptied(flat_image, tmp_path):
    """Arguments the wrong way round, say: only a folder that copy_images has made is replaced."""
    flat_image("a.png", 0, folder=tmp_path / "new")
    flat_image("tom.png", 0, folder=tmp_path / "tom")
    with pytest.raises(UserError, match="tom.png"):
        images.copy_images(tmp_path / "new", tmp_path / "tom")
    assert [f.name for f in (tmp_path / "tom").iterdir()] == ["tom.png"]


def test_bad_photos_leave_the_own_folder_as_it_is(flat_image, tmp_path):
    flat_image("a.png", 0, folder=tmp_path / "own")
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError):
            images.copy_images(source, tmp_path / "own")
        assert [f.name for f in (tmp_path / "own").iterdir()] == ["a.png"]


def test_photos_kept_inside_the_own_folder_survive(flat_image, tmp_path):
    """The folder is emptied: photos that lie below it must not be lost by that."""
    photo = flat_image("tom.png", 0, folder=tmp_path / "own" / "tom")
    try:
        images.copy_images(photo.parent, tmp_path / "own")
    except UserError:
        assert photo.exists()
    assert list((tmp_path / "own").rglob("tom.png"))


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "b.heif", "c.dng", "d.svg"])
def test_unreadable_formats_are_refused_by_name(flat_image, tmp_path, name):
    """Fault 6 of the original: a .heic from a telephone was skipped without a word."""
    flat_image("a.png", 0)
    (tmp_path / name).write_bytes(b"....ftypheic")
    with pytest.raises(UserError, match="cannot be read") as error:
        images.find_images(tmp_path)
    assert name in str(error.value)
    assert ".jpg" in str(error.value)


def test_readable_and_unreadable_formats_are_apart():
    assert not images.READABLE & images.UNREADABLE
    registered = Image.registered_extensions()
    assert {".webp", ".gif", ".tif", ".avif"} <= images.READABLE
    assert all(registered[suffix] in Image.OPEN for suffix in images.READABLE)  # this Pillow opens each
