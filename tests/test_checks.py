"""Models and recipes that these scripts do not take, and memory that does not suffice."""

import json
import shutil

import pytest
import torch

import generate
import train
from dreambooth import checks


def test_pipelines_of_another_kind_are_refused(model_dir, tmp_path):
    """An SDXL directory has all the files, but a second text encoder, too."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(checks.UserError, match="StableDiffusionXLPipeline"):
        checks.check_model_dir(folder)


def test_prediction_types_without_a_loss_are_refused(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    for kind, known in (("v_prediction", True), ("sample", False)):
        file.write_text(json.dumps({**config, "prediction_type": kind}))
        if known:
            assert checks.missing_part(folder) is None
            checks.check_model_dir(folder)
        else:
            with pytest.raises(checks.UserError, match="predicts sample"):
                checks.check_model_dir(folder)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lr_warmup_steps": 10}, "constant_with_warmup"),
        ({"adam_beta2": 1.0}, "below 1"),
        ({"adam_beta2": 0.999, "precision": "bf16"}, "give 0.99"),
        ({"snr_gamma": 0.0}, "--snr_gamma is 0.0: it must be above 0"),
        ({"use_lora": True, "precision": "bf16"}, "full fine-tuning"),
        ({"adam_epsilon": -1.0}, "--adam_epsilon"),
        ({"lr": float("nan")}, "--lr is nan"),
    ],
)
def test_recipes_that_cannot_be_are_refused(train_argv, tmp_path, flags, said):
    with pytest.raises(checks.UserError, match=said):
        train.check_args(train.parse_args(train_argv(tmp_path / "out", **flags)))
    assert not (tmp_path / "out").exists()


def test_batches_that_do_not_fit_the_memory_are_halved(model_dir, tmp_path, monkeypatch, capsys):
    """Ten pictures where the memory takes three: the same pictures, none twice, none lost, and said once."""
    args = generate.parse_args(["--model_dir", str(model_dir), "--output_dir", str(tmp_path), "--prompts", "photo"])
    args.num_samples_per_prompt, args.num_inference_steps = 10, 1
    painter, drawn = generate.Painter(args), []

    def draw(records, attempt):
        if len(records) > 3:
            return None
        drawn.extend(record["index"] for record in records)
        return torch.rand(len(records), 3, 8, 8)

    monkeypatch.setattr(painter, "draw", draw)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    painter.batch_size = 10
    done = list(painter.paint(generate.plan(args)))
    assert drawn == list(range(10))
    assert [record["index"] for record in done] == list(range(10))
    assert painter.batch_size == 2  # ten, five, two
    assert capsys.readouterr().out.count("out of GPU memory") == 2
    monkeypatch.setattr(painter, "draw", lambda records, attempt: None)
    with pytest.raises(checks.UserError, match="one picture at a time"):
        list(painter.paint(generate.plan(args)))
