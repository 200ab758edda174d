"""Photos: found in a folder, with their captions, and decoded as upright 8 bit sRGB; and a folder
for one subject alone.

python -m dreambooth.files.photos SOURCE             # says which photo or caption cannot be read
python -m dreambooth.files.photos SOURCE FOLDER      # FOLDER then holds the images of SOURCE alone
"""

import json
import math
import os
import shutil
import struct
import unicodedata
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from dreambooth.cli import STORAGE_FAILED, ArgumentParser, UserError, first_line, run_main, warn
from dreambooth.files import atomic

DAMAGED = (  # what Pillow and its plugins raise on reading a file
    OSError, EOFError, SyntaxError, ValueError, RuntimeError, TypeError, LookupError, struct.error,
    OverflowError, ArithmeticError, Image.DecompressionBombError,
)  # fmt: skip

# Formats that Pillow knows and that hold no photos, or that start another program to be read.
NOT_OPENED = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC", "PDF", "PALM"}
UNREADABLE = {  # images that Pillow cannot read: the raw formats of cameras, and others
    ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".srw", ".orf",
    ".rw2", ".rwl", ".raf", ".pef", ".ptx", ".x3f", ".3fr", ".fff", ".iiq", ".kdc", ".dcr", ".mrw",
    ".erf", ".mef", ".mos", ".gpr", ".svg", ".svgz", ".jxl", ".psb", ".xcf", ".ai", ".eps", ".ps",
    ".wmf", ".emf", ".insp",
}  # fmt: skip
COPIED = ".copied-by-dreambooth"  # marks a folder that the next subject may replace
CONTACT_SHEET = "contact_sheet.png"  # generate.py puts one beside its images; it is not one of them
METADATA = "metadata.jsonl"  # of generated images, and with the captions of photos
OURS = {CONTACT_SHEET, METADATA, "compared"}  # beside generated images
FEW_PHOTOS = 3  # with fewer, the model learns the photo rather than the subject
LARGE = 50e6  # pixels: larger JPEGs are decoded at a half or a quarter of their size, for memory

pillow_heif.register_heif_opener()  # Pillow then reads HEIC, what phones take photos in
Image.init()  # loads all of Pillow's plugins, which register their extensions
OPENED = sorted(set(Image.OPEN) - NOT_OPENED)
Image.MAX_IMAGE_PIXELS = 160_000_000  # an error from twice that on: phones have 200 megapixels
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # from once that on
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes of a text or a profile: more than 1 MB is usual


def readable_suffixes():
    """The extensions of the formats that are opened, with their dots, in lower case."""
    return {
        suffix.lower()
        for suffix, name in Image.registered_extensions().items()
        if name not in NOT_OPENED
    }


def find_images(folder, report=False):
    """The paths of the images in `folder`, sorted by name; with `report`, a line says what else is
    there and skipped.

    UserError: no such folder, no image in it, an image in a format that cannot be read, or a link
    that leads nowhere.
    """
    folder = Path(folder)
    try:
        files = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no such folder of images") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    readable = readable_suffixes()
    found, skipped, subfolders = [], [], []
    for file in files:
        if file.name.startswith(".") or file.name in OURS:
            continue
        suffix = file.suffix.lower()
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file} is a link to a file that does not exist: replace or remove it")
        if file.is_dir():
            if any(inner.suffix.lower() in readable for inner in _files_in(file)):
                subfolders.append(f"{file.name}/")
        elif suffix in readable and file.is_file():  # no pipe, which may never end
            found.append(file)
        elif suffix in UNREADABLE:
            raise UserError(f"{file}: {file.suffix} cannot be read; convert it to JPEG or PNG")
        elif not (suffix == ".txt" and _is_caption(file, files)):
            skipped.append(file.name)
    if not found:
        inside = f"; there are some in {_names(subfolders)}: give that folder" if subfolders else ""
        raise UserError(f"{folder}: no images there (such as .jpg, .png, .webp or .heic){inside}")
    others = [name for name in skipped if name.endswith((".caption", "metadata.csv"))]
    if report and others:
        warn(f"{folder}/{others[0]} is not read: captions are taken from .txt and {METADATA}")
    if report and skipped:
        plural = "s that are no images" if len(skipped) > 1 else " that is no image"
        print(f"skipped in {folder}: {len(skipped)} file{plural} ({_names(skipped)})", flush=True)
    if report and subfolders:
        print(f"images in subfolders of {folder} are not used ({_names(subfolders)})", flush=True)
    return found


def _names(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _files_in(folder):
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _is_caption(file, files):
    """Whether a text file stands beside an image of the same name, as kohya's captions do."""
    return any(_normal(other.stem) == _normal(file.stem) and other != file for other in files)


def read_captions(folder, images, were_generated=False):
    """The captions of the `images` in `folder` that have one: texts by path.

    They are in metadata.jsonl, lines of {"file_name": "a.jpg", "text": "..."} as Hugging Face's
    ImageFolder has it, or in a.txt beside a.jpg as kohya's scripts have it. Names match in either
    Unicode normalization. UserError: a line or a file that cannot be read, an empty caption, two
    that differ, or the name of no image here; where the images `were_generated` that is allowed, as
    the user may have deleted bad ones.
    """
    folder = Path(folder)
    captions = {}
    by_name = {_normal(image.name): image for image in images}
    texts = {_normal(file.stem): file for file in folder.iterdir() if file.suffix.lower() == ".txt"}
    for image in images:
        if file := texts.get(_normal(image.stem)):
            captions[image] = _caption(_read_text(file).rstrip("\r\n"), file)
    metadata = folder / METADATA
    lines = _read_text(metadata).split("\n") if metadata.is_file() else []
    for number, line in enumerate(lines, start=1):
        where = f"{metadata}, line {number}"
        if not line.strip():
            continue
        try:
            name, text = (json.loads(line)[field] for field in ("file_name", "text"))
            name = _normal(name)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{where}: no {{"file_name": ..., "text": ...}}') from None
        image = by_name.get(name)
        if image is None:
            if were_generated or "/" in name and (folder / name).exists():  # in a subfolder
                continue
            raise UserError(f"{where}: there is no image {name!r}")
        if captions.get(image, text) != text:
            raise UserError(f"{where}: {image.name} has another caption already")
        captions[image] = _caption(text, where)
    return captions


def _caption(text, where):
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: an empty caption")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character: JSON can say that, UTF-8 cannot
        raise UserError(f"{where}: {text!r} is not UTF-8") from None
    return text


def _read_text(file):
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{file} is not a UTF-8 text file") from None


def _normal(name):
    return unicodedata.normalize("NFC", name)


def open_image(path):
    """Read one image as upright 8 bit sRGB: rotated as its EXIF says, colours converted from an
    embedded ICC profile, transparency on white, 16 bits per channel and floats scaled to 8 bits.

    Other metadata is ignored, damaged or not. UserError, with the path: it cannot be read, is
    truncated or no image, or its values have no known range.
    """
    try:
        with open(path, "rb") as opened:
            try:
                image, turn = _decode(opened)
            except DAMAGED:
                bare = _without_metadata(opened)
                if bare is None:
                    raise
                image, turn = _decode(bare)
        profile = image.info.get("icc_profile")
        image = _on_white(_to_8_bits(image))
        if profile or image.mode == "LAB":
            image = _to_srgb(image, profile)
        image = image.convert("RGB")
        return image.transpose(turn) if turn is not None else image
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except DAMAGED as error:
        if getattr(error, "errno", None) in STORAGE_FAILED:
            raise
        if isinstance(error, Image.DecompressionBombError):
            most = 2 * Image.MAX_IMAGE_PIXELS / 1e6
            raise UserError(f"{path} has more than {most:g} megapixels: scale it down") from None
        reason = first_line(error)
        if isinstance(error, UnidentifiedImageError):  # Pillow's own text names a Python object
            is_empty = not Path(path).stat().st_size
            reason = "the file is empty" if is_empty else "its format is not recognized"
        raise UserError(
            f"{path}: unreadable or truncated image ({reason}); replace or remove it"
        ) from None


def _decode(opened):
    """The image in an open file, all of it decoded, and how to turn it upright: one of Pillow's
    `Transpose`, or None."""
    opened.seek(0)
    with Image.open(opened, formats=OPENED) as image:
        if image.format == "JPEG" and image.width * image.height > LARGE:
            factor = math.ceil(math.sqrt(image.width * image.height / LARGE))
            image.draft(None, (image.width // factor, image.height // factor))
        turn = _upright(image)
        image.load()
        if image.format == "PPM" and image.mode == "I":  # Pillow scales these to 16 bits
            image = Image.fromarray(np.asarray(image).astype(np.uint16))
        return image, turn


def _upright(image):
    """How to turn an image upright: as the EXIF orientation says, the one tag that matters here."""
    orientation = _find_orientation(image.info.get("exif") or b"")
    if orientation is None:  # a TIFF's own, or that of XMP
        with suppress(Exception):  # damaged metadata can end in any
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    return TRANSPOSE_OF.get(orientation) if isinstance(orientation, int) else None


def _find_orientation(exif):
    """The orientation in an EXIF block, whatever else is in it; None if it is not there. Pillow
    would lose it where another tag is damaged. The block is a TIFF header, and then a directory of
    entries of 12 bytes (TIFF 6.0, section 2)."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        for i in range(count):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i)
            if tag == ExifTags.Base.Orientation and (kind, number) == (3, 1):  # one short integer
                return value
    except (TypeError, struct.error):
        return None  # no TIFF header, or one that ends too soon
    return None


TRANSPOSE_OF = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_METADATA = {b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tIME", b"pHYs"}


def _without_metadata(opened):
    """A PNG without the chunks that Pillow reads at once and no pixel depends on; None of other
    formats, whose metadata it does not look at until it is asked for."""
    opened.seek(0)
    content = opened.read()
    if not content.startswith(PNG_SIGNATURE):
        return None
    kept = [PNG_SIGNATURE]
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        end = start + 12 + length
        if content[start + 4 : start + 8] not in PNG_METADATA:
            kept.append(content[start:end])
        start = end
    return BytesIO(b"".join(kept))


def _to_8_bits(image):
    """An image with 8 bits per channel; others Pillow would clip. UserError: integers of 32 bits
    that are neither 8 nor 16 bits wide.

    White is 255 or 65535; in an image of floats, 1 or 255 where no pixel is more than twice as
    bright.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = np.nan_to_num(values)
        white = next((white for white in (1, 255) if values.max() <= 2 * white), 65535)
        scaled = (values * (255 / white)).round()
    elif image.mode == "I":
        if values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"its values, {values.min():.0f} to {values.max():.0f}, are neither 8 nor 16 bits"
                " wide; convert it to PNG"
            )
        scaled = values if values.max() <= 255 else values // 257
    else:
        scaled = values // 257
    grey = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    if isinstance(image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray((values != image.info["transparency"]) * np.uint8(255)))
    return grey


def _on_white(image):
    """An image without transparency: what is transparent shows white."""
    if image.mode in ("RGBa", "La"):  # premultiplied
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _to_srgb(image, profile):
    """Convert the colours of `image` from its ICC `profile`, bytes, or from CIELAB. A profile that
    is damaged, or that is for another mode, is ignored."""
    if image.mode in ("P", "RGBA"):  # RGBA: opaque by now
        image = image.convert("RGB")
    try:
        if image.mode == "LAB":
            source = ImageCms.createProfile("LAB")
        else:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        return image


def warn_if_few(paths):
    """Say so if there are not enough photos of a subject."""
    if len(paths) < FEW_PHOTOS:
        warn(
            f"{Path(paths[0]).parent} holds {len(paths)} photo{'s' if len(paths) > 1 else ''}"
            f" ({Path(paths[0]).name}): is it the right folder? Four or five are usual"
        )


def copy_images(source, folder):
    """Make `folder` hold the images of `source` and their captions, and nothing else: no photo of
    the previous subject.

    It is replaced whole, and only if this function made it: it then holds a hidden marker file,
    which names their source. UserError: it holds something else.
    """
    images = find_images(source)
    captions = read_captions(source, images)
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
        for number, image in enumerate(images):
            copy = temporary / image.name
            if copy.exists():  # of names that differ in case alone, on a disk that sees no case
                copy = temporary / f"{number}-{image.name}"
            shutil.copyfile(image, copy)
            if image in captions:
                row = {"file_name": copy.name, "text": captions[image]}
                atomic.append_line(temporary / METADATA, json.dumps(row))

    atomic.replace_dir(folder, write)


def main(args):
    """Check that each image in `args.source` can be read; copy them if `args.folder` is given."""
    images = find_images(args.source, report=True)
    read_captions(args.source, images)
    for image in images:
        open_image(image)
    warn_if_few(images)
    if args.folder:
        copy_images(args.source, args.folder)


if __name__ == "__main__":
    parser = ArgumentParser("Check that each photo in a folder can be read, and copy them.")
    parser.add_argument("source", help="a folder with photos of the subject")
    where = "where to put them; replaced if this command made it (default: only check them)"
    parser.add_argument("folder", nargs="?", help=where)
    run_main(main, parser.parse_args())
