"""Generated images on disk: each PNG carries the record of how it was made, so that the next run
recognizes it; metadata.jsonl lists them, as Hugging Face's ImageFolder reads it; and contact
sheets, to see many at once.

    python -m dreambooth.files.generated_images --output sheet.png \\
        "subject"=images/lego-car "new"=/tmp/images-new
"""

import json
import os
import re
import textwrap
import time
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from dreambooth.cli import ArgumentParser, UserError, check_at_least, run_main
from dreambooth.files import atomic
from dreambooth.files.decode import open_image
from dreambooth.files.photos import CONTACT_SHEET, METADATA, find_images

OWN_FIELDS = ("file", "prompt", "seed", "index")  # of an image; the rest is the command's
MAX_ROWS = 100  # of a sheet: one of 300 takes 400 MB of memory
FILE_NAME = re.compile(r"\d{3,}-\d{4,}-seed\d+\.png")
# As atomic.replace_file names it; the groups are the host and the process.
TEMPORARY = re.compile(rf"\.(?:{FILE_NAME.pattern}|{METADATA})\.([^.]+)\.(\d+)\.tmp")


class Existing(NamedTuple):
    """The images that generate.py has made in a folder, beside those that are planned for it."""

    finished: list  # the planned records whose images are there
    others: list  # records of other images with the same settings, such as another seed's
    stale: list  # files made with other settings or prompts, or retouched


def file_name(prompt_number, index, seed):
    """The name of one prompt's image number `index`."""
    return f"{prompt_number:03d}-{index:04d}-seed{seed}.png"


def save_image(image, record, file):
    """Write `image` as a PNG that carries `record`, a dict."""
    info = PngImagePlugin.PngInfo()
    info.add_text("dreambooth", json.dumps(record))
    atomic.replace_file(
        file, lambda path: image.save(path, format="PNG", pnginfo=info, compress_level=1)
    )


def is_whole(file):
    """Whether a PNG is there and not truncated: it ends with the format's last chunk."""
    try:
        with open(file, "rb") as opened:
            opened.seek(-12, 2)
            return opened.read() == b"\0\0\0\0IEND\xaeB`\x82"
    except OSError:
        return False


def read_record(file):
    """The record in an image that `save_image` wrote; None if the file is missing, truncated, or
    not one of ours. Reads no pixels."""
    if not is_whole(file):
        return None
    try:
        with Image.open(file) as image:
            record = json.loads(image.info["dreambooth"])
    except (OSError, SyntaxError, ValueError, AttributeError, KeyError):
        return None
    return record if isinstance(record, dict) and "prompt" in record else None


def find_existing(folder, planned):
    """What generate.py has made in `folder`, an `Existing`, given the records `planned` for it.

    A record is judged by the fields that it has: images from before a setting existed stay valid.
    Truncated images count as absent; one without a record, such as a retouched one, is stale if it
    has a planned name. UserError: nothing can be written to `folder`.
    """
    atomic.check_writable(folder)
    _lines_of_others(folder)  # must be readable
    planned = {record["file"]: record for record in planned}
    prompts = {_prompt_number(name): record["prompt"] for name, record in planned.items()}
    first = next(iter(planned.values()))
    settings = {name: value for name, value in first.items() if name not in OWN_FIELDS}
    existing = Existing([], [], [])
    for file in sorted(Path(folder).glob("*.png")):
        record = read_record(file) if FILE_NAME.fullmatch(file.name) else None
        if record is None:
            if file.name in planned and is_whole(file):
                existing.stale.append(file)
            continue
        expected = planned.get(file.name)
        if expected is None:  # another index or seed of a planned prompt, or another prompt
            prompt = prompts.get(_prompt_number(file.name), record.get("prompt"))
            expected = {**settings, "file": file.name, "prompt": prompt}
        if any(record[name] != value for name, value in expected.items() if name in record):
            existing.stale.append(file)
        elif file.name in planned:
            existing.finished.append({**record, "file": file.name})
        else:
            existing.others.append({**record, "file": file.name})
    return existing


def _prompt_number(name):
    return name.partition("-")[0]


def remove_leftovers(folder):
    """Remove temporary files that a killed run has left in `folder`: old ones, and those of
    processes of this machine that have ended. (Two runs may fill it at the same time, with class
    images for two subjects.)"""
    for file in Path(folder).glob(".*.tmp"):
        found = TEMPORARY.fullmatch(file.name)
        with suppress(FileNotFoundError):
            old = time.time() - file.stat().st_mtime > 3600
            if found and (old or found[1] == atomic.HOST and not _is_running(int(found[2]))):
                file.unlink()


def _is_running(process_id):
    with suppress(PermissionError):  # another user's
        try:
            os.kill(process_id, 0)  # asks and does nothing
        except ProcessLookupError:
            return False
    return True


def write_metadata(folder, records):
    """Replace the lines of generated images in the folder's metadata.jsonl: one per image. A user's
    own lines, captions of other images, stay."""
    lines = [*_lines_of_others(folder), *map(_metadata_line, records)]
    atomic.replace_text(folder / METADATA, "".join(f"{line}\n" for line in lines))


def _lines_of_others(folder):
    """The lines of metadata.jsonl that are not of generated images, whatever they are; without a
    last one that a crash has cut off."""
    file = Path(folder) / METADATA
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n") if file.is_file() else []
    except UnicodeDecodeError:
        raise UserError(f"{file} is not a UTF-8 text file: choose another folder") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            if not FILE_NAME.fullmatch(json.loads(line)["file_name"]):
                found.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            if line.strip() and number < len(lines):
                found.append(line)
    return found


def append_metadata(folder, record):
    """Append one line to the folder's metadata.jsonl."""
    atomic.append_line(folder / METADATA, _metadata_line(record))


def _metadata_line(record):
    """A record under ImageFolder's names for the file and the text that belongs to it."""
    settings = {name: value for name, value in record.items() if name not in ("file", "prompt")}
    return json.dumps({"file_name": record["file"], "text": record["prompt"], **settings})


def contact_sheet(rows, file, columns=8, side=192):
    """Write the images of `rows`, a dict of captions and lists of paths, as one PNG: a row for each
    caption, each image fitted into a square of `side` pixels. A row shows at most `columns` images,
    and says so where there are more; a long caption takes several lines. At most MAX_ROWS rows are
    shown, the last of which says so."""
    if len(rows) > MAX_ROWS:
        *shown, (last, paths) = list(rows.items())[:MAX_ROWS]
        rows = {**dict(shown), f"{last} (the first {MAX_ROWS} of {len(rows)} rows)": paths}
    gap = 6
    line_height = 20
    font = ImageFont.load_default(size=16)
    shown = max(min(len(paths), columns) for paths in rows.values())
    width = max(shown * (side + gap) + gap, 480)
    captions = []
    for caption, paths in rows.items():
        if len(paths) > columns:
            caption = f"{caption} ({columns} of {len(paths)} shown)"
        captions.append(wrap(caption, font, width - 2 * gap))
    heights = [len(lines) * line_height + gap + side + gap for lines in captions]
    sheet = Image.new("RGB", (width, sum(heights) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    top = gap
    for lines, paths, height in zip(captions, rows.values(), heights, strict=True):
        for number, line in enumerate(lines):
            draw.text((gap, top + 2 + number * line_height), line, fill="black", font=font)
        for column, path in enumerate(paths[:columns]):
            image = fit_into_square(open_image(path), side)
            sheet.paste(image, (gap + column * (side + gap), top + height - gap - side))
        top += height
    atomic.replace_file(file, lambda path: sheet.save(path, format="PNG"))


def wrap(text, font, width):
    """The lines of `text`, none of them wider than `width` pixels."""

    def is_too_wide(characters):
        return any(font.getlength(line) > width for line in textwrap.wrap(text, characters))

    characters = bisect_left(range(1, len(text) + 1), True, key=is_too_wide)
    return textwrap.wrap(text, max(1, characters)) or [text]


def fit_into_square(image, side):
    """Scale and pad an image to `side` x `side` pixels; small ones keep their hard edges."""
    small = max(image.size) <= side // 2
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.pad(image, (side, side), method, color="white")


def main(args):
    """Write the sheet of `args.rows`, each "caption=folder". UserError: a row is of another form,
    its folder has no images, or the sheet would replace one of them."""
    rows = {}
    for row in args.rows:
        # Either may hold a "=": it is the one before a folder that exists, else the first.
        splits = [(row[:i], row[i + 1 :]) for i, char in enumerate(row) if char == "="]
        if not splits or not splits[-1][1]:
            raise UserError(f"{row!r}: write rows as caption=folder")
        caption, folder = next((s for s in splits if Path(s[1]).is_dir()), splits[0])
        rows[caption] = find_images(folder)
    check_at_least(args, 1, "columns")
    atomic.check_writable(Path(args.output).parent, "--output")
    if Path(args.output).resolve() in [image.resolve() for row in rows.values() for image in row]:
        raise UserError(f"--output {args.output} is one of the images: choose another file")
    contact_sheet(rows, args.output, args.columns)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    parser = ArgumentParser("Put the images of folders on one sheet, a row for each folder.")
    parser.add_argument("rows", nargs="+", metavar="CAPTION=DIR", help="a row of the sheet")
    parser.add_argument("--output", default=CONTACT_SHEET, help="the sheet, a PNG")
    parser.add_argument("--columns", type=int, default=8, help="maximum images per row")
    run_main(main, parser.parse_args())
