"""What a training run will do, worked out from its flags; and what can be wrong with them, found
before Ray starts and before a model loads."""

import math
from dataclasses import dataclass
from pathlib import Path

from dreambooth import atomic, images, model_dir
from dreambooth.cli import UserError, check_at_least

# The flags that decide the result, beside the images, the model, and what follows from the others.
RECIPE_FLAGS = [
    "use_lora", "lora_rank", "train_text_encoder", "instance_prompt", "class_prompt", "lr",
    "lr_scheduler", "lr_warmup_steps", "prior_loss_weight", "snr_gamma", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "seed", "param_dtype",
]  # fmt: skip


def worker_range(text):
    """The type of --num_workers: "2" is (2, 2), "2:4" is (2, 4)."""
    numbers = [int(number) for number in text.split(":")]
    if not 1 <= numbers[0] <= numbers[-1] or len(numbers) > 2:
        raise ValueError
    return numbers[0], numbers[-1]


@dataclass
class TrainingPlan:
    """What follows from the flags of a run; a pair is one instance and one class image."""

    instance_paths: list
    class_paths: list
    prompt_ids: list  # token ids of instance and class prompt, 2 x L
    resolution: int  # pixels
    pairs_per_step: int  # of all workers and forward passes
    num_steps: int
    max_pairs_per_pass: int  # per worker and forward pass
    num_workers: tuple  # minimum, maximum

    def divide(self, num_workers):
        """How each of `num_workers` takes its share of a step: (pairs per pass, passes)."""
        share = self.pairs_per_step // num_workers
        num_passes = math.ceil(share / self.max_pairs_per_pass)
        while share % num_passes:
            num_passes += 1
        return share // num_passes, num_passes

    def identity(self, args):
        """All that decides the run's result, as a flat dict: a resumed run must have the same."""
        flags = {name: value for name, value in vars(args).items() if name in RECIPE_FLAGS}
        return {
            **flags,
            "model": model_dir.fingerprint(args.model_dir),
            "instance images": images.digest(self.instance_paths),
            "class images": images.digest(self.class_paths),
            "resolution": self.resolution,
            "pairs per step": self.pairs_per_step,
            "steps": self.num_steps,
        }

    def __str__(self):
        return (
            f"{len(self.instance_paths)} instance and {len(self.class_paths)} class images"
            f" at {self.resolution} px, {self.num_steps} steps of {self.pairs_per_step} pairs,"
            f" {' to '.join(map(str, sorted(set(self.num_workers))))} worker(s)"
        )


def check_flags(args):
    """Check the flags of train.py, as far as that takes no time. A UserError names the first
    mistake."""
    check_numbers(args)
    model_dir.check_model_dir(args.model_dir)
    check_output_dir(args)
    if args.instance_prompt == args.class_prompt:
        raise UserError(
            "--instance_prompt and --class_prompt are equal: put the identifier before the class"
        )
    if Path(args.instance_images_dir).resolve() == Path(args.class_images_dir).resolve():
        raise UserError("--instance_images_dir and --class_images_dir are the same folder")
    images.find_images(args.instance_images_dir)
    images.find_images(args.class_images_dir)


def make_plan(args):
    """The `TrainingPlan` for flags that `check_flags` has passed. Reads the tokenizer and each
    image: a UserError names one that cannot be read, or a prompt that is too long."""
    tokenizer = model_dir.load_tokenizer(args.model_dir)
    prompts = check_prompts(tokenizer, args)
    instance_paths, class_paths, resolution = check_images(args)

    # Each step takes the next pairs: one stream, which goes on from epoch to epoch.
    _, most = args.num_workers
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * most
    num_steps = math.ceil(args.num_epochs * len(class_paths) / pairs_per_step)
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
        max_pairs_per_pass=args.train_batch_size,
        num_workers=args.num_workers,
    )


def check_numbers(args):
    """The recipe's numbers must be in range and go together."""
    check_at_least(
        args, 1, "train_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps",
        "lora_rank", "log_every", "checkpoints_total_limit",
    )  # fmt: skip
    check_at_least(
        args, 0, "lr_warmup_steps", "prior_loss_weight", "seed", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "adam_epsilon", "checkpointing_steps", "max_failures", "wait_for_gpus",
    )  # fmt: skip
    check_at_least(args, 0, "lr", "max_grad_norm", "snr_gamma", above=True)  # 0 would learn nothing
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
    """The result must fit where it is to go, and replace nothing but an earlier result."""
    if Path(args.output_dir).resolve() == Path(args.model_dir).resolve():
        raise UserError("--output_dir is --model_dir: name another directory")
    atomic.check_replaceable(args.output_dir, model_dir.RESULT_NAMES)
    if args.param_dtype == "fp32" and not args.use_lora:  # others are smaller than the model
        atomic.check_space(args.output_dir, model_dir.weights_size(args.model_dir))


def check_prompts(tokenizer, args):
    """Both prompts, which must fit the tokenizer."""
    prompts = [args.instance_prompt, args.class_prompt]
    for prompt in prompts:
        model_dir.check_prompt(tokenizer, prompt)
    return prompts


def check_images(args):
    """The paths of instance and class images, each of which can be read, and the resolution."""
    resolution, pixels_per_latent = model_dir.resolution(args.model_dir)
    if args.resolution is not None:
        resolution = args.resolution
    if resolution < pixels_per_latent or resolution % pixels_per_latent:
        raise UserError(
            f"--resolution {resolution}: this model takes multiples of {pixels_per_latent}"
        )
    instance_paths = images.find_images(args.instance_images_dir)
    class_paths = images.find_images(args.class_images_dir)
    images.check_images(instance_paths + class_paths, resolution)
    return instance_paths, class_paths, resolution
