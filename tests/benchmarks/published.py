"""The published example (Ray's template of 2023), rebuilt for comparison: its step, and its whole
job on Ray.

    python tests/benchmarks/published.py --model_dir $PWD/dreambooth/pocket/model \\
        --output_dir /tmp/published ...

Weights, optimizer and noise schedule in bfloat16; VAE and text encoder run at every step; pairs by
zip, repartition and shuffle in Ray Data; a report, which waits for the device and for the
controller, at every step. The flags are train.py's; of the recipe it uses --lr, --train_batch_size
and --max_train_steps.
"""

import argparse
import importlib.util
import sys
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))


class RayStandIn(MetaPathFinder, Loader):
    """Mocks for Ray's modules: train.py imports them, but the steps alone do not need them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return MagicMock(__path__=[])

    def exec_module(self, module):
        pass


if importlib.util.find_spec("ray") is None:
    sys.meta_path.append(RayStandIn())

import ray
import ray.train
from ray.train.torch import TorchTrainer, get_device

import train
from dreambooth import families, models
from dreambooth.files import pipeline_dir as directory
from dreambooth.files.photos import find_images
from dreambooth.images import crop_image
from dreambooth.run import export

PROMPTS = ("photo of unqtkn car", "photo of a car")


def settings_for(pipeline_dir, output_dir, *flags):
    """train.py's settings: its defaults but for `flags`."""
    paths = ["--model_dir", pipeline_dir, "--output_dir", output_dir]
    paths += ["--instance_images_dir", "-", "--class_images_dir", "-"]
    prompts = ["--instance_prompt", PROMPTS[0], "--class_prompt", PROMPTS[1]]
    return train.parse_args([str(word) for word in (*paths, *prompts, *flags)])


def conditions_of(pipeline_dir, num_images):
    """PROMPTS, each for half of the images of a batch, as the denoiser takes them."""
    tokenizer = directory.load_tokenizer(pipeline_dir)
    length = tokenizer.model_max_length
    ids = tokenizer(list(PROMPTS), padding="max_length", max_length=length).input_ids
    return {"input_ids": torch.tensor(ids), "counts": [num_images // 2] * 2}


class Plain:
    """The step of the published example."""

    def __init__(self, settings, pixels, conditions, device):
        vae, denoiser, self.scheduler = models.load_models(settings, device, autocast=False)
        self.vae = vae.to(torch.bfloat16)
        self.denoiser = denoiser.to(torch.bfloat16, memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), settings.lr)
        self.pixels = pixels.to(device, torch.bfloat16)
        self.conditions = families.StableDiffusion().one_per_image(conditions)
        self.conditions["input_ids"] = self.conditions["input_ids"].to(device)

    def step(self):
        posterior = self.vae.encode(self.pixels).latent_dist
        latents = posterior.sample() * self.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy_latents = self.scheduler.add_noise(latents, noise, timesteps)
        model_pred = self.denoiser(noisy_latents, timesteps, self.conditions)
        instance_error, class_error = (model_pred.float() - noise.float()).square().chunk(2)
        loss = instance_error.mean() + class_error.mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.reported = model_pred.float().mean().item()  # waits for the device


def train_fn(config):
    """What its worker runs."""
    settings = argparse.Namespace(**config)
    torch.manual_seed(0)  # the published one had no seed
    conditions = conditions_of(settings.model_dir, 2 * settings.train_batch_size)
    device = get_device()
    side = None
    step = 0
    start = time.time()
    while step < settings.max_train_steps:
        shard = ray.train.get_dataset_shard("train")
        batches = shard.iter_torch_batches(batch_size=settings.train_batch_size, drop_last=True)
        for batch in batches:
            pixels = torch.cat([batch["image"], batch["image_1"]]).float()
            if side is None:
                side = Plain(settings, pixels, conditions, device)
            side.pixels = pixels.to(device, torch.bfloat16)
            side.step()
            step += 1
            if step == 1:
                first = time.time()
            if settings.report:
                ray.train.report({"loss": side.reported})
            if step == settings.max_train_steps:
                break
    num_images = 2 * settings.train_batch_size * (settings.max_train_steps - 1)
    rate = num_images / (time.time() - first)
    print(
        f"first step after {first - start:.1f} s, then {rate:.2f} images/s, ready to save",
        flush=True,
    )
    export.save_pipeline(side.denoiser, settings.model_dir, settings.output_dir)


def build_pairs(instance_dir, class_dir, resolution):
    """Its data set: the instance images repeated to the number of class images, zipped and
    shuffled."""

    def decode(batch):
        crops = [crop_image(str(path), resolution, 0)[0] for path in batch["item"]]
        return {"image": np.stack(crops) / np.float32(127.5) - 1}

    def read_folder(folder):
        paths = [str(path.absolute()) for path in find_images(folder)]
        return ray.data.from_items(paths).map_batches(decode)

    class_images = read_folder(class_dir).materialize()
    count = class_images.count()
    instance_images = read_folder(instance_dir).repartition(1)
    repeated = instance_images
    while repeated.count() < count:
        repeated = repeated.union(instance_images)
    return repeated.limit(count).zip(class_images).repartition(8).random_shuffle(seed=0)


def main(args, report):
    ray.init(address="local", include_dashboard=False)
    on_gpu = bool(ray.cluster_resources().get("GPU"))
    resolution, _ = directory.resolution(args.model_dir)
    TorchTrainer(
        train_fn,
        train_loop_config={**vars(args), "report": report},
        datasets={
            "train": build_pairs(args.instance_images_dir, args.class_images_dir, resolution)
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=1,
            use_gpu=on_gpu,
            resources_per_worker={"GPU": 1} if on_gpu else {"CPU": 1},
        ),
        run_config=ray.train.RunConfig(storage_path=str(Path(args.output_dir).parent / "runs")),
    ).fit()


if __name__ == "__main__":
    argv = sys.argv[1:]
    train_flags = [flag for flag in argv if flag != "--no_report"]
    main(train.parse_args(train_flags), report="--no_report" not in argv)
