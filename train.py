"""Teach a Stable Diffusion model a subject: fine-tune U-Net and text encoder with DreamBooth's
prior-preserving loss (Ruiz et al. 2022, arXiv 2208.12242) on Ray Data and Ray Train.

    python train.py --model_dir $ORIG_MODEL_PATH --output_dir $TUNED_MODEL_DIR \\
        --instance_images_dir images/lego-car --instance_prompt "photo of unqtkn car" \\
        --class_images_dir $IMAGES_REG_DIR --class_prompt "photo of a car" --num_workers 1

The result is a diffusers pipeline directory, or with --use_lora pytorch_lora_weights.safetensors;
generate.py takes both. Letters: B pairs a worker and step, so 2B images; R resolution; C, h, w
channels, height and width of a latent; L tokens in a prompt.
"""

import argparse
import math
import shutil
import time
from pathlib import Path

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device, prepare_model

from dreambooth import checks, dataset, models
from dreambooth.cluster import start_ray
from dreambooth.loss import get_target, prior_preserving_loss
from dreambooth.seeds import seed_for


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("model")
    group.add_argument("--model_dir", required=True, help="diffusers pipeline directory of the original model")
    group.add_argument("--output_dir", required=True, help="where the tuned model goes; an earlier one is replaced")
    group.add_argument("--use_lora", action="store_true", help="train LoRA matrices only: less memory, a small file")
    group.add_argument("--lora_rank", type=int, default=4, help="rank of the LoRA matrices (default: %(default)s)")

    group = parser.add_argument_group("images")
    group.add_argument("--instance_images_dir", required=True, help="photos of the subject")
    group.add_argument("--instance_prompt", required=True, help='such as "photo of unqtkn dog"')
    group.add_argument("--class_images_dir", required=True, help="pictures of other subjects of its class")
    group.add_argument("--class_prompt", required=True, help='such as "photo of a dog"')
    group.add_argument("--resolution", type=int, help="side of the training images, pixels (default: the model's)")

    group = parser.add_argument_group("optimization")
    group.add_argument("--train_batch_size", type=int, default=1, help="pairs a worker and step (default: %(default)s)")
    group.add_argument("--lr", type=float, default=5e-6, help="learning rate of AdamW (default: %(default)s)")
    group.add_argument("--num_epochs", type=int, default=4, help="times each class image is used (default: %(default)s)")
    group.add_argument("--max_train_steps", type=int, default=800, help="at most so many steps (default: %(default)s)")
    group.add_argument("--prior_loss_weight", type=float, default=1.0, help="of the class half (default: %(default)s)")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are clipped (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of pairs, crops, noise and timesteps (default: %(default)s)")

    group = parser.add_argument_group("run")
    group.add_argument("--num_workers", type=int, default=2, help="one GPU each, where there are any (default: %(default)s)")
    group.add_argument("--log_every", type=int, default=10, help="steps between two lines of log (default: %(default)s)")
    return parser.parse_args(argv)


def check_args(args):
    """Find what the user got wrong before anything costly starts; set the resolution; find the images."""
    checks.check_at_least(
        args, 1, "train_batch_size", "num_epochs", "max_train_steps", "num_workers", "lora_rank", "log_every"
    )
    checks.check_at_least(args, 0, "lr", "prior_loss_weight", "max_grad_norm", "seed")
    checks.check_model_dir(args.model_dir)
    checks.check_output_dir(args.output_dir)
    models.check_replaceable(args.output_dir)
    if args.instance_prompt == args.class_prompt:
        raise checks.UserError("--instance_prompt and --class_prompt are equal: put the identifier before the class")
    tokenizer = models.load_tokenizer(args.model_dir)
    for prompt in (args.instance_prompt, args.class_prompt):
        checks.check_prompt(tokenizer, prompt)
    own_size, latent_pixels = models.model_resolution(args.model_dir)
    args.resolution = own_size if args.resolution is None else args.resolution
    if args.resolution < latent_pixels or args.resolution % latent_pixels:
        raise checks.UserError(f"--resolution {args.resolution}: this model takes multiples of {latent_pixels}")
    images = [dataset.find_images(folder) for folder in (args.instance_images_dir, args.class_images_dir)]
    for paths in images:
        dataset.check_images(paths, args.resolution)
    return tokenizer, *images


def training_step(vae, denoiser, scheduler, batch, prior_loss_weight, generator):
    """The loss of one batch: images (2B, 3, R, R) and prompt_ids (2B, L). Returns a scalar."""
    # A sample of the frozen VAE's posterior, scaled to about unit variance, stands for each image.
    with torch.no_grad():
        posterior = vae.encode(batch["images"]).latent_dist
        latents = posterior.sample(generator) * vae.config.scaling_factor  # (2B, C, h, w)

    # Each latent gets its own noise, and as much of it as its own timestep says, in float32.
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    timesteps = torch.randint(
        scheduler.config.num_train_timesteps, latents.shape[:1], generator=generator, device=latents.device
    )  # (2B,)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)

    # The U-Net predicts the noise from the noisy latents and the prompt, in bfloat16.
    with torch.autocast(latents.device.type, torch.bfloat16):
        prediction = denoiser(noisy_latents, timesteps, batch["prompt_ids"])  # (2B, C, h, w)

    # The instance half learns the subject, the class half keeps what the model knew of its class.
    target = get_target(scheduler.config.prediction_type, latents, noise, timesteps, scheduler.alphas_cumprod)
    return prior_preserving_loss(prediction, target, prior_loss_weight)


def train_fn(config):
    """What each worker runs: load the models, go through its shard of the data, save (rank 0)."""
    args = argparse.Namespace(**config)
    context = ray.train.get_context()
    rank, device = context.get_world_rank(), get_device()
    if device.type == "cpu":  # Ray gives a worker one thread; the worker takes its share of the cores.
        torch.set_num_threads(max(1, checks.cores() // context.get_local_world_size()))

    # Set up the models; [1] prepare_model moves them to the device and wraps them in DDP if there are several workers.
    vae, denoiser, scheduler = models.load_models(args.model_dir, device)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    if args.use_lora:
        torch.manual_seed(args.seed)
        models.add_lora(denoiser, args.lora_rank)
    denoiser_ddp = prepare_model(denoiser)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]  # a list: clipping reads it after the optimizer
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    if rank == 0:
        count = sum(p.numel() for p in parameters)
        print(f"training {count / 1e6:.2f} M parameters on {context.get_world_size()} x {device.type}", flush=True)

    # [2] This worker's shard of the data set: one batch a step, the next ones decoded meanwhile.
    shard = ray.train.get_dataset_shard(f"train_{rank}")
    batches = shard.iter_torch_batches(batch_size=args.train_batch_size, collate_fn=dataset.Collate(), prefetch_batches=2)

    generator, start = torch.Generator(device), time.monotonic()
    for step, batch in enumerate(batches):
        # The random numbers of a step follow from (seed, step, rank) alone.
        generator.manual_seed(seed_for(args.seed, step, rank))
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        loss = training_step(vae, denoiser_ddp, scheduler, batch, args.prior_loss_weight, generator)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        if rank == 0 and (step + 1) % args.log_every == 0:
            pace = (time.monotonic() - start) / (step + 1)
            print(f"step {step + 1}/{args.steps} loss {loss.item():.4f} grad norm {grad_norm.item():.3f} {pace:.2f} s a step", flush=True)

    if rank == 0:
        save = models.save_lora if args.use_lora else models.save_pipeline
        save(denoiser, *([] if args.use_lora else [args.model_dir]), args.output_dir)
    ray.train.report({"loss": loss.item()})  # [3] once: each report waits for all workers and the controller


def build_trainer(args, tokenizer, instance_paths, class_paths, num_gpus, num_cpus):
    """Deal the pairs of the whole run to the workers and wire each worker's shard into a TorchTrainer."""
    # Step s takes the next B pairs for each worker: one stream, which goes on from epoch to epoch.
    pairs_a_step = args.train_batch_size * args.num_workers
    args.steps = min(args.max_train_steps, math.ceil(args.num_epochs * len(class_paths) / pairs_a_step))
    pairs = dataset.pair_images(instance_paths, class_paths, args.steps * pairs_a_step, args.seed)
    print(
        f"{len(instance_paths)} instance and {len(class_paths)} class images at {args.resolution} px,"
        f" {args.steps} steps of {pairs_a_step} pairs on {args.num_workers} worker(s); result: {args.output_dir}"
    )
    prompt_ids = [
        tokenizer(prompt, padding="max_length", max_length=tokenizer.model_max_length).input_ids
        for prompt in (args.instance_prompt, args.class_prompt)
    ]
    shards = {
        f"train_{rank}": dataset.build_dataset(
            [p for p in pairs if p["position"] // args.train_batch_size % args.num_workers == rank],
            args.resolution, *prompt_ids, args.seed,
        )
        for rank in range(args.num_workers)
    }  # fmt: skip

    # On a CPU the workers reserve half of the cores at most: Ray Data's tasks need the rest, and
    # where every core is reserved they wait for ever.
    resources = {"GPU": 1} if num_gpus else {"CPU": min(1.0, num_cpus / (2 * args.num_workers))}
    return TorchTrainer(
        train_fn,
        train_loop_config=vars(args),
        datasets=shards,
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),  # they are split already, and stay in order
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.num_workers, use_gpu=bool(num_gpus), resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            storage_path=str(run_dir(args)), name="run", logging_config=ray.train.LoggingConfig(log_level="ERROR")
        ),
    )


def run_dir(args):
    """Ray Train's own files, beside the result because all nodes see that; removed at the end."""
    output_dir = Path(args.output_dir).absolute()
    return output_dir.with_name(f".{output_dir.name}.ray")


def main(args):
    inputs = check_args(args)
    num_gpus, num_cpus = start_ray()
    checks.check_gpus(args.num_workers, num_gpus, num_cpus)
    trainer = build_trainer(args, *inputs, num_gpus, num_cpus)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise models.explain(error) from error
    finally:
        shutil.rmtree(run_dir(args), ignore_errors=True)
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    checks.run_main(main, parse_args())
