"""What a run writes about itself: JSON lines and TensorBoard curves that go on after a resume."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth import metrics
from dreambooth.cli import UserError
from dreambooth.report import Report


def rows_of(*steps, value=1.0):
    return [{"step": step, "loss": value, "class_loss": value / 2} for step in steps]


def write(folder, first_step, rows):
    writer = metrics.MetricsWriter(folder, first_step)
    for row in rows:
        writer.add(row)
    writer.close()


def curve(folder, tag):
    """Steps and values of one of TensorBoard's curves."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_resumed_run_continues_its_curves_without_a_fold(tmp_path):
    """Killed after step 10, with a checkpoint of step 6: steps 8 and 10 are done again."""
    write(tmp_path, 0, rows_of(2, 4, 6, 8, 10, value=1.0))
    write(tmp_path, 6, rows_of(8, 10, 12, value=3.0))
    expected = [(2, 1.0), (4, 1.0), (6, 1.0), (8, 3.0), (10, 3.0), (12, 3.0)]
    assert [(row["step"], row["loss"]) for row in metrics.read(tmp_path)] == expected
    assert curve(tmp_path, "loss/total") == expected
    assert curve(tmp_path, "loss/class images") == [(step, value / 2) for step, value in expected]


def test_a_run_that_is_killed_keeps_its_curves(tmp_path):
    """Also TensorBoard's, which its writer would hold back for two minutes."""
    writer = metrics.MetricsWriter(tmp_path, 0)
    writer.add(rows_of(2, value=5.0)[0])
    assert curve(tmp_path, "loss/total") == [(2, 5.0)]
    writer.close()


def test_a_new_run_drops_an_earlier_one(tmp_path):
    write(tmp_path, 0, rows_of(2, 4))
    write(tmp_path, 0, rows_of(2, value=5.0))
    assert metrics.read(tmp_path) == rows_of(2, value=5.0)
    assert curve(tmp_path, "loss/total") == [(2, 5.0)]


def test_a_line_that_a_crash_has_cut_off_is_left_out(tmp_path):
    text = json.dumps(rows_of(2)[0]) + '\n{"step": 4, "lo'
    (tmp_path / metrics.FILE).write_text(text)
    assert metrics.read(tmp_path) == rows_of(2)
    assert metrics.read(tmp_path / "missing") == []


def make_report(output_dir, num_steps=4, **changes):
    plan = SimpleNamespace(
        num_steps=num_steps, pairs_per_step=4, prompt_ids=[[0], [1]], class_paths=["c"]
    )
    settings = {"log_every": 2, "started": time.time(), "enabled": True, **changes}
    report = Report(plan, output_dir=output_dir, **settings)
    weights = [torch.nn.Parameter(torch.zeros(3))]
    report.models_are_ready(weights, 1, torch.device("cpu"))
    return report


def test_rows_hold_the_means_of_both_halves(tmp_path):
    """Halves 1, 2, 3, 4 of the instance and ten times these of the class: 1.5, 15, then 3.5, 35."""
    report = make_report(tmp_path / "out")
    for step in range(4):
        losses = torch.tensor([11.0, 1.0, 10.0]) * (step + 1)
        report.step_is_done(step, losses, torch.tensor(0.5 * (step + 1)), 1e-3)
    report.steps_are_done()
    rows = metrics.read(metrics.report_dir(tmp_path / "out"))
    names = ("step", "loss", "instance_loss", "class_loss", "grad_norm", "lr")
    found = [tuple(row[name] for name in names) for row in rows]
    assert found == [(2, 16.5, 1.5, 15.0, 1.0, 1e-3), (4, 38.5, 3.5, 35.0, 2.0, 1e-3)]
    assert all(row["images_per_s"] > 0 for row in rows)


def test_only_rank_0_writes(tmp_path):
    report = make_report(tmp_path / "out", enabled=False)
    report.step_is_done(0, torch.ones(3), torch.tensor(1.0), 1e-3)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_is_on_record(tmp_path):
    report = make_report(tmp_path / "out")
    report.step_is_done(0, torch.ones(3), torch.tensor(1.0), 1e-3)
    with pytest.raises(UserError, match="the loss is nan at step 2"):
        report.step_is_done(1, torch.full((3,), math.nan), torch.tensor(1.0), 1e-3)
    row = metrics.read(metrics.report_dir(tmp_path / "out"))[-1]
    assert row["step"] == 2
    assert math.isnan(row["loss"])


def test_seconds_aside_are_named_and_not_part_of_the_steps(tmp_path, monkeypatch):
    """Two steps of 1 s with 5 s aside between them: 5 s of previews, 1 s of steps after the
    first, and 8 images in that second."""
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    report = make_report(tmp_path / "out", num_steps=2, started=100.0)
    for step in range(2):
        now[0] += 1
        report.step_is_done(step, torch.ones(3), torch.tensor(1.0), 1e-3)
        if step == 0:
            with report.aside("previews"):
                now[0] += 5
    report.steps_are_done()
    seconds = report.summary()
    assert seconds["previews_s"] == 5
    assert seconds["first_step_s"] == 1
    assert seconds["steps_s"] == 1
    rows = metrics.read(metrics.report_dir(tmp_path / "out"))
    assert rows[-1]["images_per_s"] == 8
