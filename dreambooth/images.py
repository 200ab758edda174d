"""Folders of images: what is found in one, how an image is read, and a folder for one subject alone.

python -m dreambooth.images SOURCE FOLDER      # makes FOLDER hold the images of SOURCE, and nothing else
"""

import argparse
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dreambooth.checks import UserError, run_main
from dreambooth.files import check_replaceable, replace_dir

READABLE = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm", ".jfif"}
UNREADABLE = {".heic", ".heif", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".svg", ".jxl"}
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


@lru_cache(maxsize=32)
def _resized(path, resolution):
    """One image with its shorter side at `resolution`, (H, W, 3) uint8. The few instance images stay in
    the cache; they come again every few pairs."""
    image = open_image(path)
    size = [max(resolution, round(side * resolution / min(image.size))) for side in image.size]
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def crop_image(path, resolution, seed):
    """Read and resize one image and crop it at random (the same crop for the same `seed`).

    Returns uint8 (3, R, R), and a key that tells this crop of this image from others. Without torch:
    Ray Data's tasks start at once that way.
    """
    image = _resized(path, resolution)
    top, left = np.random.default_rng(seed).integers([side - resolution + 1 for side in image.shape[:2]])
    crop = image[top : top + resolution, left : left + resolution]
    return crop.transpose(2, 0, 1), f"{path}:{top}:{left}"


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a folder hold the images of another, and nothing else.")
    parser.add_argument("source", help="a folder with photos of the subject")
    parser.add_argument("folder", help="where to put them; replaced if this command has made it")
    run_main(lambda args: copy_images(args.source, args.folder), parser.parse_args())
