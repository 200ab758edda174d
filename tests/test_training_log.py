"""What a training run logs: lines or a bar, metrics and curves that go on after a resume, where the
seconds went, and how the run ended."""

import errno
import json
import math
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth.cli import Diverged, OutOfMemory, Stopped, UserError
from dreambooth.files import atomic
from dreambooth.run import training_log
from dreambooth.run.plan import TrainingPlan, make_plan


@pytest.fixture
def plan(tmp_path):
    """A plan of steps of four pairs: plan(num_steps=5)."""

    def build(num_steps=4):
        return TrainingPlan(
            instance_paths=["i.png"] * 5, class_paths=["c.png"] * 20, prompts=[], captions={},
            resolution=64, pairs_per_step=4, num_steps=num_steps,
            max_pairs_per_pass=2, num_workers=(2, 2), checkpointing_steps=1,
            run_dir=tmp_path / "checkpoints", report_dir=tmp_path / "report",
        )  # fmt: skip

    return build


@pytest.fixture
def make(plan):
    """A log whose models are loaded and whose run begins: make(num_steps=5, log_every=2)."""

    def build(num_steps=4, first_step=0, started=None, **settings):
        settings = {"log_every": 2, "enabled": True, **settings}
        started = time.time() if started is None else started
        log = training_log.TrainingLog(
            plan(num_steps), torch.device("cpu"), started=started, **settings
        )
        log.on_models_loaded([torch.nn.Parameter(torch.zeros(1000, 1234))], num_workers=2)
        log.on_train_begin(first_step)
        return log

    return build


def end_step(log, step, loss=1.0, grad_norm=0.5, lr=1e-3):
    """End a step whose instance half has the given loss, and whose class half has twice that."""
    losses = torch.tensor([3.0, 1.0, 2.0]) * loss
    log.on_step_end(step, losses, torch.tensor(grad_norm), lr)


def test_lines_and_metrics_every_few_steps_and_after_the_last_one(make, tmp_path, capsys):
    """With the mean losses since the last line, and the last gradient norm and learning rate."""
    log = make(num_steps=5, log_every=2)
    assert capsys.readouterr().out == "training 1.23 M parameters in torch.float32: 2 x cpu\n"
    for step in range(1, 6):
        end_step(log, step, loss=step, grad_norm=step - 0.5, lr=step * 1e-3)
    log.on_train_end()
    lines = capsys.readouterr().out.splitlines()
    expected = [
        "step 2/5 loss 4.5000 (instance 1.5000, class 3.0000) grad norm 1.500 lr 2.00e-03 ",
        "step 4/5 loss 10.5000 (instance 3.5000, class 7.0000) grad norm 3.500 lr 4.00e-03 ",
        "step 5/5 loss 15.0000 (instance 5.0000, class 10.0000) grad norm 4.500 lr 5.00e-03 ",
    ]
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    assert all(line.endswith(" images/s") for line in lines)
    names = ("step", "loss", "instance_loss", "class_loss", "grad_norm", "lr")
    rows = training_log.read_metrics(tmp_path / "report")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (2, 4.5, 1.5, 3.0, 1.5, 2e-3),
        (4, 10.5, 3.5, 7.0, 3.5, 4e-3),
        (5, 15.0, 5.0, 10.0, 4.5, 5e-3),
    ]
    assert all(row["images_per_s"] > 0 for row in rows)


def test_without_a_class_half_there_is_one_loss(make, tmp_path, capsys):
    make(num_steps=1).on_step_end(1, torch.tensor([0.25, 0.25]), torch.tensor(0.5), 1e-3)
    assert "step 1/1 loss 0.2500 grad norm 0.500" in capsys.readouterr().out
    (row,) = training_log.read_metrics(tmp_path / "report")
    assert (row["instance_loss"], "class_loss" in row) == (0.25, False)


def test_only_rank_0_prints_and_writes(make, tmp_path, capsys):
    log = make(num_steps=1, enabled=False)
    end_step(log, 1)
    log.write({"step": 1, "my_loss": 0.5})  # of a callback, which each worker has
    log.on_train_end()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_no_step_but_the_first_waits_for_the_device_before_a_line_is_due(make, monkeypatch):
    """Fault 8 of the published example: the CPU waited for the GPU at every step."""
    log = make(num_steps=8, log_every=4)
    waits = set()
    for name in ("item", "tolist"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, read=read: waits.add(step) or read(t))
    for step in range(1, 9):
        end_step(log, step)
    assert waits == {1, 4, 8}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run_and_is_on_record(make, tmp_path, value):
    """A loss at the next line, of which there is one every four steps; it names the loss's own
    step. Of the gradients only those of a line's step, as later losses show earlier ones."""
    for bad_step, arguments, message in (
        (2, {"loss": value}, f"the loss is {value} at step 2"),
        (4, {"grad_norm": value}, "the gradients are not finite at step 4"),
    ):
        log = make(log_every=4)
        with pytest.raises(Diverged, match=f"{message}: lower --lr"):
            for step in range(1, 5):
                end_step(log, step, **(arguments if step == bad_step else {}))
        (row,) = training_log.read_metrics(tmp_path / "report")
        assert row["step"] == 4
        assert not math.isfinite(row["loss"] * row["grad_norm"])


@pytest.fixture
def clock(monkeypatch):
    """Both of Python's clocks: clock.wait(5), clock.set_back(60)."""
    now = {"time": 100.0, "monotonic": 7.0}

    def move(seconds, *names):
        now.update({name: now[name] + seconds for name in names})

    for name in now:
        monkeypatch.setattr(time, name, lambda name=name: now[name])
    return SimpleNamespace(
        wait=lambda seconds: move(seconds, "time", "monotonic"),
        set_back=lambda seconds: move(-seconds, "time"),
    )


def test_the_phases_add_up_to_the_run(make, clock, tmp_path, capsys):
    """Every second since the script began belongs to one phase: here 8 to start, 9 of the first
    step, 2 of the other two, 5 for previews between them, 4 to save. Four pairs per step, one
    second per step: eight images per second."""
    log = make(num_steps=3, log_every=3, started=92.0)
    clock.wait(9)
    end_step(log, 1)
    clock.wait(1)
    end_step(log, 2)
    with log.timed_apart("previews"):
        clock.wait(5)
    clock.wait(1)
    end_step(log, 3, loss=0.25)
    log.on_train_end()
    clock.wait(4)
    metrics = log.summary()
    assert metrics == {
        "start_s": 8, "load_s": 0, "first_step_s": 9, "steps_s": 2, "previews_s": 5, "save_s": 4,
        "loss": 0.75,
    }  # fmt: skip
    assert " 8.0 images/s" in capsys.readouterr().out
    assert training_log.read_metrics(tmp_path / "report")[0]["images_per_s"] == 8
    line = training_log.where_the_seconds_went(metrics)
    assert line.startswith("start 8.0 s, load 0.0 s, first step 9.0 s, previews 5.0 s, steps 2.0 s")


def test_a_clock_that_is_set_back_gives_no_negative_seconds(make, clock):
    """Before the worker begins, and while it trains."""
    log = make(num_steps=2, started=160.0)
    for step in (1, 2):
        clock.wait(1)
        clock.set_back(3600)
        end_step(log, step)
    log.on_train_end()
    metrics = log.summary()
    seconds = {name: value for name, value in metrics.items() if name.endswith("_s")}
    assert seconds == {"start_s": 0, "load_s": 0, "first_step_s": 1, "steps_s": 1, "save_s": 0}


def test_a_resumed_run_counts_its_own_images(make, clock, tmp_path, capsys):
    """Not those of the steps before it, and none of its first step, which also waits for
    compilation: four pairs, eight images, in a step of one second."""
    log = make(num_steps=100, log_every=1, first_step=98)
    end_step(log, 99)
    clock.wait(1)
    end_step(log, 100)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("step 99/100 ") and first.endswith(" lr 1.00e-03")
    assert second.startswith("step 100/100 ") and second.endswith(" 8.0 images/s")
    rates = [row.get("images_per_s") for row in training_log.read_metrics(tmp_path / "report")]
    assert rates == [None, 8.0]


def curve(folder, tag):
    """Steps and values of one of TensorBoard's curves."""
    events = EventAccumulator(str(folder / "report" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_resumed_run_continues_its_curves_without_a_fold(make, clock, tmp_path):
    """Killed after step 10, with a checkpoint of step 6: steps 7 to 10 are done again. A run that
    is killed keeps its curves, also TensorBoard's, which its writer would hold back for two
    minutes."""
    killed = make(num_steps=12)
    for step in range(1, 11):
        end_step(killed, step)
    assert curve(tmp_path, "loss/total") == [(step, 3.0) for step in (2, 4, 6, 8, 10)]
    clock.wait(1)  # TensorBoard reads files by the second in which they begin
    resumed = make(num_steps=12, first_step=6)
    for step in range(7, 13):
        end_step(resumed, step, loss=2.0)
    resumed.on_train_end()
    expected = [(2, 3.0), (4, 3.0), (6, 3.0), (8, 6.0), (10, 6.0), (12, 6.0)]
    rows = training_log.read_metrics(tmp_path / "report")
    assert [(row["step"], row["loss"]) for row in rows] == expected
    assert curve(tmp_path, "loss/total") == expected
    assert curve(tmp_path, "loss/class images") == [(step, v * 2 / 3) for step, v in expected]

    (tmp_path / "report" / "report.html").touch()
    end_step(make(log_every=1), 1)  # a new run drops it all
    assert curve(tmp_path, "loss/total") == [(1, 3.0)]
    assert [row["step"] for row in training_log.read_metrics(tmp_path / "report")] == [1]
    assert not (tmp_path / "report" / "report.html").exists()


def test_what_a_crash_has_cut_off_or_spoilt_is_left_out(tmp_path):
    lines = b'{"step": 2, "loss": 1.0}\n{"step": 3, "lo\xff\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_bytes(b'{"loss": 1.0}\n[2]\n' + lines)
    assert training_log.read_metrics(tmp_path) == [{"step": 2, "loss": 1.0}]
    assert training_log.read_metrics(tmp_path / "missing") == []


ARGV = ["train.py", "--instance_prompt", "photo of Ann's dog", "--lr", "1e-5"]  # and --restart


@pytest.fixture
def record(train_args, tmp_path, monkeypatch):
    """The record of a run that begins, in tmp_path / "out.report"."""
    monkeypatch.setattr(sys, "argv", [*ARGV, "--restart"])
    args = train_args(tmp_path / "out", num_workers="1:2")
    plan = make_plan(args)
    training_log.prepare(plan.report_dir, 0)
    return training_log.RunRecord(args, plan, "2 cores")


def test_a_run_that_finishes_is_on_record(record, tmp_path, instance_dir):
    """With the command that resumes it: a prompt is one word of it, and --restart none."""
    report = tmp_path / "out.report"
    assert training_log.read_run_record(report)["status"] == "running"
    with record:
        record.finish({"start_s": 2.0})
    facts = training_log.read_run_record(report)
    assert facts == json.loads(json.dumps(record.facts))
    assert (facts["status"], facts["metrics"]) == ("finished", {"start_s": 2.0})
    assert shlex.split(facts["command"]) == [sys.executable, *ARGV]
    assert facts["directory"] == str(Path.cwd())
    assert facts["flags"]["instance_prompt"] == "photo of unqtkn car"
    assert facts["instance_paths"] == [str(path) for path in sorted(instance_dir.iterdir())]
    assert (facts["num_class_images"], facts["hardware"]) == (4, "2 cores")
    assert torch.__version__.startswith(facts["versions"]["torch"])
    assert training_log.read_run_record(tmp_path) == {}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Stopped("stopped after step 3"), "stopped"),
        (Diverged("the loss is nan at step 7: lower --lr"), "diverged"),
        (OutOfMemory("out of GPU memory: pass --use_lora"), "out of memory"),
        (UserError("i.png: unreadable"), "failed"),
        (RuntimeError("a worker died\nTraceback: many lines"), "failed"),
        (KeyboardInterrupt(), "stopped"),
    ],
)
def test_what_ended_a_run_is_on_record(record, tmp_path, error, status):
    with pytest.raises(type(error)), record:
        raise error
    facts = training_log.read_run_record(tmp_path / "out.report")
    assert facts["status"] == status
    assert facts["message"] == (str(error).partition("\n")[0] or "KeyboardInterrupt")


def test_a_finished_run_stays_one_and_a_full_disk_hides_no_error(record, monkeypatch, tmp_path):
    """If the card cannot be written, and if the record of another error cannot."""
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space"), record:
        record.finish({})
        raise full
    assert training_log.read_run_record(tmp_path / "out.report")["status"] == "finished"
    record.facts["status"] = "running"
    monkeypatch.setattr(atomic, "replace_text", MagicMock(side_effect=full))
    with pytest.raises(UserError, match="the checkpoint"), record:
        raise UserError("no space for the checkpoint")


def test_an_exit_code_is_no_message(record, tmp_path):
    """As of a second Ctrl-C, which stops a run at once."""
    with pytest.raises(SystemExit), record:
        sys.exit(130)
    facts = training_log.read_run_record(tmp_path / "out.report")
    assert facts["status"] == "stopped" and "message" not in facts


def test_on_a_gpu_a_line_has_what_tensors_took_and_what_was_reserved(
    make, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**30)
    log = make(log_every=1)
    log.device = torch.device("cuda")
    end_step(log, 1)
    assert capsys.readouterr().out.endswith(" reserved 5.0 GiB\n")
    (row,) = training_log.read_metrics(tmp_path / "report")
    assert (row["peak_gib"], row["reserved_gib"]) == (3, 5)


def test_a_full_disk_costs_metrics_and_not_the_run(make, monkeypatch, capsys):
    """And is said once."""
    log = make(num_steps=3, log_every=1)
    full = MagicMock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(atomic, "append_line", full)
    for step in (1, 2, 3):
        end_step(log, step)
    printed = capsys.readouterr()
    assert printed.out.count("loss 3.0000") == 3
    assert printed.err.count("metrics cannot be written to") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_that_cannot_be_written_cost_no_result(make, tmp_path, capsys):
    """TensorBoard's thread raises what has failed once at each later call, the last one as well,
    and that is before the result is saved."""
    log = make(num_steps=3, log_every=1)
    (tmp_path / "report" / "tensorboard").rename(tmp_path / "gone")  # at once: its thread may write
    for step in (1, 2, 3):
        end_step(log, step)
    log.add_image("previews", Image.new("RGB", (8, 8)), 3)  # the next prompt's is saved as well
    log.on_train_end()
    assert "loss" in log.summary()
    assert [row["step"] for row in training_log.read_metrics(tmp_path / "report")] == [1, 2, 3]
    assert capsys.readouterr().err.count("metrics cannot be written to") == 1


@pytest.mark.parametrize("text", ["[1]", '{"status": "running"}', "{", "[" * 200_000])
def test_a_damaged_record_counts_as_none(tmp_path, text):
    (tmp_path / training_log.RECORD).write_text(text)
    assert training_log.read_run_record(tmp_path) == {}


def test_each_metric_has_its_curve():
    """In TensorBoard."""
    logged = {"grad_norm", "lr", "images_per_s", "peak_gib", "reserved_gib"}
    assert training_log.TAGS.keys() == {*training_log.LOSSES, *logged}


def test_a_metric_of_another_name_has_a_curve_of_that_name(make, tmp_path):
    log = make()
    log.write({"step": 3, "validation_loss": 0.25})
    assert curve(tmp_path, "validation_loss") == [(3, 0.25)]
    (line,) = (tmp_path / "report" / training_log.METRICS).read_text().splitlines()
    assert json.loads(line) == {"step": 3, "validation_loss": 0.25}


def test_a_new_run_begins_with_no_files_of_tensorboard(tmp_path):
    """Also those of step 0, such as previews, which a later run would not purge."""
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").touch()
    training_log.prepare(tmp_path, 3)
    assert (tmp_path / "tensorboard" / "events.out.tfevents.1").exists()
    training_log.prepare(tmp_path, 0)
    assert not (tmp_path / "tensorboard").exists()
