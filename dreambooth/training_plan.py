"""What a training run will do, worked out from its flags; and what can be wrong with them, found
before Ray starts and before a model loads."""

import math
from dataclasses import dataclass
from pathlib import Path

from dreambooth import atomic, images, model_dir
from dreambooth.cli import UserError, check_at_least, warn
from dreambooth.pocket import classes


@dataclass
class TrainingPlan:
    """What follows from the flags of a run; a pair is one instance and one class image, or without
    prior preservation the one instance image."""

    instance_paths: list
    class_paths: list
    prompt_ids: list  # token ids of instance and class prompt, 2 x L; or of the former, 1 x L
    resolution: int  # pixels
    pairs_per_step: int  # of all workers and forward passes
    num_steps: int

    def __str__(self):
        return (
            f"{len(self.instance_paths)} instance and {len(self.class_paths)} class images"
            f" at {self.resolution} px, {self.num_steps} steps of {self.pairs_per_step} pairs"
        )


def make_plan(args):
    """The `TrainingPlan` for the flags of train.py. A UserError names the first mistake."""
    check_numbers(args)
    model_dir.check_model_dir(args.model_dir)
    check_output_dir(args)
    tokenizer = model_dir.load_tokenizer(args.model_dir)
    prompts = check_prompts(tokenizer, args)
    instance_paths, class_paths, resolution = check_images(args)
    warn_of_likely_mistakes(prompts, instance_paths)

    # Each step takes the next pairs: one stream, which goes on from epoch to epoch.
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.num_workers
    num_steps = math.ceil(args.num_epochs * len(class_paths or instance_paths) / pairs_per_step)
    num_steps = min(args.max_train_steps, num_steps)
    if args.lr_warmup_steps >= num_steps:
        raise UserError(f"--lr_warmup_steps {args.lr_warmup_steps}: the run has {num_steps} steps")
    return TrainingPlan(
        instance_paths=instance_paths,
        class_paths=class_paths,
        prompt_ids=tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length
        ).input_ids,
        resolution=resolution,
        pairs_per_step=pairs_per_step,
        num_steps=num_steps,
    )


def check_numbers(args):
    """The recipe's numbers must be in range and go together."""
    check_at_least(
        args, 1, "train_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps",
        "num_workers", "lora_rank", "log_every",
    )  # fmt: skip
    check_at_least(
        args, 0, "lr_warmup_steps", "prior_loss_weight", "seed", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon",
    )  # fmt: skip
    check_at_least(args, 0, "lr", "max_grad_norm", "snr_gamma", above=True)  # 0 would learn nothing
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise UserError("--lr_warmup_steps: give --lr_scheduler constant_with_warmup")
    if max(args.adam_beta1, args.adam_beta2 or 0) >= 1:
        raise UserError("--adam_beta1 and --adam_beta2 must be below 1")
    if args.param_dtype == "bf16" and (args.adam_beta2 or 0) > 0.995:
        raise UserError(f"--adam_beta2 {args.adam_beta2}: too slow for bfloat16, give 0.99")
    if args.param_dtype == "bf16" and args.use_lora:
        raise UserError("--param_dtype bf16 is for full fine-tuning: leave it out with --use_lora")


def check_output_dir(args):
    """The result must fit where it is to go, and replace nothing but an earlier one of its kind."""
    if Path(args.output_dir).resolve() == Path(args.model_dir).resolve():
        raise UserError("--output_dir is --model_dir: name another directory")
    names = [model_dir.LORA_FILE] if args.use_lora else model_dir.PIPELINE_NAMES
    atomic.check_replaceable(args.output_dir, names)
    if not args.use_lora:
        atomic.check_space(args.output_dir, model_dir.weights_size(args.model_dir))


def check_prompts(tokenizer, args):
    """The instance prompt and, with prior preservation, the class prompt: they must differ and fit
    the tokenizer."""
    prompts = [args.instance_prompt]
    if args.prior_loss_weight:
        if not (args.class_images_dir and args.class_prompt):
            raise UserError(
                "--class_images_dir and --class_prompt are missing:"
                " give both, or --prior_loss_weight 0 to train without class images"
            )
        prompts.append(args.class_prompt)
        if args.instance_prompt == args.class_prompt:
            raise UserError(
                "--instance_prompt and --class_prompt are equal:"
                " put the identifier before the class"
            )
    for prompt in prompts:
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
        if Path(args.instance_images_dir).resolve() == Path(args.class_images_dir).resolve():
            raise UserError("--instance_images_dir and --class_images_dir are the same folder")
        class_paths = images.find_images(args.class_images_dir)
    images.check_images(instance_paths + class_paths, resolution)
    return instance_paths, class_paths, resolution
