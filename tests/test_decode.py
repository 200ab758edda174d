"""Images as phones, cameras and programs store them: decoded, or refused by name."""

import errno
import io
import os
import struct
import zlib
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image, ImageCms

from dreambooth.cli import UserError
from dreambooth.files import decode, photos
from tests.test_drawn_photos import png_chunk

WHITE = (255, 255, 255)

# The XYZ coordinates, for the white D50 of ICC profiles, of pure red, green and blue.
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
DISPLAY_P3 = [
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
]
ADOBE_RGB = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
D50 = (0.9642, 1.0, 0.8249)


def icc_profile(primaries, gamma=None):
    """An ICC profile of version 2 of a display: three primaries, one curve (sRGB's by default)."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    if gamma:
        curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))
    else:
        x = np.linspace(0, 1, 1024)
        linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        values = (linear * 65535).round().astype(">u2")
        curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + values.tobytes()
    tags = {
        b"wtpt": xyz(D50),
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"P\0" + b"\0" * 78,
    }
    tags.update(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries), strict=True))
    tags.update({name: curve for name in (b"rTRC", b"gTRC", b"bTRC")})
    table = struct.pack(">I", len(tags))
    body = b""
    for name, content in tags.items():
        table += struct.pack(">4s2I", name, 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(
        ">I4xI4s4s4s", 128 + len(table + body), 0x02100000, b"mntr", b"RGB ", b"XYZ "
    )
    header = header.ljust(36, b"\0") + b"acsp" + b"\0" * 28 + xyz(D50)[8:]
    return header.ljust(128, b"\0") + table + body


PROFILES = {"Display P3": icc_profile(DISPLAY_P3), "Adobe RGB": icc_profile(ADOBE_RGB, 2.19921875)}


def first_pixel(path):
    image = decode.open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def random_image(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


# Mode, colour in that mode, what it becomes in RGB on white.
COLOURS = [
    ("a.png", "L", 100, (100, 100, 100)),
    ("a.png", "1", 1, WHITE),
    ("a.png", "RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("a.png", "LA", (0, 64), (191, 191, 191)),
    ("a.tif", "CMYK", (0, 0, 0, 204), (51, 51, 51)),
    ("a.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
]


@pytest.mark.parametrize(("name", "mode", "colour", "expected"), COLOURS)
def test_every_mode_becomes_rgb_on_white(flat_image, name, mode, colour, expected):
    """Fault 6 of the published example: no mode="RGB", so that grey, palette, CMYK and transparent
    images broke the run, or were trained on as nonsense (transparency as black)."""
    read = first_pixel(flat_image(name, colour, mode=mode))
    assert np.abs(np.subtract(read, expected)).max() <= (4 if name == "a.jpg" else 0)


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 100, 50, 9, 9, 9])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "transparent.png", transparency=1)
    image.save(tmp_path / "other colour transparent.png", transparency=2)
    image.save(tmp_path / "transparent.gif", transparency=1)
    assert first_pixel(tmp_path / "opaque.png") == (200, 100, 50)
    assert first_pixel(tmp_path / "transparent.png") == WHITE
    assert first_pixel(tmp_path / "other colour transparent.png") == (200, 100, 50)
    assert first_pixel(tmp_path / "transparent.gif") == WHITE


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    """257 steps of 16 bits are one step of 8; Pillow's own conversion makes all above 255 white."""
    row = np.array([0, 256, 257, 25700, 32896, 65534, 65535], np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(np.tile(row, (5, 1))).save(tmp_path / name)
        pixels = np.asarray(decode.open_image(tmp_path / name))
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 100, 128, 254, 255]
        assert (pixels == pixels[..., :1]).all()


def test_images_of_floats_are_neither_black_nor_white(tmp_path):
    """From 0 to 1 is the convention for floats; a resized one overshoots a little."""
    for white in (1, 255, 65535):
        values = np.array([[0, 0.2, 0.5, 1, 1.02, -0.02, np.nan, 0]] * 8, np.float32) * white
        Image.fromarray(values).save(tmp_path / "a.tif")
        assert Image.open(tmp_path / "a.tif").mode == "F"
        pixels = np.asarray(decode.open_image(tmp_path / "a.tif"))
        assert pixels[0, :, 0].tolist() == [0, 51, 128, 255, 255, 0, 0, 0]


# How a camera stores an upright image, by the orientation that it writes beside it.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", [".png", ".heic", ".tif"])
def test_exif_orientation_is_applied_once(tmp_path, suffix):
    """Fault 6 of the published example: photos of a phone held upright were trained on lying on
    their side. (HEIC says it twice: in a property of its own, and in its EXIF data; a TIFF is
    turned by Pillow.)"""
    upright = Image.new("RGB", (64, 48), "black")
    upright.paste("white", (0, 0, 24, 16))
    for orientation in STORED if suffix == ".png" else (3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(STORED[orientation])
        given = exif if suffix == ".tif" else exif.tobytes()  # a TIFF's own tag
        stored.save(tmp_path / f"a{suffix}", exif=given, quality=-1)
        read = decode.open_image(tmp_path / f"a{suffix}")
        assert read.size == (64, 48)
        difference = np.asarray(read).astype(int) - np.asarray(upright)
        assert np.abs(difference).mean() <= (2 if suffix == ".heic" else 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".heic"])
def test_colours_are_converted_from_the_embedded_profile(tmp_path, suffix):
    """By the textbook: to linear light by the curve, to XYZ, to linear sRGB, to sRGB by its curve.
    Without, a phone's photos would lose a part of their colour."""
    stored = np.array([180, 120, 90])
    linear = {
        "Display P3": ((stored / 255 + 0.055) / 1.055) ** 2.4 @ np.array(DISPLAY_P3),
        "Adobe RGB": (stored / 255) ** 2.19921875 @ np.array(ADOBE_RGB),
    }
    lossless = {"quality": -1} if suffix == ".heic" else {}
    for name, xyz in linear.items():
        expected = 255 * (1.055 * (xyz @ np.linalg.inv(SRGB)) ** (1 / 2.4) - 0.055)
        assert np.abs(expected - stored).max() > 10
        image = Image.new("RGB", (64, 64), tuple(stored.tolist()))
        image.save(tmp_path / f"a{suffix}", icc_profile=PROFILES[name], **lossless)
        tolerance = 1.5 if suffix == ".png" else 5
        assert np.abs(first_pixel(tmp_path / f"a{suffix}") - expected).max() <= tolerance


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = random_image(64, 64)
    image.save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(decode.open_image(tmp_path / "a.png")), np.asarray(image))


def test_a_profile_holds_for_palettes_and_transparent_images(tmp_path):
    """sRGB red, stored in Display P3; what is transparent is white, whatever its colour."""
    profile = PROFILES["Display P3"]
    Image.new("RGBA", (8, 8), (234, 51, 35, 0)).save(tmp_path / "clear.png", icc_profile=profile)
    Image.new("RGBA", (8, 8), (234, 51, 35, 255)).save(tmp_path / "a.png", icc_profile=profile)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 234, 51, 35])
    palette.save(tmp_path / "palette.png", icc_profile=profile)
    assert first_pixel(tmp_path / "clear.png") == WHITE
    for name in ("a.png", "palette.png"):
        assert np.abs(np.subtract(first_pixel(tmp_path / name), (255, 0, 0))).max() <= 2


def test_a_profile_that_is_damaged_or_for_another_mode_is_ignored(tmp_path):
    """A grey scan with the scanner's RGB profile, say."""
    profile = PROFILES["Display P3"]
    for damaged in (b"no profile", b"\0" * 500, profile[:200], profile[:-1400]):
        Image.new("RGB", (8, 8), (234, 51, 35)).save(tmp_path / "a.png", icc_profile=damaged)
        assert first_pixel(tmp_path / "a.png") == (234, 51, 35)
    for mode, colour in (("L", 100), ("I;16", 25700), ("CMYK", 0)):
        Image.new(mode, (8, 8), colour).save(tmp_path / "plain.tif")
        Image.new(mode, (8, 8), colour).save(tmp_path / "profiled.tif", icc_profile=profile)
        assert first_pixel(tmp_path / "profiled.tif") == first_pixel(tmp_path / "plain.tif")


def test_every_format_that_is_looked_for_is_read(tmp_path):
    """HEIC also under the name .jpg, as some phones and messengers save it."""
    colour = (200, 100, 50)
    Image.new("RGB", (64, 48), colour).save(tmp_path / "phone.HEIC", format="HEIF")
    (tmp_path / "phone.HEIC").rename(tmp_path / "phone.JPG")
    suffixes = (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff",
        ".avif", ".ppm", ".pgm", ".heic", ".heif", ".heics", ".tga", ".jp2", ".mpo",
    )  # fmt: skip
    for suffix in suffixes:
        image = Image.new("RGB", (64, 48), colour)
        image.save(tmp_path / f"a{suffix}", format="JPEG" if suffix == ".mpo" else None)
    found = photos.find_images(tmp_path)
    assert len(found) == len(suffixes) + 1
    for file in found:
        image = decode.open_image(file)
        assert image.size == (64, 48)
        assert np.abs(np.asarray(image).astype(int) - colour).max() <= 4, file.name


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".heic", ".avif"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_and_damaged_files_are_refused_by_name(tmp_path, suffix):
    """At any length a truncated file is an error that names it, never another exception; so is one
    with some bytes overwritten, unless it can be read."""
    file = tmp_path / f"a{suffix}"
    random_image(32, 32).save(file)
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    places = rng.integers(len(content), size=100)
    damaged = [content[:place] + rng.bytes(8) + content[place + 8 :] for place in places]
    truncated = [content[:end] for end in np.linspace(0, len(content) - 1, 40).astype(int)]
    refused = 0
    for variant in damaged + truncated:
        file.write_bytes(variant)
        try:
            decode.open_image(file)
        except UserError as error:
            assert str(error).startswith(f"{file}: unreadable or truncated image")
            refused += variant in truncated
    assert refused >= 35  # some formats do not need their last bytes


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"exif": True}])
def test_a_jpeg_whose_rest_is_zeros_is_refused(tmp_path, settings):
    """As an interrupted copy leaves it; libjpeg would show grey. Zeros after its end are padding,
    and a thumbnail's end is not the photo's."""
    if "exif" in settings:
        thumbnail = io.BytesIO()
        random_image(32, 32).save(thumbnail, "JPEG")
        settings = {"exif": b"Exif\0\0" + thumbnail.getvalue()}
    file = tmp_path / "a.jpg"
    random_image(128, 128).save(file, **settings)
    content = file.read_bytes()
    file.write_bytes(content + bytes(4096))
    assert decode.open_image(file).size == (128, 128)
    for end in (len(content) // 2, len(content) - 600):
        file.write_bytes(content[:end] + bytes(len(content) - end))
        with pytest.raises(UserError, match="unreadable or truncated image"):
            decode.open_image(file)


def test_files_that_are_no_images_are_refused_by_name(flat_image, tmp_path, monkeypatch):
    """Also images of hundreds of megapixels, which Pillow refuses; here its limit is lowered."""
    vast = flat_image("vast.png", 0, size=(400, 400))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(UserError, match="vast.png has more than 0.1 megapixels: scale it down"):
        decode.open_image(vast)
    postscript = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # for which a program would run
    )
    for content, reason in (
        (b"", "the file is empty"),
        (b"<html>not found</html>", "its format is not recognized"),
        (postscript, "its format is not recognized"),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\xff\xd8\xff\xe0", ""),
    ):
        (tmp_path / "odd.jpg").write_bytes(content)
        with pytest.raises(UserError, match=f"odd.jpg: unreadable or truncated image .{reason}"):
            decode.open_image(tmp_path / "odd.jpg")


def test_a_photo_of_200_megapixels_is_read_in_bounded_memory(tmp_path):
    """What a phone takes; more than half of it at once, in 8 bits, would be 300 MB."""
    Image.new("L", (16320, 12240), 120).save(tmp_path / "phone.jpg", quality=30)
    image = decode.open_image(tmp_path / "phone.jpg")
    assert image.size == (8160, 6120)
    assert image.getpixel((0, 0))[0] in (119, 120, 121)
    with pytest.raises(UserError, match="bomb.jpg has more than 320 megapixels"):
        Image.new("1", (30000, 12000)).save(tmp_path / "bomb.jpg", format="PNG")
        decode.open_image(tmp_path / "bomb.jpg")


def test_integers_of_32_bits_are_8_or_16_bits_wide_or_an_error(tmp_path):
    """A TIFF with values up to 255 became black."""
    for brightest, expected in ((200, 200), (255, 255), (51400, 200), (65535, 255)):
        Image.fromarray(np.full((4, 4), brightest, np.int32)).save(tmp_path / "a.tif")
        assert decode.open_image(tmp_path / "a.tif").getpixel((0, 0)) == (expected,) * 3
    for odd in (65_536, 70_000, -1):
        Image.fromarray(np.full((4, 4), odd, np.int32)).save(tmp_path / "a.tif")
        with pytest.raises(UserError, match="a.tif: its values, .* are neither 8 nor 16 bits"):
            decode.open_image(tmp_path / "a.tif")


def test_a_transparent_value_of_16_bit_grey_becomes_white(tmp_path):
    """A PNG without an alpha channel may name one value that is transparent."""
    values = np.array([[0, 257 * 100], [257 * 50, 257 * 100]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png", transparency=257 * 100)
    found = np.asarray(decode.open_image(tmp_path / "grey.png"))[:, :, 0]
    assert found.tolist() == [[0, 255], [50, 255]]


@pytest.mark.parametrize("code", [errno.EIO, errno.ETIMEDOUT, errno.ESTALE])
def test_storage_that_fails_is_not_the_images_fault(flat_image, monkeypatch, code):
    """Ray then reads it again; a damaged image would end the run."""
    path = flat_image("a.png", 0)
    monkeypatch.setattr(Image, "open", MagicMock(side_effect=OSError(code, os.strerror(code))))
    with pytest.raises(OSError) as raised:
        decode.open_image(path)
    assert not isinstance(raised.value, UserError)


def test_colours_that_are_multiplied_by_their_alpha_are_those_of_others(tmp_path):
    """As some programs write TIFF: half of white shows below 64 of 128."""
    for mode, colour, expected in (
        ("LA", (64, 128), (191,) * 3),
        ("RGBA", (64, 0, 0, 128), (191, 127, 127)),
    ):
        content = io.BytesIO()
        Image.new(mode, (4, 4), colour).save(content, "TIFF")
        straight, multiplied = (struct.pack("<HHIHH", 338, 3, 1, kind, 0) for kind in (2, 1))
        assert straight in content.getvalue()
        (tmp_path / "a.tif").write_bytes(content.getvalue().replace(straight, multiplied))
        found = decode.open_image(tmp_path / "a.tif").getpixel((0, 0))
        assert np.abs(np.subtract(found, expected)).max() <= 1, mode


def test_a_dark_image_of_16_bits_is_dark_whatever_its_format(tmp_path):
    """Values up to 200 of 65535; as integers of 32 bits they could be of 8."""
    values = np.full((4, 4), 200, np.uint16)
    for name in ("a.png", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        assert decode.open_image(tmp_path / name).getpixel((0, 0)) == (0, 0, 0), name


def test_a_png_with_metadata_that_pillow_refuses_is_read(tmp_path):
    """Texts of 100 MB, packed and plain: no pixel depends on them."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(content, "PNG")
    header, rest = content.getvalue()[:33], content.getvalue()[33:]
    for chunk in (
        png_chunk(b"zTXt", b"XML\0\0" + zlib.compress(bytes(100_000_000), 1)),
        png_chunk(b"tEXt", b"Comment\0" + bytes(2**26 + 1)),
    ):
        (tmp_path / "a.png").write_bytes(header + chunk + rest)
        assert decode.open_image(tmp_path / "a.png").getpixel((0, 0)) == (1, 2, 3)


def test_an_orientation_in_32_bits_turns_the_image_as_well(tmp_path):
    """Some programs write it so, in either order of bytes."""
    for order, sign in ((">", b"MM"), ("<", b"II")):
        entry = struct.pack(order + "HHHII", 1, 0x0112, 4, 1, 6)
        exif = b"Exif\0\0" + sign + struct.pack(order + "HI", 42, 8) + entry + bytes(4)
        Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
        assert decode.open_image(tmp_path / "a.jpg").size == (48, 64)
