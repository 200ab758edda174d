"""What the tests share: a model with random weights, small photos, one Ray, and the scripts as commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = str(ROOT)  # for Ray's workers, which unpickle this project's classes
os.environ.pop("RAY_ADDRESS", None)

import numpy as np
import pytest
import ray
import torch
from PIL import Image

import train
from dreambooth import models
from dreambooth.cluster import SETTINGS, start_ray
from dreambooth.pocket import pretrain, render

INSTANCE_PROMPT, CLASS_PROMPT = "photo of unqtkn car", "photo of a car"


def pytest_collection_modifyitems(items):
    """test_train.py goes first: one of its runs starts a Ray of its own, and of two at a time on one
    machine Ray's own watchdogs do not know which is meant."""
    items.sort(key=lambda item: item.path.name != "test_train.py")


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A pipeline directory of the pocket model's architecture with random weights, float16, 13 MB."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = pretrain.build_tokenizer(folder / "words")
    torch.manual_seed(0)
    pretrain.export(tokenizer, *pretrain.new_models(len(tokenizer)), folder / "pipeline")
    return folder / "pipeline"


def draw_photos(folder, count, seed, size=64, aspect=1.0):
    """Write `count` drawings of random scenes, `size` pixels high, as PNG."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        render.render(render.sample_scene(rng), rng, size, aspect).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def instance_dir(tmp_path_factory):
    """Five photos in landscape format."""
    return draw_photos(tmp_path_factory.mktemp("photos") / "instance", 5, seed=1, aspect=1.25)


@pytest.fixture(scope="session")
def class_dir(tmp_path_factory):
    """Four pictures of the class."""
    return draw_photos(tmp_path_factory.mktemp("photos") / "class", 4, seed=2)


@pytest.fixture
def flat_image(tmp_path):
    """Write a picture of one colour: flat_image("a.png", (255, 0, 0)) returns its path."""

    def write(name, colour, size=(64, 64), mode="RGB", folder=tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(folder / name)
        return folder / name

    return write


@pytest.fixture(scope="session")
def train_argv(model_dir, instance_dir, class_dir):
    """The arguments of train.py: train_argv(output_dir, lr=1e-3, use_lora=True) as a list of words."""

    def argv(output_dir, **changes):
        values = {
            "model_dir": model_dir, "output_dir": output_dir,
            "instance_images_dir": instance_dir, "instance_prompt": INSTANCE_PROMPT,
            "class_images_dir": class_dir, "class_prompt": CLASS_PROMPT,
            "num_workers": 1, "max_train_steps": 3, **changes,
        }  # fmt: skip
        return to_argv(values)

    return argv


@pytest.fixture(scope="session")
def load_models(train_argv, model_dir):
    """VAE, denoiser and noise schedule as a worker of train.py loads them: load_models(use_lora=True); with
    autocast=True as on a GPU."""

    def load(folder=model_dir, autocast=None, **changes):
        args = train.parse_args(train_argv("out", model_dir=folder, **changes))
        return models.load_models(args, torch.device("cpu"), autocast)

    return load


@pytest.fixture(scope="session")
def generate_argv(model_dir):
    """The arguments of generate.py, one prompt, two steps of the sampler: generate_argv(output_dir, seed=1)."""

    def argv(output_dir, **changes):
        values = {"model_dir": model_dir, "output_dir": output_dir, "prompts": [CLASS_PROMPT], "num_inference_steps": 2}
        return to_argv({**values, **changes})

    return argv


def to_argv(values):
    """{"seed": 1, "use_lora": True, "prompts": [a, b]} as words of a command line."""
    words = []
    for name, value in values.items():
        if value is True:
            words += [f"--{name.replace('no_', 'no-', 1)}"]
        elif value is not False:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


# Where several Rays run on one machine, a watchdog of Ray Train does not know which is meant and dies
# loudly. That says nothing about the script that a test has run.
WATCHDOG = re.compile(r"Exception in thread PlacementGroupCleanerMonitor:\n.*?ConnectionError: [^\n]*\n", re.DOTALL)


@pytest.fixture(scope="session")
def run_script():
    """Run a script as a user does: run_script("train.py", "--lr", 1, RAY_ADDRESS="...")."""

    def run(script, *words, **env):
        command = [sys.executable, str(ROOT / script), *map(str, words)]
        env = {**os.environ, **env}
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
        result.stdout, result.stderr = (WATCHDOG.sub("", text) for text in (result.stdout, result.stderr))
        return result

    return run


@pytest.fixture(scope="session")
def assert_one_line():
    """Of a script that refused: exit code 2, and on stderr one line that begins with "error:" and holds the words."""

    def check(result, *words):
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stdout + result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith("error: ")
        for word in words:
            assert word in result.stderr

    return check


@pytest.fixture(scope="session")
def ray_address():
    """One Ray with two cores for all tests that use it in this process; its address for those that don't."""
    os.environ.update(SETTINGS)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    start_ray()  # settings of Ray Data
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
