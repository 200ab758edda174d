"""Checkpoints: complete or not seen, refused to another run, written when they are due; and a
restored run is the same run."""

import errno
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import ray.train
import torch
from diffusers.training_utils import EMAModel

from dreambooth import models
from dreambooth.cli import Diverged, Stopped, UserError
from dreambooth.machines import device
from dreambooth.run import checkpoints
from dreambooth.run.plan import check_flags, steps_between_checkpoints

STATE = {"weights": {"w": torch.arange(6.0)}, "optimizer": {"state": {0: {"step": 3}}}}
NUM_STEPS = 20


@pytest.fixture
def folder(tmp_path):
    """A run's directory with checkpoints of steps 10 and 20."""
    for step in (10, 20):
        checkpoints.write(STATE, step, tmp_path, limit=5)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps_in(folder):
    return [int(path.name.removeprefix("step_")) for path in sorted(folder.glob("step_*"))]


def test_the_newest_complete_checkpoint_is_found(folder):
    """Not what a killed process has left, or a full disk has cut off."""
    assert checkpoints.find_newest(folder / "nowhere") == 0
    shutil.copytree(folder / "step_000020", folder / ".step_000040.tmp")
    assert checkpoints.find_newest(folder) == 20
    for step in (30, 40, 50):
        checkpoints.write(STATE, step, folder, limit=5)
    state = folder / "step_000030" / "state.pt"
    os.truncate(state, state.stat().st_size - 1)
    (folder / "step_000040" / "state.pt").unlink()
    (folder / "step_000050" / "complete.json").write_text('{"step": 5')
    (folder / "step_000060").touch()  # no directory
    assert checkpoints.find_newest(folder) == 20


@pytest.mark.parametrize("limit", [1, 2])
def test_only_the_newest_are_kept_and_a_damaged_one_is_none_of_them(folder, limit):
    """The run went on from step 10, as 20 could not be read."""
    (folder / "step_000020" / "state.pt").write_bytes(b"half")
    checkpoints.write(STATE, 15, folder, limit)
    assert steps_in(folder) == [10, 15][-limit:]
    assert checkpoints.find_newest(folder) == 15


class FullDisk(io.FileIO):
    """The file of a state: after some of it has been written, torch too raises an error."""

    def write(self, data):
        if self.tell() + len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_said_and_keeps_the_earlier_ones(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "open", FullDisk, raising=False)
    with pytest.raises(UserError, match="no space for the checkpoint of step 30"):
        checkpoints.write(STATE, 30, folder, limit=1)
    assert names(folder) == ["step_000010", "step_000020"]


def test_a_checkpoint_is_on_the_disk_before_it_counts_and_before_an_earlier_one_goes(
    folder, monkeypatch
):
    """Else a power cut could leave half a file under its name, or neither of the two."""
    synced = []
    fsync = os.fsync

    def note(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((os.path.relpath(path, folder), steps_in(folder)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    checkpoints.write(STATE, 30, folder, limit=1)
    assert synced == [
        (".step_000030.tmp/state.pt", [10, 20]),
        (".step_000030.tmp/complete.json", [10, 20]),
        (".step_000030.tmp", [10, 20]),
        (".", [10, 20, 30]),
    ]
    assert steps_in(folder) == [30]


FINGERPRINT = {"lr": 1e-4, "instance_prompt": "photo of unqtkn car"}


@pytest.fixture
def prepare(tmp_path):
    """Begin or resume the run of tmp_path / "tuned": prepare(lr=0.1, restart=True)."""

    def call(restart=False, **changes):
        args = Namespace(output_dir=str(tmp_path / "tuned"), restart=restart)
        fingerprint = {**FINGERPRINT, **changes}
        folders = {name: tmp_path / f"tuned.{name}" for name in ("checkpoints", "report")}
        plan = SimpleNamespace(
            run_dir=folders["checkpoints"],
            report_dir=folders["report"],
            fingerprint=lambda args: fingerprint,
        )
        return checkpoints.prepare(plan, args)

    return call


@pytest.fixture
def begun(prepare, tmp_path):
    """A run with a checkpoint of step 10, and what a killed process leaves behind."""
    assert prepare() == 0
    run_dir = tmp_path / "tuned.checkpoints"
    checkpoints.write(STATE, 10, run_dir, limit=1)
    (run_dir / "stop").touch()
    (run_dir / "worker_logs").mkdir()
    return run_dir


def test_the_same_run_goes_on_and_another_is_refused_by_what_differs(begun, prepare, capsys):
    assert prepare() == 10
    assert "resuming after step 10" in capsys.readouterr().out
    assert names(begun) == ["fingerprint.json", "lock", "step_000010"]  # no old request to stop
    with pytest.raises(UserError, match=r"lr was 0.0001, is 0.1\): .*--restart") as error:
        prepare(lr=0.1)
    assert "\n" not in str(error.value)
    assert prepare() == 10


def test_a_run_from_before_a_flag_existed_goes_on_and_one_whose_record_is_damaged_does_not(
    begun, prepare
):
    """So that a new version of these scripts, with a flag more, goes on with an older one's run."""
    assert prepare(lora_layers="attention") == 10
    with pytest.raises(UserError, match="lora_layers was attention, is all"):
        prepare(lora_layers="all")
    (begun / "fingerprint.json").write_text('{"lr": 0.0')
    with pytest.raises(UserError, match=r"fingerprint.json is damaged: pass --restart"):
        prepare()
    assert prepare(restart=True) == 0


def test_restart_begins_anew_and_a_run_without_checkpoints_leaves_nothing(
    begun, prepare, tmp_path, capsys
):
    checkpoints.remove_unless_needed(begun)
    assert steps_in(begun) == [10]
    assert prepare(restart=True, lr=0.1) == 0
    assert names(begun) == ["fingerprint.json", "lock"]
    assert json.loads((begun / "fingerprint.json").read_text())["lr"] == 0.1
    assert capsys.readouterr().out == ""
    being_written = begun / ".step_000010.tmp"  # as the run ends with an error
    being_written.mkdir()
    checkpoints.remove_unless_needed(begun)
    assert names(begun) == [being_written.name, "fingerprint.json", "lock"]
    being_written.rmdir()
    checkpoints.remove_unless_needed(begun)
    assert names(tmp_path) == ["tuned.report"]


def test_a_full_disk_when_a_run_resumes_loses_nothing(begun, prepare, monkeypatch):
    """Nor would a kill at that moment: what says whose the checkpoints are is replaced whole."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        error = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(checkpoints.atomic, "replace_file", MagicMock(side_effect=error))
        prepare()
    assert prepare() == 10


LOCK = """
import sys
from dreambooth.files import atomic
atomic.lock(sys.argv[1], "tuned")
print("locked", flush=True)
sys.stdin.read()
"""


def test_storage_that_fails_for_a_moment_costs_no_checkpoint(begun, prepare, monkeypatch):
    """A share that is gone, say, at the end of a run that it has stopped, or when that resumes."""
    error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_text", MagicMock(side_effect=error))
        checkpoints.remove_unless_needed(begun)
        for restart in (False, True):
            with pytest.raises(OSError, match="Stale file handle"):
                prepare(restart)
    assert prepare() == 10


@pytest.mark.parametrize("kind", [".checkpoints", ".report"])
def test_a_run_that_has_not_ended_is_left_alone(begun, prepare, train_args, root, kind):
    """Two at a time would write each other's checkpoints and result, or if their checkpoints are
    on different disks, the result. When its process has ended, in whatever way, the run can
    resume."""
    lock = begun.with_suffix(kind) / "lock"
    lock.unlink()  # of this process
    command = [sys.executable, "-c", LOCK, lock]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, **pipes) as process:
        assert process.stdout.readline() == b"locked\n"
        before = names(begun)
        for restart in (False, True):
            with pytest.raises(UserError, match=f"another run is writing {begun.with_suffix('')}"):
                prepare(restart)
        assert names(begun) == before
        with pytest.raises(UserError, match="another run is writing"):
            check_flags(train_args(begun.with_suffix("")))  # before anything starts
        process.kill()
    assert prepare() == 10


def test_what_is_left_of_a_finished_run_is_not_resumed(begun, prepare, capsys, monkeypatch):
    """It was killed while it removed its checkpoints, in whatever order that happens."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, ignore_errors: None)
        checkpoints.remove(begun)
    assert "step_000010" in names(begun)
    assert prepare(lr=0.1) == 0
    assert names(begun) == ["fingerprint.json", "lock"]
    assert capsys.readouterr().out == ""


class Run:
    """A model of one trained and one frozen weight, which trains as train_fn does. The gradients of
    a step follow from its number alone."""

    def __init__(self, args, folder, rank, num_steps):
        torch.manual_seed(0)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.param_dtype]
        self.model = torch.nn.Linear(8, 4).to(dtype)
        self.model.bias.requires_grad_(False)
        self.optimizer = models.build_optimizer([self.model.weight], args)
        self.lr_schedule = models.build_lr_schedule(self.optimizer, num_steps, args)
        self.folder = folder
        every = steps_between_checkpoints(args, num_steps)
        plan = SimpleNamespace(num_steps=num_steps, run_dir=folder, checkpointing_steps=every)
        self.ema = EMAModel(self.model.parameters(), decay=0.9)
        stateful = {"optimizer": self.optimizer, "lr_schedule": self.lr_schedule, "ema": self.ema}
        self.checkpointer = checkpoints.Checkpointer(args, plan, self.model, stateful, rank)

    def take_steps(self, first, last):
        """Those from `first` to `last`, which is the number of steps then done."""
        for step in range(first, last):
            gradient = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            self.model.weight.grad = gradient.to(self.model.weight.dtype)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_schedule.step()
            self.ema.step(self.model.parameters())
            self.checkpointer.on_step_end(step + 1, lr=1.0)

    def everything(self):
        """Weights, moments and Kahan terms, the learning rate, and what a reader may have added, an
        average of the weights."""
        moments = self.optimizer.state_dict()["state"][0].values()
        rate = torch.tensor(self.lr_schedule.get_last_lr())
        return [self.model.weight, *moments, rate, *self.ema.shadow_params]


@pytest.fixture
def reports(monkeypatch):
    """The checkpoints of which Ray Train is told, in place of which this stands: their steps, or
    None of other ranks'."""
    found = []

    def report(metrics, checkpoint, **settings):
        found.append(checkpoint and checkpoints.find_newest(os.path.dirname(checkpoint.path)))

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(checkpoints, "broadcast_from_rank_zero", lambda value: value)
    return found


@pytest.fixture
def make(train_args, tmp_path, reports):
    """A `Run` at its beginning: make(checkpointing_steps=5)."""

    def build(rank=0, num_steps=NUM_STEPS, **flags):
        flags = {"lr": 0.1, "lr_scheduler": "cosine", "checkpoints_total_limit": 99, **flags}
        args = train_args(tmp_path / "tuned", **flags)
        return Run(args, tmp_path / "tuned.checkpoints", rank, num_steps)

    return build


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_restored_run_goes_on_to_the_last_bit(make, monkeypatch, dtype):
    """Five steps, a checkpoint, two more steps while it is written, and a new process with the
    other fifteen: as twenty in a row."""
    whole = make(param_dtype=dtype, checkpointing_steps=0)
    whole.take_steps(0, NUM_STEPS)
    assert not whole.folder.exists()

    flags = {"param_dtype": dtype, "checkpointing_steps": 5}
    may_write = threading.Event()
    write = checkpoints.write
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", lambda *args: may_write.wait(20) and write(*args))
        first = make(**flags)
        first.take_steps(0, 7)
        may_write.set()
        first.checkpointer.on_train_end()
    state = torch.load(first.folder / "step_000005" / "state.pt", weights_only=True)
    assert list(state["weights"]) == ["weight"]  # what is not trained is not saved

    second = make(**flags)
    second.checkpointer.on_train_begin(checkpoints.find_newest(second.folder))
    second.take_steps(5, NUM_STEPS)
    expected, found = whole.everything(), second.everything()
    assert len(found) == len(expected) == 7
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(whole.model.weight, first.model.weight)


def test_a_run_with_bfloat16_weights_that_began_on_a_gpu_goes_on_without(make):
    """The state of optimi's AdamW says that Triton's kernels are used, which a CPU has not."""
    first = make(param_dtype="bf16", checkpointing_steps=5)
    first.take_steps(0, 4)
    first.optimizer.param_groups[0]["triton"] = True
    state = first.checkpointer._state()
    first.optimizer.param_groups[0]["triton"] = False
    first.take_steps(4, 6)
    checkpoints.write(state, 4, first.folder, limit=99)
    second = make(param_dtype="bf16")
    second.checkpointer.on_train_begin(4)
    second.take_steps(4, 6)
    assert torch.isfinite(second.model.weight).all()


@pytest.mark.parametrize("lacking", ["room", "memory that can be pinned"])
def test_without_room_for_a_copy_the_step_waits_until_the_state_is_written(
    make, monkeypatch, lacking
):
    """The same file, and no failure."""
    with_room, without = make(checkpointing_steps=5), make(checkpointing_steps=5)
    without.folder = without.checkpointer.folder = without.folder.with_name("other")
    with_room.take_steps(0, 7)
    with_room.checkpointer.on_train_end()
    if lacking == "room":
        monkeypatch.setattr(device, "host_memory", lambda: 1)
    else:
        empty_like = MagicMock(side_effect=RuntimeError("CUDA error: out of memory"))
        monkeypatch.setattr(checkpoints.torch, "empty_like", empty_like)
    without.take_steps(0, 5)
    assert checkpoints.find_newest(without.folder) == 5  # before the next step begins
    without.take_steps(5, 7)
    without.checkpointer.on_train_end()
    one, other = (checkpoints.read(run.folder / "step_000005") for run in (with_room, without))
    pairs = zip(checkpoints.tensors_of(one), checkpoints.tensors_of(other), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not without.checkpointer.buffers


def test_room_is_for_the_copy_beside_the_object_store_and_four_gib(monkeypatch):
    """Of this machine's node; the store may be empty as yet."""
    nodes = [
        {"NodeID": "here", "Resources": {"object_store_memory": 7.0 * 2**30}},
        {"NodeID": "there", "Resources": {"object_store_memory": 70.0 * 2**30}},
    ]
    context = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(checkpoints.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(checkpoints.ray, "get_runtime_context", lambda: context)
    for running, free, room in (
        (True, 16.1, True),
        (True, 15.9, False),
        (False, 9.1, True),
        (False, 8.9, False),
        (True, None, True),
    ):
        monkeypatch.setattr(checkpoints.ray, "is_initialized", lambda running=running: running)
        monkeypatch.setattr(device, "host_memory", lambda free=free: free)
        assert checkpoints.has_room(5 * 2**30) == room


def test_a_copy_for_a_gpu_takes_pinned_memory_which_comes_in_powers_of_two():
    for num_bytes, expected in ((4, 4), (5, 8), (2**20, 2**20), (2**20 + 4, 2**21)):
        tensor = SimpleNamespace(nbytes=num_bytes, is_cuda=True)
        assert checkpoints.bytes_of_copy(tensor) == expected
        assert checkpoints.bytes_of_copy(torch.zeros(num_bytes, dtype=torch.uint8)) == num_bytes


def test_the_buffers_of_a_copy_are_kept_for_the_next_one_and_not_for_the_result(make):
    """To make them took longer than to fill them; the result needs their memory."""
    run = make(checkpointing_steps=5)
    run.take_steps(0, 5)
    first = [buffer.data_ptr() for buffer in run.checkpointer.buffers]
    run.take_steps(5, 10)
    assert [buffer.data_ptr() for buffer in run.checkpointer.buffers] == first
    run.checkpointer.on_train_end()
    assert run.checkpointer.buffers == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_goes_on_alike_whatever_the_memory_format_of_its_checkpoint(make, dtype):
    """A GPU's convolutions are channels_last, and so are their moments; a CPU's are not. Fused
    optimizers would take one element's moments for another's."""
    first = make(param_dtype=dtype, checkpointing_steps=5)
    first.take_steps(0, 6)
    first.checkpointer.on_train_end()
    plain = make(param_dtype=dtype)
    plain.checkpointer.on_train_begin(5)
    state = checkpoints.read(first.folder / "step_000005")
    moments = state["optimizer"]["state"][0]
    for name, value in moments.items():
        if value.dim() == 2:
            moments[name] = value.t().contiguous().t()
    checkpoints.write(state, 6, first.folder, limit=9)
    other = make(param_dtype=dtype)
    other.checkpointer.on_train_begin(6)
    for run in (plain, other):
        run.take_steps(5, 9)
    pairs = zip(plain.everything()[:-1], other.everything()[:-1], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("maps", [True, False])
def test_what_is_restored_does_not_depend_on_the_file(make, monkeypatch, maps):
    """It is mapped, which takes no memory, and then deleted; some file systems map nothing."""
    run = make(checkpointing_steps=5)
    run.take_steps(0, 7)
    run.checkpointer.on_train_end()
    load = torch.load

    def refusing(*args, mmap=False, **settings):
        if mmap and not maps:
            raise RuntimeError("unable to mmap 552 bytes from file: No such device (19)")
        return load(*args, mmap=mmap, **settings)

    monkeypatch.setattr(torch, "load", refusing)
    second = make()
    second.checkpointer.on_train_begin(5)
    before = [value.clone() for value in second.everything()]
    file = run.folder / "step_000005" / "state.pt"
    file.write_bytes(bytes(file.stat().st_size))  # in place, so that a mapping would see it
    assert all(torch.equal(a, b) for a, b in zip(before, second.everything(), strict=True))
    assert before[1].any()


def test_every_so_many_steps_but_not_after_the_last(make, reports):
    """Ray Train hears of each one when it is complete. The other ranks report as often, as Ray
    Train waits for all of them, and write nothing."""
    other = make(rank=1, checkpointing_steps=5)
    other.take_steps(0, NUM_STEPS)
    other.checkpointer.on_train_end()
    assert reports == [None] * 3
    assert not other.folder.exists()
    run = make(checkpointing_steps=5)
    run.take_steps(0, NUM_STEPS)
    run.checkpointer.on_train_end()
    assert reports[3:] == steps_in(run.folder) == [5, 10, 15]


@pytest.mark.parametrize(
    ("seconds", "num_workers", "expected"),
    [(59, "1", []), (61, "1", [2, 4, 6]), (1, "2:4", [2, 4, 6])],
)
def test_by_default_every_tenth_of_a_run_that_is_long_or_elastic(
    make, monkeypatch, seconds, num_workers, expected
):
    """Of elastic workers Ray Train looks after 60 seconds whether there are more, and then stops
    those there are."""
    now = time.monotonic()
    run = make(num_workers=num_workers)
    monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
    run.take_steps(0, 7)
    run.checkpointer.on_train_end()
    assert steps_in(run.folder) == expected


def test_a_request_to_stop_ends_the_run_with_a_checkpoint(make):
    run = make(checkpointing_steps=0)
    run.folder.mkdir(parents=True)
    run.take_steps(0, 6)
    (run.folder / "stop").touch()
    with pytest.raises(Stopped, match="stopped after step 7"):
        run.take_steps(6, 9)
    assert steps_in(run.folder) == [7]


def test_a_failed_write_ends_the_run_soon(make, monkeypatch):
    write = MagicMock(side_effect=UserError("no space for the checkpoint"))
    monkeypatch.setattr(checkpoints, "write", write)
    run = make(checkpointing_steps=500, num_steps=1000)
    run.take_steps(499, 500)
    with pytest.raises(UserError, match="no space"):
        for step in range(500, 900):
            run.take_steps(step, step + 1)
            time.sleep(0.01)


def test_a_last_checkpoint_that_fails_costs_no_result(make, monkeypatch, reports, capsys):
    """Such as on a full disk which is not that of the result."""
    run = make(checkpointing_steps=19)
    run.take_steps(0, 18)
    write = MagicMock(side_effect=UserError("no space for the checkpoint"))
    monkeypatch.setattr(checkpoints, "write", write)
    run.take_steps(18, NUM_STEPS)
    run.checkpointer.on_train_end()
    assert write.call_count == 1
    assert reports == [None]  # as the other ranks report, too
    assert "warning: the last checkpoint was not written" in capsys.readouterr().err


def test_the_notice_of_a_preemption_is_answered_by_one_checkpoint(make, monkeypatch):
    """Workers ask every tenth step; the same notice is answered once."""
    notices = iter([None, "node 3 goes in 30 s", "node 3 goes in 30 s", "node 1 goes in 30 s"])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(notices))
    run = make(checkpointing_steps=0, num_steps=50)
    run.take_steps(0, 50)
    run.checkpointer.on_train_end()
    assert steps_in(run.folder) == [20, 40]
    assert next(notices, None) is None


def test_what_resumes_a_run_is_not_its_command_with_restart(tmp_path, capsys, signal_handlers):
    for restart, difference in ((False, ""), (True, ", without --restart,")):
        stop = checkpoints.StopOnSignal(Namespace(restart=restart), tmp_path)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            stop.exit_if_asked(Stopped("stopped after step 3"))
        remedy = f"run the same command again{difference} to resume"
        assert f"stopped after step 0: {remedy}" in capsys.readouterr().err


def test_the_first_signal_asks_and_the_second_one_ends(tmp_path, capsys, signal_handlers):
    """What else ended the run is not hidden behind the first one."""
    codes = []
    stop = checkpoints.StopOnSignal(Namespace(restart=False), tmp_path)
    stop.exit_if_asked(RuntimeError("a worker died"))
    signal.raise_signal(signal.SIGTERM)
    assert (tmp_path / "stop").exists()
    stop.exit_if_asked(UserError("no space for the checkpoint"))
    for ask in (
        lambda: stop.exit_if_asked(Stopped("stopped after step 3")),
        lambda: stop.exit_if_asked(RuntimeError("a worker died")),
        lambda: signal.raise_signal(signal.SIGINT),
        lambda: stop.exit_if_asked(UserError("unet cannot be loaded: SystemExit")),
    ):
        with pytest.raises(SystemExit) as found:
            ask()
        codes.append(found.value.code)
    term, interrupt = 128 + signal.SIGTERM, 128 + signal.SIGINT
    assert codes == [term, term, interrupt, term]
    printed = capsys.readouterr().err
    assert printed.count("run the same command again to resume") == 3
    assert printed.count("stopped after step 0 (a worker died): run") == 1


def test_a_term_that_comes_twice_at_once_is_one(tmp_path, monkeypatch, signal_handlers):
    """`timeout ./run.sh` sends TERM to all, and run.sh passes on its own."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock.now)
    stop = checkpoints.StopOnSignal(Namespace(restart=False), tmp_path)
    for clock.now in (5.0, 5.5):
        signal.raise_signal(signal.SIGTERM)
    assert not stop.again
    clock.now = 5.0 + checkpoints.ECHO
    with pytest.raises(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    assert stop.again
    stop = checkpoints.StopOnSignal(Namespace(restart=False), tmp_path)
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit):  # an impatient user's second Ctrl-C
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_closed_terminal_asks_the_run_to_stop_but_not_under_nohup(
    tmp_path, signal_handlers, under_nohup
):
    """It sends HUP, and its shell does so again."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    checkpoints.StopOnSignal(Namespace(restart=False), tmp_path)
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)
    assert (tmp_path / "stop").exists() != under_nohup


def test_a_damaged_checkpoint_gives_way_to_that_of_the_same_step(folder):
    """The run went on from step 10, and comes to step 20 again."""
    (folder / "step_000020" / "state.pt").write_bytes(b"half")
    assert checkpoints.find_newest(folder) == 10
    checkpoints.write(STATE, 20, folder, limit=5)
    assert checkpoints.find_newest(folder) == 20
    assert names(folder) == ["step_000010", "step_000020"]


def test_a_request_to_stop_waits_for_the_checkpoint_that_is_being_written(make, monkeypatch):
    """Its copy of the state would be overwritten before it is on the disk."""
    write = checkpoints.write

    def write_slowly(*args):
        time.sleep(0.2)
        return write(*args)

    monkeypatch.setattr(checkpoints, "write", write_slowly)
    run = make(checkpointing_steps=5)
    run.take_steps(0, 5)
    expected = run.model.weight.detach().clone()
    (run.folder).mkdir(exist_ok=True)
    (run.folder / "stop").touch()
    with pytest.raises(Stopped, match="stopped after step 6"):
        run.take_steps(5, 7)
    state = checkpoints.read(run.folder / "step_000005")
    assert torch.equal(state["weights"]["weight"], expected)
    assert steps_in(run.folder) == [5, 6]


def test_rank_0_decides_whether_a_run_is_long(make, reports, monkeypatch):
    """For all: the clocks of two workers differ, and Ray Train waits until each has reported."""
    for is_long, expected in ((False, []), (True, [None] * 3)):
        reports.clear()
        answer = MagicMock(return_value=is_long)
        monkeypatch.setattr(checkpoints, "broadcast_from_rank_zero", answer)
        other = make(rank=1)
        other.take_steps(0, 7)
        other.checkpointer.on_train_end()
        assert reports == expected


def test_a_request_to_stop_is_answered_by_rank_0_alone(make):
    """The others go on until Ray Train ends them."""
    other = make(rank=1, checkpointing_steps=0)
    other.folder.mkdir(parents=True)
    (other.folder / "stop").touch()
    other.take_steps(0, 2)
    assert os.listdir(other.folder) == ["stop"]


def test_ray_train_copies_no_checkpoint(make, monkeypatch):
    """They are where they belong: a copy would take as much of the disk again."""
    modes = []
    monkeypatch.setattr(
        ray.train, "report",
        lambda metrics, checkpoint, **settings: modes.append(settings["checkpoint_upload_mode"]),
    )  # fmt: skip
    run = make(checkpointing_steps=5)
    run.take_steps(0, 11)
    run.checkpointer.on_train_end()
    assert modes == [ray.train.CheckpointUploadMode.NO_UPLOAD] * 2


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_weights_that_are_not_finite_are_not_saved(make, value):
    """Neither in a checkpoint, where they would take the place of good ones, nor as the result: the
    last step's update comes after its loss, and a short run writes no checkpoint."""
    run = make(checkpointing_steps=5)
    run.take_steps(0, 4)
    run.model.weight.data[0, 0] = float(value)
    with pytest.raises(Diverged, match="not finite after step 5: lower --lr, with --restart"):
        run.take_steps(4, 5)
    save = MagicMock()
    with pytest.raises(Diverged, match=f"not finite after step {NUM_STEPS}"):
        run.checkpointer.save_result(save)
    assert not save.called and not list(run.folder.glob("step_*"))


def test_what_kept_the_result_from_being_saved_is_what_is_raised(make, monkeypatch):
    """Where the last checkpoint fails as well."""
    run = make(checkpointing_steps=0)
    monkeypatch.setattr(checkpoints, "write", MagicMock(side_effect=OSError(errno.EIO, "gone")))
    save = MagicMock(side_effect=RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        run.checkpointer.save_result(save)
