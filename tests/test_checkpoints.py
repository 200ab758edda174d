"""Checkpoint directories: complete or not seen, found again, refused to another run."""

import argparse
import errno
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from dreambooth import checkpoints
from dreambooth.cli import UserError

STATE = {"weights": {"w": torch.arange(6.0)}, "optimizer": {"state": {0: {"step": 3}}}}


@pytest.fixture
def folder(tmp_path):
    """A run's directory with checkpoints of steps 10 and 20."""
    for step in (10, 20):
        checkpoints.write(STATE, step, tmp_path, limit=5)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newest_checkpoint_is_found(folder):
    path, step = checkpoints.find_newest(folder)
    assert (path.name, step) == ("step_000020", 20)
    state = torch.load(path / "state.pt", weights_only=True)
    assert torch.equal(state["weights"]["w"], STATE["weights"]["w"])


def test_no_checkpoint_is_step_zero(tmp_path):
    assert checkpoints.find_newest(tmp_path) == (None, 0)
    assert checkpoints.find_newest(tmp_path / "nowhere") == (None, 0)


@pytest.mark.parametrize("damage", ["truncated", "no state", "no record", "half a record"])
def test_incomplete_checkpoints_are_passed_by(folder, damage):
    newest = folder / "step_000020"
    if damage == "truncated":
        content = (newest / "state.pt").read_bytes()
        (newest / "state.pt").write_bytes(content[:-1])
    elif damage == "no state":
        (newest / "state.pt").unlink()
    elif damage == "no record":
        (newest / "complete.json").unlink()
    else:
        (newest / "complete.json").write_text('{"step": 2')
    path, step = checkpoints.find_newest(folder)
    assert (path.name, step) == ("step_000010", 10)


def test_unfinished_write_is_not_seen(folder):
    shutil.copytree(folder / "step_000020", folder / ".step_000030.tmp")
    assert checkpoints.find_newest(folder)[1] == 20


@pytest.mark.parametrize(("limit", "kept"), [(1, [30]), (2, [20, 30]), (9, [10, 20, 30])])
def test_only_the_newest_are_kept(folder, limit, kept):
    checkpoints.write(STATE, 30, folder, limit)
    assert names(folder) == [f"step_{step:06d}" for step in kept]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_damaged_one_does_not_take_the_place_of_a_good_one(folder, limit):
    """The run goes on from step 10, as 20 cannot be read."""
    (folder / "step_000020" / "state.pt").write_bytes(b"half")
    checkpoints.write(STATE, 15, folder, limit)
    assert names(folder) == ["step_000010", "step_000015"][-limit:]
    assert checkpoints.find_newest(folder)[1] == 15


def full_disk(path, mode):
    """The file of a state, on a disk that is full."""
    return open("/dev/full", mode)


class FullQuota(io.FileIO):
    """The same where the user's quota is used up."""

    code = errno.EDQUOT
    room = 0

    def write(self, data):
        if self.tell() + len(data) > self.room:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(data)


class FullLater(FullQuota):
    """Some of the state has been written: torch then raises an error of its own as well."""

    code = errno.ENOSPC
    room = 100


@pytest.mark.parametrize("open_state", [full_disk, FullQuota, FullLater])
def test_full_disk_is_said_and_keeps_the_last(folder, monkeypatch, open_state):
    monkeypatch.setattr(checkpoints, "open", open_state, raising=False)
    with pytest.raises(UserError, match="no space for the checkpoint of step 30"):
        checkpoints.write(STATE, 30, folder, limit=1)
    assert names(folder) == ["step_000010", "step_000020"]


def run_args(tmp_path, restart=False):
    output_dir = str(tmp_path / "tuned")
    return argparse.Namespace(output_dir=output_dir, storage_path=None, restart=restart)


IDENTITY = {"lr": 1e-4, "prompt": "photo of unqtkn car", "snr_gamma": None}


@pytest.fixture
def begun(tmp_path):
    """A run with a checkpoint of step 10, and what a killed process leaves behind."""
    checkpoints.prepare(run_args(tmp_path), IDENTITY)
    run_dir = tmp_path / "tuned.checkpoints"
    checkpoints.write(STATE, 10, run_dir, limit=1)
    (run_dir / "stop").touch()
    (run_dir / "worker_logs").mkdir()
    return run_dir


def test_same_run_goes_on(begun, tmp_path, capsys):
    checkpoints.prepare(run_args(tmp_path), IDENTITY)
    assert "resuming after step 10" in capsys.readouterr().out
    assert names(begun) == ["lock", "run.json", "step_000010"]  # an old request to stop is gone


def test_a_full_disk_when_a_run_resumes_loses_nothing(begun, tmp_path, monkeypatch):
    """Nor would a kill at that moment: what says whose the checkpoints are is replaced whole."""

    def fail(file, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(checkpoints.atomic, "replace_file", fail)
        checkpoints.prepare(run_args(tmp_path), IDENTITY)
    checkpoints.prepare(run_args(tmp_path), IDENTITY)
    assert names(begun) == ["lock", "run.json", "step_000010"]


LOCK = """
import sys
from dreambooth import atomic
atomic.lock(sys.argv[1], "tuned")
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_that_has_not_ended_is_left_alone(begun, tmp_path, root):
    """Two at a time would write each other's checkpoints and result. When its process has ended,
    in whatever way, the run can resume."""
    (begun / "lock").unlink()  # of this process
    process = subprocess.Popen(
        [sys.executable, "-c", LOCK, begun / "lock"],
        cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "locked\n"
    before = names(begun)
    for restart in (False, True):
        with pytest.raises(UserError, match=f"another run is writing {tmp_path / 'tuned'}"):
            checkpoints.prepare(run_args(tmp_path, restart), IDENTITY)
    assert names(begun) == before
    process.kill()
    process.wait()
    checkpoints.prepare(run_args(tmp_path), IDENTITY)
    assert names(begun) == ["lock", "run.json", "step_000010"]


def test_what_is_left_of_a_finished_run_is_not_resumed(begun, tmp_path, capsys, monkeypatch):
    """It was killed while it removed its checkpoints, in whatever order that happens."""
    monkeypatch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
    checkpoints.remove(begun)
    monkeypatch.undo()
    assert "step_000010" in names(begun)
    checkpoints.prepare(run_args(tmp_path), {**IDENTITY, "lr": 0.1})
    assert names(begun) == ["lock", "run.json"]
    assert capsys.readouterr().out == ""


def test_another_run_is_refused_by_what_differs(begun, tmp_path):
    with pytest.raises(UserError, match=r"lr was 0.0001, is 0.1\): .*--restart") as error:
        checkpoints.prepare(run_args(tmp_path), {**IDENTITY, "lr": 0.1})
    assert "\n" not in str(error.value)
    assert "step_000010" in names(begun)


def test_restart_begins_anew(begun, tmp_path, capsys):
    checkpoints.prepare(run_args(tmp_path, restart=True), {**IDENTITY, "lr": 0.1})
    assert names(begun) == ["lock", "run.json"]
    assert json.loads((begun / "run.json").read_text())["lr"] == 0.1
    assert capsys.readouterr().out == ""


def test_a_run_without_checkpoints_leaves_nothing(tmp_path):
    checkpoints.prepare(run_args(tmp_path), IDENTITY)
    checkpoints.remove_unless_needed(tmp_path / "tuned.checkpoints")
    assert names(tmp_path) == []


def test_checkpoints_go_where_storage_path_says(tmp_path):
    args = run_args(tmp_path)
    args.storage_path = str(tmp_path / "shared")
    folder = checkpoints.run_dir(args)
    assert folder.parent == tmp_path / "shared"
    args.output_dir = str(tmp_path / "another subject" / "tuned")
    assert checkpoints.run_dir(args) != folder
