"""Files, directories and lines that are written whole or not at all."""

import errno
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from dreambooth.cli import UserError
from dreambooth.files import atomic


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


def test_a_file_is_replaced_and_never_seen_half_written(tmp_path):
    """Whoever looks while it is written, or after that has failed, finds the old content."""
    file = tmp_path / "a.txt"
    atomic.replace_file(str(file), lambda path: path.write_text("old"))

    def write(path, fails):
        path.write_text("ne")
        assert file.read_text() == "old"
        if fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text("new")

    with pytest.raises(OSError, match="No space left"):
        atomic.replace_file(file, lambda path: write(path, fails=True))
    assert file.read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]
    atomic.replace_file(file, lambda path: write(path, fails=False))
    assert file.read_text() == "new"
    assert names_in(tmp_path) == ["a.txt"]


def test_a_name_that_is_not_utf_8_may_be_written(tmp_path):
    """As the page names a folder of photos."""
    atomic.replace_text(tmp_path / "page", f"caf\u00e9 {os.fsdecode(b'caf' + bytes([233]))}")
    assert (tmp_path / "page").read_text(encoding="utf-8") == "caf\u00e9 caf\\udce9"


def test_a_directory_is_no_file_to_replace(tmp_path):
    with pytest.raises(UserError, match="is a directory: name a file in it"):
        atomic.replace_file(tmp_path, lambda file: file.write_text("new"))
    assert not list(tmp_path.iterdir())


def test_lines_of_several_writers_do_not_mix(tmp_path):
    """Each is a single write, so that a crash leaves the whole line or nothing, however long it
    is."""
    file = tmp_path / "lines.jsonl"
    lines = [f"{number}: Straße " * 5000 for number in range(200)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda line: atomic.append_line(file, line), lines))
    assert sorted(file.read_text(encoding="utf-8").split("\n")) == sorted(["", *lines])


def test_a_directory_is_replaced_whole_whatever_a_killed_save_has_left(tmp_path):
    out = tmp_path / "deep" / "tuned"
    atomic.replace_dir(out, lambda folder: (folder / "other.txt").write_text("old"))
    (tmp_path / "deep" / ".tuned.new").mkdir()
    (tmp_path / "deep" / ".tuned.new" / "half").write_text("a model")
    atomic.replace_dir(out, write_new)
    assert names_in(out) == ["model.txt"]
    assert names_in(tmp_path / "deep") == ["tuned"]


AFTER_THE_FILES = RuntimeError("unexpected position")
AFTER_THE_FILES.__context__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
ERRORS = {
    "disk full, by safetensors": (RuntimeError("I/O error: No space left on device"), UserError),
    "quota, by torch, after the file's": (AFTER_THE_FILES, UserError),
    "other": (OSError("broken"), OSError),
}


@pytest.mark.parametrize("cause", ERRORS)
def test_a_failed_save_leaves_the_earlier_result_untouched(result, tmp_path, cause):
    """A first save leaves nothing; a full disk is not left full."""
    error, raised = ERRORS[cause]

    def write(folder):
        write_new(folder)
        raise error

    for name in ("tuned", "first"):
        with pytest.raises(raised) as found:
            atomic.replace_dir(tmp_path / name, write)
        says_why = f"no space left to write {tmp_path / name}" in str(found.value)
        assert says_why == (raised is UserError)
        assert (result / "model.txt").read_text() == "old"
        assert names_in(tmp_path) == ["tuned"]


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_crash_at_a_rename_loses_nothing(result, tmp_path, monkeypatch, crash_at):
    """The earlier result is whole under its own name or, between the two renames, beside it; and
    the next save succeeds."""
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
    atomic.replace_dir(result, write_new)
    assert (result / "model.txt").read_text() == "new"
    assert names_in(tmp_path) == ["tuned"]


def test_a_link_stays_a_link_to_the_new_result(tmp_path):
    """A model directory is often a link to a larger disk: what it points to is replaced."""
    target = tmp_path / "disk" / "model"
    target.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(target)
    atomic.replace_dir(link, write_new)
    assert link.is_symlink()
    assert names_in(target) == ["model.txt"]
    assert names_in(tmp_path) == ["disk", "link"]
    assert names_in(tmp_path / "disk") == ["model"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    """Below a file, a file, or a folder of the system (these tests may run as root). The check
    leaves nothing behind."""
    (tmp_path / "file").write_text("mine")
    atomic.check_writable(tmp_path / "deep" / "new")
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
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):  # a file manager has shown it
        (tmp_path / name).touch()
    atomic.check_replaceable(tmp_path, own_names)
    (tmp_path / "model_index.json").write_text("")
    (tmp_path / "unet").mkdir()
    atomic.check_replaceable(tmp_path, own_names)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"--output_dir .*holds other files \(thesis.tex\)"):
        atomic.check_replaceable(tmp_path, own_names)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_cannot_be_renamed_cannot_be_replaced(tmp_path, monkeypatch):
    """A mount point, as a volume of a container is; a directory whose parent is read-only, though
    it can be written to itself."""
    with pytest.raises(UserError, match="cannot be written"):
        atomic.check_replaceable(Path("/proc/self"), os.listdir("/proc/self"))
    (tmp_path / "tuned").mkdir()
    with monkeypatch.context() as patch:
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real = tempfile.TemporaryFile
        refused = MagicMock(side_effect=error)
        patch.setattr(
            tempfile, "TemporaryFile", lambda dir: (refused if dir == tmp_path else real)(dir=dir)
        )
        with pytest.raises(UserError, match="the directory of --output_dir .* cannot be written"):
            atomic.check_replaceable(tmp_path / "tuned", [])
    monkeypatch.setattr(os.path, "ismount", lambda folder: folder == tmp_path)
    with pytest.raises(UserError, match="is a mount point"):
        atomic.check_replaceable(tmp_path, [])
    atomic.check_replaceable(tmp_path / "sub", [])


def test_a_link_to_a_disk_that_is_not_mounted(tmp_path):
    """Its folder could not be made, and images would be lost after they were generated."""
    (tmp_path / "link").symlink_to("/nowhere/images")
    with pytest.raises(UserError, match="link is a link to what is not there: is its disk mounted"):
        atomic.check_writable(tmp_path / "link")


def test_space_on_the_disk_of_the_folder(tmp_path, monkeypatch):
    """The disk is that of its nearest parent that exists; 3 GB are free there, and 0.5 MB more once
    the leftovers are gone."""
    disk = tmp_path / "disk"
    disk.mkdir()
    free = {disk: 3e9, tmp_path: 1e9}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    out = disk / "deep" / "out"
    atomic.check_space(out, 3e9, "the result")
    with pytest.raises(UserError, match="3.0 GB are free, and the result will take 4.2 GB"):
        atomic.check_space(out, 4.2e9, "the result")
    (tmp_path / "leftover").write_bytes(b"\0" * 500_000)
    leftovers = [tmp_path / "leftover", tmp_path / "gone"]
    atomic.check_space(out, 3.0004e9, "the result", leftovers)
    with pytest.raises(UserError):
        atomic.check_space(out, 3.0006e9, "the result", leftovers)


def test_a_file_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch, capsys):
    """On a file system without locks a run goes on, and its user knows."""

    def lockf(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic.fcntl, "lockf", lockf)
    atomic.lock(tmp_path / "lock", "tuned")
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {tmp_path / 'lock'} cannot be locked (No locks available)")
    assert len(line.splitlines()) == 1


# What file systems that people use cannot do: CIFS, vboxsf, drvfs, FUSE, containers' images.


def refuse(monkeypatch, name, code, when=lambda *args: True):
    """Let `os.NAME` fail with an error number."""
    real = getattr(os, name)

    def call(*args, **kwargs):
        if when(*args):
            raise OSError(code, os.strerror(code), str(args[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)


CANNOT_SYNC = ["EINVAL", "ENOTSUP", "ENOSYS", "EPERM", "EACCES", "EBADF"]


@pytest.mark.parametrize("name", CANNOT_SYNC)
def test_a_directory_that_cannot_be_synced_is_no_reason_to_lose_a_result(result, monkeypatch, name):
    """As on FUSE or a Windows share."""
    refuse(monkeypatch, "fsync", getattr(errno, name))
    atomic.replace_dir(result, write_new)
    assert (result / "model.txt").read_text() == "new"
    assert names_in(result.parent) == ["tuned"]


def test_a_disk_that_fails_while_it_syncs_is_an_error(result, monkeypatch):
    refuse(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        atomic.replace_dir(result, write_new)
    assert (result / "model.txt").read_text() == "old"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EACCES, errno.EBUSY])
@pytest.mark.parametrize("refused", ["the old one", "both"])
def test_a_directory_that_cannot_be_renamed_is_filled(result, monkeypatch, code, refused):
    """It lies in a container's image, or a file in it is open."""
    (result / "stale").mkdir()
    (result / "stale" / "part.txt").write_text("old")
    refuse(monkeypatch, "rename", code, lambda a, b: refused == "both" or Path(a) == result)
    atomic.replace_dir(result, write_new)
    assert (result / "model.txt").read_text() == "new"
    assert [file for file in result.rglob("*") if file.is_file()] == [result / "model.txt"]
    assert names_in(result.parent) == ["tuned"]


def test_a_file_that_cannot_be_renamed_over_is_written(tmp_path, monkeypatch):
    """Somebody has it open."""
    file = tmp_path / "run.json"
    file.write_text("old")
    refuse(monkeypatch, "replace", errno.EACCES)
    atomic.replace_file(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new"
    assert names_in(tmp_path) == ["run.json"]


def test_modes_that_cannot_be_changed_are_left(result, monkeypatch):
    refuse(monkeypatch, "chmod", errno.EPERM)
    atomic.replace_dir(result, write_new)
    atomic.replace_file(result / "a.txt", lambda path: path.write_text("new"))
    assert names_in(result) == ["a.txt", "model.txt"]


def test_copies_are_of_content_alone(tmp_path, monkeypatch):
    """Through links, as the Hub's cache has them; no mode or time is copied."""
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "source" / "unet").mkdir(parents=True)
    (tmp_path / "source" / "unet" / "a.bin").symlink_to(tmp_path / "blob")
    refuse(monkeypatch, "chmod", errno.EPERM)
    refuse(monkeypatch, "utime", errno.EPERM)
    atomic.copy_files(tmp_path / "source", tmp_path / "copy")
    copy = tmp_path / "copy" / "unet" / "a.bin"
    assert copy.read_text() == "weights"
    assert not copy.is_symlink()


def test_two_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    """Such as two runs that share class images: each has a temporary file of its own."""
    file = tmp_path / "file.txt"

    def write_meanwhile(temporary):
        temporary.write_text("first")
        child = os.fork()
        if child == 0:
            atomic.replace_text(file, "second")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert file.read_text() == "second"
        assert temporary.read_text() == "first"

    atomic.replace_file(file, write_meanwhile)
    assert file.read_text() == "first"


def test_a_result_is_on_the_disk_before_the_earlier_one_goes(tmp_path, monkeypatch):
    """Its files, and then its name: else a power cut could leave neither."""
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "model.txt").write_text("old")
    synced = []
    fsync = os.fsync

    def note(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        names = sorted(file.name for file in tmp_path.iterdir())
        synced.append((os.path.relpath(path, tmp_path), names))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    atomic.replace_dir(tmp_path / "tuned", lambda new: (new / "model.txt").write_text("new"))
    assert synced == [
        (".tuned.new/model.txt", [".tuned.new", "tuned"]),
        (".tuned.new", [".tuned.new", "tuned"]),
        (".", [".tuned.old", "tuned"]),
    ]


def test_the_lock_is_for_every_user_of_shared_storage(tmp_path):
    """As their umask leaves it: another user's run is to be refused, and not warned of."""
    atomic.lock(tmp_path / "lock", "tuned")
    (tmp_path / "new").touch()
    assert (tmp_path / "lock").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_new_directory_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch):
    """There was no earlier result."""
    refuse(monkeypatch, "rename", errno.EACCES)
    atomic.replace_dir(tmp_path / "tuned", write_new)
    assert (tmp_path / "tuned" / "model.txt").read_text() == "new"
    assert names_in(tmp_path) == ["tuned"]
