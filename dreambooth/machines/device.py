"""What this process computes on: whether its GPUs can be used, and the cores of its CPU.

Without Ray, which counts GPUs and does not try them.
"""

import os
import platform

import torch

from dreambooth.cli import UserError, warn

DRIVER_FOR_CUDA = {11: 450, 12: 525, 13: 580}  # NVIDIA's oldest for each major version of CUDA
USE_THE_CPU = 'set CUDA_VISIBLE_DEVICES="" to use the CPU'
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that ask for no GPU
GIB = 2**30

LARGE = 100e6  # parameters of a model: pocket has 6 M


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


def warn_if_slow(num_parameters, what):
    """Without a GPU, say that `what`, such as "a step", takes minutes with a large model, of so
    many parameters by its parts' names."""
    if sum(num_parameters.values()) >= LARGE:
        warn(f"no GPU: {what} takes minutes with this model on {num_cores()} CPU cores")


def num_cores():
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def configure_torch(device, workers_here):
    """Set up torch in one of `workers_here` training workers on this machine, on its `device`."""
    if device.type == "cpu":  # Ray gives a worker one thread; it takes its share of the cores
        torch.set_num_threads(max(1, num_cores() // workers_here))
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32


def describe(num_gpus):
    """The hardware of a run on `num_gpus` GPUs, in words."""
    if num_gpus and torch.cuda.is_available():
        return f"{num_gpus} x {torch.cuda.get_device_name(0)}"
    if num_gpus:
        return f"{num_gpus} GPUs of a cluster"
    return f"{num_cores()} cores ({platform.machine()}), no GPU"
