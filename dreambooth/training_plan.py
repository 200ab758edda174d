"""What a training run will do, worked out from its flags and images before a model loads."""

import math
from dataclasses import dataclass
from pathlib import Path

from dreambooth import images, model_dir, training_checks
from dreambooth.cli import UserError

LR_SCHEDULERS = [
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
]  # fmt: skip
# The flags that decide the result, beside the images, the model, and what follows from the others.
RECIPE_FLAGS = [
    "use_lora", "lora_rank", "lora_layers", "train_text_encoder", "instance_prompt", "class_prompt",
    "lr", "lr_scheduler", "lr_warmup_steps", "prior_loss_weight", "snr_gamma", "max_grad_norm",
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
    """What follows from the flags of a run; a pair is one instance and one class image, or without
    prior preservation the one instance image."""

    instance_paths: list
    class_paths: list
    prompt_ids: list  # token ids of instance and class prompt, 2 x L; or of the former, 1 x L
    resolution: int  # pixels
    pairs_per_step: int  # of all workers and forward passes
    num_steps: int
    max_pairs_per_pass: int  # per worker and forward pass
    num_workers: tuple  # minimum, maximum

    @property
    def image_dirs(self):
        """The folders of the images."""
        return sorted({str(Path(path).parent) for path in self.instance_paths + self.class_paths})

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


def make_plan(args):
    """The `TrainingPlan` for flags that `check_flags` has passed. Reads the tokenizer and each
    image: a UserError names one that cannot be read, or a prompt that is too long."""
    tokenizer = model_dir.load_tokenizer(args.model_dir)
    prompts = training_checks.check_prompts(tokenizer, args)
    instance_paths, class_paths, resolution = training_checks.check_images(args)
    training_checks.warn_of_likely_mistakes(prompts, instance_paths)

    # Each step takes the next pairs: one stream, which goes on from epoch to epoch.
    _, most = args.num_workers
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * most
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
        max_pairs_per_pass=args.train_batch_size,
        num_workers=args.num_workers,
    )
