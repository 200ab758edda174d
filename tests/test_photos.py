"""Folders of photos: what is found in them and refused, their captions, and the folder of one
subject."""

import errno
import json
import os
import unicodedata
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dreambooth.cli import UserError
from dreambooth.files import decode, photos
from dreambooth.files.pipeline_dir import missing_file
from dreambooth.images import load_crops
from tests.test_decode import PROFILES


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_pipe_is_no_photo(flat_image, tmp_path):
    """To read one would wait for ever."""
    photo = flat_image("a.png", (255, 0, 0))
    os.mkfifo(tmp_path / "b.png")
    assert photos.find_images(tmp_path) == [photo]


def test_copies_of_a_photo_are_one(flat_image, tmp_path, capsys):
    """As a telephone exports some twice."""
    three = [flat_image(f"{i}.png", i, folder=tmp_path) for i in range(3)]
    copies = [flat_image(f"0 ({i}).png", 0, folder=tmp_path) for i in range(3)]
    photos.warn_if_few([*three, *copies])
    assert capsys.readouterr().err == ""
    photos.warn_if_few([*three[:2], *copies])
    assert "holds 2 photos and copies (0.png): is it the right" in capsys.readouterr().err


def test_what_is_no_image_of_the_folder_is_skipped(flat_image, tmp_path):
    """Others' leftovers, and what generate.py puts beside its images."""
    folder = tmp_path / "photos"
    (tmp_path / "photos" / "rejected").mkdir(parents=True)
    others = (".DS_Store", "Thumbs.db", "notes.txt", "._a.png", "metadata.jsonl")
    for name in others:
        (folder / name).write_text("no image")
    for name in ("contact_sheet.png", "a-masklabel.png", "a-condlabel.png"):  # OneTrainer's masks
        flat_image(name, 0, folder=folder)
    flat_image("a-checkpoint.png", 0, folder=folder / ".ipynb_checkpoints")
    flat_image("d.png", 0, folder=folder / "rejected")
    with pytest.raises(UserError, match=f"{folder}: no images there.*some in rejected/"):
        photos.find_images(folder)
    expected = [flat_image(name, 0, folder=folder) for name in ("a.png", "b.JPG", "c.webp")]
    assert photos.find_images(folder) == expected
    with pytest.raises(UserError, match=f"{tmp_path / 'nowhere'}: no such folder"):
        photos.find_images(tmp_path / "nowhere")


def test_unreadable_formats_are_refused_by_name(flat_image, tmp_path):
    """Fault 6 of the published example: what it could not read was skipped silently."""
    flat_image("a.png", 0)
    for name in ("IMG_1.DNG", "DSCF1.raf", "P1.orf", "1.rw2", "d.svg", "plot.eps", "1.insp"):
        (tmp_path / name).write_bytes(b"some camera's own")
        with pytest.raises(UserError, match=f"{name}: .* cannot be read; convert it to JPEG"):
            photos.find_images(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=r"gone.jpg is a link to a file that does not exist"):
        photos.find_images(tmp_path)


def test_what_is_skipped_is_counted_in_one_line(flat_image, tmp_path, capsys):
    """Not captions of images, what generate.py writes, and hidden files."""
    flat_image("a.png", 0)
    for name in ("a.txt", "metadata.jsonl", "contact_sheet.png", ".DS_Store"):
        (tmp_path / name).write_text("")
    (tmp_path / "compared").mkdir()
    flat_image("x.png", 0, folder=tmp_path / "compared")
    assert len(photos.find_images(tmp_path, report=True)) == 1
    assert capsys.readouterr().out == ""
    for name in ("x.txt", "Thumbs.db", "film.mp4"):
        (tmp_path / name).write_text("")
    flat_image("B.PNG", 0, folder=tmp_path / "more")  # as cameras name theirs
    photos.find_images(tmp_path, report=True)
    line = capsys.readouterr().out
    assert line == (
        f"skipped in {tmp_path}: 3 files that are no images (Thumbs.db, film.mp4, x.txt)\n"
        f"images in subfolders of {tmp_path} are not used (more/)\n"
    )
    flat_image("a-masklabel.png", 0)
    photos.find_images(tmp_path, report=True)
    assert "4 files that are no images (Thumbs.db, a-masklabel.png, fil" in capsys.readouterr().out
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="no images there .*there are some in more/: pass that"):
        photos.find_images(tmp_path)


def test_own_photos_are_those_of_this_subject_alone(flat_image, tmp_path, capsys):
    """Fault 11 of the published example: the folder of own images was never cleared, so that the
    last subject's photos mixed with the next one's. Here they are replaced, and named."""
    tom = flat_image("tom1.png", 0, folder=tmp_path / "tom").parent
    flat_image("tom2.png", 0, folder=tom)
    rex = flat_image("rex.png", 0, folder=tmp_path / "rex").parent
    (rex / "notes.txt").write_text("a dog")
    own = tmp_path / "deep" / "images-own"
    photos.copy_images(tom, own)
    assert [path.name for path in photos.find_images(own)] == ["tom1.png", "tom2.png"]
    assert capsys.readouterr().err == ""
    for expected in ([f"warning: {own} held the photos of {tom}, which are replaced"], []):
        photos.copy_images(rex, own)
        assert [path.name for path in photos.find_images(own)] == ["rex.png"]
        assert capsys.readouterr().err.splitlines() == expected
    assert names_in(rex) == ["notes.txt", "rex.png"]


def test_photos_in_the_own_folder_itself_survive(flat_image, tmp_path):
    """Copied onto itself it stays as it is; photos that lie below it would be lost."""
    own = tmp_path / "own"
    photos.copy_images(flat_image("rex.png", 0, folder=tmp_path / "rex").parent, own)
    photos.copy_images(own, own)
    assert [path.name for path in photos.find_images(own)] == ["rex.png"]
    photo = flat_image("tom.png", 0, folder=own / "tom")
    with pytest.raises(UserError, match="is inside"):
        photos.copy_images(photo.parent, own)
    assert photo.exists()


def test_the_users_own_folder_is_never_emptied(flat_image, tmp_path):
    """With the arguments the wrong way round, say: only what copy_images has made is replaced."""
    flat_image("a.png", 0, folder=tmp_path / "new")
    flat_image("tom.png", 0, folder=tmp_path / "tom")
    for source, text in (("new", "tom.png"), ("nowhere", "no such folder"), ("", "no images")):
        with pytest.raises(UserError, match=text):
            photos.copy_images(tmp_path / source, tmp_path / "tom")
        assert names_in(tmp_path / "tom") == ["tom.png"]


def test_fewer_than_three_photos_are_asked_about(flat_image, tmp_path, capsys):
    """`images` in place of `images/lego-car`: the banner of the README would be the one photo."""
    own = tmp_path / "own"
    for count, photos_in_words in ((1, "1 photo"), (2, "2 photos"), (3, "")):
        source = flat_image(f"{count}.png", count, folder=tmp_path / "source").parent
        photos.main(SimpleNamespace(source=source, folder=own))
        assert len(photos.find_images(own)) == count
        warning = f"warning: {source} holds {photos_in_words} (1.png)" if count < 3 else ""
        err = capsys.readouterr().err
        assert err.startswith(warning)
        assert len(err.splitlines()) == (count < 3)


def test_a_phones_photos_are_trained_on(tmp_path, train_here, capsys):
    """A HEIC photo, a JPEG in Display P3, and one whose name is not UTF-8: sRGB red, all three, in
    what Ray Data's tasks read, and good enough for train.py."""
    folder = tmp_path / "phone"
    folder.mkdir()
    Image.new("RGB", (80, 64), (255, 0, 0)).save(
        folder / "IMG_0001.HEIC", format="HEIF", quality=-1
    )
    for name in ("IMG_0002.JPG", b"caf\xe9.jpg".decode(errors="surrogateescape")):
        buffer = BytesIO()
        image = Image.new("RGB", (64, 80 + len(name)), (234, 51, 35))
        image.save(buffer, "JPEG", quality=95, icc_profile=PROFILES["Display P3"])
        (folder / name).write_bytes(buffer.getvalue())
    paths = [str(path) for path in photos.find_images(folder)]
    batch = {"instance": np.array(paths), "instance_prompt": np.zeros(3), "position": np.arange(3)}
    pixels = load_crops(batch, resolution=64, seed=0)["instance_image"].astype(int)
    assert np.abs(pixels - np.array([255, 0, 0])[:, None, None]).max() <= 6
    without = {"prior_loss_weight": 0, "class_images_dir": False, "class_prompt": False}
    run = train_here(instance_images_dir=folder, max_train_steps=1, **without)
    assert "3 instance and 0 class images at 64 px, 1 step of 1 image, 1 worker" in run.stdout
    assert "warning" not in capsys.readouterr().err
    assert missing_file(run.output_dir) is None


def test_names_that_differ_in_case_alone_are_both_copied(flat_image, tmp_path, monkeypatch):
    """To a disk that sees no case, where one would replace the other: with their captions, though
    one has another name there."""
    source, own = tmp_path / "source", tmp_path / "own"
    for name, colour in (("A.png", (255, 0, 0)), ("a.png", (0, 0, 255))):
        flat_image(name, colour, folder=source)
        with open(source / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": name, "text": f"unqtkn car, {name}"}) + "\n")
    exists = Path.exists

    def without_case(path):
        siblings = path.parent.iterdir() if exists(path.parent) else []
        return path.name.lower() in {sibling.name.lower() for sibling in siblings}

    monkeypatch.setattr(Path, "exists", without_case)
    photos.copy_images(source, own)
    images = photos.find_images(own)
    assert [image.name for image in images] == ["1-a.png", "A.png"]
    found = [decode.open_image(image).getpixel((0, 0)) for image in images]
    assert found == [(0, 0, 255), (255, 0, 0)]
    captions = photos.read_captions(own, images)
    assert [captions[image] for image in images] == ["unqtkn car, a.png", "unqtkn car, A.png"]


def test_a_folder_or_a_photo_that_may_not_be_read_is_one_line(flat_image, tmp_path, monkeypatch):
    """(These tests may run as root, who may read everything.)"""
    photo = flat_image("a.png", 0)

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(args[0]))

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(UserError, match="a.png cannot be read: Permission denied"):
        decode.open_image(photo)
    monkeypatch.undo()
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Permission denied"):
        photos.find_images(tmp_path)


@pytest.fixture
def captioned(flat_image, tmp_path):
    """A folder of two photos, one with a name that is not ASCII, and a function that writes files
    beside them: captioned(a="a.txt's text", metadata=[{...}]) returns what is read."""
    names = ["a.png", unicodedata.normalize("NFD", "caf\u00e9.png")]
    paths = [flat_image(name, 0, folder=tmp_path / "photos") for name in names]

    def read(metadata=None, **texts):
        for stem, text in texts.items():
            (tmp_path / "photos" / f"{stem}.txt").write_text(text, encoding="utf-8")
        if metadata is not None:
            lines = "\n".join(m if isinstance(m, str) else json.dumps(m) for m in metadata)
            (tmp_path / "photos" / "metadata.jsonl").write_text(lines, encoding="utf-8")
        return photos.read_captions(
            tmp_path / "photos", photos.find_images(tmp_path / "photos", report=True)
        )

    read.paths = paths
    return read


def test_captions_are_read_from_either_file(captioned, capsys):
    """A line break at the end of a .txt is none of the caption; names match in either Unicode
    normalization, and may be paths; more fields and Windows' byte order mark do no harm; both
    files may agree."""
    a, cafe = captioned.paths
    assert captioned() == {}
    assert captioned(a="\ufeffphoto of unqtkn car, red\r\n") == {a: "photo of unqtkn car, red"}
    rows = ["\ufeff" + json.dumps({"file_name": "caf\u00e9.png", "text": "at night", "seed": 3})]
    rows.append({"file_name": "./a.png", "text": "photo of unqtkn car, red"})
    rows.append({"file_name": str(a), "text": "photo of unqtkn car, red"})
    rows.append("")  # an empty line
    both = {a: "photo of unqtkn car, red", cafe: "at night"}
    assert captioned(metadata=rows) == both
    assert captioned(**{"caf\u00e9": "at night"}) == both
    assert capsys.readouterr().out == ""  # no caption is a file that is no image


@pytest.mark.parametrize(
    ("metadata", "texts", "message"),
    [
        ([{"file_name": "b.png", "text": "x"}], {}, "line 1: there is no image 'b.png'"),
        ([{"file_name": "more/b.png", "text": "x"}], {}, "line 1: there is no image 'more/b.png'"),
        (["{"], {}, "line 1: no"),
        (["[]"], {}, "line 1: no"),
        ([{"file_name": "a.png"}], {}, "line 1: no"),
        ([{"file_name": "a.png", "text": " "}], {}, "line 1: an empty caption"),
        ([{"file_name": "a.png", "text": 7}], {}, "line 1: an empty caption"),
        (None, {"a": "\n"}, "a.txt: an empty caption"),
        (None, {"a": "c\0a\0r\0"}, "a.txt is not a UTF-8 text file"),  # UTF-16
        ([{"file_name": "a.png", "text": "x"}], {"a": "y"}, "line 1: a.png has another caption"),
        (
            [{"file_name": "a.png", "text": t} for t in "xy"],
            {},
            "line 2: a.png has another caption",
        ),
        (["[" * 100_000], {}, "line 1: no"),
        (['{"file_name": "a.png", "text": "\\ud83d"}'], {}, "line 1: .* is not UTF-8"),
    ],
)
def test_captions_that_cannot_be_meant_are_one_line(captioned, metadata, texts, message):
    with pytest.raises(UserError, match=message) as error:
        captioned(metadata, **texts)
    assert "\n" not in str(error.value)


def test_a_line_ends_where_json_lines_end(captioned, tmp_path):
    """Not at the line separators of Unicode, which a text of JSON may hold."""
    a, _ = captioned.paths
    metadata = tmp_path / "photos" / "metadata.jsonl"
    metadata.write_text(
        '{"file_name": "a.png", "text": "red\u2028\u0085car"}\r\n', encoding="utf-8"
    )
    assert captioned() == {a: "red\u2028\u0085car"}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet", "a.caption", "a.png.txt"])
def test_captions_in_a_form_that_is_not_read_are_a_warning(captioned, tmp_path, capsys, name):
    (tmp_path / "photos" / name).write_text("a red car")
    photos.find_images(tmp_path / "photos", report=True)
    assert f"{name} is not read: captions are taken from .txt" in capsys.readouterr().err


def test_a_caption_of_two_lines_is_one_prompt_on_one_line(captioned):
    a, _ = captioned.paths
    assert captioned(a="red\nat night\n") == {a: "red at night"}


def test_a_caption_in_capitals_is_one(captioned, tmp_path):
    """As cameras and Windows write names."""
    a, _ = captioned.paths
    (tmp_path / "photos" / "a.TXT").write_text("red")
    assert captioned() == {a: "red"}


def test_a_generated_image_may_be_deleted(captioned, tmp_path):
    """A class image that looks bad; its line in metadata.jsonl stays."""
    a, cafe = captioned.paths
    rows = [{"file_name": path.name, "text": "photo of a car"} for path in (a, cafe)]
    captioned(metadata=rows)
    a.unlink()
    with pytest.raises(UserError, match="there is no image 'a.png'"):
        captioned()
    found = photos.read_captions(tmp_path / "photos", [cafe], were_generated=True)
    assert found == {cafe: "photo of a car"}


def test_the_command_names_a_photo_or_caption_that_cannot_be_read(flat_image, tmp_path):
    """Before anything costly starts; nothing is copied."""
    source = flat_image("a.png", 0, folder=tmp_path / "source").parent
    args = SimpleNamespace(source=source, folder=tmp_path / "own")
    (source / "a.txt").write_text("")
    with pytest.raises(UserError, match="a.txt: an empty caption"):
        photos.main(SimpleNamespace(source=source, folder=None))
    (source / "a.txt").unlink()
    photo = flat_image("b.png", 0, folder=source)
    photo.write_bytes(photo.read_bytes()[:-50])
    with pytest.raises(UserError, match="b.png: unreadable or truncated"):
        photos.main(args)
    assert not (tmp_path / "own").exists()


def test_a_users_caption_among_the_copied_photos_is_not_lost(flat_image, tmp_path):
    """They belong beside the photos; but what is there is not deleted without a word."""
    flat_image("a.png", 0, folder=tmp_path / "source")
    for _ in range(2):
        photos.copy_images(tmp_path / "source", tmp_path / "own")
    marker = tmp_path / "own" / photos.COPIED
    marker.write_bytes(marker.read_bytes().partition(b"\0")[0])  # as earlier versions wrote it
    photos.copy_images(tmp_path / "source", tmp_path / "own")
    (tmp_path / "own" / "a.txt").write_text("photo of unqtkn car at night")
    with pytest.raises(UserError, match="holds other files .a.txt., which would be lost"):
        photos.copy_images(tmp_path / "source", tmp_path / "own")
    assert (tmp_path / "own" / "a.txt").exists()


def test_captions_of_images_in_a_subfolder_are_left_out(flat_image, tmp_path):
    """ImageFolder's metadata.jsonl lists them as well."""
    a = flat_image("a.png", 0)
    flat_image("b.png", 0, folder=tmp_path / "more")
    rows = [{"file_name": name, "text": name} for name in ("a.png", "more/b.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert photos.read_captions(tmp_path, [a]) == {a: "a.png"}
