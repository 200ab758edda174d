"""Ray's start, for train.py and generate.py: the cluster of RAY_ADDRESS, or this machine."""

import logging
import os

import ray
import ray.data


def start_ray():
    """Connect to the cluster at RAY_ADDRESS, or start Ray on this machine without its dashboard.

    Returns the numbers of GPUs and CPU cores that the cluster has.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or each line of a worker comes twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # the end of a run waits for it
    if not ray.is_initialized():
        own = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        quiet = ray.LoggingConfig(log_level="ERROR")
        ray.init(logging_level=logging.WARNING, logging_config=quiet, **own)
    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = False
    data.execution_options.preserve_order = True  # the same rows in the same order for the same seed
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
