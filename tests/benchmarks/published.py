"""The published example (Ray's template of 2023), rebuilt to compare with: its step, and its whole job on Ray.

    python tests/benchmarks/published.py --model_dir $PWD/dreambooth/pocket/model --output_dir /tmp/published ...

Weights, optimizer and noise schedule in bfloat16; VAE and text encoder live at every step; pairs by zip,
repartition and shuffle in Ray Data; a report, which waits for the device and for the controller, at every step.
The flags are train.py's; of the recipe it uses --lr, --train_batch_size and --max_train_steps.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
if importlib.util.find_spec("ray") is None:  # train.py is imported for its flags' defaults; the steps need no Ray
    sys.modules |= {name: MagicMock() for name in ("ray", "ray.data", "ray.data.collate_fn", "ray.train")}
    sys.modules["ray.train.torch"] = MagicMock()

import ray
import ray.train
from ray.train.torch import TorchTrainer, get_device

import train
from dreambooth import files, images, models

PROMPTS = ("photo of unqtkn car", "photo of a car")


def settings_for(model_dir, output_dir, *flags):
    """train.py's settings: its defaults but for `flags`."""
    paths = {"model_dir": model_dir, "output_dir": output_dir, "instance_images_dir": "-", "class_images_dir": "-"}
    prompts = dict(zip(("instance_prompt", "class_prompt"), PROMPTS, strict=True))
    return train.parse_args([*(f"--{name}={value}" for name, value in {**paths, **prompts}.items()), *flags])


class Plain:
    """The step of the published example."""

    def __init__(self, settings, pixels, prompt_ids, device):
        vae, denoiser, self.scheduler = models.load_models(settings, device, autocast=False)
        self.vae = vae.to(torch.bfloat16)
        self.denoiser = denoiser.to(torch.bfloat16, memory_format=torch.contiguous_format)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), settings.lr)
        self.pixels = pixels.to(device, torch.bfloat16)
        self.prompt_ids = prompt_ids.repeat_interleave(len(pixels) // 2, 0).to(device)  # one for each image

    def step(self):
        x = self.vae.encode(self.pixels).latent_dist.sample() * self.vae.config.scaling_factor
        noise, timesteps = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        prediction = self.denoiser(self.scheduler.add_noise(x, noise, timesteps), timesteps, self.prompt_ids)
        instance, other = (prediction.float() - noise.float()).square().chunk(2)
        (instance.mean() + other.mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last = prediction.float().mean().item()  # a report at every step waits for the device


def train_fn(config):
    """What its worker runs."""
    settings = argparse.Namespace(**config)
    torch.manual_seed(0)  # it had none, and other results each time
    tokenizer = files.load_tokenizer(settings.model_dir)
    ids = tokenizer(list(PROMPTS), padding="max_length", max_length=tokenizer.model_max_length).input_ids
    prompt_ids = torch.tensor(ids)
    side, step, device, start = None, 0, get_device(), time.time()
    while step < settings.max_train_steps:
        shard = ray.train.get_dataset_shard("train")
        for batch in shard.iter_torch_batches(batch_size=settings.train_batch_size, drop_last=True):
            pixels = torch.cat([batch["image"], batch["image_1"]]).float()
            if side is None:
                side = Plain(settings, pixels, prompt_ids, device)
            side.pixels = pixels.to(device, torch.bfloat16)
            side.step()
            step += 1
            if step == 1:
                first = time.time()
            if settings.report:
                ray.train.report({"loss": side.last})
            if step == settings.max_train_steps:
                break
    rate = 2 * settings.train_batch_size * (settings.max_train_steps - 1) / (time.time() - first)
    print(f"first step after {first - start:.1f} s, then {rate:.2f} images/s, ready to save", flush=True)
    models.save_pipeline(side.denoiser, settings.model_dir, settings.output_dir)


def build_pairs(instance_dir, class_dir, resolution):
    """Its data set: the instance images repeated to the number of the class images, zipped and shuffled."""

    def load(folder):
        def to_rows(batch):
            crops = [images.crop_image(str(path), resolution, 0)[0] for path in batch["item"]]
            return {"image": np.stack(crops) / np.float32(127.5) - 1}

        return ray.data.from_items([str(p.absolute()) for p in images.find_images(folder)]).map_batches(to_rows)

    others = load(class_dir).materialize()
    count = others.count()
    instances = load(instance_dir).repartition(1)
    repeated = instances
    while repeated.count() < count:
        repeated = repeated.union(instances)
    return repeated.limit(count).zip(others).repartition(8).random_shuffle(seed=0)


def main(args, report):
    ray.init(include_dashboard=False)
    on_gpu = bool(ray.cluster_resources().get("GPU"))
    resolution, _ = files.model_resolution(args.model_dir)
    TorchTrainer(
        train_fn,
        train_loop_config={**vars(args), "report": report},
        datasets={"train": build_pairs(args.instance_images_dir, args.class_images_dir, resolution)},
        scaling_config=ray.train.ScalingConfig(
            num_workers=1, use_gpu=on_gpu, resources_per_worker={"GPU": 1} if on_gpu else {"CPU": 1}
        ),
        run_config=ray.train.RunConfig(storage_path=str(Path(args.output_dir).parent / "runs")),
    ).fit()


if __name__ == "__main__":
    words = sys.argv[1:]
    main(train.parse_args([word for word in words if word != "--no_report"]), report="--no_report" not in words)
