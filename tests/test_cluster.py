"""Ray's start, who gets in, what its nodes get, which errors are the user's, and waiting for it."""

import logging
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import ray
import ray.train
import torch
from ray.train import ScalingConfig

import train
from dreambooth.cli import LOGGERS, OutOfMemory, Stopped, UserError
from dreambooth.machines import cluster, device

# The start.


@pytest.fixture
def ray_init(monkeypatch, tmp_path):
    """`ray.init`, which starts and finds nothing, in a process that has not called it, of a user
    who has never run Ray, with `tmp_path` as home; what `start_ray` sets is undone afterwards."""
    environment, on_sigterm = dict(os.environ), signal.getsignal(signal.SIGTERM)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ["HOME"] = str(tmp_path)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr(ray, "init", MagicMock())
    yield ray.init
    signal.signal(signal.SIGTERM, on_sigterm)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("address", [None, "auto"])
def test_no_file_of_the_current_directory_becomes_a_module_of_the_workers(
    ray_init, root, tmp_path, monkeypatch, address
):
    """Ray tells them to import from the directory that is current when it starts: a numpy.py there
    ended each worker, and Ray started others for ever."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "check_address", lambda address: None)
    if address:
        os.environ["RAY_ADDRESS"] = address
    found = []
    ray_init.side_effect = lambda **settings: found.append(os.getcwd())
    cluster.start_ray()
    assert (found, os.getcwd()) == (["/" if address else str(root)], str(tmp_path))


def test_without_an_address_a_quiet_ray_of_its_own_is_started(ray_init):
    """Never one that happens to run on this machine, as ray.init() alone would join."""
    context = ray.data.DataContext.get_current()
    for verbose in (True, False):
        assert cluster.start_ray(verbose) == (2, 8)
        settings = ray_init.call_args.kwargs
        assert settings["address"] == "local"
        assert ("logging_config" in settings) != verbose
        assert context.enable_progress_bars == verbose
        assert context.execution_options.preserve_order
    assert not any(logging.getLogger(name).isEnabledFor(logging.ERROR) for name in LOGGERS)


def test_rays_processes_outlive_what_asks_the_run_to_stop(ray_init):
    """A terminal that closes sends HUP to all that it has started, `timeout` and some schedulers
    TERM: blocked while they start, they stay so in them. A run needs them for its last checkpoint.
    """

    def blocked():
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return {signal.SIGHUP, signal.SIGTERM} & mask

    ray_init.side_effect = lambda **settings: seen.append(blocked())
    seen = [blocked()]
    cluster.start_ray(False)
    assert [*seen, blocked()] == [set(), {signal.SIGHUP, signal.SIGTERM}, set()]


def test_ray_is_told_of_no_gpu_where_torch_is(ray_init, monkeypatch):
    """torch takes -1 for none, and Ray for one GPU of that name."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    visible = []
    ray_init.side_effect = lambda **settings: visible.append(os.environ["CUDA_VISIBLE_DEVICES"])
    cluster.start_ray()
    assert visible == [""]


def test_ray_starts_in_the_background_and_whatever_ends_the_start_comes_back(monkeypatch):
    """Also what is no Exception: else the wait would never end."""

    def start(error):
        monkeypatch.setattr(cluster, "start_ray", MagicMock(side_effect=error, return_value=(2, 8)))
        return cluster.start_ray_in_background().result(timeout=30)

    assert start(None) == (2, 8)
    with pytest.raises(UserError, match="^no cluster$"):
        start(UserError("no cluster"))
    with pytest.raises(SystemExit):
        start(SystemExit(3))


@pytest.mark.parametrize(
    ("address", "error"),
    [
        ("auto", ConnectionError("not found")),  # the README's, before `ray start`
        ("127.0.0.1", ValueError("no port")),
        ("127.0.0.1:1", AssertionError("Ray would try for minutes")),
    ],
)
def test_a_run_without_a_cluster_at_its_address_leaves_nothing(
    ray_init, monkeypatch, train_args, tmp_path, address, error
):
    monkeypatch.setenv("RAY_ADDRESS", address)
    ray_init.side_effect = error
    args = train_args(tmp_path / "out" / "model")
    with pytest.raises(UserError, match=f"^RAY_ADDRESS={address}: no Ray cluster.*`ray start"):
        train.main(args)
    assert not (tmp_path / "out").exists()


# Who gets in.


def test_a_new_ray_asks_for_a_token_that_only_its_user_can_read(ray_init, tmp_path):
    """It is there when Ray starts, which would itself make one that all can read; and Ray asks for
    it by default."""
    token, tokens = tmp_path / ".ray" / "auth_token", []

    def init(**settings):
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert "RAY_AUTH_MODE" not in os.environ
        tokens.append(token.read_text())

    ray_init.side_effect = init
    cluster.start_ray()
    cluster.start_ray()
    assert re.fullmatch("[0-9a-f]{64}", tokens[0])
    assert tokens[1] == tokens[0]


CLIENT = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit(3)
"""


def test_a_client_without_the_token_is_refused(ray_address, tmp_path):
    """By a Ray that was started as the scripts start theirs: one with another token, too. The
    user's own client gets in."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}

    def connect(**changes):
        command = [sys.executable, "-c", CLIENT, ray_address]
        env = {**environment, **changes}
        return subprocess.run(command, env=env, capture_output=True, timeout=120).returncode

    assert connect(RAY_AUTH_MODE="token") == 0
    assert connect(HOME=str(tmp_path)) == 3
    assert connect(HOME=str(tmp_path), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=64 * "a") == 3


# What the nodes get.

SHIPPED = """
import os, sys

import ray

from dreambooth.machines import cluster, gpus


def modules():
    import dreambooth.dataset
    import dreambooth.run.plan

    return dreambooth.dataset.__file__, dreambooth.run.plan.__file__


os.chdir(sys.argv[1])  # Ray's workers would look for modules in this process's directory
print(len(gpus.free_memory_of_all()))
print(*ray.get(ray.remote(modules).remote()), sep="\\n")
"""


def test_the_nodes_of_a_cluster_get_the_whole_package(run_script, ray_address, root, tmp_path):
    """They need no checkout. The process that has connected prints what it was asked for, and
    nothing else: run.sh reads the number of GPUs, which are none here (conftest.py hides them)."""
    result = run_script("-c", SHIPPED, tmp_path, RAY_ADDRESS=ray_address)
    assert (result.returncode, result.stderr) == (0, "")
    num_gpus, *files = result.stdout.splitlines()
    assert num_gpus == "0"
    for file, module in zip(files, ["dataset.py", "run/plan.py"], strict=True):
        assert file.endswith(f"/dreambooth/{module}")
        assert not file.startswith(str(root))


# What they must have and see.


def test_there_is_a_gpu_or_else_a_core_for_each_worker(train_here, tmp_path):
    """Otherwise Ray would wait for ever. Nothing is left of a run that is refused."""
    cluster.check_num_workers(4, 4, 16)
    cluster.check_num_workers(2, 0, 2)
    for resources, has in [
        ((5, 4, 16), "4 GPUs, .*pass --num_workers 4 or less"),
        ((5, 1, 16), "1 GPU, "),
        ((5, 0, 0), "0 CPU cores, .*; start nodes with some"),
    ]:
        with pytest.raises(UserError, match=f"^--num_workers 5: the cluster has {has}"):
            cluster.check_num_workers(*resources)
    with pytest.raises(UserError, match="--num_workers 50: the cluster has 2 CPU cores, "):
        train_here(tmp_path / "out" / "model", num_workers=50)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def growing(monkeypatch):
    """A cluster with one GPU, a second one 5 seconds after the start, and seconds that pass only
    while one sleeps. growing.requests is what its autoscaler is asked for."""
    growing = SimpleNamespace(now=100.0, requests=[])

    def sleep(seconds):
        growing.now += seconds

    def request_resources(bundles):
        growing.requests.append(bundles)

    monkeypatch.setattr(cluster.time, "time", lambda: growing.now)
    monkeypatch.setattr(cluster.time, "sleep", sleep)
    monkeypatch.setattr(cluster, "resources", lambda: (2 if growing.now >= 105 else 1, 8))
    monkeypatch.setattr(cluster, "request_resources", request_resources)
    return growing


def test_a_run_waits_for_its_gpus_if_asked_to_and_not_for_ever(growing, monkeypatch, capsys):
    """A cluster that grows by itself is asked for them, and no longer once the wait is over. A Ray
    of this machine alone never grows."""
    for address, seconds, message in (
        ("", 60, "still 1 GPUs after 0 s: more can only join a cluster"),
        ("auto", 0, "the cluster has 1 GPU,"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=message):
            cluster.wait_for_workers(2, seconds)
    assert (growing.now, growing.requests) == (100, [])
    assert cluster.wait_for_workers(2, seconds=60) == (2, 8)
    assert growing.now == 105
    assert capsys.readouterr().out == "waiting 60 s for 2 GPUs: there are 1\n"
    with pytest.raises(UserError, match="still 2 GPUs after 60 s: pass --num_workers 2"):
        cluster.wait_for_workers(3, seconds=60)
    assert growing.now == 165
    assert growing.requests == [2 * [{"GPU": 1}], [], 3 * [{"GPU": 1}], []]


def test_one_worker_without_a_cluster_needs_no_other_process(monkeypatch):
    for address in ("", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        for num_workers in ((1, 1), (2, 2), (1, 2)):
            in_driver = (address, num_workers) == ("", (1, 1))
            assert cluster.runs_in_driver(num_workers) == in_driver
            assert (cluster.scaling_config(num_workers, 4, 16).num_workers == 0) == in_driver


def test_each_worker_has_a_gpu_or_its_share_of_half_of_the_cores():
    """Ray Data's tasks need the other half."""
    for num_workers, num_gpus, num_cpus, resources in [
        (4, 4, 16, {"GPU": 1}),
        (2, 0, 2, {"CPU": 0.5}),
        (2, 0, 16, {"CPU": 1}),
        (3, 0, 4, {"CPU": 0.5}),
    ]:
        scaling = cluster.scaling_config((num_workers, num_workers), num_gpus, num_cpus)
        assert scaling.num_workers == num_workers
        assert scaling.use_gpu == bool(num_gpus)
        assert scaling.resources_per_worker == resources
    assert cluster.scaling_config((2, 4), num_gpus=4, num_cpus=16).num_workers == (2, 4)


@pytest.mark.parametrize("here", ["a", "h"])
def test_a_node_that_does_not_see_a_path_is_named(monkeypatch, here):
    """Of two nodes with cores, "b" has a disk of its own; this process is on the other one, or on a
    head without cores, which no worker uses, and which has one as well. A node that Ray has lost
    cannot be asked."""
    nodes = [
        {"NodeID": name, "NodeManagerHostname": name, "Alive": name != "dead", "Resources": cores}
        for name, cores in {"h": {}, "a": {"CPU": 4}, "b": {"CPU": 4}, "dead": {"CPU": 4}}.items()
    ]

    def start_on_node(node, function, paths):
        assert node["Alive"]
        return [path for path in paths if node["NodeID"] in "bh" and path.startswith("/tmp")]

    context = SimpleNamespace(get_node_id=lambda: here)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get", lambda results: results)
    monkeypatch.setattr(cluster, "start_on_node", start_on_node)
    cluster.check_shared_storage(["/shared/model"])
    with pytest.raises(UserError, match="^node b does not see /tmp/photos: "):
        cluster.check_shared_storage(["/shared/model", "/tmp/photos"])


def test_a_node_is_asked_and_the_only_one_is_not(ray_address, monkeypatch, tmp_path):
    """This process sees what its own node sees."""
    (node,) = ray.nodes()
    paths = [str(tmp_path), "/nowhere"]
    task = cluster.start_on_node(node, cluster.missing_paths, paths)
    assert ray.get(task) == ["/nowhere"]
    monkeypatch.setattr(cluster, "start_on_node", MagicMock(side_effect=AssertionError))
    cluster.check_shared_storage(paths)


# Errors that come back.


def chain(error, *causes):
    """`error` with the first of `causes` as its cause, that with the next one as its own, ..."""
    effect = error
    for cause in causes:
        effect.__cause__ = cause
        effect = cause
    return error


def task_error(cause):
    return ray.exceptions.RayTaskError("map", "Traceback ...", cause)


def failed_workers(*errors):
    """What `fit` raises where these workers have failed."""
    return ray.train.WorkerGroupError("2 workers", dict(enumerate(errors)))


def test_each_kind_of_user_error_arrives_from_another_process(ray_address):
    """As Ray raises it; where a worker has raised it; and where Ray has kept its text alone."""

    @ray.remote
    def fail(cls):
        raise cls("a.png: gone")

    for cls in (UserError, *UserError.__subclasses__()):
        if issubclass(cls, ray.exceptions.RayError):
            continue  # which Ray makes, of an error of this class and its trace
        with pytest.raises(ray.exceptions.RayTaskError) as raised:
            ray.get(fail.remote(cls))
        for error in (raised.value, RuntimeError(str(raised.value))):
            for found in (
                cluster.user_error_in(error),
                cluster.training_error(failed_workers(KeyError("rank 0 waits"), error)),
                cluster.training_error(ray.train.ControllerError(error)),
            ):
                assert (type(found), str(found)) == (cls, "a.png: gone")


def test_a_user_error_is_found_among_the_causes():
    """In a text, which is a traceback, the last one is it."""
    gone = UserError("a.png: gone")
    for error in (
        gone,
        chain(RuntimeError("task failed"), ValueError("batch 3"), gone),
        chain(RuntimeError("worker failed"), task_error(gone)),
        task_error(chain(RuntimeError("in the map function"), gone)),
    ):
        assert cluster.user_error_in(error) is cluster.training_error(error) is gone
    text = (
        "dreambooth.cli.UserError: first\n\nThe above ...\ndreambooth.cli.Stopped: second\n\nmore"
    )
    found = cluster.user_error_in(RuntimeError(text))
    assert (type(found), str(found)) == (Stopped, "second")


def test_a_user_error_ends_the_run_and_a_bug_or_a_lost_worker_does_not():
    """Then Ray Train starts the workers again."""
    after_exception = cluster.NoRetryForUserErrors().after_exception
    with pytest.raises(UserError, match="^a.png: gone$"):
        after_exception(None, {0: KeyError("bug"), 1: UserError("a.png: gone")})
    for error in (
        ValueError("shape mismatch"),
        RuntimeError("another_library.UserError: of its own; Stopped: an actor"),
        chain(RuntimeError("task failed"), KeyError("bug")),
        task_error(KeyError("bug")),
        ray.exceptions.ActorDiedError(),
        failed_workers(ValueError("shape mismatch")),
    ):
        assert cluster.user_error_in(error) is cluster.training_error(error) is None
        after_exception(None, {0: error})


def test_gpus_and_memory_that_do_not_suffice_are_user_errors_with_the_remedies():
    """Their memory, whoever asks for it; and what the libraries say of an old driver."""
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    for failure in (
        memory,
        RuntimeError("torch.OutOfMemoryError: CUDA out of memory"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Last error:\nCuda failure 2 'out of memory'"),
    ):
        found = cluster.training_error(failed_workers(failure))
        assert type(found) is OutOfMemory
        assert "--gradient_checkpointing" in str(found)
    allocator = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    found = cluster.training_error(failed_workers(allocator))
    assert type(found) is OutOfMemory
    assert "GPU" not in str(found)
    for text in (
        "nccl2 requires at least one CUDA device",
        "The NVIDIA driver on your system is too old (found version 12020).",
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version",
    ):
        for failure in (ray.train.ControllerError, failed_workers):
            found = cluster.training_error(failure(RuntimeError(text)))
            assert type(found) is UserError
            assert "NVIDIA's driver" in str(found)


# A run, and waiting for it.


@pytest.mark.parametrize("in_this_process", [True, False])
def test_fit_raises_the_users_error_and_else_what_failed(ray_address, monkeypatch, in_this_process):
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    trainer = MagicMock(running_in_local_mode=in_this_process)
    bug = failed_workers(KeyError("bug"))
    for failure, expected in (
        (failed_workers(UserError("a.png: gone")), UserError),
        (UserError("a.png: gone"), UserError),
        (bug, ray.train.WorkerGroupError),
    ):
        trainer.fit.side_effect = failure
        with pytest.raises(cluster.FAILURES) as raised:
            cluster.fit(trainer)
        assert type(raised.value) is expected
    assert raised.value is bug


@pytest.mark.parametrize(
    ("num_nodes", "num_workers", "watches"),
    [(1, 2, False), (1, (1, 2), True), (2, 2, True), (2, (1, 2), True)],
)
def test_notices_of_preemption_are_listened_for_unless_one_node_is_all_there_will_be(
    monkeypatch, num_nodes, num_workers, watches
):
    """The node that the workers of an elastic run would move to may be there later."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)  # and unset again after the test
    monkeypatch.setattr(ray, "nodes", lambda: [{}] * num_nodes)
    trainer = MagicMock(running_in_local_mode=False)
    trainer.scaling_config.num_workers = num_workers
    assert cluster.fit(trainer) is trainer.fit.return_value
    assert os.environ.get(name, "1") == str(int(watches))


def test_a_run_in_this_process_ends_its_ray_at_exit(ray_address, monkeypatch):
    """Without the second for each of its processes, which have TERM blocked: they are killed."""
    at_exit, ended = [], []
    node = ray._private.worker._global_node
    monkeypatch.setattr(node, "kill_all_processes", None)  # and as it was after the test
    kill = type(node), "kill_all_processes", lambda node, **settings: ended.append(settings)
    monkeypatch.setattr(*kill)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("Ray"))
    monkeypatch.setattr(cluster.atexit, "register", at_exit.append)
    trainer = MagicMock(running_in_local_mode=True)
    assert cluster.fit(trainer) is trainer.fit.return_value
    assert ended == []
    (stop,) = at_exit
    stop()
    assert ended == ["Ray"]
    node.kill_all_processes(check_alive=False, allow_graceful=True)  # as Ray's own shutdown does
    assert ended == ["Ray", {"check_alive": False}]
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    stop()  # it has been stopped already
    assert ended == ["Ray", {"check_alive": False}, "Ray"]


TWO_GPUS = ScalingConfig(num_workers=2, use_gpu=True, resources_per_worker={"GPU": 1})


@pytest.fixture
def run_while(monkeypatch):
    """Wait for a run whose cluster has, at each look, the next of some numbers of GPUs."""
    monkeypatch.setattr(cluster, "GRACE", 0.05)

    def run(*gpus):
        future, looks = Future(), iter(gpus)

        def cluster_resources():
            count = next(looks, None)
            if count is None and not future.done():
                future.set_result("a result")
            return {"GPU": count or gpus[-1]}

        monkeypatch.setattr(ray, "cluster_resources", cluster_resources)
        assert cluster.wait_and_tell(future, TWO_GPUS, interval=0.02) == "a result"

    return run


def test_one_line_when_a_node_is_missed_and_one_when_it_is_back(run_while, capsys):
    """And none for a moment without it."""
    run_while(2, *9 * [1], *3 * [2])
    assert capsys.readouterr().out.splitlines() == [
        "waiting: 2 workers need 2 GPUs, the cluster has 1. Ctrl-C twice stops; rerun to resume",
        "the cluster has room for the workers again",
    ]
    run_while(*5 * [2, 1, 2])
    assert capsys.readouterr().out == ""


def test_the_wait_ends_with_the_run_and_not_with_the_next_look():
    future = Future()
    start = time.monotonic()
    threading.Timer(0.05, future.set_result, ["a result"]).start()
    assert cluster.wait_and_tell(future, TWO_GPUS, interval=60) == "a result"
    assert time.monotonic() - start < 30


def test_what_is_missing(monkeypatch):
    """Nothing, where the head does not answer just now."""

    def missing(scaling_config, **resources):
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
        return cluster.missing_resource(scaling_config)

    elastic = ScalingConfig(num_workers=(2, 4), use_gpu=True, resources_per_worker={"GPU": 1})
    assert missing(elastic, GPU=2.0) is None
    assert missing(elastic, GPU=1.0) == "2 workers need 2 GPUs, the cluster has 1"
    # On a CPU, Ray Data's tasks need as many cores as the workers.
    on_cpus = ScalingConfig(num_workers=4, resources_per_worker={"CPU": 0.5})
    assert missing(on_cpus, CPU=4.0) is None
    assert missing(on_cpus, CPU=3.0) == "4 workers need 4 CPUs, the cluster has 3"
    assert missing(on_cpus) == "4 workers need 4 CPUs, the cluster has 0"
    silent = MagicMock(side_effect=ray.exceptions.RaySystemError("no answer"))
    monkeypatch.setattr(ray, "cluster_resources", silent)
    assert cluster.missing_resource(TWO_GPUS) is None


# Machines with odd homes and folders.


def test_without_a_home_the_token_is_in_the_environment(ray_init, monkeypatch):
    """As in a container that runs as a user without one."""
    for home in ("/proc/nobody", "/dev/null"):
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ["HOME"] = home
        cluster.start_ray()
        assert re.fullmatch("[0-9a-f]{64}", os.environ["RAY_AUTH_TOKEN"])


@pytest.mark.parametrize("name", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_that_does_not_hold_rays_sockets_is_named(ray_init, tmp_path, name):
    os.environ.pop("RAY_TMPDIR", None)
    deep = tmp_path / ("d" * 60)
    os.environ[name] = str(deep)
    with pytest.raises(UserError, match=f"{name} .*cannot write there; set RAY_TMPDIR"):
        cluster.start_ray()
    deep.mkdir()
    with pytest.raises(UserError, match=f"{name} .*too long for Ray's sockets; set RAY_TMPDIR"):
        cluster.start_ray()
    os.environ[name] = "/tmp"
    assert cluster.start_ray() == (2, 8)


@pytest.mark.parametrize(
    ("address", "tried"),
    [
        ("10.0.0.1:7001", ("10.0.0.1", 7001)),
        ("ray://head:10001", ("head", 10001)),
        ("[fd00::1]:6379", ("fd00::1", 6379)),
    ],
)
def test_an_address_of_any_kind_is_tried(monkeypatch, address, tried):
    connect = MagicMock()
    monkeypatch.setattr(cluster.socket, "create_connection", connect)
    cluster.check_address(address)
    assert connect.call_args.args == (tried,)


def test_workers_need_a_core_beside_that_of_the_data(monkeypatch):
    """Else they would wait for ever."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UserError, match="one CPU core, and reading images takes another"):
        cluster.scaling_config((1, 1), 0, 1)
    assert cluster.scaling_config((1, 1), 0, 2).num_workers == 1


def test_on_macos_ray_does_not_look_at_tmpdir(ray_init, monkeypatch):
    """Which is set there, and longer than a socket's path may be."""
    os.environ.pop("RAY_TMPDIR", None)
    os.environ["TMPDIR"] = "/var/folders/" + "x" * 40
    monkeypatch.setattr(cluster.sys, "platform", "darwin")
    assert cluster.start_ray() == (2, 8)


@pytest.mark.parametrize(
    ("address", "error", "line"),
    [
        ("", "Failed to connect to GCS.\nmore", "Ray did not start .Failed to connect .*try again"),
        ("head:1", "Version mismatch: It was\n of 3.12", "RAY_ADDRESS=head:1: Version .*3.12"),
    ],
)
def test_a_ray_that_does_not_start_or_has_another_python_is_one_line(
    ray_init, monkeypatch, address, error, line
):
    os.environ["RAY_ADDRESS"] = address
    monkeypatch.setattr(cluster, "check_address", lambda address: None)
    ray_init.side_effect = RuntimeError(error)
    with pytest.raises(UserError, match=line) as found:
        cluster.start_ray()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_script_on_ray_ends_on_term_without_a_trace(ray_init, in_background):
    if in_background:
        cluster.start_ray_in_background().result(timeout=30)
    else:
        cluster.start_ray()
    with pytest.raises(SystemExit) as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143


def test_a_token_that_the_user_names_is_the_one(monkeypatch, tmp_path):
    """No other is made beside it."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        monkeypatch.setenv(name, "x")
        cluster.create_token()
        assert not list(tmp_path.iterdir())


def test_a_folder_for_sockets_may_be_as_long_as_they_leave(monkeypatch, tmp_path):
    """39 characters of 107."""
    for length, fits in ((39, True), (40, False)):
        folder = "/tmp/" + "d" * (length - 5)
        os.makedirs(folder, exist_ok=True)
        monkeypatch.setenv("RAY_TMPDIR", folder)
        try:
            if fits:
                cluster.check_temp_dir()
                monkeypatch.setenv("RAY_TMPDIR", os.path.relpath(folder))
                cluster.check_temp_dir()
                assert os.environ["RAY_TMPDIR"] == folder
            else:
                with pytest.raises(UserError, match="too long"):
                    cluster.check_temp_dir()
        finally:
            os.rmdir(folder)


def test_a_gpu_that_cannot_be_used_is_found_before_ray_starts(ray_init, monkeypatch):
    """That of this machine; with a cluster the GPUs are elsewhere."""
    refused = MagicMock(side_effect=UserError("there is a GPU, but PyTorch cannot use it"))
    monkeypatch.setattr(device, "check_driver", refused)
    with pytest.raises(UserError, match="there is a GPU"):
        cluster.start_ray()
    assert not ray_init.called
    os.environ["RAY_ADDRESS"] = "auto"
    assert cluster.start_ray() == (2, 8)
