"""The GPUs of this machine or of a cluster, each tried: Ray counts them and does not try them.

python -m dreambooth.machines.gpus    # prints the number of GPUs, of RAY_ADDRESS or of this machine
"""

import os

from dreambooth.cli import ArgumentParser, UserError, run_main
from dreambooth.machines import device

SECONDS_FOR_TASKS = 60  # to start a process per node, which imports torch, on GPUs that are free


def free_memory_of_all():
    """GiB free on each GPU of the cluster at RAY_ADDRESS, or (without Ray) of this machine, a list;
    None for a cluster's GPUs that other jobs use. UserError: a GPU that training cannot use."""
    if not os.environ.get("RAY_ADDRESS"):
        return device.gpu_memory()
    from dreambooth.machines import cluster  # here: Ray takes seconds

    cluster.start_ray(log_to_driver=False)  # run.sh reads what this prints
    return on_each_node(device.gpu_memory)


def on_each_node(look_at_gpus):
    """The lists that `look_at_gpus()` returns on the nodes with GPUs, as one. On each node it is a
    task that asks for all its GPUs; where it does not get them, None stands for each. UserError:
    that of a task, with the node's name."""
    import ray

    from dreambooth.machines import cluster

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    counts = [int(node["Resources"]["GPU"]) for node in nodes]
    tasks = [
        cluster.start_on_node(node, look_at_gpus, num_gpus=count)
        for node, count in zip(nodes, counts, strict=True)
    ]
    done = ray.wait(tasks, num_returns=len(tasks), timeout=SECONDS_FOR_TASKS)[0] if tasks else []
    found = []
    for node, count, task in zip(nodes, counts, tasks, strict=True):
        try:
            found += ray.get(task) if task in done else [None] * count
        except ray.exceptions.RayError as error:
            user_error = cluster.user_error_in(error)
            if user_error:
                raise UserError(f"node {node['NodeManagerHostname']}: {user_error}") from None
            raise
    return found


if __name__ == "__main__":
    ArgumentParser(__doc__).parse_args()
    run_main(lambda args: print(len(free_memory_of_all())), None)
