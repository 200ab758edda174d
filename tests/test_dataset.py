"""Pairs of images: which, in what order, for which worker, and what reaches the training step."""

from collections import Counter
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import ray.data
import torch
from PIL import Image

from dreambooth import dataset
from dreambooth.cli import UserError
from dreambooth.images import KINDS
from tests.without_ray import Rows


def names(kind, count):
    return [f"{kind}{i}" for i in range(count)]


def pair(num_instance, num_class, epochs=5, seed=0):
    """The pairs of `epochs` rounds through the class images, as names (instance, class)."""
    pairs = dataset.pair_images(
        names("i", num_instance), names("c", num_class), epochs * num_class, seed
    )
    assert [row["position"] for row in pairs] == list(range(epochs * num_class))
    return [(Path(row["instance"]).name, Path(row["class"]).name) for row in pairs]


@pytest.mark.parametrize(("num_instance", "num_class"), [(7, 20), (20, 7), (1, 1)])
def test_each_epoch_has_every_class_image_once_and_instance_images_take_turns(
    num_instance, num_class
):
    """Fault 7 of the published example: with fewer class than instance images its data set was
    empty, and where one number did not divide the other some class images were never used. And at
    any moment of a run the uses of two instance images differ by at most one."""
    pairs = pair(num_instance, num_class)
    for start in range(0, 5 * num_class, num_class):
        epoch = [class_name for _, class_name in pairs[start : start + num_class]]
        assert sorted(epoch) == sorted(names("c", num_class))
    uses = Counter(dict.fromkeys(names("i", num_instance), 0))
    for instance_name, _ in pairs:
        uses[instance_name] += 1
        assert max(uses.values()) - min(uses.values()) <= 1
    assert set(uses) == set(names("i", num_instance))


def test_each_epoch_is_shuffled_anew_and_other_images_meet():
    """Fixed pairs would meet again in every epoch: 20 different ones among these 100."""
    pairs = pair(7, 20)
    order = [class_name for _, class_name in pairs]
    assert len({tuple(order[start : start + 20]) for start in range(0, 100, 20)}) == 5
    assert len(set(pairs)) > 40


def test_pairs_follow_from_the_seed():
    """A longer run begins like a shorter one; and a run that is resumed after an update of these
    scripts goes on with its own pairs."""
    assert pair(7, 20, seed=3) != pair(7, 20, seed=4)
    assert pair(7, 20, epochs=2) == pair(7, 20)[:40]
    instances, classes = zip(*pair(3, 4, epochs=2, seed=3), strict=True)
    assert instances == ("i1", "i2", "i0", "i0", "i1", "i2", "i1", "i0")
    assert classes == ("c2", "c1", "c0", "c3", "c3", "c0", "c2", "c1")


def test_without_class_images_the_instance_images_come_in_the_same_order():
    """Paths are absolute: the tasks of Ray Data run in another directory."""
    instances = names("photos/i", 5)
    with_class = dataset.pair_images(instances, names("c", 9), 13, seed=3)
    without = dataset.pair_images(instances, [], 13, seed=3)
    of_class = {"class", "class_prompt"}
    assert without == [{k: v for k, v in row.items() if k not in of_class} for row in with_class]
    assert {row["instance"] for row in without} == {str(Path.cwd() / name) for name in instances}


def test_an_image_with_a_caption_has_its_own_prompt_in_every_pair():
    """The others have that of their half."""
    captions = {str(Path.cwd() / "i1"): 2, str(Path.cwd() / "c0"): 3}
    pairs = dataset.pair_images(names("i", 3), names("c", 4), 20, 0, captions)
    prompts = {Path(row[kind]).name: row[f"{kind}_prompt"] for row in pairs for kind in KINDS}
    assert prompts == {"i0": 0, "i1": 2, "i2": 0, "c0": 3, "c1": 1, "c2": 1, "c3": 1}


def test_collate_puts_the_instance_half_first():
    """The 8 bit values 0, 51 and 255 become -1, -0.6 and 1, in float32."""
    colours = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1, 1)
    batch = {
        "position": np.array([6, 7]),
        "instance_image": np.tile(colours, (2, 1, 4, 4)),
        "instance_key": np.array(["i0", "i1"]),
        "instance_prompt": np.array([0, 2]),
        "instance_size": np.array([[4, 6, 0, 1], [4, 6, 0, 2]]),
        "class_image": np.full((2, 3, 4, 4), 255, np.uint8),
        "class_key": np.array(["c0", "c1"]),
        "class_prompt": np.array([1, 1]),
        "class_size": np.array([[4, 4, 0, 0], [5, 4, 1, 0]]),
    }
    collated = dataset.collate(batch)
    assert collated["keys"] == ["i0", "i1", "c0", "c1"]
    assert collated["positions"] == [6, 7]
    assert collated["prompt_numbers"] == [0, 2, 1, 1]
    assert collated["sizes"].tolist() == [[4, 6, 0, 1], [4, 6, 0, 2], [4, 4, 0, 0], [5, 4, 1, 0]]
    expected = torch.ones(4, 3, 4, 4)
    expected[:2] = torch.tensor([-1, -0.6, 1]).view(3, 1, 1)
    torch.testing.assert_close(collated["images"], expected, rtol=0, atol=1e-6)

    alone = dataset.collate({k: v for k, v in batch.items() if not k.startswith("class")})
    assert torch.equal(alone["images"], collated["images"][:2])
    assert alone["keys"] == ["i0", "i1"]
    assert alone["positions"] == [6, 7]


def test_reading_begins_before_the_first_batch_is_asked_for():
    """The models load meanwhile. The first pair's position then says where the run goes on."""
    begun = Event()

    def batches():
        begun.set()
        for start in (14, 20, 26):
            yield {"positions": [start, start + 1]}

    reading = dataset.Prefetched(batches())
    assert begun.wait(timeout=30)
    assert reading.first_position() == 14
    assert [batch["positions"][0] for batch in reading] == [14, 20, 26]


@pytest.mark.parametrize("num_good", [0, 2])
def test_what_fails_while_reading_fails_for_the_one_who_asks(num_good):
    def batches():
        yield from range(num_good)
        raise UserError("a.png: truncated")

    reading = iter(dataset.Prefetched(batches()))
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


def batches_of_workers(pairs, world_size, batch_size):
    """The batches of each worker, as Ray Train hands out their shards."""
    config = dataset.PairDataConfig(PAIRS_PER_STEP, resolution=32, seed=5)
    rows = {"train": dataset.build_dataset(pairs)}
    shards = config.configure(rows, world_size, worker_handles=None, worker_node_ids=None)
    return [list(dataset.read_batches(shard["train"], batch_size)) for shard in shards]


def positions_of_steps(pairs, world_size):
    """For each step the positions that its workers get, one worker after the other."""
    workers = batches_of_workers(pairs, world_size, PAIRS_PER_STEP // world_size)
    return [
        [position for batch in batches for position in batch["positions"]]
        for batches in zip(*workers, strict=True)
    ]


IN_ORDER = np.arange(NUM_PAIRS).reshape(-1, PAIRS_PER_STEP).tolist()


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr(ray.data, "from_items", Rows.from_items)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_workers_together_take_the_next_pairs_in_each_step(pairs, world_size, without_ray):
    """An equal share each, in order, none twice and none left out: so the updates do not depend on
    the number of workers."""
    assert positions_of_steps(pairs, world_size) == IN_ORDER


def test_ray_data_deals_them_likewise(pairs, ray_address):
    assert positions_of_steps(pairs, world_size=2) == IN_ORDER


def test_each_image_stands_beside_its_position_and_key(pairs, ray_address):
    """Over three blocks, read in parallel."""
    (batches,) = batches_of_workers(pairs, world_size=1, batch_size=3)
    assert [len(batch["positions"]) for batch in batches] == [3] * 13 + [1]
    for batch in batches:
        own = [pairs[position] for position in batch["positions"]]
        expected = [row["instance"] for row in own] + [row["class"] for row in own]
        assert batch["images"].shape == (len(expected), 3, 32, 32)
        assert [key.rsplit(":", 2)[0] for key in batch["keys"]] == expected
        reds = ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().int() - 10
        assert [f"{red:02d}.png" for red in reds] == [path[-6:] for path in expected]
        assert batch["images"][:, 1, 0, 0].tolist() == [-1] * len(own) + [1] * len(own)


def test_images_are_read_in_order_and_on_no_more_cores_than_asked_for(pairs, without_ray):
    """Training in this process on a CPU needs the others. A task reads at most 16 pairs, so that
    the first batch is there early; and there is no bar unless asked for."""
    for flags, limit, bars in (
        ({}, float("inf"), False),
        ({"verbose": True, "num_cpus": 1}, 1, True),
    ):
        context = dataset.build_dataset(pairs, **flags).context
        assert context.execution_options.resource_limits.cpu == limit
        assert context.enable_progress_bars == bars
    assert [dataset.build_dataset(pairs[:count]).num_blocks for count in (32, 33)] == [2, 3]
    rows = Rows.from_items(pairs, 1)  # of a reader, who does not build them here
    dataset.PairDataConfig(4, 32, 0).shard(rows, 0, 2)
    assert rows.context.execution_options.preserve_order
