"""One image file, decoded as upright 8 bit sRGB, whatever program wrote it."""

import math
import struct
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from dreambooth.cli import STORAGE_FAILED, UserError, first_line

DAMAGED = (  # what Pillow and its plugins raise on reading a file
    OSError, EOFError, SyntaxError, ValueError, RuntimeError, TypeError, LookupError, struct.error,
    OverflowError, ArithmeticError, Image.DecompressionBombError,
)  # fmt: skip
# Formats that Pillow knows and that hold no photos, or that start another program to be read.
NOT_OPENED = {"EPS", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC", "PDF", "PALM"}
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
        image.load()  # first: it turns a TIFF upright, and drops the tag
        if image.format in ("JPEG", "MPO") and _ends_in_zeros(opened):
            raise OSError("its end is all zeros")
        turn = _upright(image)
        if image.format == "PPM" and image.mode == "I":  # Pillow scales these to 16 bits
            image = Image.fromarray(np.asarray(image).astype(np.uint16))
        return image, turn


def _ends_in_zeros(opened):
    """Whether a JPEG's data runs into zeros, of an interrupted copy, which libjpeg shows as grey:
    no end-of-image marker follows its last start of a scan."""
    opened.seek(0)
    data = opened.read()
    return data.endswith(bytes(512)) and data.rfind(b"\xff\xda") > data.rfind(b"\xff\xd9")


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
