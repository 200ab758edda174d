"""Fine-tune Stable Diffusion's U-Net and text encoder on photos of one subject, with DreamBooth's
prior-preserving loss (Ruiz et al. 2022, arXiv 2208.12242) on Ray Data and Ray Train.

    python train.py --model_dir $ORIG_MODEL_PATH --output_dir $TUNED_MODEL_DIR \\
        --instance_images_dir images/lego-car --instance_prompt "photo of unqtkn car" \\
        --class_images_dir $IMAGES_REG_DIR --class_prompt "photo of a car" --num_workers 1

The result is a diffusers pipeline directory, or with --use_lora pytorch_lora_weights.safetensors;
generate.py takes both. The diffusion step itself is in dreambooth/loss.py.
"""

import argparse
import dataclasses
import shutil
import time
from contextlib import nullcontext
from pathlib import Path

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from dreambooth import cluster, dataset, latents, logs
from dreambooth.cli import ArgumentParser, UserError, absolute_path, run_main, valid_prompt
from dreambooth.loss import training_loss
from dreambooth.report import Report, where_the_seconds_went
from dreambooth.training_plan import TrainingPlan, make_plan

LR_SCHEDULERS = [
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
]  # fmt: skip


def parse_args(argv=None):
    """The flags, in the order in which a run uses them."""
    parser = ArgumentParser(__doc__)
    on_off = argparse.BooleanOptionalAction
    path = {"type": absolute_path, "required": True}

    add = parser.add_argument_group("model").add_argument
    add("--model_dir", **path, help="diffusers pipeline directory of the original model")
    add("--output_dir", **path, help="for the tuned model; replaces an earlier result")
    add("--use_lora", action="store_true", help="train LoRA matrices only: less memory, small file")
    add("--lora_rank", type=int, default=4, help="rank of the LoRA matrices")
    add("--train_text_encoder", action=on_off, default=True, help="tune the text encoder as well")

    add = parser.add_argument_group("images").add_argument
    add("--instance_images_dir", **path, help="photos of the subject")
    add("--instance_prompt", type=valid_prompt, required=True, help='such as "photo of unqtkn dog"')
    add("--class_images_dir", type=absolute_path, help="images of other members of its class")
    add("--class_prompt", type=valid_prompt, help='such as "photo of a dog"')
    add("--resolution", type=int, help="side of training images in pixels (default: the model's)")

    add = parser.add_argument_group("recipe").add_argument
    add("--train_batch_size", type=int, default=1, help="pairs per worker per forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes per step")
    add("--num_epochs", type=int, default=4, help="times each class image is used")
    add("--max_train_steps", type=int, default=800, help="maximum optimizer steps")
    add("--lr", type=float, default=5e-6, help="learning rate of AdamW")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning-rate schedule")
    add("--lr_warmup_steps", type=int, default=0, help="steps of linear warm-up from 0")
    weight_help = "of the class half; 0: no class images, and epochs count instance images"
    add("--prior_loss_weight", type=float, default=1.0, help=weight_help)
    add("--snr_gamma", type=float, help="min-SNR weighting; 5.0 is usual (default: off)")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--adam_beta1", type=float, default=0.9, help="decay of AdamW's first moment")
    add("--adam_beta2", type=float, help="of its second moment (default: 0.999; bf16: 0.99)")
    add("--adam_weight_decay", type=float, default=1e-2, help="weight decay of AdamW")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon of AdamW")
    add("--seed", type=int, default=0, help="for pairs, crops, noise and timesteps")

    add = parser.add_argument_group("run").add_argument
    add("--num_workers", type=int, default=2, help="one GPU per worker, where there are GPUs")
    dtype_help = "of trained weights and optimizer; bf16 (Kahan summation) takes 10 bytes, not 16"
    add("--param_dtype", choices=["fp32", "bf16"], default="fp32", help=dtype_help)
    add("--gradient_checkpointing", action="store_true", help="less memory, more time per step")
    add("--compile", action="store_true", help="compile the U-Net's repeated blocks")
    add("--log_every", type=int, default=10, help="steps between two lines of the log")
    add("--verbose", action="store_true", help="show the logs of Ray and the other libraries")
    return parser.parse_args(argv)


def forward_backward(denoiser, scheduler, batches, prompt_ids, args):
    """Add the gradients of one step to the denoiser's parameters; returns its loss, a scalar."""
    step_loss = 0.0
    for i in range(args.gradient_accumulation_steps):
        batch = next(batches)
        posteriors, positions = batch["posteriors"], batch["positions"]
        n = len(posteriors)  # 2B; B without a class half, whose random numbers go unused
        posterior_noise, noise = latents.sample_noise(
            args.seed, positions, posteriors.shape[2:], posteriors.device
        )
        timesteps = latents.sample_timesteps(
            args.seed, positions, scheduler.config.num_train_timesteps
        ).to(posteriors.device, non_blocking=True)
        # DDP averages the workers' gradients once per step, in its last backward pass.
        last = i == args.gradient_accumulation_steps - 1
        with nullcontext() if last or not hasattr(denoiser, "no_sync") else denoiser.no_sync():
            loss = training_loss(
                denoiser, scheduler, posteriors, prompt_ids, posterior_noise[:n], noise[:n],
                timesteps[:n], args.prior_loss_weight or None, args.snr_gamma,
            )  # fmt: skip
            loss = loss / args.gradient_accumulation_steps
            loss.backward()
        step_loss += loss.detach()
    return step_loss


def train_fn(config):
    """What each worker runs: load the models, encode its images, train, and save (rank 0)."""
    from diffusers.optimization import get_scheduler  # here: only the workers wait for diffusers

    from dreambooth import models

    args = argparse.Namespace(**config["args"])
    plan = TrainingPlan(**config["plan"])
    logs.configure(args.verbose)
    context = ray.train.get_context()  # [1]
    rank = context.get_world_rank()
    num_workers = context.get_world_size()
    device = get_device()
    report = Report(plan, args.log_every, config["started"], enabled=rank == 0)
    if device.type == "cpu":  # Ray gives a worker one thread; it takes its share of the cores
        torch.set_num_threads(max(1, cluster.num_cores() // context.get_local_world_size()))
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32

    # Set up the data: this worker's pairs, a batch per forward pass, read while the models load.
    shard = ray.train.get_dataset_shard("train")  # [2]
    batches = shard.iter_torch_batches(
        batch_size=args.train_batch_size, collate_fn=dataset.collate, prefetch_batches=4
    )
    batches = dataset.prefetch_first(batches)

    # Set up the models: prepare_model moves to the device and, with several workers, wraps in DDP.
    vae, denoiser, scheduler = models.load_models(args, device)
    ddp_settings = {
        "gradient_as_bucket_view": True,
        "static_graph": args.gradient_accumulation_steps == 1,
        "forward_sync_buffers": False,
    }
    ddp = prepare_model(denoiser, parallel_strategy_kwargs=ddp_settings)  # [3]
    if num_workers > 1 and device.type == "cuda":  # exchange gradients in bfloat16: half the bytes
        ddp.register_comm_hook(None, bf16_compress_hook)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = models.build_optimizer(parameters, args)
    lr_schedule = get_scheduler(
        args.lr_scheduler, optimizer, None, args.lr_warmup_steps, plan.num_steps
    )
    prompt_ids = torch.tensor(plan.prompt_ids, device=device)
    report.models_are_ready(parameters, num_workers, device)

    # Encode each image once, when a step first needs it.
    batches = latents.encode_batches(vae, batches, device)
    for step in range(plan.num_steps):
        loss = forward_backward(ddp, scheduler, batches, prompt_ids, args)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        report.step_is_done(step, loss, grad_norm, lr_schedule.get_last_lr()[0])
        lr_schedule.step()

    report.steps_are_done()
    if rank == 0:
        models.save(denoiser, args)
    return report.summary()  # [4] rank 0's is the Result's return value


def build_trainer(args, plan, num_gpus, num_cpus, started):
    """Pair the images for the whole run and hand them to a TorchTrainer."""
    num_pairs = plan.num_steps * plan.pairs_per_step
    pairs = dataset.pair_images(plan.instance_paths, plan.class_paths, num_pairs, args.seed)
    # On a CPU the workers reserve at most half of the cores: Ray Data's tasks need the rest, and
    # would wait for ever if all were reserved.
    resources = {"CPU": min(1.0, num_cpus / (2 * args.num_workers))}
    if num_gpus:
        resources = {"GPU": 1}
    ray_logs = None if args.verbose else ray.train.LoggingConfig(log_level="CRITICAL")
    return TorchTrainer(
        train_fn,
        train_loop_config={
            "args": vars(args),
            "plan": dataclasses.asdict(plan),
            "started": started,
        },
        datasets={"train": lambda: dataset.build_dataset(pairs, args.verbose)},  # [5]
        dataset_config=dataset.DealPairs(plan.pairs_per_step, plan.resolution, args.seed),  # [6]
        scaling_config=ray.train.ScalingConfig(  # [7]
            num_workers=args.num_workers,
            use_gpu=bool(num_gpus),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(  # [8]
            storage_path=str(storage_dir(args)), name="run", logging_config=ray_logs
        ),
    )


def storage_dir(args):
    """Ray Train's own files, beside the result because every node sees that; removed at the end."""
    output_dir = Path(args.output_dir)
    return output_dir.with_name(f".{output_dir.name}.ray")


def main(args):
    """Check the arguments, start Ray, train, and say where the result is."""
    started = time.time()
    plan = make_plan(args)
    num_gpus, num_cpus = cluster.start_ray(args.verbose)
    cluster.check_num_workers(args.num_workers, num_gpus, num_cpus)
    print(f"{plan}, {args.num_workers} worker(s); {num_gpus} GPUs, {num_cpus} cores")
    shutil.rmtree(storage_dir(args), ignore_errors=True)  # left by a killed run
    trainer = build_trainer(args, plan, num_gpus, num_cpus, started)
    try:
        result = trainer.fit()  # [9]
    except ray.train.TrainingFailedError as error:
        raise cluster.training_error(error) from error
    finally:
        shutil.rmtree(storage_dir(args), ignore_errors=True)
    if not Path(args.output_dir).is_dir():
        raise UserError(f"{args.output_dir} is on another node: it must be on shared storage")
    print(where_the_seconds_went(result.return_value))
    print(f"wrote {args.output_dir} ({time.time() - started:.0f} s in all)")


if __name__ == "__main__":
    run_main(main, parse_args())
