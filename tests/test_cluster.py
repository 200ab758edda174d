"""Ray's start, and the hardware that a run asks for."""

import socket
from unittest.mock import MagicMock

import pytest

from dreambooth import cluster
from dreambooth.cli import UserError


def test_there_is_a_gpu_or_else_a_core_for_each_worker():
    """Otherwise Ray would wait for ever."""
    cluster.check_num_workers(4, 4, 16)
    cluster.check_num_workers(2, 0, 2)
    with pytest.raises(
        UserError, match="--num_workers 5: the cluster has 4 GPUs,.*give --num_workers 4 or less"
    ):
        cluster.check_num_workers(5, 4, 16)
    with pytest.raises(UserError, match="the cluster has 1 GPU,"):
        cluster.check_num_workers(2, 1, 16)
    with pytest.raises(UserError, match="the cluster has 2 CPU cores,"):
        cluster.check_num_workers(3, 0, 2)


@pytest.mark.parametrize(
    ("address", "error"),
    [("auto", ConnectionError("not found")), ("127.0.0.1", ValueError("no port"))],
)
def test_an_address_at_which_ray_finds_no_cluster(monkeypatch, address, error):
    """As RAY_ADDRESS=auto, the README's own, before `ray start`; and what is not an address."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", MagicMock(side_effect=error))
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address}: no Ray cluster"):
        cluster.start_ray()


def test_without_an_address_a_ray_of_its_own_is_started(monkeypatch):
    """Never one that happens to run on this machine, as ray.init() alone would join."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", MagicMock())
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    assert cluster.start_ray() == (2, 8)
    (call,) = cluster.ray.init.call_args_list
    assert call.kwargs["address"] == "local"


def test_an_address_at_which_nothing_listens_is_found_at_once():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "auto", "127.0.0.1"):
            cluster.check_address(address)
    with pytest.raises(OSError):
        cluster.check_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize("argv", [["train.py"], ["-m", "dreambooth.gpus"]])
def test_a_command_with_an_address_at_which_there_is_no_cluster(
    assert_one_line, run_script, train_argv, tmp_path, argv
):
    """Both ways into Ray: a script, and the number of GPUs for run.sh. Ray would try for
    minutes."""
    if argv == ["train.py"]:
        argv = ["train.py", *train_argv(tmp_path / "out")]
    result = run_script(*argv, RAY_ADDRESS="127.0.0.1:1")
    assert_one_line(result, "RAY_ADDRESS=127.0.0.1:1", "ray start --head")
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_gpus_of_this_machine_and_of_a_cluster(run_script, ray_address):
    """There are none: conftest.py hides what this machine may have."""
    for environment in ({}, {"RAY_ADDRESS": ray_address}):
        result = run_script("-m", "dreambooth.gpus", **environment)
        assert result.stdout == "0\n", result.stderr
        assert result.stderr == ""


def test_more_workers_than_the_cluster_has_cores(
    assert_one_line, run_script, train_argv, tmp_path, ray_address
):
    argv = train_argv(tmp_path / "out", num_workers=50)
    result = run_script("train.py", *argv, RAY_ADDRESS=ray_address)
    assert_one_line(result, "--num_workers 50", "2 CPU cores")
    assert list(tmp_path.iterdir()) == []


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(cluster.os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert cluster.num_cores() == 3
    monkeypatch.delattr(cluster.os, "sched_getaffinity")
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 7)
    assert cluster.num_cores() == 7


def test_ray_starts_in_the_background_and_its_errors_come_back(monkeypatch):
    monkeypatch.setattr(cluster, "start_ray", lambda verbose: (2, 8))
    assert cluster.start_ray_in_background().result(timeout=30) == (2, 8)

    def fail(verbose):
        raise UserError("no cluster")

    monkeypatch.setattr(cluster, "start_ray", fail)
    with pytest.raises(UserError, match="^no cluster$"):
        cluster.start_ray_in_background().result(timeout=30)


@pytest.mark.parametrize(
    ("num_workers", "address", "in_driver"),
    [((1, 1), "", True), ((1, 1), "auto", False), ((2, 2), "", False), ((1, 2), "", False)],
)
def test_one_worker_without_a_cluster_needs_no_other_process(
    monkeypatch, num_workers, address, in_driver
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.runs_in_driver(num_workers) == in_driver
    assert (cluster.scaling_config(num_workers, 4, 16).num_workers == 0) == in_driver


def test_on_gpus_each_worker_has_one():
    scaling = cluster.scaling_config((4, 4), num_gpus=4, num_cpus=16)
    assert scaling.num_workers == 4
    assert scaling.use_gpu
    assert scaling.resources_per_worker == {"GPU": 1}


def test_a_range_of_workers_is_ray_trains():
    assert cluster.scaling_config((2, 4), num_gpus=4, num_cpus=16).num_workers == (2, 4)


@pytest.mark.parametrize(
    ("num_workers", "num_cpus", "cores"), [(2, 2, 0.5), (2, 16, 1), (4, 4, 0.5), (3, 4, 0.5)]
)
def test_on_a_cpu_the_workers_leave_half_of_the_cores(num_workers, num_cpus, cores):
    """Ray Data's tasks need them."""
    scaling = cluster.scaling_config((num_workers, num_workers), 0, num_cpus)
    assert not scaling.use_gpu
    assert scaling.resources_per_worker == {"CPU": cores}


class Clock:
    """Time that passes only while a test sleeps."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(cluster.time, "time", lambda: self.now)
        monkeypatch.setattr(cluster.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def requests(monkeypatch):
    """What the autoscaler is asked for."""
    asked = []
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: asked.append(bundles))
    return asked


def test_a_run_waits_for_its_gpus(monkeypatch, capsys, requests):
    """A cluster that grows by itself is asked for them, and no longer once they are there."""
    clock = Clock(monkeypatch)
    monkeypatch.setattr(cluster, "resources", lambda: (2, 8) if clock.now >= 105 else (1, 8))
    assert cluster.wait_for_workers(2, seconds=60) == (2, 8)
    assert clock.now == 105
    assert capsys.readouterr().out == "waiting 60 s for 2 GPUs: there are 1\n"
    assert requests == [[{"GPU": 1}] * 2, []]


def test_a_run_does_not_wait_for_ever(monkeypatch, requests):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(cluster, "resources", lambda: (1, 8))
    with pytest.raises(UserError, match="still 1 GPUs after 60 s"):
        cluster.wait_for_workers(2, seconds=60)
    assert clock.now == 160
    assert requests[-1] == []


def test_a_run_does_not_wait_unless_asked_to(monkeypatch, requests):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(cluster, "resources", lambda: (1, 8))
    with pytest.raises(UserError, match="the cluster has 1 GPU,"):
        cluster.wait_for_workers(2, seconds=0)
    assert clock.now == 100
    assert requests == []


def test_what_ends_a_thread_reaches_whoever_waits_for_it():
    """Also what is no Exception: else the wait would never end."""

    def stop():
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        cluster._in_thread(stop).result(timeout=10)
    assert cluster._in_thread(lambda x: 2 * x, 4).result(timeout=10) == 8


@pytest.fixture
def killed(ray_address, monkeypatch):
    """The types of the processes of Ray that a test would have killed."""
    types = []
    node = cluster.ray._private.worker._global_node
    monkeypatch.setattr(node, "_kill_process_type", lambda name, check_alive: types.append(name))
    assert "monitor" in node.all_processes
    return types


def test_at_its_end_a_script_does_not_wait_for_the_monitor(killed):
    cluster._kill_monitor()
    assert killed == ["monitor"]


def test_without_a_ray_there_is_no_monitor_to_kill(killed, monkeypatch):
    """As at the exit of a script that has stopped its Ray."""
    monkeypatch.setattr(cluster.ray._private.worker, "_global_node", None)
    cluster._kill_monitor()
    assert killed == []


def test_a_run_in_this_process_ends_its_ray_at_exit(killed, monkeypatch):
    shutdown, at_exit = MagicMock(), []
    monkeypatch.setattr(cluster.ray, "shutdown", shutdown)
    monkeypatch.setattr(cluster.atexit, "register", at_exit.append)
    trainer = MagicMock(running_in_local_mode=True)
    assert cluster.fit(trainer) is trainer.fit.return_value
    assert (killed, shutdown.call_count) == ([], 0)
    (stop,) = at_exit
    stop()
    assert killed == ["monitor"]
    shutdown.assert_called_once_with()


@pytest.mark.parametrize("script", ["train", "generate"])
def test_settings_come_before_what_reads_them(run_script, script):
    """OpenMP's, when torch is imported; the garbage collector's threshold, for its objects."""
    code = f"import sys, {script}; print(*sys.modules)"
    modules = run_script("-c", code).stdout.split()
    assert modules.index("dreambooth") < modules.index("torch")
