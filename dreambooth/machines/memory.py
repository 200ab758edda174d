"""How much GPU memory training needs, counted by a step on tensors without data (torch's
FakeTensorMode), and which flags make it fit.

    python -m dreambooth.machines.memory --model_dir $ORIG_MODEL_PATH --num_workers 2   # GPUs here
    python -m dreambooth.machines.memory --model_dir $ORIG_MODEL_PATH --num_workers 2 --gib 23

Prints the flags to add to train.py's, and on stderr why. Of train.py's own flags, it takes those
into account that change the need (--help lists them), and ignores the others.
"""

import os
import sys
from argparse import BooleanOptionalAction
from typing import NamedTuple

from dreambooth.cli import ArgumentParser, absolute_path, check_at_least, run_main, warn
from dreambooth.files import pipeline_dir
from dreambooth.machines import device, gpus


class Counted(NamedTuple):
    """GiB of weights, gradients, optimizer and activations at the peak of a step with two pairs per
    forward pass."""

    one_gpu: float  # on one GPU, without gradient accumulation
    kept: float  # where gradients stay allocated: on each of several GPUs, or with accumulation
    per_pair: float  # the part of either that each pair of a forward pass takes


CHECKPOINTING = "--gradient_checkpointing"
BF16 = "--param_dtype bf16"
LORA = "--use_lora"

# As tests/benchmarks/throughput.py --count prints them: sd14 at 512, sdxl and klein at
# 1024 px. An H100 needed 1 to 2 % more for the first row, and for LoRA. The order is that in which
# to try them: the first ones train the same in more time.
COUNTED = {
    (): Counted(17.7, 21.4, 2.35),
    (CHECKPOINTING,): Counted(15.0, 17.4, 0.43),
    (BF16,): Counted(12.4, 14.2, 2.35),
    (CHECKPOINTING, BF16): Counted(9.8, 10.5, 0.53),
    (LORA,): Counted(6.6, 6.6, 2.17),
    (CHECKPOINTING, LORA): Counted(3.3, 3.3, 0.51),
}
COUNTED_XL = {
    (): Counted(66.3, 75.9, 16.3),
    (CHECKPOINTING,): Counted(39.9, 46.0, 0.7),
    (BF16,): Counted(52.0, 56.7, 16.3),
    (CHECKPOINTING, BF16): Counted(25.7, 27.5, 0.8),
    (LORA,): Counted(34.0, 34.1, 14.4),
    (CHECKPOINTING, LORA): Counted(7.8, 7.9, 1.3),
}
COUNTED_KLEIN = {
    (): Counted(143.4, 157.8, 46.3),
    (CHECKPOINTING,): Counted(62.1, 71.5, 2.3),
    (BF16,): Counted(121.8, 129.0, 46.3),
    (CHECKPOINTING, BF16): Counted(40.5, 44.8, 2.3),
    (LORA,): Counted(77.7, 77.7, 35.1),
    (CHECKPOINTING, LORA): Counted(15.3, 15.4, 3.8),
}
PAIRS = 2  # as counted; run.sh's recipe has as many on one GPU, and one on each of several
RESERVE = 1.08  # the allocator's gaps, in proportion to what it holds; measured: 1.03 to 1.05
LIBRARIES = 1.0  # GiB of CUDA, cuDNN and NCCL; measured: 0.8
HOST_LIBRARIES = 4.0  # GiB of the machine's memory: Python's, Ray's and CUDA's
CUDA_GRAPHS = 1.0  # GiB that the graphs themselves take, beside what they hold
PREVIEW = device.BYTES_PER_PIXEL / device.GIB  # per pixel: one image, with guidance


class Reference(NamedTuple):
    """What was counted, and for what model."""

    counted: dict
    resolution: int  # pixels
    backbone: float  # number of parameters of its U-Net or transformer
    trained: float  # number of trained parameters
    text: float = 0.0  # share of the activations that prompt tokens take, at that resolution


SD14 = Reference(COUNTED, 512, 860e6, 983e6)
REFERENCES = {
    "StableDiffusionPipeline": SD14,
    "StableDiffusionXLPipeline": Reference(COUNTED_XL, 1024, 2567e6, 2567e6),
    "Flux2KleinPipeline": Reference(COUNTED_KLEIN, 1024, 3876e6, 3876e6, text=512 / 4608),
}


class Job(NamedTuple):
    """What the need depends on, beside the flags that reduce it."""

    pairs: int = PAIRS  # per forward pass
    keeps_gradients: bool = False
    is_captured: bool = False  # with --cuda_graph; its gradients are where activations were
    has_previews: bool = True  # as in run.sh
    resolution: int = 512  # pixels
    backbone_ratio: float = 1.0  # the model's backbone parameters / the reference's
    trained_ratio: float = 1.0  # its trained parameters / the reference's
    reference: Reference = SD14
    original: float = 0.0  # bytes of a frozen copy, for --prior_target original


def needed(flags, job):
    """GiB of free GPU memory that `job` needs with `flags`, a key of COUNTED."""
    counted = job.reference.counted[flags]
    two_pairs = counted.kept if job.keeps_gradients else counted.one_gpu
    fixed = two_pairs - PAIRS * counted.per_pair
    text = job.reference.text
    size = text + (1 - text) * (job.resolution / job.reference.resolution) ** 2
    activations = job.pairs * counted.per_pair * size
    preview = PREVIEW * job.resolution**2 if job.has_previews else 0.0  # between two steps
    if job.is_captured and CHECKPOINTING not in flags:  # the graph keeps what activations take
        activations += preview + CUDA_GRAPHS
    else:
        activations = max(activations, preview)
    original = 0.0 if LORA in flags else job.original / device.GIB
    return (
        RESERVE * (fixed * job.trained_ratio + activations * job.backbone_ratio + original)
        + LIBRARIES
    )


def choose(gib, job, given=(), may_be_lora=True):
    """The first key of COUNTED that includes the flags `given`, is LoRA's only if it `may_be_lora`,
    and with which `job` fits GPUs with `gib` GiB free; where none does, the last, which needs
    least: the numbers are counted, and it may fit all the same."""
    choices = [flags for flags in COUNTED if set(given) <= set(flags)]
    choices = [flags for flags in choices if may_be_lora or LORA not in flags]
    return next((flags for flags in choices if needed(flags, job) <= gib), choices[-1])


def check_device(args, plan, num_workers, torch_device):
    """Warn if the training of `args` may not fit the free memory of a GPU, or is slow without one.
    Each worker calls it before it loads the models. UserError: a GPU without bfloat16, or no
    compiler for what needs one."""
    sizes = pipeline_dir.num_parameters(args.model_dir)
    if torch_device.type == "cpu":
        if args.compile:
            device.check_compiler("--compile", "cpu")
        if args.cuda_graph:
            warn("--cuda_graph is ignored: it is for GPUs")
        device.warn_if_slow(sizes, "a step")
        return
    device.check_bfloat16(torch_device)
    if args.param_dtype == "bf16" or args.compile:
        device.check_compiler(BF16 if args.param_dtype == "bf16" else "--compile")
    if sum(sizes.values()) < device.LARGE:
        return
    given = given_flags(args)
    if not args.use_lora:
        warn_of_host_memory(sizes)
    pairs_per_pass, accumulation_steps = plan.divide(num_workers)
    job = make_job(
        args, sizes, pairs_per_pass, num_workers > 1 or accumulation_steps > 1, plan.resolution
    )._replace(has_previews=bool(args.preview_every))
    gib = device.free_memory(torch_device)
    if needed(given, job) > gib:
        warn(
            f"training may need {needed(given, job):.1f} GiB of GPU memory, and {gib:.1f} are free;"
            f" {CHECKPOINTING}, {BF16} and {LORA} need less (README, Memory)"
        )


def make_job(args, sizes, pairs, keeps_gradients, resolution):
    """The `Job` of `args`, flags of train.py, for a model with `sizes` parameters in its parts."""
    facts = pipeline_dir.read_facts(args.model_dir)
    trains_text = pipeline_dir.trains_text_encoder(args)
    has_class_images = args.prior_loss_weight != 0
    has_original = args.prior_target == "original" and has_class_images
    both = pipeline_dir.num_trained(args.model_dir, sizes, facts.can_train_text_encoder)
    original = 4 * both - 2 * sizes[facts.backbone]  # whose layers are in bfloat16
    return Job(
        pairs=pairs if has_class_images else pairs / 2,  # one image in each
        keeps_gradients=keeps_gradients,
        is_captured=args.cuda_graph and not keeps_gradients,  # as plan.can_capture has it
        resolution=resolution,
        original=original if has_original else 0.0,
        **relative(args.model_dir, sizes, trains_text),
    )


def given_flags(args):
    """The flags that reduce the need and are given already, in the order of COUNTED's keys."""
    given = {
        CHECKPOINTING: args.gradient_checkpointing,
        BF16: args.param_dtype == "bf16" and not args.use_lora,  # which check_flags refuses
        LORA: args.use_lora,
    }
    return tuple(flag for flag, is_given in given.items() if is_given)


def warn_of_host_memory(sizes):
    """Warn where the result, in float32, may not fit the machine's memory when it is saved."""
    need, free = 4 * sum(sizes.values()) / device.GIB + HOST_LIBRARIES, device.host_memory()
    if free is not None and free < need:
        warn(f"{free:.1f} GiB of this machine's memory are free, the run may need {need:.1f}")


def relative(model_dir, sizes, trains_text_encoder):
    """The fields of a `Job` that say how large a model is, of its numbers of parameters."""
    facts = pipeline_dir.read_facts(model_dir)
    reference = REFERENCES[facts.class_name]
    trained = pipeline_dir.num_trained(model_dir, sizes, trains_text_encoder)
    return {
        "backbone_ratio": sizes[facts.backbone] / reference.backbone,
        "trained_ratio": trained / reference.trained,
        "reference": reference,
    }


def choose_for_gpus(free, job, given, may_be_lora=True):
    """The flags for the recipe of run.sh on GPUs with `free` GiB, a list (None: in use by others),
    as a string, and why, a sentence."""
    if None in free:
        why = "other jobs use the cluster's GPUs: their memory is not known, no flag is added"
        return " ".join(given), why
    gib = min(free)
    flags = choose(gib, job, given, may_be_lora)
    if BF16 in flags and BF16 not in given:
        device.check_compiler(BF16)
    text, need = " ".join(flags), needed(flags, job)
    why = f"{len(free)} x {gib:.1f} GiB of GPU memory free, training needs {needed(given, job):.1f}"
    if need > gib:
        why = f"warning: {why}, even with {text} {need:.1f}: it may fail"
    elif flags == given:
        why += ": it fits"
    else:
        why += f": with {text} it needs {need:.1f}"
    return text, why


def main(args):
    """Print the flags that make training fit `args.gib` GiB per GPU, and on stderr why."""
    check_at_least(args, 1, "num_workers", "pairs")
    check_at_least(args, 0, "gib", above=True)
    pipeline_dir.check_model_dir(args.model_dir)
    given = given_flags(args)
    sizes = pipeline_dir.num_parameters(args.model_dir)
    free = []
    if sum(sizes.values()) >= device.LARGE:
        free = [args.gib] * args.num_workers if args.gib else gpus.free_memory_of_all()
        if not os.environ.get("RAY_ADDRESS"):
            free = free[: args.num_workers]  # the workers take the first of this machine's
    if not free:
        print(*given)
        return
    keeps_gradients = args.num_workers > 1 or args.gradient_accumulation_steps > 1
    resolution = args.resolution or pipeline_dir.resolution(args.model_dir)[0]
    job = make_job(args, sizes, args.pairs, keeps_gradients, resolution)
    flags, why = choose_for_gpus(free, job, given, not args.full)
    print(why, file=sys.stderr)
    print(flags)


def parse_args(argv=None):
    """The flags: model, GPUs, and those of train.py that change the need; others are ignored."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model_dir", type=absolute_path, required=True, help="the original model")
    add("--num_workers", type=int, default=1, help="one GPU per worker")
    add("--pairs", "--train_batch_size", type=int, default=PAIRS, help="per forward pass")
    add("--gib", type=float, help="GiB free on each GPU (default: measured)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--use_lora", action="store_true", help="LoRA, even if more would fit")
    either.add_argument("--full", action="store_true", help="no LoRA, even if nothing else fits")
    add("--gradient_checkpointing", action="store_true", help="even if it fits without")
    add("--param_dtype", default="fp32", help="bf16: even if it fits without")
    add("--gradient_accumulation_steps", type=int, default=1, help="forward passes per step")
    add("--train_text_encoder", action=BooleanOptionalAction, help="default: as in train.py")
    add("--prior_loss_weight", type=float, default=1.0, help="0: without class images")
    add("--prior_target", default="noise", help="original: a frozen copy takes memory, too")
    add("--cuda_graph", action="store_true", help="adds what the captured graphs hold")
    add("--resolution", type=int, help="in pixels (default: the model's)")
    return parser.parse_known_args(argv)[0]


if __name__ == "__main__":
    run_main(main, parse_args())
