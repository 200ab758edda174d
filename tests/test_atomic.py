"""Files, directories and lines that are written whole or not at all."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dreambooth import atomic
from dreambooth.cli import UserError


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_new(folder):
    (folder / "model.txt").write_text("new")


@pytest.fixture
def result(tmp_path):
    """An earlier result: the directory tmp_path/tuned with one file, "old"."""
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "model.txt").write_text("old")
    return tmp_path / "tuned"


def test_a_file_is_replaced(tmp_path):
    file = tmp_path / "a.txt"
    atomic.replace_file(file, lambda path: path.write_text("first"))
    atomic.replace_file(str(file), lambda path: path.write_text("second"))
    assert file.read_text() == "second"
    assert names_in(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def write_half(path):
        path.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic.replace_file(file, write_half)
    assert file.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_a_file_is_never_seen_half_written(tmp_path):
    """Whoever looks while it is written finds the old content under its name."""
    file = tmp_path / "a.txt"
    file.write_text("old")
    seen = []

    def write(path):
        path.write_text("ne")
        seen.append(file.read_text())
        path.write_text("new")

    atomic.replace_file(file, write)
    assert seen == ["old"]
    assert file.read_text() == "new"


def test_lines_are_appended(tmp_path):
    file = tmp_path / "lines.jsonl"
    for text in ("first", "zweite Straße"):
        atomic.append_line(file, text)
    assert file.read_text(encoding="utf-8") == "first\nzweite Straße\n"


def test_a_line_is_a_single_write(tmp_path, monkeypatch):
    """So that a crash leaves the whole line or nothing, however long it is."""
    file = tmp_path / "lines.jsonl"
    atomic.append_line(file, "old")
    writes = []

    class File:
        def __init__(self, opened):
            self.opened = opened

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.opened.close()

        def write(self, content):
            writes.append(content)
            return self.opened.write(content)

    def open_unbuffered(path, mode, buffering=-1):
        assert buffering == 0
        return File(open(path, mode, buffering=buffering))

    monkeypatch.setattr(atomic, "open", open_unbuffered, raising=False)
    atomic.append_line(file, "x" * 100_000)
    assert writes == [b"x" * 100_000 + b"\n"]
    assert file.read_text() == "old\n" + "x" * 100_000 + "\n"


def test_a_line_that_cannot_be_appended_leaves_the_others(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic.append_line(tmp_path / "nowhere" / "lines.jsonl", "text")
    assert names_in(tmp_path) == []


def test_a_directory_is_replaced_whole(tmp_path):
    out = tmp_path / "deep" / "tuned"
    atomic.replace_dir(out, lambda folder: (folder / "other.txt").write_text("old"))
    atomic.replace_dir(out, write_new)
    assert names_in(out) == ["model.txt"]
    assert names_in(tmp_path / "deep") == ["tuned"]


ERRORS = {
    "disk full": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError),
    "disk full, by safetensors": (RuntimeError("I/O error: No space left on device"), UserError),
    "quota": (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), UserError),
    "other": (OSError("broken"), OSError),
}


@pytest.mark.parametrize("name", ["tuned", "first"])
@pytest.mark.parametrize("cause", ERRORS)
def test_a_failed_save_leaves_the_earlier_result_untouched(result, tmp_path, name, cause):
    error, raised = ERRORS[cause]

    def write(folder):
        write_new(folder)
        raise error

    with pytest.raises(raised) as found:
        atomic.replace_dir(tmp_path / name, write)
    if raised is UserError:
        assert f"no space left to write {tmp_path / name}" in str(found.value)
    assert (result / "model.txt").read_text() == "old"
    assert names_in(tmp_path) == ["tuned"]  # a full disk is not left full


def test_leftovers_of_a_killed_save_do_no_harm(tmp_path):
    (tmp_path / ".tuned.new").mkdir()
    (tmp_path / ".tuned.new" / "half").write_text("a model")
    atomic.replace_dir(tmp_path / "tuned", write_new)
    assert names_in(tmp_path) == ["tuned"]
    assert names_in(tmp_path / "tuned") == ["model.txt"]


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_crash_at_a_rename_loses_nothing(result, tmp_path, monkeypatch, crash_at):
    """The earlier result is whole under its own name or, between the two renames, beside it."""
    rename = os.rename
    calls = []

    def crash(source, target):
        calls.append(target)
        if len(calls) == crash_at:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        atomic.replace_dir(result, write_new)
    kept = result if crash_at == 1 else tmp_path / ".tuned.old"
    assert (kept / "model.txt").read_text() == "old"


def test_a_link_stays_a_link_to_the_new_result(tmp_path):
    """A model directory is often a link to a larger disk: what it points to is replaced."""
    target = tmp_path / "disk" / "model"
    target.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    for text in ("first", "second"):
        atomic.replace_dir(link, lambda folder, text=text: (folder / "a.txt").write_text(text))
        assert link.is_symlink()
        assert (target / "a.txt").read_text() == text
    assert names_in(tmp_path) == ["disk", "link"]
    assert names_in(tmp_path / "disk") == ["model"]


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path):
    atomic.check_writable(tmp_path / "deep" / "new")
    atomic.check_writable(tmp_path)
    assert names_in(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    """Below a file, a file, or a folder of the system (these tests may run as root)."""
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file" / "below", tmp_path / "file", Path("/proc/here")):
        with pytest.raises(UserError, match=f"^--model_dir {folder} ") as error:
            atomic.check_writable(folder, "--model_dir")
        assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert names_in(tmp_path) == ["file"]


def test_only_an_earlier_result_may_be_replaced(tmp_path):
    """A new, an empty and an earlier result's directory; not one with anything else in it, even
    beside an earlier result."""
    own_names = ["model_index.json", "unet"]
    atomic.check_replaceable(tmp_path / "new", own_names)
    atomic.check_replaceable(tmp_path, own_names)
    (tmp_path / "model_index.json").write_text("")
    (tmp_path / "unet").mkdir()
    atomic.check_replaceable(tmp_path, own_names)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"--output_dir .*holds other files \(thesis.tex\)"):
        atomic.check_replaceable(tmp_path, own_names)
    assert names_in(tmp_path) == ["model_index.json", "thesis.tex", "unet"]


def test_a_mount_point_cannot_be_replaced(tmp_path, monkeypatch):
    """As a volume of a container is: it can be written, but not renamed."""
    monkeypatch.setattr(os.path, "ismount", lambda folder: folder == tmp_path)
    with pytest.raises(UserError, match="is a mount point"):
        atomic.check_replaceable(tmp_path, [])
    atomic.check_replaceable(tmp_path / "sub", [])


def test_a_directory_whose_parent_cannot_be_written_cannot_be_replaced(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        atomic.check_replaceable(Path("/proc/self"), os.listdir("/proc/self"))


def test_space_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=3e9))
    atomic.check_space(tmp_path / "deep" / "out", 2.9e9, "the result")
    with pytest.raises(UserError, match="3.0 GB are free, and the result will take 4.2 GB"):
        atomic.check_space(tmp_path / "deep" / "out", 4.2e9, "the result")


def test_space_is_that_of_the_disk_of_the_folder(tmp_path, monkeypatch):
    """Of its nearest parent that exists."""
    asked = []

    def disk_usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    (tmp_path / "disk").mkdir()
    atomic.check_space(tmp_path / "disk" / "deep" / "out", 1, "the result")
    atomic.check_space(tmp_path / "disk", 1, "the result")
    assert asked == [tmp_path / "disk", tmp_path]


def test_a_file_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch, capsys):
    """On a file system without locks a run goes on, and its user knows."""

    def lockf(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic.fcntl, "lockf", lockf)
    atomic.lock(tmp_path / "lock", "tuned")
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {tmp_path / 'lock'} cannot be locked (No locks available)")
    assert len(line.splitlines()) == 1
