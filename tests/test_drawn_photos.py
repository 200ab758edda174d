"""Photos as other programs write them, drawn at random: any mode and format, metadata that is
damaged, large or odd, truncation. Each is read with the right pixels, or is one line that names it.

    DRAWN=500 python -m pytest tests/test_drawn_photos.py
"""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dreambooth.cli import UserError
from dreambooth.files.decode import TRANSPOSE_OF, open_image

DRAWN = int(os.environ.get("DRAWN", "60"))
FORMATS = {  # the modes that each keeps, and whether it keeps them without loss
    "PNG": (["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], True),
    "TIFF": (["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"], True),
    "BMP": (["1", "L", "P", "RGB", "RGBA"], True),
    "GIF": (["L", "P"], True),
    "TGA": (["L", "RGB", "RGBA"], True),
    "PPM": (["1", "L", "RGB", "I;16"], True),
    "JPEG2000": (["L", "RGB", "RGBA"], True),
    "JPEG": (["L", "RGB", "CMYK"], False),
    "WEBP": (["RGB", "RGBA"], False),
    "HEIF": (["L", "RGB", "RGBA"], False),
    "AVIF": (["RGB", "RGBA"], False),
}
WITH_EXIF = {"PNG", "JPEG", "WEBP"}


def draw_exif(rng):
    """An EXIF block with a few entries of random tags, types, counts and values, which may point
    anywhere, and the orientation among them: its bytes, and that orientation or None."""
    order = "<" if rng.random() < 0.5 else ">"
    orientation = int(rng.integers(1, 9)) if rng.random() < 0.6 else None
    entries = []
    for _ in range(rng.integers(0, 5)):
        tag = int(rng.choice([0x010F, 0x011A, 0x0131, 0x8769, 0x8825, 0x9286, 0xA005, 0xC4A5]))
        kind, count = int(rng.integers(0, 15)), int(rng.choice([0, 1, 3, 70_000]))
        entries.append(struct.pack(order + "HHII", tag, kind, count, int(rng.integers(2**32))))
    if orientation:
        entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
        entries.insert(int(rng.integers(len(entries) + 1)), entry)
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(order + "HIH", 42, 8, len(entries))
    return b"Exif\0\0" + head + b"".join(entries) + bytes(4), orientation


def draw_pixels(rng, mode):
    """A smooth image, so that lossy formats keep it."""
    width, height = (int(side) for side in rng.integers(9, 70, size=2))
    corners = rng.integers(30, 225, size=(2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.int32))
    if mode == "F":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    return image.convert(mode)


def png_chunk(kind, content):
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def draw_metadata(rng, content, name):
    """The file with metadata that no pixel depends on: for PNG large or broken chunks, for all
    what some programs append."""
    if name == "PNG":
        broken = [
            png_chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000),
            png_chunk(b"zTXt", b"XML\0\0" + zlib.compress(b"x" * 100_000_000, 1)),
            png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x/>" * 800_000)),
            png_chunk(b"iCCP", b"profile\0\0" + b"no zlib stream"),
            png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_000_000))),
            png_chunk(b"eXIf", rng.bytes(40)),
        ]
        after_header = 8 + 25
        chosen = broken[int(rng.integers(len(broken)))]
        content = content[:after_header] + chosen + content[after_header:]
    if name != "TGA" and rng.random() < 0.3:  # TGA has a footer
        content += rng.bytes(100)
    return content


def draw(rng):
    """The bytes of a file, how it should look, the tolerance, and the name of its format."""
    name = str(rng.choice(list(FORMATS)))
    modes, lossless = FORMATS[name]
    mode = str(rng.choice(modes))
    image = draw_pixels(rng, mode)
    bare = io.BytesIO()
    settings = {} if lossless else {"quality": 95}
    if name == "TIFF":
        settings["compression"] = str(rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate"]))
    image.save(bare, format=name, **settings)
    content, orientation = bare.getvalue(), None
    if name in WITH_EXIF and rng.random() < 0.7:
        exif, orientation = draw_exif(rng)
        with_exif = io.BytesIO()
        image.save(with_exif, format=name, exif=exif, **settings)
        content = with_exif.getvalue()
    if rng.random() < 0.5:
        content = draw_metadata(rng, content, name)
    return content, bare.getvalue(), orientation, name


@pytest.mark.parametrize("seed", range(DRAWN))
def test_a_drawn_photo_is_read_whatever_its_metadata(seed, tmp_path):
    """As its bare image data is, turned as the orientation says."""
    rng = np.random.default_rng(seed)
    content, bare, orientation, name = draw(rng)
    (tmp_path / "drawn").write_bytes(content)
    (tmp_path / "bare").write_bytes(bare)
    expected = open_image(tmp_path / "bare")
    if orientation in TRANSPOSE_OF:
        expected = expected.transpose(TRANSPOSE_OF[orientation])
    found = open_image(tmp_path / "drawn")
    assert found.size == expected.size, name
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= (0 if name != "AVIF" else 2), name


@pytest.mark.parametrize("seed", range(DRAWN))
def test_a_drawn_photo_that_is_cut_off_or_damaged_is_read_or_one_line(seed, tmp_path):
    rng = np.random.default_rng(1000 + seed)
    content, _, _, _ = draw(rng)
    content = bytearray(content[: int(rng.integers(len(content))) + 1])
    for _ in range(int(rng.integers(3))):
        content[int(rng.integers(len(content)))] ^= int(rng.integers(1, 256))
    file = tmp_path / "damaged.png"
    file.write_bytes(content)
    try:
        image = open_image(file)
        assert image.mode == "RGB"
    except UserError as error:
        assert str(file) in str(error)
        assert len(str(error).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.png"]
