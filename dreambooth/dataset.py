"""Two folders of images as a Ray Dataset of (instance, class) pairs, and which worker gets which.

    instance images (5)    i3 i1 i4 i0 i2 | i1 i3 i0 ...    each round shuffles the folder anew
                            |  |  |  |  |    |  |  |
    class images (200)     c7 c0 c5 c2 c9   c3 c8 c1 ...    each epoch shuffles the folder anew

Each column of this picture is a pair, a row of the dataset. Every class image is used exactly once
per epoch, however many instance images there are, and the instance images take turns: over a whole
run, the numbers of times that any two of them are used differ by at most one.

Letters: B pairs in a batch, R resolution in pixels.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import ray.data
import ray.train
import torch
from ray.data.expressions import col

from dreambooth.images import KINDS, load_crops
from dreambooth.seeds import seed_for

PAIRS_PER_BLOCK = 16  # decoded by one task of Ray Data: few enough for an early first batch


def pair_images(instance_paths, class_paths, num_pairs, seed, captions=None):
    """The first `num_pairs` pairs of the run with this seed, as in the diagram above.

    A pair is a dict: instance and class are paths of image files, instance_prompt and class_prompt
    the numbers of their prompts, and position is its place in the run. Prompt 0 is the instance
    prompt and 1 the class prompt; `captions`: by path, the number of a captioned image's prompt.
    Without class images it has no class: training without prior preservation.
    """
    captions = captions or {}

    def shuffled_rounds(paths, kind):
        rng = np.random.default_rng(seed_for(f"{kind} order", seed))
        while True:
            for i in rng.permutation(len(paths)):
                yield str(Path(paths[i]).absolute())

    columns = {"instance": shuffled_rounds(instance_paths, "instance")}
    if class_paths:
        columns["class"] = shuffled_rounds(class_paths, "class")
    pairs = []
    for position in range(num_pairs):
        pair = {"position": position}
        for number, (kind, paths) in enumerate(columns.items()):
            pair[kind] = next(paths)
            pair[f"{kind}_prompt"] = captions.get(pair[kind], number)
        pairs.append(pair)
    return pairs


def build_dataset(pairs, verbose=False, num_cpus=None):
    """A Ray Dataset with one row for each of `pairs`, in their order. No image is read yet; the
    tasks that will read them take at most `num_cpus` cores (default: all)."""
    blocks = max(1, math.ceil(len(pairs) / PAIRS_PER_BLOCK))
    rows = ray.data.from_items(pairs, override_num_blocks=blocks)
    rows.context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=num_cpus)
    rows.context.enable_progress_bars = verbose
    return rows


class PairDataConfig(ray.train.DataConfig):
    """Deals the rows of "train" to the workers by their position in the run.

    Every step takes the next `pairs_per_step` pairs, and each worker an equal share of them, in
    order: so the updates do not depend on the number of workers. `streaming_split`, Ray's default,
    deals whichever block is ready to whichever worker asks, in another order in every run, and
    drops rows to equalise the shards.
    """

    def __init__(self, pairs_per_step, resolution, seed):
        super().__init__(datasets_to_split=[])
        self.pairs_per_step = pairs_per_step
        self.resolution = resolution
        self.seed = seed

    def configure(self, datasets, world_size, worker_handles, worker_node_ids, **kwargs):
        """For each worker its shard by name: Ray Train calls this once for each worker group."""
        rows = datasets["train"]
        return [{"train": self.shard(rows, i, world_size).iterator()} for i in range(world_size)]

    def shard(self, rows, rank, world_size):
        """The rows of one worker with the columns of `load_crops`, in the order of `rows`; images
        are read as the rows are consumed."""
        rows.context.execution_options.preserve_order = True
        share = self.pairs_per_step // world_size
        own = rows.filter(expr=col("position") // share % world_size == rank)
        crop = {"resolution": self.resolution, "seed": self.seed}
        return own.map_batches(load_crops, batch_size=None, fn_kwargs=crop)


def collate(batch):
    """Stack B rows, a dict of numpy columns, instance half first.

    Returns images (2B, 3, R, R), float32 in [-1, 1]; their keys, prompt_numbers and sizes (2B, 4),
    as `load_crops` has them; and the pairs' positions in the run, B integers. In numpy, as torch
    would start a second pool of threads.
    """
    kinds = [kind for kind in KINDS if f"{kind}_image" in batch]

    def stack(name):
        return np.concatenate([batch[f"{kind}_{name}"] for kind in kinds])

    return {
        "images": torch.from_numpy(stack("image") / np.float32(127.5) - 1),
        "keys": stack("key").tolist(),
        "prompt_numbers": stack("prompt").tolist(),
        "sizes": torch.from_numpy(stack("size")),
        "positions": batch["position"].tolist(),
    }


def read_batches(shard, batch_size):
    """The pairs of one worker's `shard` in batches of `batch_size`, a `Prefetched`."""
    batches = shard.iter_torch_batches(
        batch_size=batch_size, collate_fn=collate, prefetch_batches=4
    )
    return Prefetched(batches)


class Prefetched:
    """An iterable over `batches`; a thread begins to fetch the first one at once."""

    def __init__(self, batches):
        self.batches = iter(batches)
        self.first = ThreadPoolExecutor(1).submit(next, self.batches, None)

    def first_position(self):
        """The position in the run of the first pair; None if there is none. Waits for it."""
        first = self.first.result()
        return None if first is None else first["positions"][0]

    def __iter__(self):
        if self.first.result() is not None:
            yield self.first.result()
        yield from self.batches
