"""Batch inference with Ray Data: the same images as without, on any number of workers."""

import json
import math
from collections import Counter
from types import SimpleNamespace
from uuid import uuid4

import pytest

import generate
from dreambooth import batch_inference, outputs
from dreambooth.batch_inference import count_batches, generate_with_ray
from dreambooth.cli import UserError


def batch_sizes(num_records, num_batches):
    """The numbers of records in the batches: equal, and what is left in the last one."""
    size = math.ceil(num_records / num_batches)
    return [min(size, num_records - start) for start in range(0, num_records, size)]


@pytest.mark.parametrize("num_gpus", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_gpus_end_together(num_gpus, batch_size):
    """None generates more than its share by over one image per batch; the batches are as few as
    possible, and none is larger than asked for."""
    largest = batch_size
    for num_records in (1, 3, 4, 17, 64, 65, 100, 200, 1000):
        num_batches = count_batches(num_records, num_gpus, num_gpus, batch_size)
        sizes = batch_sizes(num_records, num_batches)
        assert min(sizes) >= 1
        assert max(sizes) <= largest
        batches_per_gpu = math.ceil(num_records / (num_gpus * largest))
        assert num_batches == min(num_records, batches_per_gpu * num_gpus)
        images_per_gpu = [sum(sizes[gpu::num_gpus]) for gpu in range(num_gpus)]
        assert sum(images_per_gpu) == num_records
        assert max(images_per_gpu) <= num_records / num_gpus + batches_per_gpu


def test_200_images_on_4_gpus():
    """In batches of 13: 52 for the first one. Batches of 16 would be 64 for it."""
    assert count_batches(200, 4, 4, 16) == 16


@pytest.mark.parametrize(
    ("num_records", "num_batches"), [(1, 1), (16, 1), (17, 2), (32, 2), (200, 13)]
)
@pytest.mark.parametrize("num_workers", [1, 2, 8])
def test_on_a_cpu_there_are_as_few_batches_as_possible(num_records, num_batches, num_workers):
    """Each is padded to 16 images: a smaller one takes as long."""
    assert count_batches(num_records, num_workers, 0, 16) == num_batches


@pytest.fixture
def batches_only(monkeypatch):
    """In place of an ImageGenerator, a class that gives each record a number of its batch. (Local:
    Ray's workers do not find the tests' modules.)"""

    class NoteBatch:
        def __init__(self, args):
            pass

        def __call__(self, batch):
            return batch.assign(batch=uuid4().hex)

    monkeypatch.setattr(batch_inference, "ImageGenerator", NoteBatch)


@pytest.mark.parametrize("num_records", [3, 37])
def test_batches_are_those_that_were_counted(generate_args, ray_address, batches_only, num_records):
    """Ray Data neither splits nor joins them, and keeps the records' order: 37 are 13, 13 and 11.
    (--batch_size is for GPUs: on a CPU a batch would be padded all the same.)"""
    args = generate_args("out", num_samples_per_prompt=num_records, batch_size=4)
    rows = list(generate_with_ray(args, generate.plan(args)))
    assert [row["index"] for row in rows] == list(range(num_records))
    sizes = sorted(Counter(row["batch"] for row in rows).values())
    assert len(sizes) == count_batches(num_records, 1, 0, 16)
    assert sizes in ([3], [11, 13, 13])


def test_images_are_the_same_with_ray_and_without(
    generate_args, digests, ray_address, tmp_path, generated
):
    """Twenty images, in this process and on two workers of Ray: the same pixels to the last bit,
    and the same records."""
    flags = {"prompts": generated.prompts, "num_samples_per_prompt": 10}
    generate.main(generate_args(tmp_path / "local", **flags))
    generate.main(generate_args(tmp_path / "ray", use_ray_data=True, num_workers=2, **flags))
    local = digests(tmp_path / "local")
    assert len(set(local.values())) == 20
    assert digests(tmp_path / "ray") == local
    local_lines = (tmp_path / "local" / outputs.RECORDS).read_text().splitlines()
    ray_lines = (tmp_path / "ray" / outputs.RECORDS).read_text().splitlines()
    assert len(local_lines) == 20
    assert sorted(ray_lines) == sorted(local_lines)


def test_fewer_images_than_workers_with_a_lora(
    generate_args, digests, lora_dir, ray_address, tmp_path
):
    """Fault 9 of the published example: with fewer than four samples the batch size was 0, four
    GPUs were hard-wired, and a LoRA was silently ignored with Ray Data. One image for two workers,
    with a LoRA: the one generated without Ray, and not the one without the LoRA."""
    plain = generate_args(tmp_path / "plain")
    generate.main(plain)
    local = generate_args(tmp_path / "local", lora_weights_dir=lora_dir)
    generate.main(local)
    args = generate_args(tmp_path / "ray", lora_weights_dir=lora_dir, num_workers=2)
    finished = list(generate_with_ray(args, generate.plan(args)))
    assert len(finished) == 1
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    assert digests(tmp_path / "ray") != digests(tmp_path / "plain")
    # What comes back through Ray is a record like any other: of Python's own types.
    assert outputs.read_record(tmp_path / "ray" / finished[0]["file"]) == finished[0]
    assert json.loads(json.dumps(finished[0])) == finished[0]


def test_a_worker_that_generates_nothing_is_a_user_error(
    broken_model_dir, generate_args, digests, ray_address, tmp_path
):
    """What an actor of Ray Data raises reaches the user without its stack trace."""
    args = generate_args(tmp_path / "new", model_dir=broken_model_dir, use_ray_data=True)
    with pytest.raises(UserError, match="^the model generates nothing for") as error:
        generate.main(args)
    assert "\n" not in str(error.value)
    assert digests(tmp_path / "new") == {}


def test_more_workers_than_cores_are_refused(generate_args, ray_address):
    args = generate_args("out", num_workers=9)
    with pytest.raises(UserError, match="--num_workers 9: the cluster has 2 CPU cores"):
        next(generate_with_ray(args, generate.plan(args)))


def test_each_gpu_gets_an_actor(generate_args, monkeypatch, tmp_path):
    """With --num_workers fewer of them. What would run is kept, as there is no GPU here."""
    calls = []

    class Rows:
        def map_batches(self, cls, **settings):
            calls.append(settings)
            return self

        def iter_rows(self):
            return iter([])

    monkeypatch.setattr(batch_inference.cluster, "start_ray", lambda *args, **kwargs: (4, 16))
    monkeypatch.setattr(batch_inference.ray.data, "from_pandas", lambda blocks: Rows())
    monkeypatch.setattr(
        batch_inference.ray.data, "ActorPoolStrategy", lambda size: SimpleNamespace(size=size)
    )
    monkeypatch.setattr(batch_inference, "check_shared_storage", lambda paths: None)
    args = generate_args(tmp_path, num_samples_per_prompt=200)
    list(generate_with_ray(args, generate.plan(args)))
    args = generate_args(tmp_path, num_samples_per_prompt=200, num_workers=2)
    list(generate_with_ray(args, generate.plan(args)))
    assert [call["compute"].size for call in calls] == [4, 2]
    assert [call["num_gpus"] for call in calls] == [1, 1]
    assert [call["batch_size"] for call in calls] == [13, 15]


def test_each_node_must_see_what_generation_reads_and_writes(
    generate_args, ray_address, lora_dir, tmp_path, monkeypatch
):
    """Before a model loads on any of them."""
    checked = []

    def refuse(paths):
        checked.extend(paths)
        raise UserError("node b does not see it")

    monkeypatch.setattr(batch_inference, "check_shared_storage", refuse)
    args = generate_args(tmp_path / "out", use_ray_data=True, lora_weights_dir=lora_dir)
    with pytest.raises(UserError, match="node b"):
        next(generate_with_ray(args, generate.plan(args)))
    assert checked == [args.model_dir, args.output_dir, args.lora_weights_dir]
