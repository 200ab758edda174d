"""What this process computes on: its GPUs and whether PyTorch can use them, its CPU cores, its
memory. Without Ray, which counts GPUs and does not try them.
"""

import math
import os
import platform
import re
import shutil
import sysconfig
from contextlib import suppress
from pathlib import Path

import torch

from dreambooth.cli import UserError, first_line, warn

DRIVER_FOR_CUDA = {11: 450, 12: 525, 13: 580}  # NVIDIA's oldest for each major version of CUDA
USE_THE_CPU = 'set CUDA_VISIBLE_DEVICES="" to use the CPU'
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that ask for no GPU
GIB = 2**30
BYTES_PER_PIXEL = 4096  # of GPU memory per image being generated, as an H100 reserves

LARGE = 100e6  # parameters of a model: pocket has 6 M
# What says that a GPU's memory did not suffice: torch; and CUDA, cuBLAS and NCCL, as some of it is
# taken beside torch's allocator.
OUT_OF_MEMORY = (
    r"torch\.OutOfMemoryError|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|Cuda failure .*out of memory"
)


def is_out_of_memory(error):
    """Whether `error` says that a GPU's memory did not suffice, or its text, of another process."""
    return bool(re.search(OUT_OF_MEMORY, f"{type(error)} {error}"))


def unusable_gpu(reason=""):
    """The message for a GPU that this PyTorch cannot use, for a `reason` that CUDA has given."""
    cuda = torch.version.cuda
    if reason and "too old" not in reason:
        return f"PyTorch cannot use it ({reason}): mend that, or {USE_THE_CPU}"
    driver = DRIVER_FOR_CUDA[int(cuda.split(".")[0])]
    return (
        f"PyTorch cannot use it: CUDA {cuda} needs NVIDIA's driver {driver} or newer (nvidia-smi"
        f" shows yours); update the driver, or {USE_THE_CPU}"
    )


def check_driver():
    """UserError: there is a GPU that this PyTorch cannot use, and all would silently run on the
    CPU, or fail at the first kernel. `torch.cuda.device_count` asks the driver's management
    library, which an old driver answers; only `torch.cuda.is_available` starts CUDA."""
    if torch.cuda.is_available():
        for gpu in range(torch.cuda.device_count()):
            check_kernels(gpu)
        return
    if torch.cuda.device_count():
        try:
            torch.cuda.init()
            reason = ""
        except RuntimeError as error:
            reason = first_line(error)
        raise UserError(f"there is a GPU, but {unusable_gpu(reason)}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible not in HIDDEN:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine: unset it to use all"
            f" GPUs, or {USE_THE_CPU}"
        )


def check_kernels(gpu):
    """UserError: this PyTorch was built without kernels for a GPU. One for sm_XY runs on cards of
    the same major compute capability and the same minor or a greater one; PTX for compute_XY on all
    greater ones. (ROCm's builds list neither.)"""
    capability = torch.cuda.get_device_capability(gpu)
    builds = re.findall(r"(sm|compute)_(\d+?)(\d)[af]?\b", " ".join(torch.cuda.get_arch_list()))
    for kind, major, minor in builds:
        built_for = int(major), int(minor)
        same_major = kind == "compute" or built_for[0] == capability[0]
        if same_major and built_for <= capability:
            return
    if builds:
        name = torch.cuda.get_device_name(gpu)
        raise UserError(
            f"GPU {gpu}, {name} (compute capability {capability[0]}.{capability[1]}), is not among"
            f" those that this PyTorch has kernels for ({' '.join(torch.cuda.get_arch_list())}):"
            f" list other GPUs in CUDA_VISIBLE_DEVICES, or {USE_THE_CPU}"
        )


# By the device for which kernels are built: the variable that names a compiler, compilers, and the
# language. On a CPU they are C++, for which PyTorch looks for g++ alone.
COMPILERS = {"cuda": ("CC", ("gcc", "clang", "cc"), "C"), "cpu": ("CXX", ("g++",), "C++")}


def check_compiler(flag, device_type="cuda"):
    """UserError: `flag` builds kernels, and there is no compiler for them, or no Python.h."""
    variable, names, language = COMPILERS[device_type]
    compiler = os.environ.get(variable) or next(filter(shutil.which, names), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None or not header.exists():
        missing = f"a {language} compiler" if compiler is None else f"Python's headers ({header})"
        raise UserError(
            f"{flag} needs {missing}: apt install {names[0]} python3-dev, or leave it out"
        )


def host_memory():
    """GiB of this machine's, or container's, memory that are free; None where that is not known."""
    try:
        free = 1024 * fields("/proc/meminfo")["MemAvailable:"]
    except (OSError, KeyError):
        return None
    for group in control_groups("memory"):
        for limit, used, cache in MEMORY_FILES:
            with suppress(OSError, KeyError, ValueError):  # "max": no limit
                room = _number(group / limit) - _number(group / used)
                free = min(free, room + fields(group / "memory.stat")[cache])
    return free / GIB


MEMORY_FILES = (  # of a control group, by version: limit, use, and what of it can be given up
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def control_groups(controller, root=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """The directories of this process's control groups (Linux) for "memory" or "cpu", from its own
    to the root: containers and batch systems set limits in any of them. None on other systems."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root  # version 1, version 2
        group = base / path.lstrip("/")
        found += [g for g in (group, *group.parents) if g.is_relative_to(base) and g.is_dir()]
    return found


def _number(file):
    return int(file.read_text(encoding="utf-8"))


def fields(path):
    """The numbers of one of the kernel's files, by name, each on its line."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return {line.split()[0]: int(line.split()[1]) for line in lines}


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
            " bfloat16, which training needs: name an Ampere card (8.0) or newer in"
            f" CUDA_VISIBLE_DEVICES, or {USE_THE_CPU}"
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
    """The number of CPU cores that this process may use: of those that it is bound to, what a
    container's quota leaves."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for group in control_groups("cpu"):
        with suppress(OSError, ValueError):  # "max": no limit
            if (group / "cpu.max").exists():
                quota, period = map(int, (group / "cpu.max").read_text(encoding="utf-8").split())
            else:
                quota, period = (_number(group / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
            if quota > 0:
                cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


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
