"""Whether the packages of requirements.txt are installed in their versions."""

import importlib.metadata

from dreambooth import installed

TORCH = importlib.metadata.version("torch")


def write(tmp_path, *lines):
    file = tmp_path / "requirements.txt"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_what_these_tests_run_with_is_installed():
    assert installed.missing_packages() == []


def test_other_versions_and_absent_packages_are_missing(tmp_path):
    file = write(
        tmp_path, "# A comment.", f"torch=={TORCH}", "ray[train,data]==0.0.1", "no-such-thing==1.0"
    )
    assert installed.missing_packages(file) == ["ray==0.0.1", "no-such-thing==1.0"]


def test_a_build_for_another_cuda_is_the_same_version(tmp_path, monkeypatch):
    """Which a user with an older driver has installed."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.15.0+cu126")
    assert installed.missing_packages(write(tmp_path, "torch==2.15.0")) == []
    assert installed.missing_packages(write(tmp_path, "torch==2.14.0")) == ["torch==2.14.0"]


def test_a_comment_after_a_pin_is_not_part_of_it(tmp_path):
    assert installed.missing_packages(write(tmp_path, f"torch=={TORCH}  # the CUDA build")) == []


def test_the_exit_code_of_the_command_says_it(run_script):
    done = run_script("-m", "dreambooth.installed")
    assert done.returncode == 0
    assert done.stdout + done.stderr == ""
