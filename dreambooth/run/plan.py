"""What a training run will do, worked out from its flags and images before a model loads; and what
a user can get wrong in them."""

import argparse
import math
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from dreambooth import images
from dreambooth.cli import UserError, check_at_least, plural, warn, words
from dreambooth.files import atomic, pipeline_dir
from dreambooth.files.photos import find_images, read_captions, warn_if_few
from dreambooth.run.training_log import read_run_record, report_dir

LR_SCHEDULERS = [
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial",
]  # fmt: skip
DEFAULT_STEPS = 800
MAX_PAIRS = 999_999  # of a run: they are listed in memory, 0.85 KB each
POLYNOMIAL_END = 1e-7  # diffusers' last learning rate of that schedule
LORA_DEFAULTS = (4, "attention")  # of --lora_rank and --lora_layers in train.py
# The flags that may change when a run is resumed. All others are part of its fingerprint.
PATHS = {"model_dir", "output_dir", "instance_images_dir", "class_images_dir", "storage_path"}
FACTORS = {  # only their products, pairs per step and number of steps, are in the fingerprint
    "train_batch_size", "gradient_accumulation_steps", "num_workers", "num_epochs",
    "max_train_steps",
}  # fmt: skip
HOW_IT_RUNS = {
    "gradient_checkpointing", "compile", "cuda_graph", "checkpointing_steps",
    "checkpoints_total_limit", "restart", "max_failures", "wait_for_gpus", "log_every",
    "preview_prompts", "preview_every", "dry_run", "verbose",
}  # fmt: skip
MAY_CHANGE = PATHS | FACTORS | HOW_IT_RUNS


def worker_range(text):
    """The type of --num_workers: "2" is (2, 2), "2:4" is (2, 4)."""
    found = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text.strip())
    fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if fewest > most:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more, or a range such as 2:4")
    return fewest, most


@dataclass
class TrainingPlan:
    """What follows from the flags of a run; a pair is one instance and one class image, or without
    prior preservation the one instance image."""

    instance_paths: list
    class_paths: list  # [] without prior preservation
    prompts: list  # distinct: the instance prompt, the class prompt if there is one, captions
    captions: dict  # the number of the prompt of each image that has a caption, by its path
    resolution: int  # pixels
    pairs_per_step: int  # of all workers and forward passes
    num_steps: int
    max_pairs_per_pass: int  # per worker and forward pass
    num_workers: tuple  # minimum, maximum
    checkpointing_steps: int  # between two checkpoints; 0: there are none
    run_dir: Path  # checkpoints, and Ray Train's own files: every node must see it
    report_dir: Path  # what the run logs, beside its result

    @property
    def images_per_pair(self):
        return 2 if self.class_paths else 1

    def step_of(self, position):
        """The number of steps done before the pair at `position`; all of them if that is None."""
        return self.num_steps if position is None else position // self.pairs_per_step

    @property
    def image_dirs(self):
        """The folders of the images."""
        return sorted({str(Path(path).parent) for path in self.instance_paths + self.class_paths})

    def divide(self, num_workers):
        """(pairs per forward pass, gradient accumulation steps) of each of `num_workers` workers:
        the fewest passes of equal size, none larger than `max_pairs_per_pass`."""
        share = self.pairs_per_step // num_workers
        accumulation_steps = math.ceil(share / self.max_pairs_per_pass)
        while share % accumulation_steps:
            accumulation_steps += 1
        return share // accumulation_steps, accumulation_steps

    def fingerprint(self, args):
        """All that decides the run's result, as a flat dict: a resumed run must have the same."""
        flags = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        captions = [[Path(path).name, self.prompts[n]] for path, n in self.captions.items()]
        return {
            **flags,
            "train_text_encoder": pipeline_dir.trains_text_encoder(args),
            "model": pipeline_dir.fingerprint(args.model_dir),
            "instance images": images.digest(self.instance_paths),
            "class images": images.digest(self.class_paths),
            "captions": captions or None,
            "resolution": self.resolution,
            "pairs per step": self.pairs_per_step,
            "steps": self.num_steps,
        }

    def __str__(self):
        fewest, most = self.num_workers
        return (
            f"{len(self.instance_paths)} instance and {len(self.class_paths)} class images"
            f" at {self.resolution} px, {plural(self.num_steps, 'step')} of"
            f" {plural(self.pairs_per_step, 'pair' if self.class_paths else 'image')},"
            f" {f'{fewest} to ' if fewest < most else ''}{plural(most, 'worker')}"
        )


def make_plan(args):
    """The `TrainingPlan` for flags that `check_flags` has passed. Reads the tokenizer and each
    image: a UserError names one that cannot be read, or a prompt that is too long."""
    resolution = pipeline_dir.check_resolution(args.model_dir, args.resolution)
    prompts = [args.instance_prompt]
    instance_paths, class_paths = find_images(args.instance_images_dir, report=True), []
    if args.prior_loss_weight:
        prompts.append(args.class_prompt)
        class_paths = find_images(args.class_images_dir)
    warn_of_likely_mistakes(prompts, instance_paths)
    prompts, captions = number_captions(args, prompts, instance_paths, class_paths)
    pipeline_dir.check_prompts(args.model_dir, prompts + args.preview_prompts)
    images.check_images(instance_paths + class_paths, resolution)

    # Each step takes the next pairs: one stream, which goes on from epoch to epoch.
    _, most = args.num_workers
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * most
    num_steps = args.max_train_steps or DEFAULT_STEPS
    if args.num_epochs:
        num_pairs = args.num_epochs * len(class_paths or instance_paths)
        of_epochs = -(-num_pairs // pairs_per_step)  # rounded up
        num_steps = min(args.max_train_steps or of_epochs, of_epochs)
    if num_steps * pairs_per_step > MAX_PAIRS:
        raise UserError(
            f"{plural(num_steps, 'step')} of {plural(pairs_per_step, 'pair')}: at most {MAX_PAIRS}"
            " pairs are possible; use fewer steps, or a smaller --train_batch_size"
        )
    if args.lr_warmup_steps >= num_steps:
        raise UserError(
            f"--lr_warmup_steps {args.lr_warmup_steps}: use fewer, the run has {num_steps} steps"
        )
    checkpointing_steps = steps_between_checkpoints(args, num_steps)
    if not args.use_lora:
        check_space_for_checkpoints(args, num_steps, checkpointing_steps)
    return TrainingPlan(
        instance_paths=instance_paths,
        class_paths=class_paths,
        prompts=prompts,
        captions=captions,
        resolution=resolution,
        pairs_per_step=pairs_per_step,
        num_steps=num_steps,
        max_pairs_per_pass=args.train_batch_size,
        num_workers=args.num_workers,
        checkpointing_steps=checkpointing_steps,
        run_dir=run_dir(args.output_dir, args.storage_path),
        report_dir=report_dir(args.output_dir),
    )


def number_captions(args, prompts, instance_paths, class_paths):
    """All prompts of a run, the captions of its images behind `prompts`; and the number of each
    captioned image's prompt, by path. A caption stands in place of the folder's prompt."""
    prompts, captions = list(prompts), {}
    of_instance = read_captions(args.instance_images_dir, instance_paths)
    own_words = words(args.instance_prompt)
    for path, text in of_instance.items():
        if own_words - words(text):
            warn(f"the caption of {path} does not name the subject as --instance_prompt: {text!r}")
    of_class = {}
    if class_paths:
        of_class = read_captions(args.class_images_dir, class_paths, were_generated=True)
    of_class = {path: text for path, text in of_class.items() if text != args.class_prompt}
    if of_class:
        first = next(iter(of_class.values()))
        message = f"{len(of_class)} class images have captions of their own, such as {first!r}"
        if len(of_class) < len(class_paths):
            print(message)
        else:
            warn(f"{message}: no image is left for --class_prompt")
    for path, text in [*of_instance.items(), *of_class.items()]:
        if text not in prompts:
            prompts.append(text)
        captions[str(Path(path).absolute())] = prompts.index(text)
    return prompts, captions


def run_dir(output_dir, storage_path=None):
    """Where the run of a result has its checkpoints: beside it, or in --storage_path, where other
    results may have the same name."""
    output_dir = Path(output_dir)
    if storage_path:
        path_hash = f"{zlib.crc32(str(output_dir).encode()):08x}"
        return Path(storage_path) / f"{output_dir.name}-{path_hash}.checkpoints"
    return output_dir.with_name(f"{output_dir.name}.checkpoints")


def check_flags(args):
    """The quick checks of train.py's flags: a UserError names the first mistake. Switches
    `args.cuda_graph` off, with a warning, where no step can be captured."""
    check_numbers(args)
    for name in PATHS:
        path = getattr(args, name) or ""
        if path.encode(errors="replace") != os.fsencode(path):
            raise UserError(f"--{name} {path!r} is not UTF-8, which Ray needs: rename the folder")
    args.cuda_graph = can_capture(args)
    pipeline_dir.check_model_dir(args.model_dir)
    check_pipeline(args)
    check_output_dir(args)
    find_images(args.instance_images_dir)
    if args.prior_loss_weight:
        check_class(args)


def check_pipeline(args):
    """Not every text encoder can be trained here, nor does every flag fit every pipeline."""
    facts = pipeline_dir.read_facts(args.model_dir)
    if args.snr_gamma and facts.is_flow:
        raise UserError("--snr_gamma is for diffusion models: leave it out")
    if facts.is_distilled:
        warn(
            "--model_dir is distilled to few steps, which training undoes: train its base model;"
            " generate.py takes that LoRA with either"
        )
    if args.train_text_encoder and not facts.can_train_text_encoder:
        raise UserError(f"--train_text_encoder: {facts.name}'s text encoders are not trained here")


def check_class(args):
    """Prior preservation needs class images and a class prompt, which must be the class's own."""
    if not (args.class_images_dir and args.class_prompt):
        raise UserError(
            "--class_images_dir and --class_prompt are missing:"
            " pass both, or --prior_loss_weight 0 to train without class images"
        )
    if args.instance_prompt == args.class_prompt:
        raise UserError(
            "--instance_prompt and --class_prompt are equal: put the identifier before the class"
        )
    if Path(args.instance_images_dir).resolve() == Path(args.class_images_dir).resolve():
        raise UserError("--instance_images_dir and --class_images_dir are the same folder")
    find_images(args.class_images_dir)


def check_numbers(args):
    """The recipe's numbers must be in range and go together."""
    check_at_least(
        args, 1, "train_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps",
        "lora_rank", "log_every", "checkpoints_total_limit",
    )  # fmt: skip
    check_at_least(
        args, 0, "lr_warmup_steps", "prior_loss_weight", "seed", "adam_beta1", "adam_beta2",
        "adam_weight_decay", "checkpointing_steps", "max_failures", "wait_for_gpus",
        "preview_every",
    )  # fmt: skip
    check_at_least(args, 0, "adam_epsilon", above=True)  # 0 / 0 where a gradient is always 0
    check_at_least(args, 0, "lr", "max_grad_norm", "snr_gamma", above=True)  # 0 would learn nothing
    check_at_least(args, 0, "max_instance_noise", above=True)
    if args.max_instance_noise > 1:
        raise UserError(f"--max_instance_noise is {args.max_instance_noise}: must be at most 1")
    if bool(args.preview_every) != bool(args.preview_prompts):
        raise UserError("--preview_prompts and --preview_every go together: pass both or neither")
    if args.lr_scheduler == "polynomial" and args.lr <= POLYNOMIAL_END:
        raise UserError(f"--lr {args.lr:g}: polynomial ends at {POLYNOMIAL_END:g}; use linear")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        raise UserError("--lr_warmup_steps: pass --lr_scheduler constant_with_warmup")
    if max(args.adam_beta1, args.adam_beta2 or 0) >= 1:
        raise UserError("--adam_beta1 and --adam_beta2 must be below 1")
    if args.param_dtype == "bf16" and (args.adam_beta2 or 0) > 0.995:
        raise UserError(f"--adam_beta2 {args.adam_beta2}: too slow for bfloat16, use 0.99")
    fewest, most = args.num_workers
    pairs_per_step = args.train_batch_size * args.gradient_accumulation_steps * most
    for num_workers in range(fewest, most + 1):
        if pairs_per_step % num_workers:
            raise UserError(
                f"--num_workers {fewest}:{most}: {num_workers} workers cannot share"
                f" {pairs_per_step} pairs per step equally; choose another --train_batch_size"
            )
    if args.param_dtype == "bf16" and args.use_lora:
        raise UserError("--param_dtype bf16 is for full fine-tuning: leave it out with --use_lora")
    if (args.lora_rank, args.lora_layers) != LORA_DEFAULTS and not args.use_lora:
        raise UserError(
            "--lora_rank, --lora_layers: they need --use_lora; add it or leave them out"
        )


def can_capture(args):
    """Whether --cuda_graph is given and steps can be captured. If they cannot, a warning says so:
    run.sh may have added, for the GPUs that it found, what does not go with it."""
    several = max(args.num_workers[1], args.gradient_accumulation_steps) > 1
    if args.cuda_graph and (several or args.gradient_checkpointing):
        warn(
            "--cuda_graph is ignored: it is for one worker and one pass per step, without"
            " --gradient_checkpointing"
        )
        return False
    return args.cuda_graph


def check_output_dir(args):
    """The result must fit where it is to go, and replace nothing but an earlier one of its kind."""
    if Path(args.output_dir).resolve() == Path(args.model_dir).resolve():
        raise UserError("--output_dir is --model_dir: choose another directory")
    names = [pipeline_dir.LORA_FILE] if args.use_lora else pipeline_dir.PIPELINE_NAMES
    is_there = any((Path(args.output_dir) / name).exists() for name in names)
    card_files = pipeline_dir.CARD_FILES if is_there else ()  # without a result they are the user's
    atomic.check_replaceable(args.output_dir, [*names, *card_files])
    if is_there and not report_dir(args.output_dir).is_dir():
        raise UserError(
            f"--output_dir {args.output_dir} holds a model that train.py has not made, as"
            f" {report_dir(args.output_dir)} is missing: choose another directory, or delete it"
        )
    atomic.check_writable(report_dir(args.output_dir), "the report's directory")
    check_run_dir(args)
    if is_there:
        print(f"{args.output_dir} holds a result, which will be replaced", flush=True)
    if not args.use_lora:
        sizes = pipeline_dir.num_parameters(args.model_dir)
        num_bytes = 4 * sum(sizes.values())  # float32
        folder = Path(args.output_dir).resolve()
        leftovers = atomic.unfinished(folder).rglob("*.*")
        atomic.check_space(folder, num_bytes, "the result", leftovers)


def check_run_dir(args):
    """Where checkpoints go there must be those of a run, or nothing; and no run that goes on."""
    folder, output_dir = run_dir(args.output_dir, args.storage_path), Path(args.output_dir)
    atomic.check_writable(folder, "the checkpoints' directory")
    if output_dir.resolve() in folder.resolve().parents:
        raise UserError("--storage_path is inside --output_dir, which is replaced: choose another")
    for place in (folder, report_dir(output_dir)):
        if (place / "lock").exists():  # of another run, perhaps one that has ended
            atomic.lock(place / "lock", output_dir)
    # Checkpoints of an unfinished run that this one, with another --storage_path, would not find.
    record = read_run_record(report_dir(output_dir))
    recorded = run_dir(output_dir, record["flags"].get("storage_path")) if record else folder
    for place in (run_dir(output_dir), recorded):
        begun_there, begun_here = (any(p.glob("step_*/complete.json")) for p in (place, folder))
        if begun_there and not begun_here and not args.restart:
            raise UserError(
                f"{place} holds checkpoints of --output_dir: move it to {folder} to resume from"
                " them, or delete it"
            )
    if not (folder / "lock").exists() and folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"{folder}, where checkpoints would go, holds other files, which would be lost: rename"
            " it, or pass --storage_path"
        )


def steps_between_checkpoints(args, num_steps):
    """What the flag says, or a tenth of the run; 0: no checkpoints."""
    if args.checkpointing_steps is None:
        return max(1, round(num_steps / 10))
    return args.checkpointing_steps


def check_space_for_checkpoints(args, num_steps, checkpointing_steps):
    """The disk must have room for the checkpoints of full fine-tuning, and for one more while that
    is written, beside those that are there. Trained weights and optimizer take 12 bytes per weight;
    8 in bfloat16. The last step has none."""
    folder = run_dir(args.output_dir, args.storage_path)
    written = (num_steps - 1) // (checkpointing_steps or num_steps)
    count = min(args.checkpoints_total_limit + 1, written)
    trained = pipeline_dir.num_trained(
        args.model_dir,
        pipeline_dir.num_parameters(args.model_dir),
        pipeline_dir.trains_text_encoder(args),
    )
    num_bytes = {"fp32": 12, "bf16": 8}[args.param_dtype] * trained
    what = f"{count} checkpoints at a time (none with --checkpointing_steps 0)"
    existing = folder.glob("*step_*/state.pt")  # also unfinished ones
    if count:
        atomic.check_space(folder, count * num_bytes, what, existing)


def warn_of_likely_mistakes(prompts, instance_paths):
    """Warn of what is allowed and probably a mistake: few photos, prompts the wrong way round."""
    warn_if_few(instance_paths)
    if len(prompts) < 2:
        return
    instance_words, class_words = map(words, prompts)
    if class_words - instance_words or not instance_words - class_words:
        warn(
            "--class_prompt is usually --instance_prompt without the identifier,"
            f" not {prompts[1]!r} for {prompts[0]!r}"
        )
