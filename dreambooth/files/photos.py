"""Photos: found in a folder, decoded as upright 8 bit sRGB; and a folder for one subject alone.

python -m dreambooth.files.photos SOURCE FOLDER      # FOLDER then holds the images of SOURCE alone
"""

import errno
import os
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image, ImageCms, ImageOps

from dreambooth.cli import ArgumentParser, UserError, run_main, warn
from dreambooth.files import atomic

DAMAGED = (  # what Pillow and its plugins raise on reading a file
    OSError, EOFError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError,
)  # fmt: skip

STORAGE_FAILED = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # which may pass: no image's fault

READABLE = {
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm",
    ".heic", ".heif", ".hif",
}  # fmt: skip
UNREADABLE = {".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".svg", ".jxl"}
COPIED = ".copied-by-dreambooth"  # marks a folder that the next subject may replace
CONTACT_SHEET = "contact_sheet.png"  # generate.py puts one beside its images; it is not one of them
FEW_PHOTOS = 3  # with fewer, the model learns the photo rather than the subject

pillow_heif.register_heif_opener()  # Pillow then reads HEIC, what phones take photos in


def open_image(path):
    """Read one image as upright 8 bit sRGB: EXIF rotation applied, colours converted from an
    embedded ICC profile, transparency on white, 16 bits per channel and floats scaled to 8 bits.
    UserError, with the path: truncated or not an image."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            profile = image.info.get("icc_profile")
            if image.mode.startswith(("I", "F")):
                image = _to_8_bits(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            if profile:
                image = _to_srgb(image, profile)
            return image.convert("RGB")
    except DAMAGED as error:
        if getattr(error, "errno", None) in STORAGE_FAILED:
            raise
        raise UserError(
            f"{path}: unreadable or truncated image ({error}); replace or remove it"
        ) from None


def _to_8_bits(image):
    """A grey image of 16 bits or of floats, which Pillow would clip. White is 65535; in an image of
    floats, 1 or 255 where no pixel is more than twice as bright."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = np.nan_to_num(values)
        white = next((white for white in (1, 255) if values.max() <= 2 * white), 65535)
        values = (values * (255 / white)).round()
    else:
        values = values / 257
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _to_srgb(image, profile):
    """Convert the colours of `image` from its ICC `profile`, bytes. A profile that is damaged, or
    that is for another mode, is ignored."""
    if image.mode in ("P", "RGBA"):  # RGBA: opaque by now
        image = image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        return image


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
    parser = ArgumentParser(__doc__)
    parser.add_argument("source", help="a folder with photos of the subject")
    parser.add_argument("folder", help="where to put them; replaced if this command made it")
    run_main(main, parser.parse_args())
