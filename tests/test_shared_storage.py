"""Paths that every node of a cluster must see."""

from types import SimpleNamespace

import pytest

from dreambooth import shared_storage
from dreambooth.cli import UserError


@pytest.mark.parametrize("here", ["first node", "a head without cores"])
def test_a_node_that_does_not_see_a_path_is_named(monkeypatch, here):
    """Two nodes, of which the second has a disk of its own: where this process is on the first one,
    and where it is on a head that the workers do not use."""
    nodes_here = {"first node": "a", "a head without cores": "h"}
    context = SimpleNamespace(get_node_id=lambda: nodes_here[here])
    monkeypatch.setattr(shared_storage.ray, "get_runtime_context", lambda: context)
    nodes = [
        {"Alive": True, "NodeID": "h", "NodeManagerHostname": "head", "Resources": {}},
        {"Alive": True, "NodeID": "a", "NodeManagerHostname": "first", "Resources": {"CPU": 4}},
        {"Alive": True, "NodeID": "b", "NodeManagerHostname": "second", "Resources": {"CPU": 4}},
        {"Alive": False, "NodeID": "c", "NodeManagerHostname": "dead", "Resources": {"CPU": 4}},
    ]

    class Task:
        def options(self, scheduling_strategy):
            self.node = scheduling_strategy.node_id
            return self

        def remote(self, paths):
            return [path for path in paths if self.node == "b" and path.startswith("/tmp")]

    monkeypatch.setattr(shared_storage.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(shared_storage.ray, "get", lambda results: results)
    monkeypatch.setattr(shared_storage, "NodeAffinitySchedulingStrategy", node_affinity)
    monkeypatch.setattr(shared_storage, "_missing_paths", Task())
    shared_storage.check_shared_storage(["/shared/model"])
    with pytest.raises(UserError, match="node second does not see /tmp/photos"):
        shared_storage.check_shared_storage(["/shared/model", "/tmp/photos"])


def node_affinity(node_id, soft):
    return SimpleNamespace(node_id=node_id)


def test_one_node_needs_no_shared_storage(ray_address, monkeypatch):
    """Nothing is asked of it: this process sees what it sees."""
    asked = []
    monkeypatch.setattr(shared_storage.ray, "get", lambda tasks: asked.extend(tasks) or tasks)
    shared_storage.check_shared_storage(["/nowhere"])
    assert asked == []
