"""Model directories as other programs and half-finished downloads leave them, drawn at random:
files missing or of no use, fields missing, null or of another type, harmless extras. Each works, or
is one line.

    DRAWN=200 python -m pytest tests/test_drawn_model_dirs.py
"""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dreambooth import models
from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.image_generator import ImageGenerator
from dreambooth.pocket import POCKET_DIR

DRAWN = int(os.environ.get("DRAWN", "25"))
CONFIGS = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "text_encoder/config.json",
    "vae/config.json",
    "unet/config.json",
]
VALUES = [None, "text", -1, 0, 3, 0.5, True, [], [1, 2], {}, {"a": 1}]


def copy_model(folder):
    """Weights are linked, everything else is copied."""
    for file in POCKET_DIR.rglob("*"):
        copy = folder / file.relative_to(POCKET_DIR)
        if file.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            (os.symlink if file.suffix == ".safetensors" else shutil.copyfile)(file, copy)
    return folder


def change_field(folder, rng):
    """Drop a field of a configuration, or give it another value."""
    file = folder / str(rng.choice(CONFIGS))
    config = json.loads(file.read_text())
    name = str(rng.choice(sorted(config)))
    value = config.pop(name)
    if rng.random() < 0.7:
        value = VALUES[int(rng.integers(len(VALUES)))]
        config[name] = value
    file.write_text(json.dumps(config))
    return f"{file.relative_to(folder)}: {name} {value}"


def spoil_file(folder, rng):
    """Remove a file, or put something else in its place."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    file = files[int(rng.integers(len(files)))]
    contents = [
        None,
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xef\xbb\xbf{}",
        b"<html>404</html>",
        rng.bytes(99),
    ]
    content = contents[int(rng.integers(len(contents)))]
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    return f"{file.relative_to(folder)} is {content}"


def add_extras(folder, rng):
    """What a directory may hold beside a model."""
    for name in (
        "README.md",
        ".DS_Store",
        "unet/diffusion_flax_model.msgpack",
        "vae/._config.json",
    ):
        (folder / name).write_bytes(rng.bytes(20))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    for name in CONFIGS[1:]:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, "_comment": "mine"}))
    return "extras"


def use(folder, tmp_path):
    """Load a model for training and for sampling as the scripts do, and take a step of each;
    returns the images (3, 64, 64), one."""
    pipeline_dir.check_model_dir(folder)
    pipeline_dir.check_prompts(folder, ["photo of a car"])
    args = SimpleNamespace(
        model_dir=str(folder), verbose=False, param_dtype="fp32", train_text_encoder=True,
        use_lora=False, gradient_checkpointing=False, compile=False, seed=0,
        output_dir=str(tmp_path / "images"), lora_weights_dir=None, scheduler="dpm",
        num_inference_steps=3, guidance_scale=4.0, resolution=64, batch_size=1,
    )  # fmt: skip
    vae, denoiser, scheduler = models.load_models(args, torch.device("cpu"))
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
        noisy = scheduler.add_noise(latents, torch.ones_like(latents), torch.tensor([500]))
        conditions = {"input_ids": torch.zeros(1, 48, dtype=torch.long), "counts": [1]}
        denoiser(noisy, torch.tensor([500]), conditions)
    record = {"prompt": "photo of a car", "seed": 0, "index": 0, "file": "a.png"}
    return [image for _, image in ImageGenerator(args).sample_all([record], 0)]


@pytest.mark.parametrize("seed", range(DRAWN))
def test_a_drawn_model_directory_works_or_is_one_line(seed, tmp_path):
    rng = np.random.default_rng(seed)
    folder = copy_model(tmp_path / "model")
    changes = [change_field, change_field, spoil_file]
    story = changes[int(rng.integers(len(changes)))](folder, rng)
    try:
        use(folder, tmp_path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1, story
        assert str(folder) in str(error), story
    except Exception as error:
        raise AssertionError(story) from error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_with_extras_works(tmp_path):
    folder = copy_model(tmp_path / "model")
    add_extras(folder, np.random.default_rng(0))
    (image,) = use(folder, tmp_path)
    (plain,) = use(POCKET_DIR, tmp_path)
    assert torch.equal(image, plain)
