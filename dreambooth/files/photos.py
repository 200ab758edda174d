"""Folders of photos: the images in them, with their captions; and a folder for one subject alone.

python -m dreambooth.files.photos SOURCE             # says which photo or caption cannot be read
python -m dreambooth.files.photos SOURCE FOLDER      # FOLDER then holds the images of SOURCE alone
"""

import json
import os
import shutil
import unicodedata
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

from dreambooth.cli import ArgumentParser, UserError, absolute_path, run_main, warn
from dreambooth.files import atomic
from dreambooth.files.decode import open_image, readable_suffixes

UNREADABLE = {  # images that Pillow cannot read: the raw formats of cameras, and others
    ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".srw", ".orf",
    ".rw2", ".rwl", ".raf", ".pef", ".ptx", ".x3f", ".3fr", ".fff", ".iiq", ".kdc", ".dcr", ".mrw",
    ".erf", ".mef", ".mos", ".gpr", ".svg", ".svgz", ".jxl", ".psb", ".xcf", ".ai", ".eps", ".ps",
    ".wmf", ".emf", ".insp",
}  # fmt: skip
OTHER_CAPTIONS = (".caption", "metadata.csv", "metadata.parquet")
COPIED = ".copied-by-dreambooth"  # marks a folder that the next subject may replace
CONTACT_SHEET = "contact_sheet.png"  # generate.py puts one beside its images; it is not one of them
METADATA = "metadata.jsonl"  # of generated images, and with the captions of photos
OURS = {CONTACT_SHEET, METADATA, "compared"}  # beside generated images
MASKS = ("-masklabel", "-condlabel")  # that OneTrainer puts beside photos: skipped, not used
FEW_PHOTOS = 3  # with fewer, the model learns the photo rather than the subject


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
    stems = Counter(_normal(file.stem) for file in files)
    found, skipped, subfolders = [], [], []
    for file in files:
        if file.name.startswith(".") or file.name in OURS:
            continue
        if file.stem.endswith(MASKS):
            skipped.append(file.name)
            continue
        suffix = file.suffix.lower()
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file} is a link to a file that does not exist: replace or remove it")
        if file.is_dir():
            with suppress(OSError):  # it may not be read
                if any(inner.suffix.lower() in readable for inner in file.iterdir()):
                    subfolders.append(f"{file.name}/")
        elif suffix in readable and file.is_file():  # no pipe, which may never end
            found.append(file)
        elif suffix in UNREADABLE:
            raise UserError(f"{file}: {file.suffix} cannot be read; convert it to JPEG or PNG")
        elif not (suffix == ".txt" and stems[_normal(file.stem)] > 1):  # an image's caption
            skipped.append(file.name)
    if not found:
        inside = f"; there are some in {_names(subfolders)}: pass that folder" if subfolders else ""
        raise UserError(f"{folder}: no images there (such as .jpg, .png, .webp or .heic){inside}")
    of_image = {f"{file.name}.txt" for file in found}
    others = [name for name in skipped if name.endswith(OTHER_CAPTIONS) or name in of_image]
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
            text = " ".join(_read_text(file).rstrip("\r\n").splitlines())
            captions[image] = _caption(text, file)
    metadata = folder / METADATA
    lines = _read_text(metadata).split("\n") if metadata.is_file() else []
    for number, line in enumerate(lines, start=1):
        where = f"{metadata}, line {number}"
        if not line.strip():
            continue
        try:
            name, text = (json.loads(line)[field] for field in ("file_name", "text"))
            own_name = _normal(os.path.relpath(folder / name, folder))  # "./a.jpg" is a.jpg
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'{where}: no {{"file_name": ..., "text": ...}}') from None
        image = by_name.get(own_name)
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
    with suppress(OSError, UnicodeDecodeError):
        text = file.read_text(encoding="utf-8-sig")
        if "\0" not in text:  # else it is UTF-16, which may be valid UTF-8
            return text
    raise UserError(f"{file} is not a UTF-8 text file")


def _normal(name):
    return unicodedata.normalize("NFC", name)


def warn_if_few(paths):
    """Warn if there are not enough photos of a subject. Copies of one count as one."""
    number = len({os.path.getsize(path) for path in paths})
    if number < FEW_PHOTOS:
        number = len({zlib.crc32(Path(path).read_bytes()) for path in paths})
    if number < FEW_PHOTOS:
        copies = " and copies" if len(paths) > number else ""
        warn(
            f"{Path(paths[0]).parent} holds {number} photo{'s' if number > 1 else ''}{copies}"
            f" ({Path(paths[0]).name}): is it the right folder? Four or five are usual"
        )


def copy_images(source, folder):
    """Make `folder` hold the images of `source` and their captions, and nothing else: no photo of
    the previous subject.

    It is replaced whole, and only if this function made it: it then holds a hidden marker file,
    which names their source and all files. UserError: it holds something else.
    """
    images = find_images(source)
    captions = read_captions(source, images)
    folder = Path(folder)
    if folder.resolve() == Path(source).resolve():
        return
    if folder.resolve() in Path(source).resolve().parents:
        raise UserError(f"{source} is inside {folder}, which would be replaced: move it elsewhere")
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    earlier, *own = (folder / COPIED).read_bytes().split(b"\0") if COPIED in names else (b"",)
    # The marker of an earlier version names no files.
    own = [COPIED, *map(os.fsdecode, own)] if own or COPIED not in names else names
    atomic.check_replaceable(folder, own, flag="folder")
    source = os.fsencode(Path(source).resolve())
    if earlier not in (b"", source):
        warn(f"{folder} held the photos of {os.fsdecode(earlier)}, which are replaced")

    def write(temporary):
        for number, image in enumerate(images):
            copy = temporary / image.name
            if copy.exists():  # of names that differ in case alone, on a disk that sees no case
                copy = temporary / f"{number}-{image.name}"
            shutil.copyfile(image, copy)
            if image in captions:
                row = {"file_name": copy.name, "text": captions[image]}
                atomic.append_line(temporary / METADATA, json.dumps(row))
        written = [os.fsencode(file.name) for file in temporary.iterdir()]
        (temporary / COPIED).write_bytes(b"\0".join([source, *written]))

    with atomic.locked(folder.parent):  # two runs of one subject may begin at once
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
    parser.add_argument("source", type=absolute_path, help="a folder with photos of the subject")
    where = "where to put them; replaced if this command made it (default: only check them)"
    parser.add_argument("folder", nargs="?", type=absolute_path, help=where)
    run_main(main, parser.parse_args())
