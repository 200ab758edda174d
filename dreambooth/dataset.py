"""Two folders of images into one Ray Dataset of (instance, class) pairs.

    instance images (5)    i3 i1 i4 i0 i2 | i1 i3 i0 ...    each round is a new shuffle of the folder
                            |  |  |  |  |    |  |  |
    class images (200)     c7 c0 c5 c2 c9   c3 c8 c1 ...    each epoch is a new shuffle of the folder

A column is a pair, and a row of the data set. Every class image is used exactly once an epoch,
however many instance images there are, and the instance images take turns: over a whole run the
numbers of times that two of them are used differ by one at the most.

Letters: B pairs in a batch, R resolution in pixels, L tokens in a prompt.
"""

import argparse
import itertools
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import ray.data
import torch
from PIL import Image, ImageOps
from ray.data.collate_fn import NumpyBatchCollateFn
from torchvision import transforms

from dreambooth.checks import UserError, run_main
from dreambooth.files import check_replaceable, replace_dir
from dreambooth.seeds import seed_for

READABLE = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".jfif"}
UNREADABLE = {".heic", ".heif", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".svg", ".jxl"}
PAIRS_A_BLOCK = 16  # a task of Ray Data decodes so many: few enough for an early first batch
COPIED = ".copied-by-dreambooth"  # marks a folder that the next subject may replace
CONTACT_SHEET = "contact_sheet.png"  # generate.py puts one beside its pictures; it is none of them


def find_images(folder):
    """The paths of the images in `folder`, sorted by name.

    Hidden files, folders, and files that are no images (Thumbs.db, captions, records) are passed
    over. UserError: no such folder, no image in it, or an image in a format that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    files = [
        f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".") and f.name != CONTACT_SHEET
    ]
    for file in files:
        if file.suffix.lower() in UNREADABLE:
            raise UserError(f"{file}: {file.suffix} cannot be read; convert it to one of {' '.join(sorted(READABLE))}")
    images = [f for f in files if f.suffix.lower() in READABLE]
    if not images:
        raise UserError(f"{folder}: no images there (looked for {' '.join(sorted(READABLE))})")
    return images


def open_image(path):
    """Read one image as upright 8 bit RGB: EXIF rotation applied, transparency laid onto white,
    16 bits a channel scaled to 8. UserError, with the path: truncated or not an image."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # 16 bit grey: Pillow's own conversion would clip it
                image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: unreadable or truncated image ({error}); replace it or take it out") from None


def check_images(paths, resolution):
    """Decode each image once. UserError: unreadable, or with a side under a quarter of `resolution`
    pixels, too small to learn from."""
    with ThreadPoolExecutor() as threads:
        sizes = list(threads.map(lambda path: open_image(path).size, paths))
    for path, (width, height) in zip(paths, sizes, strict=True):
        if min(width, height) < resolution / 4:
            raise UserError(
                f"{path}: {width} x {height} pixels are too small to train at {resolution};"
                f" use an image of {resolution} or more"
            )


def copy_images(source, folder):
    """Make `folder` hold the images of `source`, and nothing else: no photo of the last subject.

    It is replaced whole, and only if this function has made it (there is a hidden mark in it).
    UserError: it holds something else.
    """
    images, folder = find_images(source), Path(folder)
    if folder.resolve() == Path(source).resolve():
        return
    if folder.resolve() in Path(source).resolve().parents:
        raise UserError(f"{source} lies in {folder}, which is to be replaced: move it elsewhere")
    held = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    check_replaceable(folder, held if COPIED in held else [], name="folder")

    def write(temporary):
        (temporary / COPIED).touch()
        for image in images:
            shutil.copy(image, temporary)

    replace_dir(folder, write)


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


@lru_cache(maxsize=32)
def _resized(path, resolution):
    """One image with its shorter side at `resolution`, (3, H, W) in [0, 1]. The few instance images
    stay in the cache; they come again every few pairs."""
    to_size = transforms.Compose([transforms.ToTensor(), transforms.Resize(resolution, antialias=True)])
    return to_size(open_image(path)).clamp(0, 1)


def load_image(path, resolution, seed):
    """Resize, crop at random (the same crop for the same `seed`) and normalize one image.

    Returns float32 (3, R, R) in [-1, 1], and a key that tells this crop of this image from others.
    """
    image = _resized(path, resolution)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        top, left, height, width = transforms.RandomCrop.get_params(image, (resolution, resolution))
    crop = transforms.functional.normalize(image[:, top : top + height, left : left + width], [0.5], [0.5])
    return crop, f"{path}:{top}:{left}"


def build_dataset(pairs, resolution, instance_prompt_ids, class_prompt_ids, seed):
    """A Ray Dataset with one row for each of `pairs`, in their order, decoded as it is consumed.

    Columns: position; instance_image and class_image (3, R, R); instance_key and class_key, equal for
    equal crops; instance_prompt_ids and class_prompt_ids (L,).
    """

    def load(batch):
        columns = {"position": batch["position"]}
        for half, (kind, prompt_ids) in enumerate({"instance": instance_prompt_ids, "class": class_prompt_ids}.items()):
            crops = [
                load_image(path, resolution, seed_for(seed, int(position), half))
                for path, position in zip(batch[kind], batch["position"], strict=True)
            ]
            columns[f"{kind}_image"] = np.stack([image for image, _ in crops])
            columns[f"{kind}_key"] = np.array([key for _, key in crops])
            columns[f"{kind}_prompt_ids"] = np.tile(prompt_ids, (len(crops), 1))
        return columns

    blocks = math.ceil(len(pairs) / PAIRS_A_BLOCK)
    return ray.data.from_items(pairs, override_num_blocks=blocks).map_batches(load, batch_size=None)


def collate(batch):
    """Stack B rows, a dict of numpy columns, instance half first.

    Returns images (2B, 3, R, R), their keys (2B strings), prompt_ids (2B, L), and the pairs' positions
    in the run (B integers).
    """
    both = {
        name: np.concatenate([batch[f"instance_{name}"], batch[f"class_{name}"]])
        for name in ("image", "prompt_ids", "key")
    }
    return {
        "images": torch.from_numpy(both["image"]),
        "keys": both["key"].tolist(),
        "prompt_ids": torch.from_numpy(both["prompt_ids"]),
        "positions": batch["position"].tolist(),
    }


class Collate(NumpyBatchCollateFn):
    """`collate`, in the form in which Ray Data takes it."""

    def __call__(self, batch):
        return collate(batch)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a folder hold the images of another, and nothing else.")
    parser.add_argument("source", help="a folder with photos of the subject")
    parser.add_argument("folder", help="where to put them; replaced if this command has made it")
    run_main(lambda args: copy_images(args.source, args.folder), parser.parse_args())
