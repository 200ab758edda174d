"""Ray: its start, the hardware it finds, and the errors that come back through it.

python -m dreambooth.cluster    # prints the number of GPUs, of RAY_ADDRESS or of this machine
"""

import logging
import os
import re
import socket

import ray
import ray.data
import torch

from dreambooth import logs
from dreambooth.cli import UserError, run_main

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the end of a run waits for the next check
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it, each line that a worker prints appears twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # for checkpoints; a run here saves at its end
    "RAY_DEDUP_LOGS": "0",
}


def start_ray(verbose=False, log_to_driver=True):
    """Connect to the cluster at RAY_ADDRESS, or start Ray on this machine without its dashboard.

    `log_to_driver`: whether what workers print appears here, and what Ray's C++ core logs.

    Returns the numbers of GPUs and CPU cores of the cluster. UserError: no cluster at that address.
    """
    logs.configure(verbose)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        if not log_to_driver:
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        with logs.silent_stderr(verbose):  # where it would say that it has read this level
            _connect(os.environ.get("RAY_ADDRESS"), verbose, log_to_driver)
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = verbose
    data_context.execution_options.preserve_order = True  # the same rows in the same order
    logs.configure(verbose)  # Ray has set levels of its own
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)), int(resources.get("CPU", 1))


def _connect(address, verbose, log_to_driver):
    log_settings = {"log_to_driver": log_to_driver}
    if not verbose:
        log_settings["logging_level"] = logging.WARNING
        log_settings["logging_config"] = ray.LoggingConfig(log_level="CRITICAL")
    if not address:
        ray.init(address="local", include_dashboard=False, **log_settings)
        return
    try:
        check_address(address)
        ray.init(address=address, **log_settings)
    except (OSError, ValueError) as error:  # ValueError: not an address
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there;"
            " start one with `ray start --head`, or unset it"
        ) from error


def check_address(address):
    """An OSError within seconds if nothing listens at `address`, host:port; Ray itself waits for
    minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def check_num_workers(num_workers, num_gpus, num_cpus):
    """There must be a GPU for each worker if the cluster has any, else a CPU core for each."""
    available, resource = (num_gpus, "GPU") if num_gpus else (num_cpus, "CPU core")
    if num_workers > available:
        plural = "s" if available != 1 else ""
        raise UserError(
            f"--num_workers {num_workers}: the cluster has {available} {resource}{plural}, and each"
            f" worker needs one; give --num_workers {available} or less"
        )


def num_cores():
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def user_error_in(error):
    """The message of the `UserError` behind an exception that crossed Ray; None if there is none.

    It is the exception itself or one of its causes. Only where Ray has lost the cause and kept its
    text is it read from that.
    """
    causes = [error]
    while causes[-1] is not None:
        # A RayTaskError has its original exception as an attribute.
        causes.append(getattr(causes[-1], "cause", None) or causes[-1].__cause__)
    for cause in causes:
        if type(cause) is UserError:
            return str(cause)
    in_text = re.findall(rf"\b{UserError.__name__}: (.*)", str(error))
    return in_text[-1] if in_text else None


def training_error(error):
    """The `UserError` behind a failed training; `error` itself if it is not the user's."""
    for cause in getattr(error, "worker_failures", {}).values():
        if "torch.OutOfMemoryError" in f"{type(cause)} {cause}":
            return UserError(
                "out of GPU memory: give --gradient_checkpointing, --param_dtype bf16, --use_lora,"
                " or a smaller --train_batch_size or --resolution"
            )
        message = user_error_in(cause)
        if message:
            return UserError(message)
    return error


def count_gpus():
    """The number of GPUs of the cluster at RAY_ADDRESS, or (without Ray) of this machine."""
    if os.environ.get("RAY_ADDRESS"):
        num_gpus, _ = start_ray()
        return num_gpus
    return torch.cuda.device_count()


if __name__ == "__main__":
    run_main(lambda args: print(count_gpus()), None)
