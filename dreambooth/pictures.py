"""Pictures on disk: each PNG carries the record of how it was made, appears whole or not at all,
and is found again by the next run; and contact sheets, to look at many at once.

    python -m dreambooth.pictures --output sheet.png "the subject"=images/lego-car "new"=/tmp/images-new
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from dreambooth.checks import HelpFormatter, UserError, run_main
from dreambooth.images import CONTACT_SHEET, find_images, open_image

RECORDS = "images.jsonl"


def fingerprint(folder):
    """A digest that tells one model, or LoRA, from another: names, sizes and 64 samples of each
    weight file in `folder`, so that it takes no time on large ones."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.safetensors")) or sorted(Path(folder).rglob("*.bin")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with open(file, "rb") as opened:
            for i in range(64):
                opened.seek(size * i // 64)
                digest.update(opened.read(4096))
    return digest.hexdigest()[:12]


def pixel_digest(image):
    """A digest of the pixels, whatever file they are stored in."""
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def save_picture(image, record, file):
    """Write `image` as PNG with `record` (a dict) inside: under a temporary name, then renamed."""
    info = PngImagePlugin.PngInfo()
    info.add_text("dreambooth", json.dumps(record))
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG", pnginfo=info, compress_level=1)
    os.replace(temporary, file)


def read_record(file):
    """The record inside a picture that `save_picture` wrote; None where the file is missing,
    damaged, or not one of ours."""
    try:
        with Image.open(file) as image:
            record = json.loads(image.text["dreambooth"])
            return record if record["digest"] == pixel_digest(image) else None
    except (OSError, SyntaxError, ValueError, AttributeError, KeyError):
        return None


def write_records(folder, records):
    """Replace the folder's images.jsonl, one line a picture."""
    temporary = folder / f".{RECORDS}.tmp"
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, folder / RECORDS)


def append_record(folder, record):
    """Add one line to the folder's images.jsonl, in a single write: whole or not at all."""
    with open(folder / RECORDS, "ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def contact_sheet(rows, file, columns=8, side=192):
    """Write the pictures of `rows`, a dict of captions and lists of paths, as one picture: a row each
    (of `columns` pictures at the most), every picture fitted into a square of `side` pixels."""
    rows = {caption: list(paths)[:columns] for caption, paths in rows.items()}
    gap, line = 6, 26
    width = max(len(paths) for paths in rows.values()) * (side + gap) + gap
    sheet = Image.new("RGB", (max(width, 480), len(rows) * (side + line + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for number, (caption, paths) in enumerate(rows.items()):
        top = gap + number * (side + line + gap)
        draw.text((gap, top + 2), caption, fill="black", font=font)
        for column, path in enumerate(paths):
            picture = open_image(path)
            # Small pictures are enlarged by whole pixels, so that they look as they are.
            method = Image.Resampling.NEAREST if max(picture.size) <= side // 2 else Image.Resampling.LANCZOS
            picture = ImageOps.pad(picture, (side, side), method, color="white")
            sheet.paste(picture, (gap + column * (side + gap), top + line))
    temporary = Path(file).with_name(f".{Path(file).name}.tmp")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, file)


def main(args):
    rows = {}
    for row in args.rows:
        caption, _, folder = row.partition("=")
        if not folder:
            raise UserError(f"{row!r}: give rows as caption=folder")
        rows[caption] = find_images(folder)
    contact_sheet(rows, args.output, args.columns)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="CAPTION=DIR", help="a row of the sheet")
    parser.add_argument("--output", default=CONTACT_SHEET, help="the sheet, a PNG")
    parser.add_argument("--columns", type=int, default=8, help="pictures a row at the most")
    run_main(main, parser.parse_args())
