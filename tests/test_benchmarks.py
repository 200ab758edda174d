"""The benchmarks: what they say of training must hold for train.py."""

import runpy
import shutil
import sys
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

from dreambooth.machines.device import num_cores
from dreambooth.run import export
from tests.benchmarks import candidates
from tests.benchmarks import subjects as benchmark


def test_each_benchmark_can_be_started(root, monkeypatch, capsys):
    """What it imports is there."""
    files = [file for file in root.glob("tests/benchmarks/*.py") if "__main__" in file.read_text()]
    assert files
    for file in files:
        monkeypatch.setattr(sys, "argv", [str(file), "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(file), run_name="__main__")
        assert not end.value.code
        assert "usage" in capsys.readouterr().out


def test_training_without_ray_gives_the_weights_of_train_py(train_here, train_args, tmp_path):
    """To the last bit: so what subjects.py says of a recipe holds for train.py."""
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "lr": 1e-3}
    expected = train_here(**changes).output_dir
    args = train_args(tmp_path / "out", **changes)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(num_cores())
    steps = []
    try:
        export.save(benchmark.train_here(args, lambda step, denoiser: steps.append(step)), args)
    finally:
        torch.set_num_threads(num_threads)
    assert steps == [1, 2, 3]
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        by_train_py = load_file(expected / f"{part}.safetensors")
        here = load_file(tmp_path / "out" / f"{part}.safetensors")
        assert by_train_py.keys() == here.keys()
        assert all(torch.equal(by_train_py[key], here[key]) for key in here)


def test_a_candidate_trains_another_model_and_leaves_nothing_behind(
    train_args, class_dir, tmp_path, monkeypatch
):
    """That of other classes: the second of each two pairs has a class image of its own, and its
    prompt."""
    monkeypatch.setattr(candidates, "OTHER_EVERY", 2)
    monkeypatch.setattr(candidates.render, "CLASSES", ["house", "boat"])
    for kind in candidates.render.CLASSES:  # what it would generate
        folder = tmp_path / "work" / "class" / f"photo of a {kind}, 25 steps"
        folder.mkdir(parents=True)
        for number in range(candidates.NUM_OTHER_IMAGES):
            shutil.copy(class_dir / f"{number % 4}.png", folder / f"{number}.png")
    args = train_args(tmp_path / "out", train_batch_size=4, max_train_steps=1, lr=1e-3)
    bench_args = Namespace(model_dir=args.model_dir, work_dir=str(tmp_path / "work"))
    loss = benchmark.train.training_loss
    prompts = []

    def training_loss(denoiser, scheduler, posteriors, conditions, *rest, **settings):
        counts = torch.tensor(conditions["counts"])
        prompts.append(conditions["input_ids"].repeat_interleave(counts, 0))
        return loss(denoiser, scheduler, posteriors, conditions, *rest, **settings)

    def train():
        trained = benchmark.train_here(args).unet.parameters()
        return torch.cat([p.detach().flatten() for p in trained])

    monkeypatch.setattr(benchmark.train, "training_loss", training_loss)
    before = train()
    with candidates.changed_training("other_classes", bench_args):
        by_candidate = train()
    after = train()
    assert by_candidate.isfinite().all()
    assert not torch.equal(by_candidate, before)
    assert torch.equal(after, before)
    before, of_each_image, _ = prompts
    instance, of_class, house, boat = before[0], before[4], of_each_image[5], of_each_image[7]
    assert torch.equal(before, torch.stack([instance] * 4 + [of_class] * 4))
    assert torch.equal(of_each_image[:4], before[:4])
    assert torch.equal(of_each_image[4], of_class) and torch.equal(of_each_image[6], of_class)
    assert len({tuple(ids.tolist()) for ids in (of_class, house, boat)}) == 3


def test_the_worst_of_each_column_ends_the_table(capsys):
    """A subject has no column for its own class."""
    row = {"prior": 1.0, "diversity": 1.0, "boat": 1.0, "ball": 1.0, "tree": 0.3}
    results = [
        {**row, "subject_name": "mug", "seed": 0, "subject": 0.5, "composition": 0.9, "car": 0.6},
        {**row, "subject_name": "bus", "seed": 1, "subject": 0.7, "composition": 0.4, "cup": 0.8},
    ]
    benchmark.print_table(results)
    *_, worst = capsys.readouterr().out.splitlines()
    for cell in ("subject 0.50", "composition 0.40", "car 0.60", "cup 0.80", "tree 0.30"):
        assert cell in worst
