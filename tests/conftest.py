"""Shared by the tests: a model with random weights, small photos, one Ray, the scripts as commands.

The tests need neither a GPU nor a network.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that machines with GPUs give the same results
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("PYTHONPATH", None)
os.environ["RAY_local_fs_capacity_threshold"] = "1"  # noqa: SIM112 (no line of it on a full disk)
COMMAND_ENVIRONMENT = dict(os.environ)  # as a user has it: nothing that the code sets at run time
os.environ["PYTHONPATH"] = str(ROOT)  # for Ray's workers, which unpickle this project's classes

import dreambooth  # noqa: F401 (first: it sets what torch reads when it is imported)

# isort: split
import numpy as np
import pytest
import ray
import torch
from PIL import Image

import generate
import train
from dreambooth import models
from dreambooth.cli import UserError, silence_model_libraries
from dreambooth.image_generator import with_defaults
from dreambooth.machines import cluster
from dreambooth.pocket import pretrain, render
from dreambooth.run import export

INSTANCE_PROMPT = "photo of unqtkn car"
CLASS_PROMPT = "photo of a car"


def pytest_collection_modifyitems(items):
    """Tests that share this process's Ray come last. Some of the others start a Ray of their own,
    and two at a time would take twice the memory."""
    items.sort(key=lambda item: "ray_address" in item.fixturenames)


@pytest.fixture(scope="session")
def root():
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A pipeline directory: the pocket model's architecture, random weights in float16, 13 MB."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = pretrain.build_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    pretrain.export(tokenizer, *pretrain.new_models(len(tokenizer)), folder / "pipeline")
    return folder / "pipeline"


SD14_SIZES = {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}


@pytest.fixture(scope="session")
def sd14_dir(model_dir, tmp_path_factory):
    """A pipeline directory as large as Stable Diffusion 1.4 and for images of its size, to look at
    and not to load: its weights are holes in files, which take no space."""
    folder = tmp_path_factory.mktemp("sd14") / "pipeline"
    shutil.copytree(model_dir, folder)
    for name, count in SD14_SIZES.items():
        (file,) = (folder / name).glob("*.safetensors")
        tensor = {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}
        header = json.dumps({"weights": tensor}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(file, 8 + len(header) + count)
    for config, changes in {
        "unet": {"sample_size": 64},
        "vae": {"block_out_channels": [128, 256, 512, 512]},
    }.items():
        file = folder / config / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def render_photos(folder, count, seed, aspect=1.0):
    """Write `count` renders of random scenes, 64 pixels high, as PNG."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        render.render(render.sample_scene(rng), rng, 64, aspect).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def instance_dir(tmp_path_factory):
    """Five photos in landscape format."""
    return render_photos(tmp_path_factory.mktemp("photos") / "instance", 5, seed=1, aspect=1.25)


@pytest.fixture(scope="session")
def class_dir(tmp_path_factory):
    """Four images of the class."""
    return render_photos(tmp_path_factory.mktemp("photos") / "class", 4, seed=2)


@pytest.fixture
def flat_image(tmp_path):
    """Write an image of one colour: flat_image("a.png", (255, 0, 0)) returns its path."""

    def write(name, colour, size=(64, 64), mode="RGB", folder=tmp_path):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, colour).save(folder / name)
        return folder / name

    return write


@pytest.fixture(scope="session")
def train_argv(model_dir, instance_dir, class_dir):
    """The arguments of train.py as a list: train_argv(output_dir, lr=1e-3, use_lora=True)."""

    def build(output_dir, **changes):
        values = {
            "model_dir": model_dir,
            "output_dir": output_dir,
            "instance_images_dir": instance_dir,
            "instance_prompt": INSTANCE_PROMPT,
            "class_images_dir": class_dir,
            "class_prompt": CLASS_PROMPT,
            "num_workers": 1,
            "max_train_steps": 3,
        }
        return to_argv({**values, **changes})

    return build


@pytest.fixture(scope="session")
def generate_argv(model_dir):
    """The arguments of generate.py, by default one prompt and two denoising steps:
    generate_argv(output_dir, seed=1)."""

    def build(output_dir, **changes):
        values = {
            "model_dir": model_dir,
            "output_dir": output_dir,
            "prompts": [CLASS_PROMPT],
            "num_inference_steps": 2,
        }
        return to_argv({**values, **changes})

    return build


def to_argv(values):
    """{"seed": 1, "use_lora": True, "prompts": [a, b]} as arguments of a command line."""
    argv = []
    for name, value in values.items():
        if value is False:
            continue
        flag = f"--{name}"
        if name.startswith("no_"):
            flag = f"--no-{name.removeprefix('no_')}"
        argv.append(flag)
        if value is not True:
            argv += [str(item) for item in (value if isinstance(value, list) else [value])]
    return argv


@pytest.fixture(scope="session")
def train_args(train_argv):
    """The parsed arguments of train.py: train_args(output_dir, lr=1e-3)."""
    return lambda output_dir, **changes: train.parse_args(train_argv(output_dir, **changes))


@pytest.fixture(scope="session")
def generate_args(generate_argv):
    """The parsed arguments of generate.py: generate_args(output_dir, seed=1)."""
    return lambda output_dir, **changes: generate.parse_args(generate_argv(output_dir, **changes))


@pytest.fixture(scope="session")
def sampling_args(generate_args):
    """The same with the model's own settings where none are given."""
    return lambda output_dir, **changes: with_defaults(generate_args(output_dir, **changes))


@pytest.fixture
def run_and_resume(train_here, tmp_path, monkeypatch):
    """Train two steps twice, once without a stop and once resumed after step 1 by so many workers:
    run_and_resume("1:2", lr=1e-3) returns the uninterrupted run, the resumed one, and the state
    after step 1. A pair that is used twice or not at all would change the weights. (The first part
    of the resumed run ends because its result cannot be saved; its checkpoint of step 2 is then
    deleted.)"""

    def run(num_workers, **changes):
        changes = {"adam_epsilon": 1e-2, "lr": 1e-3, "max_train_steps": 2, **changes}
        alone = {**changes, "num_workers": 1, "gradient_accumulation_steps": 2}
        expected = train_here(**alone)
        with monkeypatch.context() as patch:
            patch.setattr(export, "save", lambda denoiser, args: 1 / 0)
            with pytest.raises(UserError, match="could not be saved"):
                more = {"checkpointing_steps": 1, "checkpoints_total_limit": 2}
                train_here(tmp_path / "out", **alone, **more)
        first, second = sorted((tmp_path / "out.checkpoints").glob("step_*"))
        state = torch.load(first / "state.pt", weights_only=True)
        shutil.rmtree(second)
        if num_workers != 1:
            alone["gradient_accumulation_steps"] = 1  # as many pairs per step
        resumed = train_here(tmp_path / "out", **{**alone, "num_workers": num_workers})
        assert "resuming after step 1" in resumed.stdout
        return expected, resumed, state

    return run


@pytest.fixture(scope="session")
def load_models(train_args, model_dir):
    """VAE, denoiser and noise schedule as a worker of train.py loads them:
    load_models(use_lora=True); with autocast=True as on a GPU."""
    silence_model_libraries()

    def load(folder=model_dir, autocast=None, **changes):
        args = train_args("out", model_dir=folder, **changes)
        return models.load_models(args, torch.device("cpu"), autocast)

    return load


@pytest.fixture(scope="session")
def generated(generate_args, tmp_path_factory):
    """Five images of each of two prompts, generated in this process: a namespace of their folder
    and the flags that made them."""
    prompts = ["photo of unqtkn car, in the snow", CLASS_PROMPT]
    flags = {"prompts": prompts, "num_samples_per_prompt": 5}
    folder = tmp_path_factory.mktemp("generated") / "new"
    generate.main(generate_args(folder, **flags))
    return SimpleNamespace(folder=folder, flags=flags, prompts=prompts)


@pytest.fixture(scope="session")
def digests():
    """A function: the digest of the pixels of each generated image in a folder, by file name."""

    def read(folder):
        files = sorted(Path(folder).glob("*-seed*.png"))
        return {file.name: sha256(Image.open(file).tobytes()).hexdigest() for file in files}

    return read


@pytest.fixture(scope="session")
def lora_dir(load_models, tmp_path_factory):
    """A LoRA with a visible effect: its second matrices are not zero."""
    _, denoiser, _ = load_models(use_lora=True)
    torch.manual_seed(0)
    for name, parameter in denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("lora") / "lora"
    export.save(denoiser, SimpleNamespace(use_lora=True, model_dir=None, output_dir=folder))
    return folder


@pytest.fixture(scope="session")
def broken_model_dir(load_models, model_dir, tmp_path_factory):
    """A model whose images are not numbers."""
    _, denoiser, _ = load_models()
    denoiser.unet.conv_out.bias.data.fill_(float("nan"))
    folder = tmp_path_factory.mktemp("broken") / "model"
    export.save_pipeline(denoiser, model_dir, folder)
    return folder


# If several Rays run on a machine, one of Ray Train's threads does not find its own, and dies with
# a stack trace. That says nothing about the script that is tested.
CLEANER_THREAD = re.compile(
    r"Exception in thread PlacementGroupCleanerMonitor:\n.*?ConnectionError: [^\n]*\n", re.DOTALL
)


@pytest.fixture(scope="session")
def run_script():
    """Run Python as a user does: run_script("train.py", "--lr", 1, RAY_ADDRESS="...")."""

    def run(*argv, **environment):
        result = subprocess.run(
            [sys.executable, *map(str, argv)],
            cwd=ROOT,
            env={**COMMAND_ENVIRONMENT, **environment},
            capture_output=True,
            text=True,
            timeout=400,
        )
        result.stdout = CLEANER_THREAD.sub("", result.stdout)
        result.stderr = CLEANER_THREAD.sub("", result.stderr)
        return result

    return run


@pytest.fixture(scope="session")
def assert_one_line():
    """Check that a script refused: exit code 2, and on stderr one line that begins with "error:"
    and contains the given texts."""

    def check(result, *texts):
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stdout + result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert result.stderr.startswith("error: ")
        for text in texts:
            assert text in result.stderr

    return check


@pytest.fixture(scope="session")
def run_train(run_script, train_argv, tmp_path_factory):
    """Run train.py as a command that succeeds: run_train(num_workers=2) returns a namespace of its
    output_dir, stdout and stderr. It starts a Ray of its own, unless `ray_address` is given."""

    def run(ray_address="", **changes):
        folder = tmp_path_factory.mktemp("train")
        output_dir = folder / "out"
        argv = train_argv(output_dir, log_every=1, **changes)
        result = run_script("train.py", *argv, RAY_ADDRESS=ray_address)
        assert result.returncode == 0, result.stdout + result.stderr
        left = {path.name for path in folder.iterdir()}
        assert left == {"out", "out.report"}  # nothing else is left there
        return SimpleNamespace(
            output_dir=output_dir, stdout=result.stdout, stderr=result.stderr, changes=changes
        )

    return run


@contextmanager
def signal_handlers_kept():
    """Afterwards what handles the signals that stop a run is as before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        list(map(signal.signal, numbers, handlers))


@pytest.fixture
def signal_handlers():
    """A test that may replace the handlers of the signals that stop a run."""
    with signal_handlers_kept():
        yield


@pytest.fixture(scope="session")
def train_here(train_args, tmp_path_factory, ray_address):
    """Call train.main in this process, in Ray Train's local mode on the shared Ray; seconds faster
    than a process, with the same weights: train_here(lr=1e-3) returns a namespace of its output_dir
    and stdout."""

    def run(output_dir=None, **changes):
        output_dir = output_dir or tmp_path_factory.mktemp("train") / "out"
        num_threads = torch.get_num_threads()
        stdout = io.StringIO()
        try:
            with redirect_stdout(stdout), signal_handlers_kept():
                train.main(train_args(output_dir, **{"log_every": 1, **changes}))
        finally:
            torch.set_num_threads(num_threads)
        return SimpleNamespace(output_dir=output_dir, stdout=stdout.getvalue(), changes=changes)

    return run


@pytest.fixture(scope="session")
def one_worker(run_train):
    """A run with the default recipe on one worker."""
    return run_train(num_workers=1)


@pytest.fixture(scope="session")
def update(load_models):
    """What a run of train.py has added to all weights of U-Net and text encoder, as one vector."""
    _, start, _ = load_models()

    def difference(run):
        _, tuned, _ = load_models(run.output_dir)
        pairs = zip(tuned.parameters(), start.parameters(), strict=True)
        return torch.cat([(p.detach().double() - s.detach().double()).flatten() for p, s in pairs])

    return difference


@pytest.fixture(scope="session")
def two_workers(run_train):
    """A run on two workers, each of which accumulates two forward passes per step. (AdamW's large
    epsilon makes its updates smooth in the gradients, so that rounding does not grow.)"""
    return run_train(
        num_workers=2, gradient_accumulation_steps=2, adam_epsilon=1e-2, lr=1e-3, max_train_steps=2
    )


@pytest.fixture(scope="session")
def ray_address():
    """The address of one Ray with two cores, which all tests of this process share.

    It is always a new one: a Ray that happens to run on this machine is left alone.
    """
    os.environ.update(cluster.SETTINGS)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    COMMAND_ENVIRONMENT["RAY_AUTH_MODE"] = os.environ["RAY_AUTH_MODE"]  # so that commands may join
    cluster.start_ray()  # with the settings of Ray Data
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
