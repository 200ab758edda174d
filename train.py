"""Teach a Stable Diffusion model a subject: fine-tune U-Net and text encoder with DreamBooth's
prior-preserving loss (Ruiz et al. 2022, arXiv 2208.12242) on Ray Data and Ray Train.

    python train.py --model_dir $ORIG_MODEL_PATH --output_dir $TUNED_MODEL_DIR \\
        --instance_images_dir images/lego-car --instance_prompt "photo of unqtkn car" \\
        --class_images_dir $IMAGES_REG_DIR --class_prompt "photo of a car" --num_workers 1

The result is a diffusers pipeline directory, or with --use_lora pytorch_lora_weights.safetensors;
generate.py takes both. The diffusion step itself is in dreambooth/loss.py.
"""

import argparse
import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from dreambooth import checks, cluster, dataset, files, images, latents
from dreambooth.loss import training_loss
from dreambooth.report import Report

LR_SCHEDULERS = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


def parse_args(argv=None):
    """The flags, in the order in which a run uses them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)

    model = parser.add_argument_group("model")
    model.add_argument("--model_dir", required=True, help="diffusers pipeline directory of the original model")
    model.add_argument("--output_dir", required=True, help="where the tuned model goes; an earlier one is replaced")
    model.add_argument("--use_lora", action="store_true", help="train LoRA matrices only: less memory, a small file")
    model.add_argument("--lora_rank", type=int, default=4, help="rank of the LoRA matrices")
    both_ways = argparse.BooleanOptionalAction
    model.add_argument("--train_text_encoder", action=both_ways, default=True, help="tune the text encoder too")

    images = parser.add_argument_group("images")
    images.add_argument("--instance_images_dir", required=True, help="photos of the subject")
    images.add_argument("--instance_prompt", required=True, help='such as "photo of unqtkn dog"')
    images.add_argument("--class_images_dir", required=True, help="pictures of other subjects of its class")
    images.add_argument("--class_prompt", required=True, help='such as "photo of a dog"')
    images.add_argument("--resolution", type=int, help="side of the training images, pixels (default: the model's)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--train_batch_size", type=int, default=1, help="pairs a worker and forward pass")
    recipe.add_argument("--gradient_accumulation_steps", type=int, default=1, help="forward passes a step")
    recipe.add_argument("--num_epochs", type=int, default=4, help="times each class image is used")
    recipe.add_argument("--max_train_steps", type=int, default=800, help="at most so many steps")
    recipe.add_argument("--lr", type=float, default=5e-6, help="learning rate of AdamW")
    recipe.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="course of the learning rate")
    recipe.add_argument("--lr_warmup_steps", type=int, default=0, help="steps to rise from 0, for schedulers that do")
    recipe.add_argument("--prior_loss_weight", type=float, default=1.0, help="weight of the class half of the loss")
    recipe.add_argument("--snr_gamma", type=float, help="min-SNR weighting, 5.0 is usual (default: off)")
    recipe.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are clipped to this length")
    recipe.add_argument("--adam_beta1", type=float, default=0.9, help="decay of AdamW's first moment")
    recipe.add_argument("--adam_beta2", type=float, help="decay of AdamW's second moment (default: 0.999, bf16 0.99)")
    recipe.add_argument("--adam_weight_decay", type=float, default=1e-2, help="weight decay of AdamW")
    recipe.add_argument("--adam_epsilon", type=float, default=1e-8, help="epsilon of AdamW")
    recipe.add_argument("--seed", type=int, default=0, help="of pairs, crops, noise and timesteps")

    run = parser.add_argument_group("run")
    run.add_argument("--num_workers", type=int, default=2, help="one GPU each, where there are any")
    run.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32",
        help="of trained weights and optimizer; bf16 with Kahan summation: 10 bytes a weight instead of 16",
    )  # fmt: skip
    run.add_argument("--live_vae", action="store_true", help="encode the images at every step instead of once")
    run.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time a step")
    run.add_argument("--compile", action="store_true", help="compile the U-Net's repeated blocks")
    run.add_argument("--log_every", type=int, default=10, help="steps between two lines of log")
    return parser.parse_args(argv)


def check_args(args):
    """Find what the user got wrong before anything costly starts; set the resolution; find the images."""
    checks.check_at_least(
        args, 1, "train_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps", "num_workers",
        "lora_rank", "log_every",
    )  # fmt: skip
    checks.check_at_least(args, 0, "lr_warmup_steps", "prior_loss_weight", "seed")
    checks.check_at_least(args, 0, "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
    checks.check_at_least(args, 0, "lr", "max_grad_norm", "snr_gamma", above=True)  # with 0 nothing would be learned
    checks.check_model_dir(args.model_dir)
    files.check_replaceable(args.output_dir, files.RESULT_NAMES)
    if args.precision == "fp32" and not args.use_lora:  # else the result is smaller than the model
        files.check_space(args.output_dir, args.model_dir)
    for name in ("model_dir", "output_dir"):  # the workers may run in another directory
        setattr(args, name, str(Path(getattr(args, name)).resolve()))
    if args.output_dir == args.model_dir:
        raise checks.UserError("--output_dir is --model_dir, which would be replaced: name another directory")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise checks.UserError("--lr_warmup_steps: the constant scheduler has none, give constant_with_warmup")
    if not max(args.adam_beta1, args.adam_beta2 or 0) < 1:
        raise checks.UserError("--adam_beta1 and --adam_beta2 must be below 1")
    if args.precision == "bf16" and (args.adam_beta2 or 0) > 0.995:
        raise checks.UserError(f"--adam_beta2 {args.adam_beta2}: bfloat16 cannot decay so slowly, give 0.99")
    if args.use_lora and args.precision == "bf16":
        raise checks.UserError("--precision bf16 is for full fine-tuning: a LoRA's frozen weights need no optimizer")
    if Path(args.instance_images_dir).resolve() == Path(args.class_images_dir).resolve():
        raise checks.UserError("--instance_images_dir and --class_images_dir are the same: the class needs its own")
    if args.instance_prompt == args.class_prompt:
        raise checks.UserError("--instance_prompt and --class_prompt are equal: put the identifier before the class")
    tokenizer = files.load_tokenizer(args.model_dir)
    for prompt in (args.instance_prompt, args.class_prompt):
        checks.check_prompt(tokenizer, prompt)
    own_size, latent_pixels = files.model_resolution(args.model_dir)
    args.resolution = own_size if args.resolution is None else args.resolution
    if args.resolution < latent_pixels or args.resolution % latent_pixels:
        raise checks.UserError(f"--resolution {args.resolution}: this model takes multiples of {latent_pixels}")
    found = [images.find_images(folder) for folder in (args.instance_images_dir, args.class_images_dir)]
    for paths in found:
        images.check_images(paths, args.resolution)
    return tokenizer, *found


def forward_backward(denoiser, scheduler, batches, args):
    """Add the gradients of one step to the denoiser's parameters; returns the step's loss, a scalar."""
    step_loss, accumulate = 0.0, args.gradient_accumulation_steps
    for turn in range(accumulate):
        batch = next(batches)
        draws = latents.draw(args.seed, batch, scheduler.config.num_train_timesteps)
        exchange = turn == accumulate - 1  # the workers average their gradients once a step, in its last backward pass
        with denoiser.no_sync() if hasattr(denoiser, "no_sync") and not exchange else nullcontext():
            loss = training_loss(denoiser, scheduler, batch, draws, args.prior_loss_weight, args.snr_gamma) / accumulate
            loss.backward()
        step_loss += loss.detach()
    return step_loss


def train_fn(config):
    """What each worker runs: load the models, encode its shard of the images, train, save (rank 0)."""
    from diffusers.optimization import get_scheduler  # here: only the workers wait for diffusers

    from dreambooth import models

    args, context, device = argparse.Namespace(**config), ray.train.get_context(), get_device()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    cluster.quiet()
    report = Report(args, enabled=rank == 0)
    if device.type == "cpu":  # Ray gives a worker one thread; the worker takes its share of the cores.
        torch.set_num_threads(max(1, checks.cores() // context.get_local_world_size()))
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32

    # Set up the data. [1] This worker's shard, a batch for each forward pass; it is read while the models load.
    shard, collate = ray.train.get_dataset_shard(f"train_{rank}"), dataset.Collate()
    batches = shard.iter_torch_batches(batch_size=args.train_batch_size, collate_fn=collate, prefetch_batches=4)
    batches = dataset.start_reading(batches)

    # Set up the models. [2] prepare_model moves to the device, and wraps in DDP if there are several workers.
    vae, denoiser, scheduler = models.load_models(args, device)
    static = args.gradient_accumulation_steps == 1
    ddp_settings = {"gradient_as_bucket_view": True, "static_graph": static, "broadcast_buffers": False}
    ddp = prepare_model(denoiser, parallel_strategy_kwargs=ddp_settings)
    if num_workers > 1 and device.type == "cuda":  # GPUs exchange gradients in bfloat16: half the bytes
        ddp.register_comm_hook(None, bf16_compress_hook)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]  # a list: optimizer and clipping both read it
    optimizer = models.build_optimizer(parameters, args)
    lr_schedule = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, args.steps)
    report.models_are_ready(parameters, num_workers, device)

    # Encode each image once, and drop the VAE.
    prompt_ids = torch.tensor(args.prompt_ids, device=device)
    batches = latents.encode_batches(vae, batches, prompt_ids, device, live=args.live_vae)
    report.data_are_ready()

    for step in range(args.steps):
        loss = forward_backward(ddp, scheduler, batches, args)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        report.step_is_done(step, loss, grad_norm, lr_schedule.get_last_lr()[0])
        lr_schedule.step()

    report.steps_are_done()
    if rank == 0:
        models.save(denoiser, args)
    ray.train.report(report.summary())  # [3] once: each report waits for all workers and for the controller


def build_trainer(args, tokenizer, instance_paths, class_paths, num_gpus, num_cpus):
    """Deal the pairs of the whole run to the workers and wire each worker's shard into a TorchTrainer."""
    # Step s takes the next pairs for each worker: one stream, which goes on from epoch to epoch.
    pairs_a_worker = args.train_batch_size * args.gradient_accumulation_steps
    pairs_a_step = pairs_a_worker * args.num_workers
    args.steps = min(args.max_train_steps, math.ceil(args.num_epochs * len(class_paths) / pairs_a_step))
    if args.lr_warmup_steps >= args.steps:
        raise checks.UserError(f"--lr_warmup_steps {args.lr_warmup_steps}: the run has only {args.steps} steps")
    pairs = dataset.pair_images(instance_paths, class_paths, args.steps * pairs_a_step, args.seed)
    print(
        f"{len(instance_paths)} instance and {len(class_paths)} class images at {args.resolution} px,"
        f" {args.steps} steps of {pairs_a_step} pairs, {args.num_workers} worker(s); {num_gpus} GPUs, {num_cpus} cores"
    )
    prompts, length = [args.instance_prompt, args.class_prompt], tokenizer.model_max_length
    args.prompt_ids = tokenizer(prompts, padding="max_length", max_length=length).input_ids
    shards = {}
    for rank in range(args.num_workers):
        own = [pair for pair in pairs if pair["position"] // pairs_a_worker % args.num_workers == rank]
        shards[f"train_{rank}"] = dataset.build_dataset(own, args.resolution, args.seed)

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
            storage_path=str(run_dir(args)), name="run", logging_config=ray.train.LoggingConfig(log_level="CRITICAL")
        ),
    )


def run_dir(args):
    """Ray Train's own files, beside the result because all nodes see that; removed at the end."""
    output_dir = Path(args.output_dir)
    return output_dir.with_name(f".{output_dir.name}.ray")


def main(args):
    """Check what the user gave, deal the data to the workers, train, and say where the result is."""
    args.started = time.time()
    inputs = check_args(args)
    num_gpus, num_cpus = cluster.start_ray()
    checks.check_gpus(args.num_workers, num_gpus, num_cpus)
    shutil.rmtree(run_dir(args), ignore_errors=True)  # of a run that was killed
    trainer = build_trainer(args, *inputs, num_gpus, num_cpus)
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise checks.explain(error) from error
    finally:
        shutil.rmtree(run_dir(args), ignore_errors=True)
    if not Path(args.output_dir).is_dir():
        raise checks.UserError(f"{args.output_dir} is on another node: --output_dir must be on a shared file system")
    print(f"wrote {args.output_dir} ({time.time() - args.started:.0f} s in all)")


if __name__ == "__main__":
    checks.run_main(main, parse_args())
