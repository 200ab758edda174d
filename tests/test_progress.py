"""One bar on a terminal, lines elsewhere."""

import io

import pytest
import torch

from dreambooth import metrics, progress
from tests.test_metrics import make_report


@pytest.mark.parametrize(
    ("terminal", "in_driver", "expected"),
    [
        (True, True, "bar"),
        (True, False, "nothing"),
        (False, True, "lines"),
        (False, False, "lines"),
    ],
)
def test_what_rank_0_shows(monkeypatch, terminal, in_driver, expected):
    """With several workers on a terminal the driver shows the bar, and the worker nothing."""
    monkeypatch.setattr(progress, "on_terminal", lambda: terminal)
    assert progress.shown_by_worker(in_driver) == expected


@pytest.fixture
def screen(monkeypatch):
    """What a bar writes, whatever the terminal."""
    text = io.StringIO()
    new_bar = progress.tqdm

    def bar(**settings):
        return new_bar(**{**settings, "file": text, "ncols": 120, "dynamic_ncols": False})

    monkeypatch.setattr(progress, "tqdm", bar)
    return text


def take_steps(report, count):
    for step in range(count):
        losses = torch.tensor([3.0, 1.0, 2.0])
        report.step_is_done(step, losses, torch.tensor(0.5), 1e-3)
    report.steps_are_done()


def test_the_bar_shows_steps_halves_and_rate_and_replaces_the_lines(tmp_path, screen, capsys):
    report = make_report(tmp_path / "out", show="bar")
    take_steps(report, 4)
    last = screen.getvalue().split("\r")[-1]
    assert "4/4" in last
    assert "instance=1" in last
    assert "class=2" in last
    assert "images/s=" in last
    assert "step 2/4" not in capsys.readouterr().out


def test_lines_without_a_terminal(tmp_path, screen, capsys):
    take_steps(make_report(tmp_path / "out"), 4)
    assert screen.getvalue() == ""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/4", "4/4"]
    assert "loss 3.0000 (instance 1.0000, class 2.0000) grad norm 0.500" in lines[0]


def test_the_driver_follows_what_rank_0_writes(tmp_path, screen, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LOOKS", 0.01)
    row = {"step": 3, "instance_loss": 0.25, "class_loss": 0.5, "images_per_s": 7.0}
    with progress.follow(tmp_path, 9, enabled=True):
        writer = metrics.MetricsWriter(tmp_path, 0)
        writer.add(row)
        writer.add({**row, "step": 6})
        writer.close()
    assert "6/9" in screen.getvalue()
    assert "instance=0.25, class=0.5" in screen.getvalue()


def test_nothing_follows_where_it_is_not_needed(tmp_path, screen):
    with progress.follow(tmp_path, 9, enabled=False):
        metrics.MetricsWriter(tmp_path, 0).add({"step": 3})
    assert screen.getvalue() == ""


def test_a_failed_run_still_closes_its_bar(tmp_path, screen):
    with (
        pytest.raises(RuntimeError, match="worker"),
        progress.follow(tmp_path, 9, enabled=True),
    ):
        metrics.MetricsWriter(tmp_path, 0).add({"step": 3})
        raise RuntimeError("worker died")
    assert screen.getvalue().endswith("\n")
