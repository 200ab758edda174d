"""Prints a line when a run waits for a node: Ray Train itself waits silently."""

import time
from concurrent.futures import wait

import ray
from ray.exceptions import RayError

GRACE = 20  # seconds for which a node may be absent without a line


def wait_and_tell(future, scaling_config, interval=5):
    """The result of `future`, a run of Ray Train's with that ScalingConfig. Meanwhile, look every
    `interval` seconds whether the cluster still has room for the workers; print when it has none
    for longer than `GRACE`, and when it has again."""
    short_since, told = None, False
    while not wait([future], timeout=interval).done:
        missing = missing_resource(scaling_config)
        if missing is None:
            if told:
                print("the cluster has room for the workers again", flush=True)
            short_since, told = None, False
            continue
        short_since = short_since or time.monotonic()
        if not told and time.monotonic() - short_since >= GRACE:
            print(f"waiting: {missing}. Ctrl-C, twice, stops; rerun to resume", flush=True)
            told = True
    return future.result()


def missing_resource(scaling_config):
    """What the cluster lacks for the fewest workers allowed, in words; None if nothing."""
    num_workers = scaling_config.num_workers
    fewest = num_workers if isinstance(num_workers, int) else num_workers[0]
    try:
        total = ray.cluster_resources()
    except RayError:  # its head does not answer just now
        return None
    for name, amount in scaling_config.resources_per_worker.items():
        needed = amount * fewest
        if name == "CPU":
            needed *= 2  # half of them for Ray Data's tasks: see cluster.scaling_config
        if total.get(name, 0) < needed:
            return (
                f"{fewest} workers need {needed:g} {name}s, the cluster has {total.get(name, 0):g}"
            )
    return None
