"""What all command lines share: --help, user errors in one line, exit codes, quiet libraries."""

import argparse
import ast
import errno
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import diffusers
import pytest
import transformers

import cache_model
import download_example_dataset
import generate
import train
from dreambooth import cli
from dreambooth.cli import UserError

# The end of a script.


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # which names no file
REMEDY = "make room, or use another disk, and run the same command again"
OF_THE_DISK = ["ENOSPC", "EFBIG", "EACCES", "EROFS", "ENAMETOOLONG", "ELOOP"]
OF_A_FILE = [OSError(getattr(errno, name), f"it says {name}", "/out/a") for name in OF_THE_DISK]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a.png: gone"), 2, "error: a.png: gone\n"),
        (cli.Diverged("a\nb\u2028c.png: gone"), 2, "error: a\\nb\\nc.png: gone\n"),  # a file's name
        (KeyboardInterrupt(), 130, "interrupted\n"),
        *((error, 2, f"error: /out/a: {error.strerror}\n") for error in OF_A_FILE),
        (FULL, 2, f"error: {FULL.strerror}: {REMEDY}\n"),
    ],
)
def test_what_ends_a_script_is_one_line_and_an_exit_code(capsys, error, code, line):
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(MagicMock(side_effect=error), None)
    assert (stopped.value.code, capsys.readouterr().err) == (code, line)


def test_the_first_line_of_an_error_is_one_that_says_something():
    """diffusers has an empty line between a sentence and what it announces."""
    assert (
        cli.first_line(ValueError("\n these keys are wrong: \n\n a.b \n c"))
        == "these keys are wrong: a.b"
    )
    assert cli.first_line(ValueError("no such key: a\nTraceback: many lines")) == "no such key: a"
    assert cli.first_line(KeyError()) == "KeyError"


def test_a_bug_keeps_its_stack_trace():
    with pytest.raises(ZeroDivisionError):
        cli.run_main(lambda args: 1 / 0, None)


def test_a_script_that_fails_closes_its_iterators():
    """Even while its error is kept. Closed later, after Ray, Ray Data's would wait for ever."""
    closed, kept = [], []

    def rows():
        try:
            yield 1
        finally:
            closed.append("rows")

    def read():
        iterator = rows()
        next(iterator)
        raise OSError("disk")

    def main(args):
        try:
            read()
        except OSError as error:
            kept.append(error)
            raise UserError("no space") from error

    with pytest.raises(SystemExit):
        cli.run_main(main, None)
    assert closed == ["rows"]


SUCCEED = """
import atexit
from dreambooth.cli import run_main

class Large:
    def __del__(self):
        print("freed")

large = Large()
atexit.register(print, "shut down")
run_main(print, "done")
"""


def test_a_script_that_succeeds_shuts_down_but_frees_nothing(run_script):
    """Ray's shutdown takes place; that Python frees torch's modules takes seconds, and does not."""
    result = run_script("-c", SUCCEED)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\nshut down\n", "")


# Its flags.


@pytest.fixture
def refusal(capsys):
    """The line with which a script's `parse_args` refuses some arguments."""

    def run(script, argv):
        with pytest.raises(SystemExit) as stopped:
            script.parse_args(argv)
        assert stopped.value.code == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        return line

    return run


def test_a_command_line_that_argparse_refuses_is_one_line_and_exit_code_2(refusal):
    """argparse itself prints the usage, some forty lines, above its error."""
    required = ["--model_dir", "a", "--output_dir", "b"]
    for argv, reason in (
        (required[2:], "error: the following arguments are required: --model_dir (--help "),
        ([*required, "--se\nde", "1"], "error: unrecognized arguments: --se\\nde 1 (--help "),
        ([*required, "--seed", "one"], "error: argument --seed: invalid int value: 'one' (--help "),
        ([*required, "--prompts", " "], "error: argument --prompts: an empty prompt; is a shell "),
    ):
        assert refusal(generate, argv).startswith(reason)


PATH_FLAGS = {
    train: ["model_dir", "output_dir", "instance_images_dir", "class_images_dir", "storage_path"],
    generate: ["model_dir", "output_dir", "lora_weights_dir", "compare_to", "prompts_file"],
}


@pytest.mark.parametrize("script", PATH_FLAGS)
def test_paths_are_absolute_and_not_empty(script, train_argv, generate_argv, refusal, monkeypatch):
    """Ray's workers run in another directory. An empty path is a shell variable that is not set:
    it would be the current directory. The shell leaves a tilde alone in --flag=~/x."""
    monkeypatch.setenv("HOME", "/home/ann")
    argv = (train_argv if script is train else generate_argv)("out")
    for name in PATH_FLAGS[script]:
        assert refusal(script, [*argv, f"--{name}", ""]).startswith(
            f"error: argument --{name}: an empty path"
        )
        for path, absolute in (
            ("some/path", f"{os.getcwd()}/some/path"),
            ("~/photos", "/home/ann/photos"),
            ("/a/b", "/a/b"),
        ):
            assert getattr(script.parse_args([*argv, f"--{name}={path}"]), name) == absolute


def test_help_is_the_docstring_and_every_default_but_off_and_none(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # so that no help is wrapped
    for script in (train, generate, cache_model, download_example_dataset):
        with pytest.raises(SystemExit) as stopped:
            script.parse_args(["--help"])
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert script.__doc__.strip() in text
        assert not re.search(r"\(default: (None|False|\[\])\)", text)
        if script is train:
            assert "steps of linear warm-up from 0 (default: 0)\n" in text
            assert "learning rate of AdamW (default: 5e-6; of LoRA: 1e-4)\n" in text
            assert "gradients are clipped to this norm (default: 1.0)\n" in text
            assert "train LoRA matrices only: less memory, small file\n" in text


def test_numbers_must_be_finite_and_in_range():
    """A number that is none is below every minimum; what is not given is not checked."""
    numbers = {"count": 2, "rate": 0.5, "unset": None, "none": 0, "inf": math.inf, "nan": math.nan}
    args = SimpleNamespace(**numbers)
    cli.check_at_least(args, 2, "count", "unset")
    cli.check_at_least(args, 0, "count", "rate", "unset", "none")
    cli.check_at_least(args, 0, "count", "rate", above=True)
    for minimum, above, name, reason in [
        (1, False, "rate", "--rate is 0.5: must be at least 1"),
        (0, True, "none", "--none is 0: must be above 0"),
        (0, False, "inf", "--inf is inf: must be finite"),
        (0, False, "nan", "--nan is nan: must be at least 0"),
        (0, True, "nan", "--nan is nan: must be above 0"),
    ]:
        with pytest.raises(UserError, match=f"^{reason}$"):
            cli.check_at_least(args, minimum, "count", name, above=above)


def test_lines_of_a_text_file(tmp_path):
    """Windows' editors put an invisible signature before the first one."""
    file = tmp_path / "prompts.txt"
    text = "\ufeffphoto of a car\n\n  at night, in the snow \r\n写真\n # not this one\ncar #5\n"
    file.write_text(text, encoding="utf-8")
    expected = ["photo of a car", "at night, in the snow", "写真", "car #5"]
    assert cli.read_lines(file, "--prompts_file") == expected
    file.write_bytes(b"\xff\xfecar")
    for path, reason in (
        (file, "is not a UTF-8 text file"),
        (tmp_path, "is not a UTF-8 text file"),
        (tmp_path / "nowhere.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=f"^--prompts_file {path}:? {reason}$"):
            cli.read_lines(path, "--prompts_file")


# What else it prints: nothing.


@pytest.fixture
def unconfigured():
    """The loggers of a process that has silenced nothing yet; afterwards all is as before."""
    environment = dict(os.environ)
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in cli.LOGGERS}
    for logger in levels:
        logger.setLevel(logging.WARNING)
    for name in cli.QUIET_ENVIRONMENT:
        os.environ.pop(name, None)
    yield list(levels)
    for logger, level in levels.items():
        logger.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)


def test_libraries_are_silent_unless_verbose(unconfigured):
    """Their logs and warnings in this process, and by its environment in those that it starts; but
    what the user has set there stays."""
    os.environ["RAY_DATA_LOG_LEVEL"] = "DEBUG"
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        for verbose in (True, False):
            cli.configure_logs(verbose)
            assert {logger.isEnabledFor(logging.ERROR) for logger in unconfigured} == {verbose}
            assert ("HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ) == verbose
            warnings.warn(f"verbose: {verbose}", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["verbose: True"]
    assert os.environ["PYTHONWARNINGS"] == "ignore"
    assert os.environ["RAY_DATA_LOG_LEVEL"] == "DEBUG"


def test_models_load_without_bars_and_messages_unless_verbose(unconfigured):
    both = [library.utils.logging for library in (diffusers, transformers)]
    for library in both:
        library.enable_progress_bar()
    for verbose in (True, False):  # silent in the end, as in other tests
        cli.configure_logs(verbose, loads_models=True)
        assert {library.is_progress_bar_enabled() for library in both} == {verbose}
        assert {library.get_verbosity() == logging.CRITICAL for library in both} == {not verbose}


def test_stderr_is_silent_for_a_while(capfd):
    """Also that of other processes; afterwards it is there again, whatever happened."""
    with pytest.raises(KeyError), cli.silent_stderr(verbose=False):
        os.write(2, b"hidden\n")
        subprocess.run(["sh", "-c", "echo hidden >&2"])
        raise KeyError
    os.write(2, b"shown\n")
    with cli.silent_stderr(verbose=True):
        os.write(2, b"shown, too\n")
    assert capfd.readouterr().err == "shown\nshown, too\n"


def test_a_run_on_two_workers_prints_its_own_lines_alone(two_workers):
    """As a command that starts its own Ray, with a process for each worker."""
    assert two_workers.stderr == ""
    first_words = [line.split(" ")[0] for line in two_workers.stdout.splitlines()]
    assert first_words == ["5", "training", "step", "step", "start", "wrote"]


IMPORT = """
import gc, os, sys

class FirstImport:
    def find_spec(self, name, path, target=None):
        if name in ("torch", "ray"):
            settings = ("GOMP_SPINCOUNT", "RAY_TRAIN_V2_ENABLED")
            print(*map(os.environ.get, settings), gc.get_threshold()[0], flush=True)
            os._exit(0)

sys.meta_path.insert(0, FirstImport())
import {script}
"""


@pytest.mark.parametrize("script", ["train", "generate"])
def test_settings_are_made_before_torch_reads_them(run_script, script):
    """OpenMP's, when it or Ray imports it; the garbage collector's threshold, for all objects."""
    assert run_script("-c", IMPORT.format(script=script)).stdout == "3000 1 10000\n"


CHATTY = """
import sys
from dreambooth.cli import run_main
def main(args):
    for i in range(3000):
        print("line", i, "\\u732b", flush=i % EVERY == EVERY - 1)
    print("done", file=sys.stderr)
run_main(main, None)
"""


@pytest.mark.parametrize("every", ["7", "5000"])
@pytest.mark.parametrize("shell", ["| head -1", ">&-", "2>&- >&-", "> /dev/full"])
def test_a_script_outlives_the_reader_of_what_it_prints(root, shell, every):
    """Whether it fails to flush or to write; also where the stream was closed from the start, or
    the locale knows no Japanese."""
    environment = {"PATH": os.environ["PATH"], "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = CHATTY.replace("EVERY", every)
    command = f"set -o pipefail; {sys.executable} -c '{script}' {shell}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=root, env={**environment, "LC_ALL": "C"}, capture_output=True
    )
    assert done.returncode == 0
    assert done.stderr == (b"" if "2>&-" in shell else b"done\n")


def test_ctrl_c_while_modules_are_imported_prints_no_trace(root):
    """They take seconds; a fault there keeps its trace."""
    for error, code, printed in (
        ("KeyboardInterrupt", 130, b"interrupted\n"),
        ("ImportError", 1, b"Traceback"),
    ):
        program = f"import dreambooth; raise {error}"
        done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True)
        assert done.returncode == code
        assert done.stderr.split(b" ")[0] == printed


def test_a_closed_stream_does_not_write_into_the_next_file(root, tmp_path):
    """Which would get its number: what Ray's or torch's C++ prints would go into a checkpoint."""
    code = "import dreambooth, os; f = open('x', 'wb'); os.write(1, b'printed'); f.close()"
    command = f'PYTHONPATH={root} {sys.executable} -c "{code}" >&-'
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path).returncode == 0
    assert (tmp_path / "x").read_bytes() == b""


def test_a_home_that_nobody_has_is_a_mistake_in_a_flag():
    assert cli.absolute_path("~/a") == str(Path.home() / "a")
    with pytest.raises(argparse.ArgumentTypeError, match="~nobody-here/x: no such user"):
        cli.absolute_path("~nobody-here/x")


def test_a_url_is_no_path():
    """It would become a folder of that name here."""
    for url in ("s3://bucket/out", "file:///tmp/out", "GS://bucket"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{url} is a URL, not a path"):
            cli.absolute_path(url)
    assert cli.absolute_path("/s3:/x") == "/s3:/x"


def test_a_path_in_a_directory_that_is_gone_is_a_mistake_in_a_flag(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(argparse.ArgumentTypeError, match="x: the current directory was deleted"):
        cli.absolute_path("x")
    assert cli.absolute_path("/x") == "/x"


def test_text_is_read_and_written_as_utf_8_whatever_the_locale(root):
    """Each call that reads or writes text names its encoding."""
    for file in [*root.glob("*.py"), *root.glob("dreambooth/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "attr", None)
            if name in ("read_text", "write_text"):
                named = {keyword.arg for keyword in node.keywords}
                assert "encoding" in named, f"{file}:{node.lineno}"


def test_flags_are_written_out_and_lists_of_them_add_up(train_argv):
    """run.sh looks for --use_lora and --dry_run; of two --preview_prompts the first was lost."""
    for flag in ("--use_l", "--dry"):
        with pytest.raises(SystemExit):
            train.parse_args([*train_argv("out"), flag])
    twice = ["--preview_prompts", "a", "--preview_prompts", "b", "c"]
    assert train.parse_args([*train_argv("out"), *twice]).preview_prompts == ["a", "b", "c"]
    assert train.parse_args(train_argv("out")).preview_prompts == []


def test_a_link_in_a_path_stays_one(tmp_path, monkeypatch):
    """What goes beside a result goes beside the link to it; a model has the link's name."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    assert cli.absolute_path("link/model") == str(tmp_path / "link" / "model")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(argparse.ArgumentTypeError, match="loop: links that lead back"):
        cli.absolute_path("loop")


def test_the_words_of_a_prompt_are_those_that_say_what_it_shows():
    """So the class prompt "picture of a car" beside "photo of unqtkn car" makes no identifier of
    "photo"."""
    assert cli.words("A photo of my Unqtkn car, in the snow.") == {"unqtkn", "car", "snow"}
    assert cli.words("photo of unqtkn car") - cli.words("picture of a car") == {"unqtkn"}
