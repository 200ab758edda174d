"""The GPUs of this machine are counted, those of a cluster tried on its nodes."""

import re

import ray

from dreambooth.machines import cluster, device, gpus

SCRIPT = """
import ray

from dreambooth.cli import UserError
from dreambooth.machines import gpus


def found():
    return [22.0, 78.0]


def refused():
    raise UserError("Tesla T4 has no bfloat16")


if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, num_gpus=2, include_dashboard=False, log_to_driver=False)
    print(gpus.on_each_node(found))
    try:
        gpus.on_each_node(refused)
    except UserError as error:
        print(error)
    taken = ray.util.placement_group([{"GPU": 1}])
    ray.get(taken.ready())
    gpus.SECONDS_FOR_TASKS = 0.5
    print(gpus.on_each_node(found))
"""


def test_gpus_of_a_cluster_are_tried_on_their_nodes(run_script, tmp_path, root):
    """With two GPUs that Ray takes for granted: what a node says of them, an error there as one
    line, and nothing where another job has one of them."""
    script = tmp_path / "gpus_of_a_node.py"
    script.write_text(SCRIPT)
    result = run_script(script, CUDA_VISIBLE_DEVICES="0,1", PYTHONPATH=str(root))
    assert result.returncode == 0, result.stderr
    found, refused, taken = result.stdout.splitlines()
    assert found == "[22.0, 78.0]"
    assert re.fullmatch(r"node \S+: Tesla T4 has no bfloat16", refused)
    assert taken == "[None, None]"


def test_a_node_that_ray_has_lost_has_no_gpus(monkeypatch):
    """Ray still lists it, and a task there would never start. Nor is a node without GPUs asked; one
    whose GPUs are in use has as many that nothing is known of."""
    nodes = [
        {"NodeID": name, "Alive": name != "lost", "Resources": {"CPU": 4.0, "GPU": count}}
        for name, count in {"head": 0.0, "a": 2.0, "busy": 3.0, "lost": 8.0}.items()
    ]
    asked = []

    def start_on_node(node, function, num_gpus):
        asked.append((node["NodeID"], function, num_gpus))
        return node["NodeID"]

    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "wait", lambda tasks, **settings: (["a"], ["busy"]))
    monkeypatch.setattr(ray, "get", {"a": [22.0, 78.0]}.get)
    monkeypatch.setattr(cluster, "start_on_node", start_on_node)
    assert gpus.on_each_node(device.gpu_memory) == [22.0, 78.0, None, None, None]
    assert asked == [("a", device.gpu_memory, 2), ("busy", device.gpu_memory, 3)]


def test_the_command_prints_the_number_of_gpus_and_nothing_else(run_script):
    """For run.sh. Here there are none: conftest.py hides what this machine may have. (Of a cluster:
    test_cluster.py.)"""
    result = run_script("-m", "dreambooth.machines.gpus")
    assert (result.returncode, result.stdout, result.stderr) == (0, "0\n", "")
