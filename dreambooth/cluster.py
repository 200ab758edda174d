"""Ray's start, for train.py and generate.py: the cluster of RAY_ADDRESS, or this machine.

python -m dreambooth.cluster    # prints the number of GPUs there
"""

import logging
import os
import socket

import ray
import ray.data
import torch

from dreambooth.checks import UserError, run_main

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report, and the end of a run, wait for the next check
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it each line that a worker prints comes twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it is for checkpoints; a run here saves at its end
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "PYTHONWARNINGS": "ignore",  # in the workers: warnings of libraries about libraries
}


def start_ray():
    """Connect to the cluster at RAY_ADDRESS, or start Ray on this machine without its dashboard.

    Returns the numbers of GPUs and CPU cores that the cluster has. UserError: no cluster at that address.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        own = {"address": address} if address else {"address": "local", "include_dashboard": False}
        errors_only = ray.LoggingConfig(log_level="CRITICAL")
        try:
            check_address(address)
            ray.init(logging_level=logging.WARNING, logging_config=errors_only, **own)
        except (OSError, ValueError) as error:  # ValueError: no address at all
            if not address:
                raise
            raise UserError(
                f"RAY_ADDRESS={address}: no Ray cluster answers there; start one with `ray start --head`, or unset it"
            ) from error
    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    data.execution_options.preserve_order = True  # the same rows in the same order for the same seed
    quiet()
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)), int(resources.get("CPU", 1))


def check_address(address):
    """An OSError within seconds where nothing listens at `address`, host:port; Ray itself waits for minutes."""
    host, _, port = (address or "").rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def quiet():
    """No log of Ray's libraries in this process; what fails is raised anyhow. (One of their loggers has no
    name of theirs: it is the root's.)"""
    for library in (None, "ray.data", "ray.train"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def count_gpus():
    """The number of GPUs of the cluster at RAY_ADDRESS, or of this machine (without starting Ray)."""
    return start_ray()[0] if os.environ.get("RAY_ADDRESS") else torch.cuda.device_count()


if __name__ == "__main__":
    run_main(lambda args: print(count_gpus()), None)
