"""Pairs of images: which, in what order, for which worker, and what reaches the training step."""

import inspect
from collections import Counter
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import ray.train
import torch
from PIL import Image

from dreambooth import dataset
from dreambooth.cli import UserError

COUNTS = [(7, 20), (20, 7), (1, 1)]  # of instance and class images


def names(kind, count):
    return [f"{kind}{i}" for i in range(count)]


def pair(num_instance, num_class, epochs=5, seed=0):
    """The pairs of `epochs` rounds through the class images, with names in place of paths."""
    pairs = dataset.pair_images(
        names("i", num_instance), names("c", num_class), epochs * num_class, seed
    )
    return [
        {**row, "instance": Path(row["instance"]).name, "class": Path(row["class"]).name}
        for row in pairs
    ]


@pytest.mark.parametrize(("num_instance", "num_class"), COUNTS)
def test_every_class_image_is_used_once_per_epoch(num_instance, num_class):
    """Fault 7 of the published example: with fewer class than instance images its data set was
    empty, and where one number did not divide the other some class images were never used."""
    pairs = pair(num_instance, num_class)
    assert len(pairs) == 5 * num_class
    for start in range(0, len(pairs), num_class):
        epoch = [row["class"] for row in pairs[start : start + num_class]]
        assert sorted(epoch) == sorted(names("c", num_class))


@pytest.mark.parametrize(("num_instance", "num_class"), COUNTS)
def test_instance_images_take_turns(num_instance, num_class):
    """At any moment of a run the uses of two instance images differ by at most one."""
    uses = Counter(dict.fromkeys(names("i", num_instance), 0))
    for row in pair(num_instance, num_class):
        uses[row["instance"]] += 1
        assert max(uses.values()) - min(uses.values()) <= 1
    assert set(uses) == set(names("i", num_instance))


def test_a_dataset_of_another_step_than_the_workers_is_noticed():
    """Of 6 pairs per step, one of three workers gets pairs 14 and 15 of step 2."""
    plan = SimpleNamespace(pairs_per_step=6)
    batches = [{"positions": [14, 15]}, {"positions": [20, 21]}]
    assert list(dataset.check_start(batches, 2, plan)) == batches
    with pytest.raises(RuntimeError, match="pair is 14 in step 1"):
        next(dataset.check_start(batches, 1, plan))


def test_pairs_follow_from_the_seed():
    assert pair(7, 20, seed=3) == pair(7, 20, seed=3)
    assert pair(7, 20, seed=3) != pair(7, 20, seed=4)


def test_a_longer_run_begins_like_a_shorter_one():
    assert pair(7, 20, epochs=2) == pair(7, 20, epochs=5)[:40]


def test_positions_count_the_pairs():
    assert [row["position"] for row in pair(7, 20)] == list(range(100))


def test_paths_are_absolute():
    """The tasks of Ray Data run in another directory."""
    (row,) = dataset.pair_images(["a/i.png"], ["b/c.png"], 1, seed=0)
    assert row["instance"] == str(Path.cwd() / "a" / "i.png")
    assert row["class"] == str(Path.cwd() / "b" / "c.png")


def test_each_epoch_is_shuffled_anew():
    order = [row["class"] for row in pair(7, 20)]
    epochs = {tuple(order[start : start + 20]) for start in range(0, 100, 20)}
    assert len(epochs) == 5


def test_other_images_meet_in_each_epoch():
    """Fixed pairs would meet again in every epoch: 20 different ones among these 100."""
    assert len({(row["instance"], row["class"]) for row in pair(7, 20)}) > 40


def test_collate_puts_the_instance_half_first():
    batch = {
        "instance_image": np.full((2, 3, 4, 4), 0, np.uint8),
        "class_image": np.full((2, 3, 4, 4), 255, np.uint8),
        "instance_key": np.array(["i0", "i1"]),
        "class_key": np.array(["c0", "c1"]),
        "position": np.array([6, 7]),
    }
    collated = dataset.collate(batch)
    assert collated["images"].mean(dim=(1, 2, 3)).tolist() == [-1, -1, 1, 1]
    assert collated["keys"] == ["i0", "i1", "c0", "c1"]
    assert collated["positions"] == [6, 7]


def test_pixels_become_numbers_from_minus_one_to_one():
    """The 8 bit values 0, 51 and 255 become -1, -0.6 and 1."""
    image = np.broadcast_to(np.array([0, 51, 255], np.uint8)[:, None, None], (3, 4, 4))
    batch = {
        "instance_image": image[None],
        "class_image": image[None],
        "instance_key": np.array(["a"]),
        "class_key": np.array(["b"]),
        "position": np.array([0]),
    }
    images = dataset.collate(batch)["images"]
    assert images.shape == (2, 3, 4, 4)
    assert images.dtype == torch.float32
    expected = torch.tensor([-1, -0.6, 1]).view(3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_reading_begins_before_the_first_batch_is_asked_for():
    """The models load meanwhile."""
    begun = Event()

    def batches():
        begun.set()
        yield from range(3)

    reading = dataset.prefetch_first(batches())
    assert begun.wait(timeout=30)
    assert list(reading) == [0, 1, 2]


@pytest.mark.parametrize("num_good", [0, 2])
def test_what_fails_while_reading_fails_for_the_one_who_asks(num_good):
    def batches():
        yield from range(num_good)
        raise UserError("a.png: truncated")

    reading = dataset.prefetch_first(batches())
    assert [next(reading) for _ in range(num_good)] == list(range(num_good))
    with pytest.raises(UserError, match="truncated"):
        next(reading)


NUM_PAIRS = 40  # three blocks
PAIRS_PER_STEP = 8


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs of one-coloured images: the colour of instance image i is (10 + i, 0, 0), that of class
    image c (10 + c, 255, 0)."""
    folder = tmp_path_factory.mktemp("flat")
    paths = {"instance": [], "class": []}
    for kind, count, green in (("instance", 7, 0), ("class", 20, 255)):
        for i in range(count):
            path = folder / f"{kind}{i:02d}.png"
            Image.new("RGB", (80, 64), (10 + i, green, 0)).save(path)
            paths[kind].append(path)
    return dataset.pair_images(paths["instance"], paths["class"], NUM_PAIRS, seed=5)


@pytest.fixture(scope="module")
def deal(pairs, ray_address):
    """The batches of each worker, as Ray Train hands out their shards: deal(world_size,
    batch_size). Dealt once for each number of workers."""
    dealt = {}

    def read(world_size, batch_size):
        if (world_size, batch_size) not in dealt:
            config = dataset.DealPairs(PAIRS_PER_STEP, resolution=64, seed=5)
            rows = dataset.build_dataset(pairs)
            shards = config.configure({"train": rows}, world_size, None, None)
            assert [list(shard) for shard in shards] == [["train"]] * world_size
            dealt[world_size, batch_size] = [
                list(
                    shard["train"].iter_torch_batches(
                        batch_size=batch_size, collate_fn=dataset.collate, prefetch_batches=1
                    )
                )
                for shard in shards
            ]
        return dealt[world_size, batch_size]

    return read


def positions_of(batches):
    return [position for batch in batches for position in batch["positions"]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_are_disjoint_and_complete_and_in_order(deal, world_size):
    shards = [positions_of(batches) for batches in deal(world_size, 2)]
    for positions in shards:
        assert positions == sorted(positions)
    assert sorted(sum(shards, [])) == list(range(NUM_PAIRS))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_workers_together_take_the_next_pairs_in_each_step(deal, world_size):
    """So the updates do not depend on the number of workers."""
    shards = [positions_of(batches) for batches in deal(world_size, 2)]
    share = PAIRS_PER_STEP // world_size
    for step in range(NUM_PAIRS // PAIRS_PER_STEP):
        taken = [positions[step * share : (step + 1) * share] for positions in shards]
        expected = range(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP)
        assert sum(taken, []) == list(expected)


def test_configure_has_the_signature_that_ray_train_calls():
    """A `DataConfig` of ray.train: all of its arguments may come by name."""
    ours = inspect.signature(dataset.DealPairs.configure).parameters
    rays = inspect.signature(ray.train.DataConfig.configure).parameters
    assert list(ours) == list(rays)


def test_batches_have_the_promised_shapes(deal):
    (batches,) = deal(1, 3)
    sizes = [3] * 13 + [1]
    assert [len(batch["positions"]) for batch in batches] == sizes
    for batch, size in zip(batches, sizes, strict=True):
        assert batch["images"].shape == (2 * size, 3, 64, 64)
        assert batch["images"].dtype == torch.float32


def test_rows_come_in_the_order_of_the_pairs(deal, pairs):
    """Over three blocks, decoded in parallel: each image stands beside its position and key."""
    (batches,) = deal(1, 3)
    assert positions_of(batches) == list(range(NUM_PAIRS))
    for batch in batches:
        own = [pairs[position] for position in batch["positions"]]
        expected = [row["instance"] for row in own] + [row["class"] for row in own]
        assert [key.rsplit(":", 2)[0] for key in batch["keys"]] == expected
        reds = ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().int() - 10
        assert [f"{red:02d}.png" for red in reds] == [path[-6:] for path in expected]
        greens = batch["images"][:, 1, 0, 0].tolist()
        assert greens == [-1] * len(own) + [1] * len(own)


@pytest.fixture
def crop_edges(tmp_path, ray_address):
    """The left edges of the crops of one image, 192 x 64, for pairs at some positions of a run:
    crop_edges(seed, positions) returns those of the instance half and of the class half."""
    path = str(tmp_path / "ramp.png")
    Image.fromarray(np.tile(np.arange(192, dtype=np.uint8), (64, 1))).save(path)

    def read(seed, positions):
        pairs = [{"position": i, "instance": path, "class": path} for i in positions]
        config = dataset.DealPairs(pairs_per_step=1, resolution=64, seed=seed)
        rows = config.shard(dataset.build_dataset(pairs), 0, 1).take_all()
        assert [row["position"] for row in rows] == positions
        instance = [int(row["instance_image"][0, 0, 0]) for row in rows]
        prior = [int(row["class_image"][0, 0, 0]) for row in rows]
        return instance, prior

    return read


def test_each_use_of_an_image_is_cropped_anew(crop_edges):
    """The crop follows from the run's seed, the pair's position, and which half it is in."""
    instance, prior = crop_edges(0, list(range(8)))
    assert len(set(instance + prior)) >= 12  # of 129 possible ones
    assert crop_edges(0, [6, 2]) == ([instance[6], instance[2]], [prior[6], prior[2]])
    other_instance, other_prior = crop_edges(1, list(range(8)))
    assert sum(a == b for a, b in zip(instance, other_instance, strict=True)) <= 2
    assert sum(a == b for a, b in zip(prior, other_prior, strict=True)) <= 2


@pytest.mark.parametrize(("num_cpus", "limit"), [(1, 1), (None, float("inf"))])
def test_images_are_read_on_no_more_cores_than_asked_for(pairs, ray_address, num_cpus, limit):
    """Training in this process on a CPU needs the others."""
    options = dataset.build_dataset(pairs, num_cpus=num_cpus).context.execution_options
    assert options.resource_limits.cpu == limit
    assert options.preserve_order
