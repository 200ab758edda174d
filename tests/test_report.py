"""What a training run prints, and the losses and gradients that stop it."""

import math
import re
import time

import pytest
import torch

from dreambooth.cli import UserError
from dreambooth.report import Report, where_the_seconds_went
from dreambooth.training_plan import TrainingPlan


def make_plan(num_steps):
    return TrainingPlan(
        instance_paths=["i.png"] * 5,
        class_paths=["c.png"] * 20,
        prompt_ids=[[0], [1]],
        resolution=64,
        pairs_per_step=4,
        num_steps=num_steps,
        max_pairs_per_pass=2,
        num_workers=(2, 2),
    )


class Run:
    """A run of `num_steps` steps that reports the given losses and gradient norms."""

    def __init__(self, num_steps, log_every, enabled=True):
        self.report = Report(make_plan(num_steps), log_every, time.time() - 2, enabled)
        self.step = 0

    def set_up(self):
        parameters = [torch.nn.Parameter(torch.zeros(1000, 1234))]
        self.report.models_are_ready(parameters, 2, torch.device("cpu"))
        return self

    def take_step(self, loss=1.0, grad_norm=0.5, lr=1e-3):
        self.report.step_is_done(self.step, torch.tensor(loss), torch.tensor(grad_norm), lr)
        self.step += 1


def test_facts_at_set_up(capsys):
    Run(num_steps=1, log_every=1).set_up()
    line = "training 1.23 M parameters in torch.float32: 2 x cpu\n"
    assert capsys.readouterr().out == line


def test_a_line_every_few_steps_and_after_the_last_one(capsys):
    """With the mean loss since the last line, and the last gradient norm and learning rate."""
    run = Run(num_steps=5, log_every=2).set_up()
    capsys.readouterr()
    for number in range(5):
        run.take_step(loss=number + 1.0, grad_norm=number + 0.5, lr=(number + 1) * 1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 2/5 loss 1.5000 grad norm 1.500 lr 2.00e-03 ")
    assert lines[1].startswith("step 4/5 loss 3.5000 grad norm 3.500 lr 4.00e-03 ")
    assert lines[2].startswith("step 5/5 loss 5.0000 grad norm 4.500 lr 5.00e-03 ")


def test_images_per_second_since_the_first_step(capsys, monkeypatch):
    """Four pairs per step, one second per step: eight images per second. The first step, which
    takes nine, does not count."""
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    run = Run(num_steps=3, log_every=3).set_up()
    for seconds in (9, 1, 1):
        now[0] += seconds
        run.take_step()
    assert " 8.0 images/s" in capsys.readouterr().out


def test_a_resumed_run_counts_its_own_images(capsys):
    """Not those of the steps before it: its only line comes with its first step."""
    run = Run(num_steps=100, log_every=100).set_up()
    run.step = 99
    run.take_step()
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("step 100/100 ")
    assert line.endswith(" 0.0 images/s")


def test_only_rank_0_prints(capsys):
    run = Run(num_steps=1, log_every=1, enabled=False).set_up()
    run.take_step()
    assert capsys.readouterr().out == ""


def test_no_step_but_the_first_waits_for_the_device_before_a_line_is_due(monkeypatch):
    """Fault 8 of the published example: the CPU waited for the GPU at every step."""
    waits = []
    for name in ("item", "tolist"):
        read = getattr(torch.Tensor, name)

        def record(tensor, name=name, read=read):
            waits.append((run.step, name))
            return read(tensor)

        monkeypatch.setattr(torch.Tensor, name, record)
    run = Run(num_steps=8, log_every=4).set_up()
    for _ in range(8):
        run.take_step()
    assert {step for step, _ in waits} == {0, 3, 7}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_step(value):
    """At the next line, of which there is one every four steps."""
    run = Run(num_steps=8, log_every=4).set_up()
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0, value, 1.0):
        run.take_step(loss)
    with pytest.raises(UserError, match=f"the loss is {value} at step 6: lower --lr"):
        run.take_step()


def test_gradients_that_are_not_finite_stop_the_run():
    """Those of the last step, which no later loss would show."""
    run = Run(num_steps=4, log_every=4).set_up()
    for _ in range(3):
        run.take_step()
    with pytest.raises(UserError, match="the gradients are not finite at step 4: lower --lr"):
        run.take_step(grad_norm=math.inf)


def test_the_phases_add_up_to_the_run(monkeypatch):
    """Every second since the script began belongs to one phase."""
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    report = Report(make_plan(2), 10, 92.0, True)

    def wait(seconds):
        now[0] += seconds

    wait(1)
    report.models_are_ready([torch.nn.Parameter(torch.zeros(1))], 1, torch.device("cpu"))
    wait(3)
    report.step_is_done(0, torch.tensor(0.75), torch.tensor(1.0), 1e-3)
    wait(4)
    report.step_is_done(1, torch.tensor(0.25), torch.tensor(1.0), 1e-3)
    report.steps_are_done()
    wait(5)
    metrics = report.summary()
    assert metrics == {
        "start_s": 8,
        "load_s": 1,
        "first_step_s": 3,
        "steps_s": 4,
        "save_s": 5,
        "loss": 0.25,
    }


def test_where_the_seconds_went():
    line = where_the_seconds_went({"start_s": 8.04, "first_step_s": 1.26, "loss": 0.25})
    assert line == "start 8.0 s, first step 1.3 s"
    assert re.fullmatch(r"(\w+( \w+)* \d+\.\d s(, )?)+", line)
