"""A run that lacks a node says so."""

import threading
import time
from concurrent.futures import Future

import pytest
from ray.exceptions import RaySystemError
from ray.train import ScalingConfig

from dreambooth import shortage

TWO_GPUS = ScalingConfig(num_workers=2, use_gpu=True, resources_per_worker={"GPU": 1})


@pytest.fixture
def run_while(monkeypatch):
    """Wait for a run whose cluster has, at each look, the next of some resources."""
    monkeypatch.setattr(shortage, "GRACE", 0.05)

    def run(scaling_config, looks, error=None):
        future = Future()
        remaining = list(looks)

        def cluster_resources():
            if len(remaining) > 1:
                return remaining.pop(0)
            if not future.done():
                future.set_exception(error) if error else future.set_result("a result")
            return remaining[0]

        monkeypatch.setattr(shortage.ray, "cluster_resources", cluster_resources)
        return shortage.wait_and_tell(future, scaling_config, interval=0.02)

    return run


def test_one_line_when_a_node_is_missed_and_one_when_it_is_back(run_while, capsys):
    looks = [{"GPU": 2.0}] + 9 * [{"GPU": 1.0}] + 3 * [{"GPU": 2.0}]
    assert run_while(TWO_GPUS, looks) == "a result"
    assert capsys.readouterr().out.splitlines() == [
        "waiting: 2 workers need 2 GPUs, the cluster has 1. Ctrl-C, twice, stops; rerun to resume",
        "the cluster has room for the workers again",
    ]


def test_no_line_while_there_is_room_or_for_a_moment_without(run_while, capsys):
    looks = [{"GPU": 2.0}, {"GPU": 1.0}, {"GPU": 2.0}] * 5
    assert run_while(TWO_GPUS, looks) == "a result"
    assert capsys.readouterr().out == ""


def test_the_errors_of_a_run_are_its_own(run_while):
    with pytest.raises(TimeoutError, match="its own"):
        run_while(TWO_GPUS, [{"GPU": 2.0}], TimeoutError("its own"))


def test_the_wait_ends_with_the_run_and_not_with_the_next_look():
    future = Future()
    start = time.monotonic()
    threading.Timer(0.05, future.set_result, ["a result"]).start()
    assert shortage.wait_and_tell(future, TWO_GPUS, interval=60) == "a result"
    assert time.monotonic() - start < 30


def test_what_is_missing(monkeypatch):
    def missing(scaling_config, resources):
        monkeypatch.setattr(shortage.ray, "cluster_resources", lambda: resources)
        return shortage.missing_resource(scaling_config)

    elastic = ScalingConfig(num_workers=(2, 4), use_gpu=True, resources_per_worker={"GPU": 1})
    assert missing(elastic, {"GPU": 2.0}) is None
    assert missing(elastic, {"GPU": 1.0}) == "2 workers need 2 GPUs, the cluster has 1"
    # On a CPU, Ray Data's tasks need as many cores as the workers.
    on_cpus = ScalingConfig(num_workers=4, resources_per_worker={"CPU": 0.5})
    assert missing(on_cpus, {"CPU": 4.0}) is None
    assert missing(on_cpus, {"CPU": 3.0}) == "4 workers need 4 CPUs, the cluster has 3"
    assert missing(on_cpus, {}) == "4 workers need 4 CPUs, the cluster has 0"


def test_a_head_that_does_not_answer_ends_nothing(monkeypatch):
    def fail():
        raise RaySystemError("no answer")

    monkeypatch.setattr(shortage.ray, "cluster_resources", fail)
    assert shortage.missing_resource(TWO_GPUS) is None
