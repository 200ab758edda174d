"""On several nodes, whether each of them sees the folders that a run reads and writes."""

import os

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dreambooth.cli import UserError


@ray.remote(num_cpus=0)
def _missing_paths(paths):
    return [path for path in paths if not os.path.exists(path)]


def check_shared_storage(paths):
    """Every node must see each of `paths`, which this process sees: a UserError names a node and
    the path that it lacks."""
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    nodes = [node for node in others if node["Resources"].get("CPU")]
    on_node = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    tasks = [_missing_paths.options(scheduling_strategy=node).remote(paths) for node in on_node]
    for node, missing in zip(nodes, ray.get(tasks), strict=True):
        if missing:
            raise UserError(
                f"node {node['NodeManagerHostname']} does not see {missing[0]}:"
                " put it on storage that all nodes share"
            )
