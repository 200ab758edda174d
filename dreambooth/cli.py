"""What every script's command line shares: --help, user errors, exit codes, the libraries' logs.

Each script runs its `main` through `run_main`, which turns a `UserError` into one line on stderr
and exit code 2. A bug of ours keeps its stack trace. The libraries' own logs and progress bars are
off, unless a script runs with --verbose.
"""

import argparse
import atexit
import errno
import logging
import math
import os
import re
import sys
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

# For the libraries and the processes that Ray starts, which inherit them.
QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
}
STORAGE_FAILED = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # may pass, and is no file's fault
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: for one file of this size
OF_THE_DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
COMMON_WORDS = {"a", "an", "the", "my", "our", "of", "in", "on", "at", "with", "by", "and"}
COMMON_WORDS |= {"photo", "picture", "image"}
# One of Ray Train's loggers has no name of its own: it is the root logger.
LOGGERS = (None, "ray", "ray.data", "ray.train", "ray.tune", "diffusers", "transformers", "peft")


class UserError(ValueError):
    """Something that the user caused and can fix; the message, one line, says how. A docstring's
    "UserError: ..." lists what raises one."""

    # In the record of the run that it ended (run/training_log.py). All subclasses are in this
    # module, by whose name machines/cluster.py finds them in the text of Ray's errors.
    status = "failed"


class Stopped(UserError):
    """A signal asked the run to stop, and its checkpoint is written."""

    status = "stopped"


class Diverged(UserError):
    """The loss, the gradients or the weights are not finite numbers."""

    status = "diverged"


class OutOfMemory(UserError):
    """The GPU's memory did not suffice."""

    status = "out of memory"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with the script's docstring as it stands, and every default except off and none."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose --help is the script's docstring, and whose errors are one line."""

    def __init__(self, description, **settings):
        super().__init__(
            description=description, formatter_class=HelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message):
        self.exit(2, f"error: {_one_line(message)} (--help explains the flags)\n")


def absolute_path(text):
    """The type of a flag that takes a path: absolute, as Ray's workers run in another directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path; is a shell variable not set?")
    if re.match("[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):  # else it would become a folder here
        raise argparse.ArgumentTypeError(f"{text} is a URL, not a path: mount the storage it names")
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"{text}: no such user; ./~ begins the name of a folder"
        ) from None
    except FileNotFoundError:
        raise argparse.ArgumentTypeError(f"{text}: the current directory was deleted") from None
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:  # Path.resolve would end in a RuntimeError
            raise argparse.ArgumentTypeError(f"{text}: links that lead back to itself") from None
    return str(path)


def valid_prompt(text):
    """The type of a flag that takes a prompt."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty prompt; is a shell variable not set?")
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps bytes that are not UTF-8 as lone surrogates
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


def words(prompt):
    """The words of a prompt, a set, without punctuation, case, and the commonest ones."""
    return set(re.findall(r"[^\s,.;:]+", prompt.lower())) - COMMON_WORDS


def warn(message):
    """One line on stderr about what is allowed and probably a mistake."""
    print(f"warning: {_one_line(message)}", file=sys.stderr, flush=True)


def _one_line(message):
    """`message` with what would end a line written as \\n: a file's name may hold a line break."""
    return "\\n".join(str(message).splitlines())


def first_line(error):
    """What a library's error says, in one line; its class if it says nothing."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])


def run_main(main, args):
    """Call `main(args)` and exit. A `UserError` becomes one line and exit code 2, and so does a
    disk that is full or that may not be read or written; Ctrl-C, 130."""
    sys.stdout, sys.stderr = _Stream(sys.stdout), _Stream(sys.stderr)
    try:
        with _iterators_closed():
            main(args)
        _exit_at_once()
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in OF_THE_DISK or not (error.filename or is_full(error)):
            raise  # (a full disk names no file)
        file = f"{_one_line(error.filename)}: " if error.filename else ""
        remedy = "" if file else ": make room, or use another disk, and run the same command again"
        print(f"error: {file}{error.strerror}{remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def is_full(error):
    """Whether `error`, or one before it, says that the disk or the user's quota of it is full, or
    that it takes no file of that size. (safetensors has errors of its own, with the system's
    message; torch's come after the file's.)"""
    texts = [os.strerror(code) for code in FULL]
    if getattr(error, "errno", None) in FULL or any(text in str(error) for text in texts):
        return True
    return error.__context__ is not None and is_full(error.__context__)


class _Stream:
    """A standard stream that outlives its reader: after `train.py | head -1`, what is printed goes
    nowhere, and the run goes on."""

    def __init__(self, stream):
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 (None: closed from the start)
        with suppress(AttributeError):
            self._stream.reconfigure(errors="backslashreplace")  # a prompt need not be in Latin-1

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()

    def flush(self):
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what the stream still holds goes there as well
        os.close(nowhere)


def _exit_at_once():
    """Exit with code 0, before Python frees every object of torch, Ray and diffusers one by one:
    1.2 s of generate.py, 1.6 s of train.py, on two cores. (A profiler or a debugger sees the usual
    end.)"""
    if sys.getprofile() or sys.gettrace():
        return
    atexit._run_exitfuncs()  # Ray's own shutdown is one of them
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # closed, or a pipe whose reader has ended
            stream.flush()
    os._exit(0)


@contextmanager
def _iterators_closed():
    """Where the body fails, close the iterators in the frames that the error has left: Ray Data's,
    closed at the end of the process, after Ray, would start Ray again and wait for ever."""
    try:
        yield
    except BaseException as error:
        cause = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        raise


def check_at_least(args, minimum, *names, above=False):
    """Each of the named arguments, where given, must be a finite number of at least `minimum`;
    with `above`, greater than `minimum`. A UserError names the first that is not."""
    for name in names:
        value = getattr(args, name)
        if value is None:
            continue
        large_enough = value > minimum if above else value >= minimum  # False for nan
        if value == math.inf:
            raise UserError(f"--{name} is {value}: must be finite")
        if not large_enough:
            bound = "above" if above else "at least"
            raise UserError(f"--{name} is {value}: must be {bound} {minimum}")


def plural(count, noun):
    """A number and its noun: "1 step", "2 steps"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def read_lines(file, flag):
    """The lines of a text file, without empty ones and comments, which begin with #."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()  # Notepad adds a signature
    except FileNotFoundError:
        raise UserError(f"{flag} {file}: no such file") from None
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{flag} {file} is not a UTF-8 text file") from None
    lines = [line.strip() for line in lines]
    return [line for line in lines if line and not line.startswith("#")]


def configure_logs(verbose, loads_models=False):
    """Silence the libraries in this process and in those that Ray starts from it, unless `verbose`;
    with `loads_models` also diffusers and transformers, which it imports.

    What fails is raised in any case. Call it before Ray starts and before models load.
    """
    if verbose:
        return
    if loads_models:
        silence_model_libraries()
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def silence_model_libraries():
    """Hide the bars with which diffusers and transformers load models, and what they log."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity(logging.CRITICAL)


@contextmanager
def silent_stderr(verbose):
    """Hide stderr, also that of C++ code and of processes started meanwhile, unless `verbose`."""
    if verbose:
        yield
        return
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
