"""What this process computes on: whether its GPUs can be used, and how slow its CPU is.

Without Ray, which counts GPUs and does not try them.
"""

import math
import os

import torch

from dreambooth import model_dir
from dreambooth.cli import UserError, warn

DRIVER_FOR_CUDA = {11: 450, 12: 525, 13: 580}  # NVIDIA's oldest for each major version of CUDA
USE_THE_CPU = 'set CUDA_VISIBLE_DEVICES="" to use the CPU'
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that ask for no GPU
GIB = 2**30

LARGE = 100e6  # parameters of a model: pocket has 6 M
SD14_PARAMETERS = 1067e6  # of U-Net, text encoder and VAE
TFLOP_PER_PASS = 0.8  # of Stable Diffusion 1.4's U-Net, forward, with an image of 512 px
TFLOPS_PER_CORE = 0.05  # in float32: a rough figure, for a rough answer


def unusable_gpu():
    """The message for a GPU that this PyTorch cannot use."""
    cuda = torch.version.cuda
    driver = DRIVER_FOR_CUDA[int(cuda.split(".")[0])]
    return (
        f"PyTorch cannot use it: CUDA {cuda} needs NVIDIA's driver {driver} or newer (nvidia-smi"
        f" shows yours); update the driver, or {USE_THE_CPU}"
    )


def check_driver():
    """UserError: there is a GPU that this PyTorch cannot use, and all would silently run on the
    CPU. `torch.cuda.device_count` asks the driver's management library, which an old driver
    answers; only `torch.cuda.is_available` starts CUDA."""
    if torch.cuda.is_available():
        return
    if torch.cuda.device_count():
        raise UserError(f"there is a GPU, but {unusable_gpu()}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible not in HIDDEN:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine: unset it to use all"
            f" GPUs, or {USE_THE_CPU}"
        )


def pick_device():
    """The device of this process: "cuda" or "cpu". UserError: a GPU that cannot be used."""
    check_driver()
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_bfloat16(gpu):
    """UserError: a GPU without bfloat16, in which the forward pass of training is computed on GPUs.
    By its compute capability: torch counts cards that emulate bfloat16, many times slower."""
    major, minor = torch.cuda.get_device_capability(gpu)
    if major < 8:
        raise UserError(
            f"{torch.cuda.get_device_name(gpu)} (compute capability {major}.{minor}) has no"
            f" bfloat16, which training needs: use an Ampere card (8.0) or newer, or {USE_THE_CPU}"
        )


def free_memory(gpu):
    """GiB that are free on a GPU, beside this process's own CUDA context."""
    free, _ = torch.cuda.mem_get_info(gpu)
    return free / GIB


def gpu_memory():
    """GiB free on each GPU; an empty list if there is none. UserError: one that training cannot
    use. For a process that ends soon, as it leaves a CUDA context on each GPU."""
    check_driver()
    gpus = range(torch.cuda.device_count())
    for gpu in gpus:
        check_bfloat16(gpu)
    return [free_memory(gpu) for gpu in gpus]


def warn_of_slow_images(args, num_cores):
    """Warn how long generate.py will take for an image without a GPU, if that is minutes."""
    side, _ = model_dir.resolution(args.model_dir)
    guided = 2 if args.guidance_scale > 1 else 1  # with the prompt and without
    passes = guided * args.num_inference_steps
    _warn_of_cpu(args.model_dir, side, passes, "an image", num_cores)


def warn_of_slow_steps(args, plan, num_cores):
    """The same for a step of train.py: a forward and a backward pass, which counts twice."""
    passes = 3 * 2 * plan.pairs_per_step
    _warn_of_cpu(args.model_dir, plan.resolution, passes, "a step", num_cores)


def _warn_of_cpu(pipeline_dir, resolution, passes, what, num_cores):
    num_parameters = sum(model_dir.num_parameters(pipeline_dir).values())
    if num_parameters < LARGE:
        return
    tflop = passes * TFLOP_PER_PASS * num_parameters / SD14_PARAMETERS * (resolution / 512) ** 2
    minutes = math.ceil(tflop / (num_cores * TFLOPS_PER_CORE) / 60)
    warn(f"no GPU: {what} takes about {minutes} min with this model on {num_cores} CPU cores")
