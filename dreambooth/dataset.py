"""Two folders of images into one Ray Dataset of (instance, class) pairs.

    instance images (5)    i3 i1 i4 i0 i2 | i1 i3 i0 ...    each round is a new shuffle of the folder
                            |  |  |  |  |    |  |  |
    class images (200)     c7 c0 c5 c2 c9   c3 c8 c1 ...    each epoch is a new shuffle of the folder

A column is a pair, and a row of the data set. Every class image is used exactly once an epoch,
however many instance images there are, and the instance images take turns: over a whole run the
numbers of times that two of them are used differ by one at the most.

Letters: B pairs in a batch, R resolution in pixels.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import ray.data
import torch
from ray.data.collate_fn import NumpyBatchCollateFn

from dreambooth.images import crop_image
from dreambooth.seeds import seed_for

PAIRS_A_BLOCK = 16  # a task of Ray Data decodes so many: few enough for an early first batch


def pair_images(instance_paths, class_paths, num_pairs, seed):
    """The first `num_pairs` pairs of the run with this seed: see the drawing above.

    A pair is a dict of the two paths (instance, class) and its position in the run.
    """

    def rounds(paths, stream):
        rng = np.random.default_rng((seed, stream))
        while True:
            yield from (str(Path(paths[i]).absolute()) for i in rng.permutation(len(paths)))

    stream = zip(rounds(instance_paths, 0), rounds(class_paths, 1), strict=True)
    return [
        {"position": n, "instance": instance, "class": other}
        for n, (instance, other) in enumerate(itertools.islice(stream, num_pairs))
    ]


def build_dataset(pairs, resolution, seed):
    """A Ray Dataset with one row for each of `pairs`, in their order, decoded as it is consumed.

    Columns: position; instance_image and class_image (3, R, R), uint8; instance_key and class_key, equal for
    equal crops.
    """

    def load(batch):
        columns = {"position": batch["position"]}
        for half, kind in enumerate(["instance", "class"]):
            crops = [
                crop_image(path, resolution, seed_for(seed, int(position), half))
                for path, position in zip(batch[kind], batch["position"], strict=True)
            ]
            columns[f"{kind}_image"] = np.stack([image for image, _ in crops])
            columns[f"{kind}_key"] = np.array([key for _, key in crops])
        return columns

    blocks = math.ceil(len(pairs) / PAIRS_A_BLOCK)
    return ray.data.from_items(pairs, override_num_blocks=blocks).map_batches(load, batch_size=None)


def collate(batch):
    """Stack B rows, a dict of numpy columns, instance half first.

    Returns images (2B, 3, R, R), float32 in [-1, 1], their keys (2B strings), and the pairs' positions in
    the run (B integers).
    """
    both = {name: np.concatenate([batch[f"instance_{name}"], batch[f"class_{name}"]]) for name in ("image", "key")}
    return {
        "images": torch.from_numpy(both["image"] / np.float32(127.5) - 1),  # torch would start a second thread pool
        "keys": both["key"].tolist(),
        "positions": batch["position"].tolist(),
    }


def start_reading(batches):
    """Begin now, in a thread, with what `batches` would begin with when first asked; returns an iterator."""
    first = ThreadPoolExecutor(1).submit(next, batches := iter(batches))

    def read():
        yield first.result()
        yield from batches

    return read()


class Collate(NumpyBatchCollateFn):
    """`collate`, in the form in which Ray Data takes it."""

    def __call__(self, batch):
        return collate(batch)
