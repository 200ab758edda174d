"""The images of a training run: checked, and cropped at random by Ray Data's tasks.

Letters: H, W height and width of an image, R resolution in pixels.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.cli import UserError
from dreambooth.files.decode import open_image
from dreambooth.seeds import seed_for

KINDS = ("instance", "class")  # of images
CROP_STEPS = 16  # a crop lies at one of 17 places along a side: few, as each is encoded once


def check_images(paths, resolution):
    """Decode each image once. UserError: one is unreadable, or too small to learn from, with a side
    of less than `resolution` / 4 pixels."""
    with ThreadPoolExecutor() as threads:
        sizes = list(threads.map(lambda path: open_image(path).size, paths))
    for path, (width, height) in zip(paths, sizes, strict=True):
        if min(width, height) < resolution / 4:
            raise UserError(
                f"{path}: {width} x {height} pixels are too small to train at {resolution};"
                f" use an image of {resolution} or more"
            )


def digest(paths):
    """A digest of the content of image files, in their order."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return whole.hexdigest()[:16]


@lru_cache(maxsize=32)
def _resized(path, resolution, version):
    """One image with its shorter side at `resolution`, (H, W, 3) uint8, and its own height and
    width. The few instance images stay in the cache, until their `version` changes."""
    image = open_image(path)
    width, height = image.size
    shorter = min(image.size)
    size = [max(resolution, round(side * resolution / shorter)) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS)), (height, width)


def crop_image(path, resolution, seed):
    """Read and resize one image and crop it at random (the same crop for the same `seed`), at one
    of CROP_STEPS + 1 evenly spread places, or fewer if its sides are nearly equal.

    Returns the crop, uint8 (3, R, R); a key that only equal crops share; and the `size` that SDXL
    is conditioned on: height and width of the original image, top and left of the crop in the
    resized one.
    """
    image, size = _resized(path, resolution, os.path.exists(path) and os.stat(path).st_mtime_ns)
    spare = np.array(image.shape[:2]) - resolution  # rows and columns that a crop leaves out
    steps = spare.clip(max=CROP_STEPS)
    top, left = spare * np.random.default_rng(seed).integers(steps + 1) // steps.clip(min=1)
    crop = image[top : top + resolution, left : left + resolution]
    return crop.transpose(2, 0, 1), f"{path}:{top}:{left}", (*size, int(top), int(left))


def load_crops(batch, resolution, seed):
    """Read and crop the images of pairs: `batch` has columns of paths, `instance` and perhaps
    `class`, of their prompts' numbers, and of the pairs' positions in the run.

    Columns of the result: position; instance_image and class_image (3, R, R), uint8; instance_key
    and class_key, equal for equal crops; instance_size and class_size (4,), as `crop_image` has
    them; instance_prompt and class_prompt. Without torch, so that Ray Data's tasks start soon.
    """
    columns = {"position": batch["position"]}
    for kind in KINDS:
        if kind not in batch:
            continue
        crops = [
            crop_image(path, resolution, seed_for(f"{kind} crop", seed, int(position)))
            for path, position in zip(batch[kind], batch["position"], strict=True)
        ]
        images, keys, sizes = zip(*crops, strict=True)
        columns[f"{kind}_image"] = np.stack(images)
        columns[f"{kind}_key"] = np.array(keys)
        columns[f"{kind}_size"] = np.array(sizes)
        columns[f"{kind}_prompt"] = batch[f"{kind}_prompt"]
    return columns
