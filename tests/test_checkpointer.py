"""When checkpoints are written while a run trains, and that a restored run is the same run."""

import signal
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import get_scheduler

import train
from dreambooth import checkpointer, checkpoints, models
from dreambooth.cli import UserError

NUM_STEPS = 20


@pytest.fixture
def make(train_argv, tmp_path, monkeypatch):
    """A small model with its optimizer, schedule and Checkpointer, as in train_fn."""
    monkeypatch.setattr(checkpointer.ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(checkpointer, "broadcast_from_rank_zero", lambda value: value)

    def build(dtype=torch.float32, rank=0, **flags):
        flags = {"lr": 0.1, "lr_scheduler": "cosine", **flags}
        if dtype == torch.bfloat16:
            flags["param_dtype"] = "bf16"
        args = train.parse_args(train_argv(tmp_path / "tuned", **flags))
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4).to(dtype)
        model.bias.requires_grad_(False)
        optimizer = models.build_optimizer([model.weight], args)
        schedule = get_scheduler("cosine", optimizer, None, 0, NUM_STEPS)
        plan = SimpleNamespace(num_steps=NUM_STEPS)
        saver = checkpointer.Checkpointer(args, plan, model, optimizer, schedule, rank)
        return SimpleNamespace(model=model, optimizer=optimizer, schedule=schedule, saver=saver)

    return build


def take_steps(run, first, last):
    """Steps whose gradients follow from their number alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(4, 8, generator=generator)
        run.model.weight.grad = gradient.to(run.model.weight.dtype)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.schedule.step()


def everything(run):
    """Weights, moments and Kahan terms, and the learning rate."""
    state = run.optimizer.state_dict()["state"][0]
    tensors = [run.model.weight, *(value for value in state.values() if torch.is_tensor(value))]
    return tensors, run.schedule.get_last_lr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_run_goes_on_to_the_last_bit(make, dtype):
    """Five steps, a checkpoint, a new process, fifteen more: as twenty in a row."""
    whole = make(dtype)
    take_steps(whole, 0, NUM_STEPS)
    first = make(dtype)
    take_steps(first, 0, 5)
    checkpoints.write(first.saver._state(), 5, first.saver.folder, limit=1)
    second = make(dtype)
    assert second.saver.restore() == 5
    take_steps(second, 5, NUM_STEPS)
    expected, expected_lr = everything(whole)
    found, found_lr = everything(second)
    assert len(found) == len(expected) >= 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found_lr == expected_lr


def test_checkpoint_is_of_the_step_at_which_it_was_asked_for(make):
    """The thread writes a copy: what the next steps change does not reach it."""
    run = make(checkpointing_steps=5)
    take_steps(run, 0, 5)
    before = run.model.weight.detach().clone()
    run.saver._save(5)
    take_steps(run, 5, 9)
    path = run.saver.writing.result()
    state = torch.load(path / "state.pt", weights_only=True)
    assert torch.equal(state["weights"]["weight"], before)
    assert list(state["weights"]) == ["weight"]  # what is not trained is not saved


def steps_saved(saver, monkeypatch):
    """The steps of a whole run at which a checkpoint is taken."""
    saved = []
    monkeypatch.setattr(saver, "_save", saved.append)
    monkeypatch.setattr(saver, "_report", lambda: None)
    for step in range(1, NUM_STEPS + 1):
        saver.step_is_done(step)
    return saved


@pytest.mark.parametrize(("every", "expected"), [(6, [6, 12, 18]), (10, [10]), (0, []), (50, [])])
def test_every_so_many_steps_but_not_after_the_last(make, monkeypatch, every, expected):
    saver = make(checkpointing_steps=every).saver
    assert steps_saved(saver, monkeypatch) == expected


def test_by_default_every_tenth_of_a_long_run_and_none_of_a_short_one(make, monkeypatch):
    assert steps_saved(make().saver, monkeypatch) == []
    long = make().saver
    long.started -= 61
    assert steps_saved(long, monkeypatch) == list(range(2, NUM_STEPS, 2))


def test_elastic_workers_write_from_the_start(make, monkeypatch):
    """Ray Train looks after 60 seconds whether there are more, and then stops those there are."""
    saver = make(num_workers="2:4").saver
    assert steps_saved(saver, monkeypatch) == list(range(2, NUM_STEPS, 2))


def test_only_rank_zero_writes(make):
    saver = make(rank=1).saver
    saver._save(5)
    assert saver.writing is None
    assert not saver.folder.exists()


def test_request_to_stop_ends_the_run_with_a_checkpoint(make):
    run = make(checkpointing_steps=0)
    run.saver.folder.mkdir(parents=True)
    run.saver.step_is_done(6)
    (run.saver.folder / "stop").touch()
    with pytest.raises(UserError, match="stopped after step 7"):
        run.saver.step_is_done(7)
    assert checkpoints.find_newest(run.saver.folder)[1] == 7


def test_failed_write_ends_the_run_at_the_next_step(make, monkeypatch):
    run = make(checkpointing_steps=5)

    def full(*args):
        raise UserError("no space for the checkpoint")

    monkeypatch.setattr(checkpoints, "write", full)
    run.saver._save(5)
    run.saver.thread.shutdown()
    with pytest.raises(UserError, match="no space"):
        run.saver.step_is_done(6)


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(make):
    run = make()
    take_steps(run, 0, 2)
    run.saver._save(2)
    run.model.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite after step 4: lower --lr, with --restart"):
        run.saver._save(4)
    assert checkpoints.find_newest(run.saver.folder)[1] == 2


def test_the_first_signal_asks_and_the_second_one_ends(tmp_path, capsys):
    """What else ended the run is not hidden behind the first one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = checkpointer.StopOnSignal(tmp_path)
        stop.exit_if_asked(RuntimeError("a worker died"))
        signal.raise_signal(signal.SIGTERM)
        assert (tmp_path / "stop").exists()
        stop.exit_if_asked(UserError("no space for the checkpoint"))
        for error in (UserError("stopped after step 3"), RuntimeError("a worker died")):
            with pytest.raises(SystemExit) as found:
                stop.exit_if_asked(error)
            assert found.value.code == 128 + signal.SIGTERM
            assert "run the same command again to resume" in capsys.readouterr().err
        with pytest.raises(SystemExit) as found:
            signal.raise_signal(signal.SIGINT)
        assert found.value.code == 128 + signal.SIGINT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_notice_of_a_preemption_is_answered_by_one_checkpoint(make, monkeypatch):
    """Workers ask every tenth step; the same notice is answered once."""
    saver = make(checkpointing_steps=0).saver
    asked = []
    saved = []
    monkeypatch.setattr(saver, "_save", saved.append)
    monkeypatch.setattr(saver, "_report", lambda: None)
    monkeypatch.setattr(checkpointer, "STEPS_BETWEEN_NOTICES", 4)
    notices = iter([None, "node 3 goes in 30 s", "node 3 goes in 30 s", "node 1 goes in 30 s"])
    monkeypatch.setattr(
        checkpointer.ray.train, "get_preemption_info", lambda: asked.append(1) or next(notices)
    )
    for step in range(1, NUM_STEPS):
        saver.step_is_done(step)
    assert len(asked) == 4
    assert saved == [8, 16]
