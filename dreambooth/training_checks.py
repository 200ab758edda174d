"""What a user can get wrong in the flags of train.py, found before a model loads."""

from pathlib import Path

from dreambooth import atomic, checkpoints, images, metrics, model_dir
from dreambooth.cli import UserError, check_at_least, warn
from dreambooth.pocket import classes


def check_flags(args):
    """Check the flags of train.py, as far as that takes no time. A UserError names the first
    mistake."""
    check_numbers(args)
    model_dir.check_model_dir(args.model_dir)
    check_output_dir(args)
    images.find_images(args.instance_images_dir)
    if args.prior_loss_weight:
        check_class(args)


def check_class(args):
    """Prior preservation needs class images and a class prompt, which must be the class's own."""
    if not (args.class_images_dir and args.class_prompt):
        raise UserError(
            "--class_images_dir and --class_prompt are missing:"
            " give both, or --prior_loss_weight 0 to train without class images"
        )
    if args.instance_prompt == args.class_prompt:
        raise UserError(
            "--instance_prompt and --class_prompt are equal: put the identifier before the class"
        )
    if Path(args.instance_images_dir).resolve() == Path(args.class_images_dir).resolve():
        raise UserError("--instance_images_dir and --class_images_dir are the same folder")
    images.find_images(args.class_images_dir)


def check_numbers(args):
    """The recipe's numbers must be in range and go together."""
    check_at_least(
        args, 1, "train_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps",
        "lora_rank", "log_every", "checkpoints_total_limit",
    )  # fmt: skip
    check_at_least(
        args, 0, "lr_warmup_steps", "prior_loss_weight", "seed", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon", "checkpointing_steps", "max_failures", "wait_for_gpus",
        "preview_every",
    )  # fmt: skip
    check_at_least(args, 0, "lr", "max_grad_norm", "snr_gamma", above=True)  # 0 would learn nothing
    if bool(args.preview_every) != bool(args.preview_prompts):
        raise UserError("--preview_prompts and --preview_every go together: give both or neither")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise UserError("--lr_warmup_steps: give --lr_scheduler constant_with_warmup")
    if max(args.adam_beta1, args.adam_beta2 or 0) >= 1:
        raise UserError("--adam_beta1 and --adam_beta2 must be below 1")
    if args.param_dtype == "bf16" and (args.adam_beta2 or 0) > 0.995:
        raise UserError(f"--adam_beta2 {args.adam_beta2}: too slow for bfloat16, give 0.99")
    fewest, most = args.num_workers
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * most
    for num_workers in range(fewest, most + 1):
        if pairs_per_step % num_workers:
            raise UserError(
                f"--num_workers {fewest}:{most}: {num_workers} workers cannot share"
                f" {pairs_per_step} pairs per step equally; give another --train_batch_size"
            )
    if args.param_dtype == "bf16" and args.use_lora:
        raise UserError("--param_dtype bf16 is for full fine-tuning: leave it out with --use_lora")


def check_output_dir(args):
    """The result must fit where it is to go, and replace nothing but an earlier one of its kind."""
    if Path(args.output_dir).resolve() == Path(args.model_dir).resolve():
        raise UserError("--output_dir is --model_dir: name another directory")
    names = [model_dir.LORA_FILE] if args.use_lora else model_dir.PIPELINE_NAMES
    atomic.check_replaceable(args.output_dir, [*names, *model_dir.CARD_FILES])
    atomic.check_writable(metrics.report_dir(args.output_dir), "the report's directory,")
    atomic.check_writable(checkpoints.run_dir(args), "the checkpoints' directory,")
    if not args.use_lora:
        sizes = model_dir.num_parameters(args.model_dir)
        num_bytes = 4 * sum(sizes.values())  # float32
        folder = Path(args.output_dir).resolve()
        leftovers = atomic.unfinished(folder).rglob("*.*")
        atomic.check_space(folder, num_bytes, "the result", leftovers)
        check_space_for_checkpoints(args, sizes)


def check_space_for_checkpoints(args, sizes):
    """The disk must have room for the checkpoints of full fine-tuning, and for one more while that
    is written, beside those that are there. Trained weights and optimizer take 12 bytes per weight;
    8 in bfloat16."""
    if args.checkpointing_steps == 0:
        return
    trained = model_dir.num_trained(sizes, args.train_text_encoder)
    num_bytes = {"fp32": 12, "bf16": 8}[args.param_dtype] * trained
    what = f"{args.checkpoints_total_limit} + 1 checkpoints (none with --checkpointing_steps 0)"
    folder = checkpoints.run_dir(args)
    existing = folder.glob("*step_*/state.pt")  # also unfinished ones
    atomic.check_space(folder, (args.checkpoints_total_limit + 1) * num_bytes, what, existing)


def check_prompts(tokenizer, args):
    """The instance prompt and, with prior preservation, the class prompt: they must fit the
    tokenizer, as those of the previews must."""
    prompts = [args.instance_prompt]
    if args.prior_loss_weight:
        prompts.append(args.class_prompt)
    for prompt in prompts + args.preview_prompts:
        model_dir.check_prompt(tokenizer, prompt)
    classes.check_prompts(args.model_dir, prompts)
    return prompts


def warn_of_likely_mistakes(prompts, instance_paths):
    """Say what is allowed and seldom meant: few photos, prompts the wrong way round."""
    images.warn_if_few(instance_paths)
    if len(prompts) < 2:
        return
    words = [set(prompt.lower().split()) - {"a", "an", "the"} for prompt in prompts]
    instance_words, class_words = words
    if class_words - instance_words or not instance_words - class_words:
        warn(
            "--class_prompt is usually --instance_prompt without the identifier:"
            f" are {prompts[0]!r} and {prompts[1]!r} meant in this order?"
        )


def check_images(args):
    """The paths of instance and class images, each of which can be read, and the resolution.
    Without prior preservation there are no class images."""
    resolution, pixels_per_latent = model_dir.resolution(args.model_dir)
    if args.resolution is not None:
        resolution = args.resolution
    if resolution < pixels_per_latent or resolution % pixels_per_latent:
        raise UserError(
            f"--resolution {resolution}: this model takes multiples of {pixels_per_latent}"
        )
    instance_paths = images.find_images(args.instance_images_dir)
    class_paths = []
    if args.prior_loss_weight:
        class_paths = images.find_images(args.class_images_dir)
    images.check_images(instance_paths + class_paths, resolution)
    return instance_paths, class_paths, resolution
