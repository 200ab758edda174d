"""Batch inference with Ray Data: into how many batches, on how many actors. (That the images are
the same as without Ray is tested in test_crash.py, where one of the actors is killed.)"""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

import generate
from dreambooth import batch_inference
from dreambooth.batch_inference import count_batches, generate_with_ray
from dreambooth.cli import UserError
from dreambooth.machines import device


@pytest.mark.parametrize("num_gpus", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_gpus_end_together(num_gpus, batch_size):
    """None generates more than its share by over one image per batch; the batches are as few as
    possible, and none is larger than asked for. (200 images on 4 GPUs: batches of 13, 52 images for
    the first one. Batches of 16 would be 64 for it.)"""
    for num_records in (1, 3, 17, 64, 65, 200, 1000):
        num_batches = count_batches(num_records, num_gpus, num_gpus, batch_size)
        size = math.ceil(num_records / num_batches)
        sizes = [min(size, num_records - start) for start in range(0, num_records, size)]
        assert max(sizes) <= batch_size
        batches_per_gpu = math.ceil(num_records / (num_gpus * batch_size))
        assert num_batches == min(num_records, batches_per_gpu * num_gpus)
        images_per_gpu = [sum(sizes[gpu::num_gpus]) for gpu in range(num_gpus)]
        assert sum(images_per_gpu) == num_records
        assert max(images_per_gpu) <= num_records / num_gpus + batches_per_gpu


def test_on_a_cpu_there_are_as_few_batches_as_possible():
    """Each is padded to 16 images: a smaller one takes as long, whoever generates it."""
    for num_records, num_batches in ((1, 1), (16, 1), (17, 2), (200, 13)):
        for num_workers in (1, 8):
            assert count_batches(num_records, num_workers, 0, 16) == num_batches


@pytest.fixture
def actors_are(monkeypatch):
    """Let a class take the place of ImageGenerator. (A local one: Ray's workers do not find the
    tests' modules.)"""
    return lambda cls: monkeypatch.setattr(batch_inference, "ImageGenerator", cls)


def test_batches_are_those_that_were_counted(sampling_args, ray_address, actors_are):
    """Ray Data neither splits nor joins them, and keeps the records' order: 37 are 13, 13 and 11.
    (--batch_size is for GPUs: on a CPU a batch would be padded all the same.)"""

    class NoteBatch:
        def __init__(self, args):
            pass

        def __call__(self, batch):
            return batch.assign(batch=uuid4().hex)

    actors_are(NoteBatch)
    args = sampling_args("out", num_samples_per_prompt=37, batch_size=4)
    rows = list(generate_with_ray(args, generate.list_records(args)))
    assert [row["index"] for row in rows] == list(range(37))
    assert sorted(Counter(row["batch"] for row in rows).values()) == [11, 13, 13]


def test_a_worker_that_generates_nothing_is_a_user_error(sampling_args, ray_address, actors_are):
    """What an actor of Ray Data raises reaches the user without its stack trace."""

    class Fails:
        def __init__(self, args):
            pass

        def __call__(self, batch):
            raise UserError("the model generates nothing for 'photo of a car'")

    actors_are(Fails)
    args = sampling_args("out")
    with pytest.raises(UserError, match="^the model generates nothing for 'photo of a car'$"):
        list(generate_with_ray(args, generate.list_records(args)))


@pytest.mark.parametrize(
    ("resources", "flags", "num_images", "expected"),
    [
        ((4, 16), {}, 200, {"size": 4, "num_gpus": 1, "num_cpus": 0, "batch_size": 13}),
        ((4, 16), {"batch_size": 4}, 200, {"size": 4, "num_gpus": 1, "batch_size": 4}),
        ((4, 16), {"num_workers": 2}, 200, {"size": 2, "num_gpus": 1, "batch_size": 15}),
        ((4, 16), {}, 3, {"size": 3, "num_gpus": 1, "num_cpus": 0, "batch_size": 1}),
        ((0, 2), {"num_workers": 2}, 40, {"size": 2, "num_cpus": 0.5, "batch_size": 14}),
        ((0, 2), {}, 40, {"size": 1, "num_cpus": 1.0, "batch_size": 14}),
        ((0, 2), {"num_workers": 2}, 1, {"size": 1, "num_cpus": 1.0, "batch_size": 1}),
    ],
)
def test_each_gpu_gets_an_actor(
    sampling_args, monkeypatch, capsys, tmp_path, resources, flags, num_images, expected
):
    """With --num_workers fewer of them, each with --batch_size images at a time, and no more than
    there are batches (fault 9 of the published example: with fewer than four samples the batch size
    was 0, and four GPUs were hard-wired). Without GPUs one, or as many as asked for, on half of the
    cores, and a line says that a large model takes minutes there. What would run is kept, as there
    is no GPU here."""
    calls = []
    monkeypatch.setattr(device, "LARGE", 1e6)

    class Rows:
        def map_batches(self, cls, **settings):
            calls.append(settings)
            return self

        def iter_rows(self):
            return iter([])

    monkeypatch.setattr(batch_inference.cluster, "start_ray", lambda *args, **kwargs: resources)
    monkeypatch.setattr(batch_inference.cluster, "check_shared_storage", lambda paths: None)
    monkeypatch.setattr(batch_inference.ray.data, "from_pandas", lambda blocks: Rows())
    monkeypatch.setattr(
        batch_inference.ray.data, "ActorPoolStrategy", lambda size: SimpleNamespace(size=size)
    )
    args = sampling_args(tmp_path, num_samples_per_prompt=num_images, **flags)
    list(generate_with_ray(args, generate.list_records(args)))
    (call,) = calls
    call["size"] = call.pop("compute").size
    assert {name: call[name] for name in expected} == expected
    on_a_cpu = "num_gpus" not in expected
    assert ("no GPU: an image takes minutes" in capsys.readouterr().err) == on_a_cpu


def test_each_node_must_see_what_generation_reads_and_writes(
    sampling_args, lora_dir, tmp_path, monkeypatch
):
    """Before a model loads on any of them. The folder for the images is made first, as no other
    node would see it before."""
    checked = []

    def refuse(paths):
        assert all(Path(path).exists() for path in paths)
        checked.extend(paths)
        raise UserError("node b does not see it")

    monkeypatch.setattr(batch_inference.cluster, "start_ray", lambda *args, **kwargs: (0, 2))
    monkeypatch.setattr(batch_inference.cluster, "check_shared_storage", refuse)
    args = sampling_args(tmp_path / "out", use_ray_data=True, lora_weights_dir=lora_dir)
    with pytest.raises(UserError, match="node b"):
        next(generate_with_ray(args, generate.list_records(args)))
    assert checked == [args.model_dir, args.output_dir, args.lora_weights_dir]
