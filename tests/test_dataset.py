"""The data route: pairing, decoding, cropping, and what reaches the training step through Ray Data."""

from collections import Counter
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth import dataset
from dreambooth.checks import UserError

SIZES = [(7, 20), (20, 7), (1, 1)]


def names(kind, count):
    return [f"{kind}{i}" for i in range(count)]


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


def test_pixels_become_numbers_from_minus_one_to_one():
    """Of 8 bit values 0, 51 and 255: -1, -0.6 and 1."""
    columns = {"image": np.tile(np.array([0, 51, 255], np.uint8)[:, None, None], (2, 1, 4, 4)), "key": ["a", "b"]}
    batch = {f"{kind}_{name}": column for kind in ("instance", "class") for name, column in columns.items()}
    images = dataset.collate({**batch, "position": np.arange(2)})["images"]
    assert images.shape == (4, 3, 4, 4)
    assert images.dtype == torch.float32
    expected = torch.tensor([-1, -0.6, 1]).view(3, 1, 1).expand(4, 3, 4, 4)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


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
    data = dataset.build_dataset(pairs, 64, seed=5)
    batches = list(data.iter_torch_batches(batch_size=4, collate_fn=dataset.Collate(), prefetch_batches=1))
    return pairs, batches


def test_batches_have_the_promised_shapes(rows):
    _, batches = rows
    sizes = [4] * 9 + [1]
    assert [b["images"].shape for b in batches] == [(2 * size, 3, 64, 64) for size in sizes]
    assert {b["images"].dtype for b in batches} == {torch.float32}


def test_instance_images_come_first(rows):
    """Green tells the halves apart: -1 of an instance image, 1 of a class image."""
    _, batches = rows
    for batch in batches:
        half = len(batch["images"]) // 2
        assert batch["images"][:, 1, 0, 0].tolist() == [-1] * half + [1] * half


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
        rows = dataset.build_dataset(pairs, 64, seed=0).take_all()
        return [int(row[f"{kind}_image"][0, 0, 0]) for row in rows for kind in ("instance", "class")]

    found = places()
    assert len(set(found)) >= 7
    assert places() == found


def test_reading_begins_before_the_first_batch_is_asked_for():
    """The models load meanwhile. Nothing is lost or out of order, and what fails still fails for the one who asks."""
    begun = Event()

    def batches(count):
        begun.set()
        yield from range(count)
        raise UserError("a.png: truncated")

    reading = dataset.start_reading(batches(3))
    assert begun.wait(timeout=30)
    assert [next(reading) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="truncated"):
        next(reading)
    with pytest.raises(UserError, match="truncated"):
        next(dataset.start_reading(batches(0)))
