"""The libraries are quiet, unless a script runs with --verbose."""

import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from dreambooth import logs

SECONDS = r"\d+\.\d s"
TRAIN_LINES = [
    r"\d+ instance and \d+ class images at \d+ px, \d+ steps of \d+ pairs, \d+ worker\(s\);"
    r" \d+ GPUs, \d+ cores",
    r"training \d+\.\d\d M parameters in torch\.float32: \d+ x cpu",
    r"step \d+/\d+ loss \d+\.\d{4} \(instance \d+\.\d{4}, class \d+\.\d{4}\)"
    r" grad norm \d+\.\d{3} lr \d\.\d\de-\d\d \d+\.\d images/s",
    rf"start {SECONDS}, load {SECONDS}, first step {SECONDS}, steps {SECONDS}, save {SECONDS}",
    r"wrote /\S+ \(\d+ s in all\)",
]
GENERATE_LINES = [
    r"\d+ images of \d+ prompt\(s\) in /\S+: \d+ to generate",
    r" *\d+%\|.*\| \d+/\d+ \[.*\]",  # the progress bar
    r"look at /\S+contact_sheet\.png",
]


def other_lines(output, patterns):
    """The lines of an output that match none of `patterns`."""
    lines = [line for line in re.split(r"[\r\n]+", output) if line]
    return [line for line in lines if not any(re.fullmatch(p, line) for p in patterns)]


@pytest.mark.parametrize("name", ["one_worker", "two_workers"])
def test_train_prints_its_own_lines_alone(request, name):
    """As a command that starts its own Ray, as a user's does."""
    run = request.getfixturevalue(name)
    assert other_lines(run.stdout, TRAIN_LINES) == []
    assert run.stderr == ""
    number_of_lines = 4 + run.stdout.count("step ") - 1  # "first step" is no line of its own
    assert len(run.stdout.splitlines()) == number_of_lines


@pytest.fixture(scope="module")
def run_generate(run_script, generate_argv, tmp_path_factory):
    """Run generate.py with Ray Data as a command; returns all that it prints."""

    def run(**changes):
        folder = tmp_path_factory.mktemp("generate") / "out"
        argv = generate_argv(folder, use_ray_data=True, num_samples_per_prompt=2, **changes)
        result = run_script("generate.py", *argv)
        assert result.returncode == 0, result.stdout + result.stderr
        assert len(list(folder.glob("*-seed0.png"))) == 2
        return result.stdout + result.stderr

    return run


def test_generate_prints_its_own_lines_alone(run_generate):
    output = run_generate()
    assert other_lines(output, GENERATE_LINES) == []
    assert "2 images of 1 prompt(s)" in output
    assert "look at" in output


def test_verbose_shows_the_libraries_lines(run_train, run_generate):
    run = run_train(num_workers=1, use_lora=True, max_train_steps=1, verbose=True)
    assert len(other_lines(run.stdout + run.stderr, TRAIN_LINES)) > 5
    assert len(other_lines(run_generate(verbose=True), GENERATE_LINES)) > 5


CONFIGURE = """
import logging, os, sys, warnings
from dreambooth import logs
logs.configure(verbose=sys.argv[1] == "verbose")
logging.getLogger("ray.data").error("a library's error")
warnings.warn("a library's warning")
print(os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"))
"""


@pytest.mark.parametrize("mode", ["quiet", "verbose"])
def test_configure_silences_logs_and_warnings_unless_verbose(root, mode):
    """In this process, and by its environment in those that it starts."""
    env = {name: os.environ[name] for name in os.environ if name not in logs.QUIET_ENVIRONMENT}
    command = [sys.executable, "-c", CONFIGURE, mode]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if mode == "quiet":
        assert done.stderr == ""
        assert done.stdout == "1\n"
    else:
        assert "a library's error" in done.stderr
        assert "a library's warning" in done.stderr
        assert done.stdout == "None\n"


def test_what_the_user_has_set_stays(monkeypatch):
    """An environment variable for a library, say."""
    monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "DEBUG")
    with warnings.catch_warnings():
        logs.configure(verbose=False)
    assert os.environ["RAY_DATA_LOG_LEVEL"] == "DEBUG"


def test_stderr_is_silent_for_a_while(capfd):
    """Also that of other processes; afterwards it is there again, whatever happened."""
    with pytest.raises(KeyError), logs.silent_stderr(verbose=False):
        os.write(2, b"hidden\n")
        subprocess.run(["sh", "-c", "echo hidden >&2"])
        raise KeyError
    os.write(2, b"shown\n")
    with logs.silent_stderr(verbose=True):
        os.write(2, b"shown, too\n")
    assert capfd.readouterr().err == "shown\nshown, too\n"


def test_loggers_are_silent_by_name():
    logs.configure(verbose=False)
    for name in logs.LOGGERS:
        assert not logging.getLogger(name).isEnabledFor(logging.ERROR)
