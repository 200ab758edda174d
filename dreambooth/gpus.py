"""The GPUs of this machine or of a cluster, each tried: Ray counts them and does not try them.

python -m dreambooth.gpus    # prints the number of GPUs, of RAY_ADDRESS or of this machine
"""

import os

from dreambooth import hardware
from dreambooth.cli import UserError, run_main

SECONDS_FOR_TASKS = 60  # to start a process per node, which imports torch, on GPUs that are free


def free_memory():
    """GiB free on each GPU of the cluster at RAY_ADDRESS, or (without Ray) of this machine; None
    for a cluster's GPUs that other jobs use. UserError: a GPU that training cannot use."""
    if not os.environ.get("RAY_ADDRESS"):
        return hardware.gpu_memory()
    from dreambooth import cluster  # here: Ray takes seconds

    cluster.start_ray(log_to_driver=False)  # run.sh reads what this prints
    return on_each_node(hardware.gpu_memory)


def on_each_node(look_at_gpus):
    """The lists that `look_at_gpus()` returns on the nodes with GPUs, as one. On each node it is a
    task that asks for all its GPUs; where it does not get them, None stands for each."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    tasks = []
    for node in nodes:
        task = ray.remote(look_at_gpus).options(
            num_gpus=num_gpus(node),
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )
        tasks.append(task.remote())
    done = []
    if tasks:
        done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=SECONDS_FOR_TASKS)
    found = []
    for node, task in zip(nodes, tasks, strict=True):
        found += result_of(task, node) if task in done else [None] * num_gpus(node)
    return found


def num_gpus(node):
    """Of an entry of `ray.nodes()`."""
    return int(node["Resources"]["GPU"])


def result_of(task, node):
    """What a finished task on `node` has returned; its UserError names the node."""
    import ray

    from dreambooth import ray_errors

    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        message = ray_errors.user_error_in(error)
        if message:
            raise UserError(f"node {node['NodeManagerHostname']}: {message}") from None
        raise


if __name__ == "__main__":
    run_main(lambda args: print(len(free_memory())), None)
