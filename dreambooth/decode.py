"""One image file of any format as upright 8 bit sRGB."""

import errno
from io import BytesIO

import numpy as np
import pillow_heif
from PIL import Image, ImageCms, ImageOps

from dreambooth.cli import UserError

DAMAGED = (  # what Pillow and its plugins raise on reading a file
    OSError, EOFError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError,
)  # fmt: skip

STORAGE_FAILED = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # which may pass: no image's fault

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
