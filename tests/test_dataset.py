"""The data route: pairing, decoding, cropping, and what reaches the training step through Ray Data."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth import dataset
from dreambooth.checks import UserError

SIZES = [(7, 20), (20, 7), (1, 1)]


def names(kind, count):
    return [f"{kind}{i}" for i in range(count)]


def load_image(path, resolution, seed):
    """The pixels alone."""
    return dataset.load_image(str(path), resolution, seed)[0]


def pair(num_instance, num_class, epochs=5, seed=0):
    pairs = dataset.pair_images(names("i", num_instance), names("c", num_class), epochs * num_class, seed)
    return [{**p, "instance": Path(p["instance"]).name, "class": Path(p["class"]).name} for p in pairs]


@pytest.mark.parametrize(("num_instance", "num_class"), SIZES)
def test_every_class_image_is_used_once_an_epoch(num_instance, num_class):
    """Fault 7 of the original: with fewer class than instance images its data set was empty, and
    where the counts did not divide some class images were never used."""
    pairs = pair(num_instance, num_class)
    assert len(pairs) == 5 * num_class
    for start in range(0, len(pairs), num_class):
        epoch = [p["class"] for p in pairs[start : start + num_class]]
        assert sorted(epoch) == sorted(names("c", num_class))


@pytest.mark.parametrize(("num_instance", "num_class"), SIZES)
def test_instance_images_take_turns(num_instance, num_class):
    """At any moment of the run two instance images differ by one use at the most."""
    counts = Counter(dict.fromkeys(names("i", num_instance), 0))
    for row in pair(num_instance, num_class):
        counts[row["instance"]] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts) == set(names("i", num_instance))


def test_pairs_follow_from_the_seed():
    assert pair(7, 20, seed=3) == pair(7, 20, seed=3)
    assert pair(7, 20, seed=3) != pair(7, 20, seed=4)
    assert pair(7, 20, epochs=2, seed=3) == pair(7, 20, epochs=5, seed=3)[:40]  # a longer run begins alike
    assert [p["position"] for p in pair(7, 20)] == list(range(100))


def test_each_epoch_is_another_shuffle():
    order = [p["class"] for p in pair(7, 20)]
    epochs = [tuple(order[start : start + 20]) for start in range(0, 100, 20)]
    assert len(set(epochs)) == 5
    meetings = {(p["instance"], p["class"]) for p in pair(7, 20)}
    assert len(meetings) > 40  # of 100 pairs; a fixed pairing would meet again every epoch


def pixel(path):
    image = dataset.open_image(path)
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
    found = np.asarray(dataset.open_image(tmp_path / name))
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
    found = dataset.open_image(tmp_path / "a.png")
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
            dataset.open_image(cut)
        except UserError as error:
            assert str(cut) in str(error)
            refused += 1
    assert refused >= 35  # the last byte or two of some formats are not missed


def test_pixels_become_numbers_from_minus_one_to_one(flat_image):
    """Of 8 bit values 0, 51 and 255: -1, -0.6 and 1, whatever the size of the picture."""
    image = load_image(flat_image("a.png", (0, 51, 255), size=(200, 100)), 64, seed=0)
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.float32
    expected = torch.tensor([-1, -0.6, 1]).view(3, 1, 1).expand(3, 64, 64)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_resizing_stays_in_range_and_is_antialiased(tmp_path):
    """A fine chequerboard of black and white shrinks to grey, not to a pattern or beyond the range."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    image = load_image(tmp_path / "board.png", 64, seed=0)
    assert image.abs().max() < 0.05


def test_crop_follows_from_the_seed_and_lies_inside(tmp_path):
    """Column x has the value x, so that a crop tells its place: any of 0 to 32 in a 96 x 64 photo."""
    ramp = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    path, state, places, keys = str(tmp_path / "ramp.png"), torch.get_rng_state(), set(), set()
    for seed in range(20):
        crop, key = dataset.load_image(path, 64, seed)
        columns = ((crop[0] + 1) * 127.5).round().int()
        place = columns[0, 0].item()
        assert torch.equal(columns, torch.arange(place, place + 64, dtype=torch.int32).expand(64, 64))
        assert torch.equal(crop, load_image(path, 64, seed))
        places.add(place)
        keys.add((key, place))
    assert len(places) > 8
    assert len({key for key, _ in keys}) == len(keys) == len(places)  # a key a place, a place a key
    assert min(places) >= 0
    assert max(places) <= 32
    assert torch.equal(state, torch.get_rng_state())  # the random numbers of others are not disturbed


@pytest.fixture(scope="module")
def rows(tmp_path_factory, ray_address):
    """37 pairs of one-coloured images through build_dataset and iter_torch_batches(Collate()): the
    colour tells which image it is, instance i (10 + i, 0, 0) and class c (10 + c, 255, 0)."""
    folder, paths = tmp_path_factory.mktemp("flat"), {}
    for kind, count, green in (("instance", 7, 0), ("class", 20, 255)):
        paths[kind] = [folder / f"{kind}{i:02d}.png" for i in range(count)]
        for i, path in enumerate(paths[kind]):
            Image.new("RGB", (80, 64), (10 + i, green, 0)).save(path)
    pairs = dataset.pair_images(paths["instance"], paths["class"], 37, seed=5)
    data = dataset.build_dataset(pairs, 64, [1, 2, 3], [7, 8, 9], seed=5)
    batches = list(data.iter_torch_batches(batch_size=4, collate_fn=dataset.Collate(), prefetch_batches=1))
    return pairs, batches


def test_batches_have_the_promised_shapes(rows):
    _, batches = rows
    sizes = [4] * 9 + [1]
    assert [b["images"].shape for b in batches] == [(2 * size, 3, 64, 64) for size in sizes]
    assert [b["prompt_ids"].shape for b in batches] == [(2 * size, 3) for size in sizes]
    assert {b["images"].dtype for b in batches} == {torch.float32}
    assert {b["prompt_ids"].dtype for b in batches} == {torch.int64}


def test_prompt_ids_stay_with_their_own_half(rows):
    """Green tells the halves apart: -1 of an instance image, 1 of a class image."""
    _, batches = rows
    for batch in batches:
        half = len(batch["images"]) // 2
        assert batch["images"][:, 1, 0, 0].tolist() == [-1] * half + [1] * half
        assert batch["prompt_ids"].tolist() == [[1, 2, 3]] * half + [[7, 8, 9]] * half


def test_positions_and_keys_stay_with_their_rows(rows):
    pairs, batches = rows
    assert [position for batch in batches for position in batch["positions"]] == list(range(37))
    for batch in batches:
        own = [pairs[position] for position in batch["positions"]]
        paths = [p["instance"] for p in own] + [p["class"] for p in own]
        assert [key.rsplit(":", 2)[0] for key in batch["keys"]] == paths


def test_rows_come_in_the_order_of_the_pairs(rows):
    """Over three blocks, decoded in parallel tasks."""
    pairs, batches = rows
    found = {"instance": [], "class": []}
    for batch in batches:
        numbers = ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().int() - 10
        for kind, half in zip(found, numbers.chunk(2), strict=True):
            found[kind] += half.tolist()
    for kind, numbers in found.items():
        assert [f"{kind}{n:02d}.png" for n in numbers] == [p[kind].rpartition("/")[2] for p in pairs]


def test_same_image_is_cropped_anew_each_time(tmp_path, ray_address):
    """One instance image, five pairs: crops differ from use to use, and are the same in a second run."""
    ramp = np.tile(np.arange(192, dtype=np.uint8), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pairs = dataset.pair_images([tmp_path / "ramp.png"], [tmp_path / "ramp.png"], 5, seed=0)

    def places():
        rows = dataset.build_dataset(pairs, 64, [1], [2], seed=0).take_all()
        return [round((row[f"{kind}_image"][0, 0, 0] + 1) * 127.5) for row in rows for kind in ("instance", "class")]

    found = places()
    assert len(set(found)) >= 7
    assert places() == found


def test_junk_is_passed_over(flat_image, tmp_path):
    folder = tmp_path / "photos"
    photos = [flat_image(name, 0, folder=folder) for name in ("b.JPG", "a.png", "c.webp")]
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "images.jsonl", "._a.png", "desktop.ini"):
        (folder / name).write_text("no image")
    flat_image("contact_sheet.png", 0, folder=folder)
    flat_image("a-checkpoint.png", 0, folder=folder / ".ipynb_checkpoints")
    flat_image("d.png", 0, folder=folder / "rejected")
    assert dataset.find_images(folder) == sorted(photos)


def test_own_photos_are_those_of_this_subject_alone(flat_image, tmp_path):
    """Fault 11 of the original: the folder of own images was never cleared, so that the last subject's
    photos mixed into the next one's."""
    for name in ("tom1.png", "tom2.png"):
        flat_image(name, 0, folder=tmp_path / "tom")
    flat_image("rex.png", 0, folder=tmp_path / "rex")
    (tmp_path / "rex" / "notes.txt").write_text("a dog")
    own = tmp_path / "deep" / "images-own"
    for subject, expected in (("tom", ["tom1.png", "tom2.png"]), ("rex", ["rex.png"]), ("rex", ["rex.png"])):
        dataset.copy_images(tmp_path / subject, own)
        assert [f.name for f in dataset.find_images(own)] == expected
    dataset.copy_images(own, own)
    assert [f.name for f in dataset.find_images(own)] == ["rex.png"]
    assert sorted(f.name for f in (tmp_path / "rex").iterdir()) == ["notes.txt", "rex.png"]


def test_folder_of_the_users_is_never_emptied(flat_image, tmp_path):
    """Arguments the wrong way round, say: only a folder that copy_images has made is replaced."""
    flat_image("a.png", 0, folder=tmp_path / "new")
    flat_image("tom.png", 0, folder=tmp_path / "tom")
    with pytest.raises(UserError, match="tom.png"):
        dataset.copy_images(tmp_path / "new", tmp_path / "tom")
    assert [f.name for f in (tmp_path / "tom").iterdir()] == ["tom.png"]


def test_bad_photos_leave_the_own_folder_as_it_is(flat_image, tmp_path):
    flat_image("a.png", 0, folder=tmp_path / "own")
    for source in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError):
            dataset.copy_images(source, tmp_path / "own")
        assert [f.name for f in (tmp_path / "own").iterdir()] == ["a.png"]


def test_photos_kept_inside_the_own_folder_survive(flat_image, tmp_path):
    """The folder is emptied: photos that lie below it must not be lost by that."""
    photo = flat_image("tom.png", 0, folder=tmp_path / "own" / "tom")
    try:
        dataset.copy_images(photo.parent, tmp_path / "own")
    except UserError:
        assert photo.exists()
    assert list((tmp_path / "own").rglob("tom.png"))


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "b.heif", "c.dng", "d.svg"])
def test_unreadable_formats_are_refused_by_name(flat_image, tmp_path, name):
    """Fault 6 of the original: a .heic from a telephone was skipped without a word."""
    flat_image("a.png", 0)
    (tmp_path / name).write_bytes(b"....ftypheic")
    with pytest.raises(UserError, match="cannot be read") as error:
        dataset.find_images(tmp_path)
    assert name in str(error.value)
    assert ".jpg" in str(error.value)


def test_readable_and_unreadable_formats_are_apart():
    assert not dataset.READABLE & dataset.UNREADABLE
    registered = Image.registered_extensions()
    assert {".webp", ".gif", ".tif", ".avif"} <= dataset.READABLE
    assert all(registered[suffix] in Image.OPEN for suffix in dataset.READABLE)  # this Pillow opens each
