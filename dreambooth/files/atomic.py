"""Atomic writes: a file or directory is written whole or not at all, even if the process crashes.

Files and directories are written under a temporary name beside the target and then renamed. The
checks find what would make that fail before anything costly starts.

Not every file system can do all of this: network shares, folders that a virtual machine shares with
its host, and FUSE may refuse to sync a directory, to lock, to change a mode, or to rename what is
open. What they cannot do is left out or done in another way, and loses no result.
"""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from dreambooth.cli import UserError, is_full, warn

CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EPERM, errno.EACCES)
FILE_MANAGERS = {".DS_Store", "Thumbs.db", "desktop.ini"}  # put these into folders that they show
HOST = socket.gethostname().partition(".")[0]


def replace_file(file, write):
    """Let `write(temporary)` write a temporary file, then rename it to `file`, with the mode of new
    files. UserError: `file` is a directory."""
    file = Path(file)
    if file.is_dir():
        raise UserError(f"{file} is a directory: name a file in it")
    temporary = file.with_name(f".{file.name}.{HOST}.{os.getpid()}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        with suppress(OSError):
            temporary.chmod(mode)  # safetensors makes its own readable by their owner alone
        try:
            os.replace(temporary, file)
        except OSError:
            if not file.is_file():
                raise
            shutil.copyfile(temporary, file)  # where a file that is open cannot be replaced
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_text(file, text):
    """Write `text` to `file`, whole or not at all."""
    # A path's bytes that are not UTF-8, which Python keeps as lone surrogates, become "\\udce9".
    data = text.encode(errors="backslashreplace")
    replace_file(file, lambda temporary: temporary.write_bytes(data))


def append_line(file, text):
    """Append one line of `text` to `file` in a single write."""
    with open(file, "ab", buffering=0) as opened:
        opened.write(f"{text}\n".encode())


def replace_dir(folder, write):
    """Let `write(temporary)` fill a temporary directory, give its files the mode of new files, and
    put it in place of `folder`.

    A crash at any moment leaves the previous one whole: under its own name or, between the two
    renames, under .NAME.old beside it. UserError: the disk is full.
    """
    folder = Path(folder).resolve()
    new = unfinished(folder)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write(new)
        mode = new.stat().st_mode & 0o666  # a new directory's, so the umask is in it
        for path in (*new.rglob("*"), new):
            if path.is_file():
                with suppress(OSError):  # of a file system without modes
                    path.chmod(mode)  # safetensors makes its own readable by their owner alone
            fsync(path)
    except Exception as error:
        shutil.rmtree(new, ignore_errors=True)
        if is_full(error):
            raise UserError(
                f"no space left to write {folder}: nothing was saved, the previous result is kept"
            ) from error
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        try:
            os.rename(folder, old)
        except OSError:  # it is part of a container's image, or a file in it is open
            _copy_over(new, folder)
            return
    try:
        os.rename(new, folder)
    except OSError:
        _copy_over(new, folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _copy_over(new, folder):
    """Make the directory `folder`, where one cannot be renamed to it, hold what `new` holds."""
    folder.mkdir(exist_ok=True)
    copy_files(new, folder)
    for file in list(folder.rglob("*")):
        if file.is_file() and not (new / file.relative_to(folder)).exists():
            file.unlink()
    fsync(folder)
    shutil.rmtree(new, ignore_errors=True)


def copy_files(source, folder):
    """Copy the files below `source` to `folder`, their content alone: links are followed, and modes
    and times are new."""
    for file in sorted(Path(source).rglob("*")):
        if file.is_file():
            copy = Path(folder) / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def unfinished(folder):
    """Where `replace_dir` writes the new directory; a killed process leaves it to the next one."""
    folder = Path(folder)
    return folder.with_name(f".{folder.name}.new")


def lock(file, what, wait=False):
    """Lock `file` for this process, as long as it lives. UserError: another process has locked it,
    and is writing `what`; unless this one is to `wait` for its end."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # stays open: closing it unlocks
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise UserError(
            f"another run is writing {what}: wait for it to finish, or stop it"
            " (on shared storage, the lock of a lost machine lasts for a minute or two)"
        ) from None
    except OSError as error:  # a file system without locks, say: no reason to refuse the run
        warn(f"{file} cannot be locked ({error.strerror}): start no second run for {what}")


@contextmanager
def locked(folder):
    """Hold the lock of a directory: waits until no other process holds it. Leaves no file there;
    where it is not there, or cannot be locked, goes on."""
    descriptor = None
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def fsync(path):
    """Wait until a file or a directory is on the disk, so that it survives a power cut; where the
    file system cannot be asked for that, go on, as git and borg do."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if Path(path).is_dir():  # which some systems do not open
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def check_writable(folder, flag="--output_dir"):
    """`folder` must be a directory that can be created and written to. Leaves nothing behind."""
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {folder} is a file: name a directory")
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{flag} {folder} is a link to what is not there: is its disk mounted?")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{flag} {folder} cannot be written: {reason}") from None


def check_replaceable(folder, own_names, flag="--output_dir"):
    """`folder` must be new, empty, or an earlier result, that is, hold nothing but `own_names`; and
    `replace_dir` must be able to replace it, which a mount point does not allow."""
    folder = Path(folder).resolve()
    check_writable(folder, flag)
    check_writable(folder.parent, f"the directory of {flag}")
    if os.path.ismount(folder):
        raise UserError(
            f"{flag} {folder} is a mount point and cannot be replaced: name a subfolder"
        )
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(names - set(own_names) - FILE_MANAGERS)
    if others:
        raise UserError(
            f"{flag} {folder} holds other files ({others[0]}), which would be lost:"
            " name a new directory"
        )


def check_space(folder, num_bytes, what, leftovers=()):
    """The disk of `folder` must have `num_bytes` free for `what`, not counting `leftovers`: files
    that will have been deleted by then."""
    existing = next(parent for parent in Path(folder).absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    for file in leftovers:
        with suppress(FileNotFoundError):  # another run's, which has just finished with it
            free += file.stat().st_size
    if free < num_bytes:
        raise UserError(
            f"{folder}: {_size(free)} are free, and {what} will take {_size(num_bytes)}"
        )


def _size(num_bytes):
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes > 1e8 else f"{num_bytes / 1e6:.1f} MB"
