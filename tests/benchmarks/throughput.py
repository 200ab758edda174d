"""Training speed: this project's step and job against the published example's, ratios within one run.

    python tests/benchmarks/throughput.py --model pocket              # steps alone, then whole jobs on Ray
    python tests/benchmarks/throughput.py --model sd14 --no_ray       # steps alone: Stable Diffusion 1.4's
                                                                      # architecture at random weights, for a GPU

Steps: each side trains its own copy of the model; the sides take turns, so that a busy machine slows
them alike. "plain" is the published loop: bfloat16 weights and noise schedule, VAE and text encoder
live at every step. The sides below "ours" have one of its features switched off.

Jobs: 60 steps, 64 class images, start to saved model, as processes of their own: train.py with 1 and 2
workers, and the published loop, which reports at every step. Their logs say where the seconds went.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import cache_model
import train
from dreambooth import checks, dataset, latents, models
from dreambooth.pocket import pretrain, render

PROMPTS = ("photo of unqtkn car", "photo of a car")


def build_sd14(folder):
    """Write a pipeline directory with Stable Diffusion 1.4's architecture and random weights: 860 M
    U-Net, 123 M text encoder, 84 M VAE; a tokenizer of pocket's, filled up to 77 tokens."""
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(cache_model.POCKET_DIR)
    tokenizer.model_max_length = 77
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    )
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        sample_size=512, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pretrain.export(tokenizer, vae, text_encoder, unet, folder)
    return folder


class Ours:
    """The step of train.py, with some of its features switched off by name."""

    def __init__(self, args, images, prompt_ids, device, off=()):
        models.quiet()
        self.args, self.off, self.device = args, off, device
        vae, self.denoiser, self.scheduler = models.load_models(args, device)
        if "channels_last" in off:
            self.denoiser.unet.to(memory_format=torch.contiguous_format)
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, args.lr, fused="fused AdamW" not in off)
        pairs = len(images) // 2
        self.batch = {"prompt_ids": prompt_ids.to(device), "positions": list(range(pairs))}
        self.vae, self.images = vae, images.to(device)
        self.batch["posteriors"] = latents.encode(vae, self.images)

    def step(self):
        if "cached latents" in self.off:
            self.batch["posteriors"] = latents.encode(self.vae, self.images)
        draws = latents.draw(0, self.batch, 1000)
        loss = train.training_loss(self.denoiser, self.scheduler, self.batch, draws, 1.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Plain:
    """The step of the published example."""

    def __init__(self, args, images, prompt_ids, device):
        vae, denoiser, self.scheduler = models.load_models(args, device)
        self.vae, self.denoiser = (
            vae.to(torch.bfloat16),
            denoiser.to(torch.bfloat16, memory_format=torch.contiguous_format),
        )
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), args.lr)
        self.images, self.prompt_ids = images.to(device, torch.bfloat16), prompt_ids.to(device)

    def step(self):
        x = self.vae.encode(self.images).latent_dist.sample() * self.vae.config.scaling_factor
        noise, timesteps = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=x.device)
        prediction = self.denoiser(self.scheduler.add_noise(x, noise, timesteps), timesteps, self.prompt_ids)
        instance, other = (prediction.float() - noise.float()).square().chunk(2)
        (instance.mean() + other.mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last = prediction.float().mean().item()  # a report at every step waits for the device


def settings_for(model_dir, output_dir):
    """train.py's settings, all at their defaults."""
    paths = {"model_dir": model_dir, "output_dir": output_dir, "instance_images_dir": "-", "class_images_dir": "-"}
    prompts = dict(zip(("instance_prompt", "class_prompt"), PROMPTS, strict=True))
    return train.parse_args([f"--{name}={value}" for name, value in {**paths, **prompts}.items()])


def compare_steps(args, model_dir, device):
    """Print images/s of each side, the ratio to "plain", and on a GPU the peak memory."""
    settings = settings_for(model_dir, "-")
    resolution, _ = models.model_resolution(model_dir)
    tokenizer = models.load_tokenizer(model_dir)
    ids = tokenizer(list(PROMPTS), padding="max_length", max_length=tokenizer.model_max_length).input_ids
    prompt_ids = torch.tensor(ids).repeat_interleave(args.batch_size, 0)
    images = torch.rand(2 * args.batch_size, 3, resolution, resolution) * 2 - 1
    inputs = (settings, images, prompt_ids, device)
    sides = {
        "plain": lambda: Plain(*inputs),
        "ours": lambda: Ours(*inputs),
        **{f"ours without {name}": lambda name=name: Ours(*inputs, off=(name,))
           for name in ("cached latents", "channels_last", "fused AdamW")},
    }  # fmt: skip
    on_gpu = device.type == "cuda"  # there one side at a time has room; on a CPU they alternate
    built = {} if on_gpu else {name: build() for name, build in sides.items()}
    seconds, peaks = {name: [] for name in sides}, {}
    for name in sides if on_gpu else []:
        torch.cuda.reset_peak_memory_stats()
        side = sides[name]()
        seconds[name] = [time_steps(side, args.steps, device) for _ in range(args.turns + 1)][1:]
        peaks[name] = torch.cuda.max_memory_allocated() / 2**30
        del side
        torch.cuda.empty_cache()
    for turn in range(0 if on_gpu else args.turns + 1):
        for name, side in built.items():
            value = time_steps(side, args.steps, device)
            if turn:
                seconds[name].append(value)
    plain = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        peak = f"  peak {peaks[name]:5.1f} GiB" if name in peaks else ""
        rate = f"{2 * args.batch_size / middle:7.1f} images/s  {plain / middle:5.2f} x"
        print(f"{name:28} {middle:6.3f} s a step  {rate}{peak}")


def time_steps(side, steps, device):
    """Seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        side.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def plain_job(model_dir, instance_dir, class_dir, output_dir, steps):
    """The published example as a whole: zip, repartition and shuffle in Ray Data; a report at every step."""
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    def train_fn(config):
        settings = argparse.Namespace(**config)
        tokenizer = models.load_tokenizer(settings.model_dir)
        ids = torch.tensor(
            tokenizer(list(PROMPTS), padding="max_length", max_length=tokenizer.model_max_length).input_ids
        )
        side, step = None, 0
        while step < settings.steps:
            for batch in ray.train.get_dataset_shard("train").iter_torch_batches(batch_size=2):
                images = torch.cat([batch["image"], batch["image_1"]]).float()
                if side is None:
                    side = Plain(settings, images, ids.repeat_interleave(2, 0), torch.device("cpu"))
                side.images = images.to(torch.bfloat16)
                side.step()
                step += 1
                ray.train.report({"loss": side.last})
                if step == settings.steps:
                    break
        models.save_pipeline(side.denoiser, settings.model_dir, settings.output_dir)

    def load(kind):
        def to_rows(batch):
            return {"image": np.stack([dataset.load_image(str(p), 64, 0)[0].numpy() for p in batch["item"]])}

        return ray.data.from_items([str(p.absolute()) for p in dataset.find_images(kind)]).map_batches(to_rows)

    ray.init(include_dashboard=False)
    others = load(class_dir).materialize()
    count = others.count()
    instances = load(instance_dir).repartition(1)
    repeated = instances
    while repeated.count() < count:
        repeated = repeated.union(instances)
    pairs = repeated.limit(count).zip(others).repartition(8).random_shuffle(seed=0)
    settings = settings_for(model_dir, output_dir)
    TorchTrainer(
        train_fn,
        train_loop_config={**vars(settings), "steps": steps},
        datasets={"train": pairs},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(storage_path=str(Path(output_dir).parent / "runs")),
    ).fit()


def compare_jobs(args, model_dir, folder):
    """Print the seconds of each whole job, and what train.py says of where they went."""
    instance_dir, class_dir = ROOT / "images" / "lego-car", folder / "class"
    class_dir.mkdir()
    rng = np.random.default_rng(0)
    for i in range(64):
        render.render(render.sample_scene(rng), rng).save(class_dir / f"{i}.png")
    common = ["--model_dir", model_dir, "--instance_images_dir", instance_dir, "--instance_prompt", PROMPTS[0],
              "--class_images_dir", class_dir, "--class_prompt", PROMPTS[1], "--train_batch_size", 2,
              "--num_epochs", 4, "--max_train_steps", args.job_steps]  # fmt: skip
    jobs = {
        f"ours, {n} worker(s)": [ROOT / "train.py", *common, "--num_workers", n, "--output_dir", folder / f"ours-{n}"]
        for n in (1, 2)
    }
    jobs["published loop, 1 worker"] = [
        __file__,
        "--plain_job",
        model_dir,
        instance_dir,
        class_dir,
        folder / "plain",
        args.job_steps,
    ]
    for name, command in jobs.items():
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
        print(f"{name:28} {time.perf_counter() - start:6.1f} s in all, exit code {done.returncode}")
        print("".join(f"    {line}\n" for line in done.stdout.splitlines() if "save" in line), end="", flush=True)


def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(checks.cores())
    torch.set_float32_matmul_precision("high")  # as in train.py
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model_dir = build_sd14(folder / "sd14") if args.model == "sd14" else cache_model.POCKET_DIR
        compare_steps(args, model_dir, device)
        if not args.no_ray:
            compare_jobs(args, model_dir, folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plain_job"]:
        plain_job(*sys.argv[2:6], int(sys.argv[6]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)
    parser.add_argument("--model", choices=["pocket", "sd14"], default="pocket", help="sd14 for a GPU")
    parser.add_argument("--no_ray", action="store_true", help="the steps alone")
    parser.add_argument("--batch_size", type=int, default=2, help="pairs a step")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn")
    parser.add_argument("--turns", type=int, default=5, help="turns measured, after one that warms up")
    parser.add_argument("--job_steps", type=int, default=60, help="steps of a job")
    main(parser.parse_args())
