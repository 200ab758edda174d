"""Photos in a folder: found, checked, cropped; and a folder for one subject alone.

python -m dreambooth.images SOURCE FOLDER      # FOLDER then holds the images of SOURCE alone
"""

import argparse
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth import atomic
from dreambooth.cli import UserError, run_main, warn
from dreambooth.decode import open_image
from dreambooth.seeds import seed_for

KINDS = ("instance", "class")  # of images
READABLE = {
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm",
    ".heic", ".heif", ".hif",
}  # fmt: skip
UNREADABLE = {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".svg", ".jxl"}
COPIED = ".copied-by-dreambooth"  # marks a folder that the next subject may replace
CONTACT_SHEET = "contact_sheet.png"  # generate.py puts one beside its images; it is not one of them
FEW_PHOTOS = 3  # with fewer, the model learns the photo rather than the subject


def find_images(folder):
    """The paths of the images in `folder`, sorted by name.

    Hidden files, subfolders and non-images (Thumbs.db, captions, records) are skipped. UserError:
    no such folder, no image in it, or an image in a format that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of images")
    found = []
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name == CONTACT_SHEET:
            continue
        suffix = file.suffix.lower()
        if suffix in UNREADABLE:
            raise UserError(
                f"{file}: {file.suffix} cannot be read; convert it to one of {_readable_formats()}"
            )
        if suffix in READABLE:
            found.append(file)
    if not found:
        raise UserError(f"{folder}: no images there (looked for {_readable_formats()})")
    return found


def _readable_formats():
    return " ".join(sorted(READABLE))


def warn_if_few(paths):
    """Say so if there are not enough photos of a subject."""
    if len(paths) < FEW_PHOTOS:
        warn(
            f"{Path(paths[0]).parent} holds {len(paths)} photo{'s' if len(paths) > 1 else ''}"
            f" ({Path(paths[0]).name}): is it the right folder? Four or five are usual"
        )


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


def digest(paths):
    """A digest of the content of image files, in their order."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return whole.hexdigest()[:16]


@lru_cache(maxsize=32)
def _resized(path, resolution):
    """One image with its shorter side at `resolution`, (H, W, 3) uint8. The few instance images
    stay in the cache: each is used again every few pairs."""
    image = open_image(path)
    shorter = min(image.size)
    size = [max(resolution, round(side * resolution / shorter)) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def crop_image(path, resolution, seed):
    """Read and resize one image and crop it at random (the same crop for the same `seed`).

    Returns uint8 (3, R, R), and a key that tells this crop from all others.
    """
    image = _resized(path, resolution)
    height, width, _ = image.shape
    limits = [height - resolution + 1, width - resolution + 1]
    top, left = np.random.default_rng(seed).integers(limits)
    crop = image[top : top + resolution, left : left + resolution]
    return crop.transpose(2, 0, 1), f"{path}:{top}:{left}"


def load_crops(batch, resolution, seed):
    """Read and crop the images of pairs: `batch` has columns of paths, `instance` and perhaps
    `class`, and their positions in the run.

    Columns of the result: position; instance_image and class_image (3, R, R), uint8; instance_key
    and class_key, equal for equal crops. Here, without torch, so that Ray Data's tasks start soon.
    """
    columns = {"position": batch["position"]}
    for kind in KINDS:
        if kind not in batch:
            continue
        crops = [
            crop_image(path, resolution, seed_for(f"{kind} crop", seed, int(position)))
            for path, position in zip(batch[kind], batch["position"], strict=True)
        ]
        columns[f"{kind}_image"] = np.stack([image for image, _ in crops])
        columns[f"{kind}_key"] = np.array([key for _, key in crops])
    return columns


def copy_images(source, folder):
    """Make `folder` hold the images of `source` and nothing else: no photo of the previous subject.

    It is replaced whole, and only if this function made it: it then holds a hidden marker file,
    which names their source. UserError: it holds something else.
    """
    images = find_images(source)
    folder = Path(folder)
    if folder.resolve() == Path(source).resolve():
        return
    if folder.resolve() in Path(source).resolve().parents:
        raise UserError(f"{source} is inside {folder}, which would be replaced: move it elsewhere")
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    atomic.check_replaceable(folder, names if COPIED in names else [], flag="folder")
    source = os.fsencode(Path(source).resolve())
    earlier = (folder / COPIED).read_bytes() if COPIED in names else b""
    if earlier not in (b"", source):
        warn(f"{folder} held the photos of {os.fsdecode(earlier)}, which are replaced")

    def write(temporary):
        (temporary / COPIED).write_bytes(source)
        for image in images:
            shutil.copy(image, temporary)

    atomic.replace_dir(folder, write)


def main(args):
    copy_images(args.source, args.folder)
    warn_if_few(find_images(args.folder))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Make a folder hold the images of another, and nothing else."
    )
    parser.add_argument("source", help="a folder with photos of the subject")
    parser.add_argument("folder", help="where to put them; replaced if this command made it")
    run_main(main, parser.parse_args())
