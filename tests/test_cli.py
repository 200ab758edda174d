"""What all command lines share: --help, user errors in one line, exit codes."""

import argparse
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import cache_model
import download_example_dataset
import generate
import train
from dreambooth import cli
from dreambooth.cli import UserError


@pytest.fixture(autouse=True)
def no_exit(monkeypatch):
    """A `run_main` that succeeds in this process would end the tests."""
    monkeypatch.setattr(cli.os, "_exit", lambda code: pytest.fail("the process has ended"))


def raise_error(error):
    raise error


def test_user_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(raise_error, UserError("a.png: gone"))
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: a.png: gone\n"


def test_ctrl_c_is_exit_code_130(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run_main(raise_error, KeyboardInterrupt())
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


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
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "done\nshut down\n"


def test_a_script_whose_output_nobody_reads_has_succeeded(root):
    """`train.py >&-`, or `train.py | head`, which has what it wants."""
    for redirection in (">&-", "2>&-", "> /dev/full"):
        command = f"{sys.executable} -c '{SUCCEED.replace('print, ', 'bool, ')}' {redirection}"
        assert subprocess.run(command, shell=True, cwd=root).returncode == 0


def test_a_bug_keeps_its_stack_trace():
    with pytest.raises(ZeroDivisionError):
        cli.run_main(raise_error, ZeroDivisionError())


BAD_COMMANDS = {
    "missing flag": ["--output_dir", "out"],
    "unknown flag": ["--model_dir", "a", "--output_dir", "b", "--sede", "1"],
    "no number": ["--model_dir", "a", "--output_dir", "b", "--seed", "one"],
    "unknown choice": ["--model_dir", "a", "--output_dir", "b", "--scheduler", "best"],
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_a_command_line_that_argparse_refuses_is_one_line_and_exit_code_2(name, capsys):
    """argparse itself prints the usage, some forty lines, above its error."""
    with pytest.raises(SystemExit) as stopped:
        generate.parse_args(BAD_COMMANDS[name])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("error: ")
    assert "--help" in printed.err


PATH_FLAGS = {
    train: ["model_dir", "output_dir", "instance_images_dir", "class_images_dir", "storage_path"],
    generate: ["model_dir", "output_dir", "lora_weights_dir", "compare_to", "prompts_file"],
}


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script, names in PATH_FLAGS.items() for name in names]
)
def test_an_empty_path_is_refused(script, name, train_argv, generate_argv, capsys):
    """A shell variable that is not set: "" would be the current directory."""
    build = train_argv if script is train else generate_argv
    argv = [*build("out"), f"--{name}", ""]
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(argv)
    assert stopped.value.code == 2
    assert f"error: argument --{name}: an empty path" in capsys.readouterr().err


@pytest.mark.parametrize("script", PATH_FLAGS)
def test_paths_are_absolute_after_parsing(script, train_argv, generate_argv):
    """Ray's workers run in another directory."""
    build = train_argv if script is train else generate_argv
    argv = build("out")
    for name in PATH_FLAGS[script]:
        argv += [f"--{name}", "some/path"]
    args = script.parse_args(argv)
    for name in PATH_FLAGS[script]:
        assert getattr(args, name) == os.path.join(os.getcwd(), "some/path")


def test_a_tilde_is_the_home_directory(monkeypatch):
    """The shell leaves it alone in --flag=~/x and in quotes."""
    monkeypatch.setenv("HOME", "/home/ann")
    assert cli.absolute_path("~/photos") == "/home/ann/photos"
    assert cli.absolute_path("/a/b") == "/a/b"


def options_of(script):
    """The options of a script's parser, all but --help."""
    parsers = []

    def keep(parser, argv=None):
        parsers.append(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        script.parse_args([])
    return [action for action in parsers[0]._actions if action.dest != "help"]


@pytest.mark.parametrize("script", [train, generate, cache_model, download_example_dataset])
def test_help_is_the_docstring_and_every_default_but_off_and_none(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # so that no help is wrapped
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert script.__doc__.strip() in text
    text = " ".join(text.split())
    for option in options_of(script):
        is_off = option.default is None or option.default is False or option.default == []
        default = "" if is_off else f" (default: {option.default})"
        assert f"{option.help}{default}" in text
    assert not re.search(r"\(default: (None|False|\[\])\)", text)


def test_a_default_of_zero_appears_in_help(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "steps of linear warm-up from 0 (default: 0)" in text
    assert "random numbers of the run (default: 0)" in text


def test_a_script_that_fails_closes_its_iterators():
    """Even while its error is kept. Closed later, after Ray, Ray Data's would wait for ever."""
    closed = []
    kept = []

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
    assert len(kept) == 1
    assert closed == ["rows"]


def test_check_at_least():
    args = SimpleNamespace(count=2, rate=0.5, unset=None, zero=0, infinite=float("inf"))
    cli.check_at_least(args, 2, "count", "unset")
    cli.check_at_least(args, 0, "count", "rate", "unset", "zero")
    cli.check_at_least(args, 0, "count", "rate", above=True)
    with pytest.raises(UserError, match="^--rate is 0.5: must be at least 1$"):
        cli.check_at_least(args, 1, "count", "rate")
    with pytest.raises(UserError, match="^--zero is 0: must be above 0$"):
        cli.check_at_least(args, 0, "count", "zero", above=True)
    with pytest.raises(UserError, match="--infinite is inf"):
        cli.check_at_least(args, 0, "infinite")


def test_not_a_number_is_below_every_minimum():
    args = SimpleNamespace(lr=float("nan"))
    for above in (False, True):
        with pytest.raises(UserError, match="--lr is nan"):
            cli.check_at_least(args, 0, "lr", above=above)


def test_lines_of_a_text_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("photo of a car\n\n  at night, in the snow \r\n写真\n", encoding="utf-8")
    expected = ["photo of a car", "at night, in the snow", "写真"]
    assert cli.read_lines(file, "--prompts_file") == expected


def test_lines_of_what_is_not_a_text_file(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfecar")
    with pytest.raises(UserError, match="--prompts_file .*prompts.txt is not a UTF-8 text file"):
        cli.read_lines(tmp_path / "prompts.txt", "--prompts_file")
    with pytest.raises(UserError, match="--prompts_file .*nowhere.txt: no such file"):
        cli.read_lines(tmp_path / "nowhere.txt", "--prompts_file")
    with pytest.raises(UserError, match="--prompts_file .* is not a UTF-8 text file"):
        cli.read_lines(tmp_path, "--prompts_file")
