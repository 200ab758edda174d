"""Fine-tune Stable Diffusion or FLUX.2-klein on photos of one subject, with DreamBooth's
prior-preserving loss (Ruiz et al. 2022, arXiv 2208.12242) on Ray Data and Ray Train.

    python train.py --model_dir $ORIG_MODEL_PATH --output_dir $TUNED_MODEL_DIR \\
        --instance_images_dir images/dog --instance_prompt "photo of unqtkn dog" \\
        --class_images_dir $IMAGES_REG_DIR --class_prompt "photo of a dog"

The result is a diffusers pipeline directory, or with --use_lora pytorch_lora_weights.safetensors;
generate.py takes both. The diffusion step itself is in dreambooth/loss.py.
"""

import argparse
import time
from contextlib import nullcontext

import dreambooth  # noqa: F401 (first: it sets what torch and Ray read when they are imported)

# isort: split
import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from dreambooth import dataset, latents
from dreambooth.cli import ArgumentParser, absolute_path, configure_logs, run_main, valid_prompt
from dreambooth.loss import training_loss
from dreambooth.machines import cluster, memory
from dreambooth.machines.device import configure_torch, describe
from dreambooth.run import checkpoints, export, previews, training_log
from dreambooth.run.plan import LR_SCHEDULERS, TrainingPlan, check_flags, make_plan, worker_range


def build_parser():
    """The flags, in the order in which a run uses them."""
    parser = ArgumentParser(__doc__)
    on_off = argparse.BooleanOptionalAction
    path = {"type": absolute_path, "required": True}
    add = parser.add_argument_group("model").add_argument
    add("--model_dir", **path, help="diffusers pipeline directory of the original model")
    add("--output_dir", **path, help="for the tuned model; replaces an earlier result")
    add("--use_lora", action="store_true", help="train LoRA matrices only: less memory, small file")
    add("--lora_rank", type=int, default=4, help="rank of the LoRA matrices")
    layers = ["attention", "all"]
    layers_help = "layers to adapt: attention's, or feed-forward layers and convolutions as well"
    add("--lora_layers", choices=layers, default=layers[0], help=layers_help)
    text_help = "train the text encoder, too (default: only for Stable Diffusion 1.x and 2.x)"
    add("--train_text_encoder", action=on_off, help=text_help)

    add = parser.add_argument_group("images").add_argument
    add("--instance_images_dir", **path, help="photos of the subject")
    add("--instance_prompt", type=valid_prompt, required=True, help='such as "photo of unqtkn dog"')
    add("--class_images_dir", type=absolute_path, help="images of other members of the class")
    add("--class_prompt", type=valid_prompt, help='such as "photo of a dog"')
    add("--resolution", type=int, help="side of training images in pixels (default: the model's)")

    add = parser.add_argument_group("recipe").add_argument
    add("--train_batch_size", type=int, default=1, help="pairs per worker per forward pass")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes per step")
    add("--max_train_steps", type=int, help="steps of the run (default: 800, or --num_epochs)")
    add("--num_epochs", type=int, help="passes over the class images, after which the run ends")
    add("--lr", type=float, help="learning rate of AdamW (default: 5e-6; of LoRA: 1e-4)")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning-rate schedule")
    add("--lr_warmup_steps", type=int, default=0, help="steps of linear warm-up from 0")
    weight_help = "weight of the class loss; 0: no class images, epochs count instance images"
    add("--prior_loss_weight", type=float, default=1.0, help=weight_help)
    target_help = "class loss's target: noise (v, velocity) or the original model's prediction"
    add("--prior_target", choices=["noise", "original"], default="noise", help=target_help)
    noise_help = "train photos only at this fraction of the timesteps, the least noisy"
    add("--max_instance_noise", type=float, default=1.0, help=noise_help)
    add("--snr_gamma", type=float, help="min-SNR weighting; 5.0 is usual (default: off)")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--adam_beta1", type=float, default=0.9, help="decay of AdamW's first moment")
    add("--adam_beta2", type=float, help="decay of the second moment (default: 0.999; bf16: 0.99)")
    add("--adam_weight_decay", type=float, default=1e-2, help="weight decay of AdamW")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon of AdamW")
    add("--seed", type=int, default=0, help="for all random numbers of the run")

    add = parser.add_argument_group("run").add_argument
    workers_help = "training workers, one GPU each if there are GPUs; 2:4 means two to four"
    add("--num_workers", type=worker_range, default="1", help=workers_help)
    dtype_help = "type of trained weights; bf16 (Kahan summation): 10 bytes per weight, not 16"
    add("--param_dtype", choices=["fp32", "bf16"], default="fp32", help=dtype_help)
    add("--gradient_checkpointing", action="store_true", help="less memory, more time per step")
    add("--compile", action="store_true", help="compile the model's repeated blocks")
    graph_help = "replay forward and backward pass as CUDA graphs, on one GPU: faster, more memory"
    add("--cuda_graph", action="store_true", help=graph_help)
    every_help = "steps between checkpoints; 0: none (default: a tenth of the run, after a minute)"
    add("--checkpointing_steps", type=int, help=every_help)
    add("--checkpoints_total_limit", type=int, default=1, help="checkpoints to keep")
    storage_help = "directory for checkpoints (default: beside the result)"
    add("--storage_path", type=absolute_path, help=storage_help)
    add("--restart", action="store_true", help="start over, whatever checkpoints there are")
    add("--max_failures", type=int, default=3, help="restarts after a worker fails or dies")
    add("--wait_for_gpus", type=int, default=0, help="seconds to wait for GPUs, on a cluster")
    add("--log_every", type=int, default=10, help="steps between two lines of the log")
    several = {"nargs": "+", "action": "extend", "type": valid_prompt, "default": []}
    add("--preview_prompts", **several, help="prompts of previews")
    add("--preview_every", type=int, default=0, help="steps between previews; 0: none")
    add("--dry_run", action="store_true", help="check everything, print the plan, and stop")
    add("--verbose", action="store_true", help="show the logs of Ray and the other libraries")
    return parser


def parse_args(argv=None):
    args = build_parser().parse_args(argv)
    if args.lr is None:
        args.lr = 1e-4 if args.use_lora else 5e-6
    return args


def batch_loss(denoiser, scheduler, batch, args):
    """The loss of one batch, a scalar, and its halves, as `training_loss` returns them. Noise and
    timesteps follow from the run's seed and the positions of the batch's pairs."""
    posteriors, positions = batch["posteriors"], batch["positions"]
    shape, device = posteriors.shape[2:], posteriors.device
    posterior_noise, noise = latents.sample_noise(args.seed, positions, shape, device)
    timesteps = latents.sample_timesteps(scheduler, args.seed, positions, args.max_instance_noise)
    timesteps = timesteps.to(device, non_blocking=True)
    n = len(posteriors)  # 2B; B without a class half, whose random numbers go unused
    return training_loss(
        denoiser, scheduler, posteriors, batch["conditions"], posterior_noise[:n], noise[:n],
        timesteps[:n], prior_loss_weight=args.prior_loss_weight, snr_gamma=args.snr_gamma,
        predict_original=batch["predict_original"],
    )  # fmt: skip


def forward_backward(denoiser, scheduler, batches, accumulation_steps, args):
    """Add one step's gradients, on the next of `batches`, to those of the denoiser's parameters.
    Returns this worker's losses (3,): total, instance half, class half; (2,) without the latter."""
    step_losses = 0.0
    for i in range(accumulation_steps):
        batch = next(batches)
        # DDP averages the workers' gradients once per step, in its last backward pass.
        last = i == accumulation_steps - 1
        with nullcontext() if last or not hasattr(denoiser, "no_sync") else denoiser.no_sync():
            loss, halves = batch_loss(denoiser, scheduler, batch, args)
            (loss / accumulation_steps).backward()
        step_losses += torch.cat([loss.detach().view(1), halves]) / accumulation_steps
    return step_losses


def train_fn(config):
    """What each worker runs: load the models, encode its images, train, and save (rank 0)."""
    from dreambooth import models  # here: only the workers wait for diffusers

    args = argparse.Namespace(**config["args"])
    plan = TrainingPlan(**config["plan"])
    configure_logs(args.verbose, loads_models=True)
    context = ray.train.get_context()  # [1]
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    device = get_device()
    pairs_per_pass, accumulation_steps = plan.divide(num_workers)
    memory.check_device(args, plan, num_workers, device)
    log = training_log.TrainingLog(plan, device, args.log_every, config["started"], rank == 0)
    configure_torch(device, context.get_local_world_size())

    # Set up the data: this worker's pairs, read while the models load, and the encoded prompts.
    pixels = dataset.read_batches(ray.train.get_dataset_shard("train"), pairs_per_pass)  # [2]
    family = models.family_of(args.model_dir)
    encoded_prompts = family.encode_prompts(args, plan.prompts, device)

    # Set up the models: prepare_model moves to the device and, with several workers, wraps in DDP.
    vae, denoiser, scheduler = models.load_models(args, device)
    ddp_settings = models.ddp_settings(accumulation_steps)
    wrapped = prepare_model(denoiser, parallel_strategy_kwargs=ddp_settings)  # [3]
    # Between GPUs gradients go in bfloat16, half the bytes: updates differ by 2 % (RESULTS.md).
    if num_workers > 1 and device.type == "cuda":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    if args.cuda_graph and device.type == "cuda":
        wrapped = models.Captured(denoiser)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = models.build_optimizer(parameters, args)
    lr_schedule = models.build_lr_schedule(optimizer, plan.num_steps, args)
    predict_original = models.load_original(args, denoiser, device)
    log.on_models_loaded(parameters, num_workers)

    # Set up what happens once in a while. `build_trainer` has left out the pairs of steps that are
    # done: the position of this worker's first pair tells how many.
    stateful = {"optimizer": optimizer, "lr_schedule": lr_schedule}
    saver = checkpoints.Checkpointer(args, plan, denoiser, stateful, rank)
    callbacks = [log, saver, previews.Previews(args, plan, vae, denoiser, encoded_prompts, log)]
    first_step = plan.step_of(pixels.first_position())
    for callback in callbacks:
        callback.on_train_begin(first_step)

    # Encode each crop once, when a step first needs it.
    batches = latents.encode_batches(vae, pixels, family, encoded_prompts, device, predict_original)
    for step in range(first_step, plan.num_steps):
        losses = forward_backward(wrapped, scheduler, batches, accumulation_steps, args)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        lr = lr_schedule.get_last_lr()[0]
        optimizer.step()
        optimizer.zero_grad(set_to_none=num_workers == 1)  # else they are views of DDP's buckets
        lr_schedule.step()
        for callback in callbacks:
            callback.on_step_end(step + 1, losses=losses, grad_norm=grad_norm, lr=lr)
    for callback in callbacks:
        callback.on_train_end()

    if rank == 0:
        saver.save_result(export.save)
    return log.summary()  # [5] rank 0's is the Result's return value


def build_trainer(args, plan, num_gpus, num_cpus, started):
    """Pair the images for the whole run and hand them to a TorchTrainer."""
    num_pairs = plan.num_steps * plan.pairs_per_step
    pairs = dataset.pair_images(
        plan.instance_paths, plan.class_paths, num_pairs, args.seed, plan.captions
    )
    pair_config = dataset.PairDataConfig(plan.pairs_per_step, plan.resolution, args.seed)
    in_driver = cluster.runs_in_driver(args.num_workers)  # Ray Train then ignores pair_config

    def remaining_pairs():
        # Ray Train calls this for each new group of workers, also after a failure: the pairs of
        # the steps before its newest checkpoint are left out.
        first_step = checkpoints.find_newest(plan.run_dir)
        cores = max(1, num_cpus // 2) if in_driver and not num_gpus else None
        rows = dataset.build_dataset(pairs[first_step * plan.pairs_per_step :], args.verbose, cores)
        return pair_config.shard(rows, rank=0, world_size=1) if in_driver else rows

    return TorchTrainer(
        train_fn,
        train_loop_config={"args": vars(args), "plan": vars(plan), "started": started},
        datasets={"train": remaining_pairs},  # [6]
        dataset_config=pair_config,  # [7]
        scaling_config=cluster.scaling_config(args.num_workers, num_gpus, num_cpus),  # [8]
        run_config=ray.train.RunConfig(  # [9]
            storage_path=str(plan.run_dir.parent),
            name=plan.run_dir.name,
            failure_config=ray.train.FailureConfig(max_failures=args.max_failures),
            callbacks=[cluster.NoRetryForUserErrors()],
            logging_config=None if args.verbose else ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )


def main(args):
    """Check the flags, start Ray, train, and say where the result is."""
    started, began = time.time(), time.monotonic()  # the former is for workers in other processes
    check_flags(args)
    if args.dry_run:
        plan = make_plan(args)
        checkpoints.steps_done(plan, args)  # refuses another run's checkpoints
        print(plan)
        return
    ray_start = cluster.start_ray_in_background(args.verbose)
    plan = make_plan(args)
    if cluster.runs_in_driver(args.num_workers):  # while Ray starts, import what train_fn needs
        from dreambooth import models  # noqa: F401
    ray_start.result()
    num_gpus, num_cpus = cluster.wait_for_workers(args.num_workers[0], args.wait_for_gpus)
    print(f"{plan}; {num_gpus} GPUs, {num_cpus} cores")

    # Resume an earlier run of the same command if it left a checkpoint.
    first_step = checkpoints.prepare(plan, args)
    training_log.prepare(plan.report_dir, first_step)
    stop = checkpoints.StopOnSignal(args, plan.run_dir)
    hardware = describe(min(num_gpus, args.num_workers[1]))
    try:
        with training_log.RunRecord(args, plan, hardware) as record:
            folders = [args.model_dir, *plan.image_dirs, plan.run_dir, plan.report_dir]
            cluster.check_shared_storage(folders)
            result = cluster.fit(build_trainer(args, plan, num_gpus, num_cpus, started))
            record.finish(result.return_value)
            export.write_card(args.output_dir, record.facts)
    except cluster.FAILURES as error:
        stop.exit_if_asked(error)
        raise
    finally:
        checkpoints.remove_unless_needed(plan.run_dir)
    checkpoints.remove(plan.run_dir)
    print(training_log.where_the_seconds_went(result.return_value))
    print(f"wrote {args.output_dir} ({time.monotonic() - began:.0f} s in all)")


if __name__ == "__main__":
    run_main(main, parse_args())
