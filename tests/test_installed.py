"""Whether the packages of requirements.txt are installed in their versions."""

import importlib.metadata

from dreambooth import installed

TORCH = importlib.metadata.version("torch")


def missing(tmp_path, *lines):
    file = tmp_path / "requirements.txt"
    file.write_text("\n".join(lines) + "\n")
    return installed.missing_packages(file)


def test_other_versions_and_absent_packages_are_missing(tmp_path):
    lines = ["# A comment.", f"torch=={TORCH}  # the CUDA build", "ray[train,data]==0.0.1", "no==1"]
    assert missing(tmp_path, *lines) == ["ray==0.0.1", "no==1"]


def test_a_build_for_another_cuda_is_the_same_version(tmp_path, monkeypatch):
    """Which a user with an older driver has installed."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.15.0+cu126")
    assert missing(tmp_path, "torch==2.15.0") == []
    assert missing(tmp_path, "torch==2.14.0") == ["torch==2.14.0"]


def test_the_exit_code_of_the_command_says_that_what_these_tests_run_with_is_installed(run_script):
    done = run_script("-m", "dreambooth.installed")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
