"""Ray: starting or joining a cluster, waiting for its nodes, and user errors raised on them."""

import atexit
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, wait
from contextlib import chdir, suppress
from pathlib import Path

import ray
import ray.data
import ray.exceptions
import ray.train
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import dreambooth
from dreambooth.cli import OutOfMemory, UserError, configure_logs, first_line, silent_stderr
from dreambooth.machines import device

SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # the end of a run waits for the next check
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # with it, each line that a worker prints appears twice
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # a node may be lost while workers start
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # and then nobody answers
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",  # no dashboard: do not look for it
    "RAY_DEDUP_LOGS": "0",
    "RAY_local_fs_capacity_threshold": "0.99",  # not 0.95, with a line every 10 seconds above it
    "RAY_worker_niceness": "0",  # beside other programs, workers get their share of the cores
}
PACKAGE = Path(dreambooth.__file__).parent  # its folder, which the nodes get
# Characters of the folder for temporary files: a socket's path may have 107, and Ray's adds up to
# /ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.
MAX_TEMP_DIR = 107 - len("/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
GRACE = 20  # seconds for which a node may be absent without a line
FAILURES = (  # what fit() raises
    ray.train.TrainingFailedError, ray.exceptions.RayError, RuntimeError, ValueError,
)  # fmt: skip
UNUSABLE_GPU = (  # in the texts of NCCL, torch and CUDA
    "requires at least one CUDA device|driver on your system is too old"
    "|driver version is insufficient"
)


def start_ray(verbose=False, log_to_driver=True):
    """Connect to the cluster at RAY_ADDRESS, or start Ray on this machine without its dashboard.

    `log_to_driver`: whether what workers print appears here, and what Ray's C++ core logs.

    Returns the numbers of GPUs and CPU cores of the cluster. UserError: no cluster at that address,
    or a GPU of this machine that cannot be used.
    """
    configure_logs(verbose)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        device.check_driver()
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "-1":  # which Ray would count as a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if not ray.is_initialized():
        if not log_to_driver:
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Ray would say that it has read this level. (Not in a thread, which train.py starts it in:
        # there it would hide what the main thread says meanwhile.)
        with silent_stderr(verbose=verbose or log_to_driver):
            _connect(address, verbose, log_to_driver)
    data_context = ray.data.DataContext.get_current()
    data_context.enable_progress_bars = verbose
    data_context.execution_options.preserve_order = True  # the same rows in the same order
    configure_logs(verbose)  # Ray has set levels of its own
    if threading.current_thread() is threading.main_thread():
        _exit_on_term()
    return resources()


def resources():
    """The numbers of GPUs and CPU cores of the cluster, now."""
    total = ray.cluster_resources()
    return int(total.get("GPU", 0)), int(total.get("CPU", 0))


def _exit_on_term():
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # no trace of Ray's


def start_ray_in_background(verbose=False):
    """`start_ray` in a thread, as it mostly waits; returns a future of its result. For the main
    thread."""
    _exit_on_term()
    return _in_thread(start_ray, verbose)


def _in_thread(function, *args):
    """Call `function` in a thread for which nobody waits at the end; returns a future."""
    future = Future()

    def call():
        try:
            future.set_result(function(*args))
        except BaseException as error:  # whoever waits for the result must hear of any
            future.set_exception(error)
        threading.Event().wait()  # Linux kills Ray's processes with the thread that started them

    threading.Thread(target=call, daemon=True).start()
    return future


def fit(trainer):
    """`trainer.fit()`, in a thread unless it runs in this process: Ray Train would otherwise take
    over Ctrl-C. What fails is one of FAILURES; where the user caused it, a UserError."""
    try:
        if trainer.running_in_local_mode:
            result = trainer.fit()  # [10]
            # At exit, before Ray's own shutdown, which waits for what other processes print: none
            # does.
            atexit.register(_stop_ray)
            return result
        # One node, and no more to come: its preemption ends the run, nobody could answer a notice.
        if len(ray.nodes()) < 2 and isinstance(trainer.scaling_config.num_workers, int):
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        return wait_and_tell(_in_thread(trainer.fit), trainer.scaling_config)  # [10]
    except FAILURES as error:
        raise training_error(error) or error from None


def scaling_config(num_workers, num_gpus, num_cpus):
    """Ray Train's ScalingConfig for a range (minimum, maximum) of workers."""
    if runs_in_driver(num_workers):
        return ray.train.ScalingConfig(num_workers=0)
    if not num_gpus and num_cpus < 2:
        raise UserError("Ray has one CPU core, and reading images takes another: add a node")
    fewest, most = num_workers
    # On a CPU the workers reserve at most half of the cores: Ray Data's tasks need the rest, and
    # would wait for ever if all were reserved. Halved, not divided: 1/2, 1/4 ... add up exactly.
    cpus = 1.0
    while cpus * most > num_cpus / 2:
        cpus /= 2
    return ray.train.ScalingConfig(
        num_workers=most if fewest == most else (fewest, most),
        use_gpu=bool(num_gpus),
        resources_per_worker={"GPU": 1} if num_gpus else {"CPU": cpus},
    )


def runs_in_driver(num_workers):
    """Whether training needs no worker process: one worker, and no cluster to run it on. In its
    local mode, Ray Train then calls train_fn in this process and starts no others."""
    return num_workers == (1, 1) and not os.environ.get("RAY_ADDRESS")


def _connect(address, verbose, log_to_driver):
    log_settings = {"log_to_driver": log_to_driver}
    if not verbose:
        log_settings["logging_level"] = logging.WARNING
        log_settings["logging_config"] = ray.LoggingConfig(log_level="CRITICAL")
    if not address:
        create_token()
        check_temp_dir()
        # Block these in Ray's processes, which inherit the mask: terminals and schedulers send them
        # to every process of a job, and the run needs Ray until its checkpoint is written.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})
        try:
            cores = device.num_cores()  # Ray would count all of the machine's, bound to them or not
            # Ray's workers import from the current directory, where a numpy.py of the user's would
            # take the place of NumPy. (Flags that are paths are absolute by now.)
            with chdir(PACKAGE.parent):
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **log_settings)
        except Exception as error:  # a time-out of Ray's is of no class of its own
            raise UserError(
                f"Ray did not start ({first_line(error)}): the machine may be busy, or out of"
                " memory; try again, with --verbose to see what Ray says"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        atexit.register(_kill_at_shutdown)
        return
    package = {"py_modules": [str(PACKAGE)]}  # the nodes need not have this checkout
    try:
        check_address(address)
        with chdir("/"):  # where no module is, and no checkout that the nodes would prefer
            ray.init(address=address, runtime_env=package, **log_settings)
    except (OSError, ValueError) as error:  # ValueError: not an address
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there; start one with"
            " `ray start --head`, or unset it; a cluster with a token answers to"
            " RAY_AUTH_MODE=token and its ~/.ray/auth_token"
        ) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise UserError(f"RAY_ADDRESS={address}: {' '.join(str(error).split())}") from error
    except ray.exceptions.AuthenticationError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: the cluster wants its token: copy its ~/.ray/auth_token here"
        ) from error


def _kill_at_shutdown():
    """Let `ray.shutdown` kill the processes of a Ray that this process has started. It would send
    each a TERM, which they have blocked, and wait a second for its end. (Private names of Ray's;
    there is no public one.)"""
    node = ray._private.worker._global_node
    if node is not None:
        kill = type(node).kill_all_processes
        node.kill_all_processes = lambda **graceful: kill(node, check_alive=False)


def _stop_ray():
    _kill_at_shutdown()
    ray.shutdown()


def create_token():
    """Make the token with which Ray asks its clients who they are, readable by this user alone: Ray
    itself would make it readable by all. Where there is no home directory to write to, as in many
    containers, it is in the environment of this process and its children alone."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        token = Path.home() / ".ray" / "auth_token"
        if token.exists():
            token.read_bytes()  # raises where it is another user's
            return
        token.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(token, "xb", opener=_for_the_user_alone) as file:
            file.write(secrets.token_hex(32).encode())
    except (OSError, RuntimeError):  # the latter if the user has no home at all
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def check_temp_dir():
    """Ray's sockets must fit the folder for temporary files: a UserError names the variable."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)  # as Ray does
    name = next((name for name in names if name in os.environ), None)
    folder = os.environ[name] if name else "/tmp"
    where = f"{name} {folder}" if name else folder
    remedy = "set RAY_TMPDIR to a short path that can be written to"
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{where}: Ray cannot write there; {remedy}")
    if len(os.path.abspath(folder)) > MAX_TEMP_DIR:
        raise UserError(f"{where} is too long for Ray's sockets; {remedy}")
    if name:
        os.environ[name] = os.path.abspath(folder)  # Ray's processes run elsewhere


def _for_the_user_alone(path, flags):
    return os.open(path, flags, 0o600)


def check_address(address):
    """An OSError within seconds if nothing listens at `address`, host:port; Ray itself waits for
    minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def wait_for_workers(num_workers, seconds):
    """The numbers of GPUs and CPU cores of the cluster, which must suffice for `num_workers`; with
    `seconds`, as soon as there is a GPU for each, which a cluster that grows by itself is asked
    for. UserError: there are too few, or still too few after that time."""
    num_gpus, num_cpus = resources()
    waits = seconds if os.environ.get("RAY_ADDRESS") else 0  # this machine alone does not grow
    deadline = time.time() + waits
    if waits and num_gpus < num_workers:
        print(f"waiting {waits} s for {num_workers} GPUs: there are {num_gpus}", flush=True)
        request_resources(bundles=[{"GPU": 1}] * num_workers)
    while num_gpus < num_workers and time.time() < deadline:
        time.sleep(1)
        num_gpus, num_cpus = resources()
    if waits:
        request_resources(bundles=[])  # withdraws the request
    if seconds and num_gpus < num_workers:
        remedy = f"pass --num_workers {num_gpus}" if num_gpus else "`ray status` may say why"
        if not waits:
            remedy = "more can only join a cluster (RAY_ADDRESS)"
        raise UserError(f"still {num_gpus} GPUs after {waits} s: {remedy}")
    check_num_workers(num_workers, num_gpus, num_cpus)
    return num_gpus, num_cpus


def check_num_workers(num_workers, num_gpus, num_cpus):
    """There must be a GPU for each worker if the cluster has any, else a CPU core for each."""
    available, resource = (num_gpus, "GPU") if num_gpus else (num_cpus, "CPU core")
    if num_workers > available:
        plural = "s" if available != 1 else ""
        remedy = f"pass --num_workers {available} or less" if available else "start nodes with some"
        raise UserError(
            f"--num_workers {num_workers}: the cluster has {available} {resource}{plural}, and each"
            f" worker needs one; {remedy}"
        )


def wait_and_tell(future, scaling_config, interval=5):
    """The result of `future`, the run of a trainer with this ScalingConfig. Ray Train says nothing
    while it waits for lost nodes: every `interval` seconds, look whether the cluster has room for
    the workers, and print when it has had none for `GRACE` seconds, and when it has again."""
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
            print(f"waiting: {missing}. Ctrl-C twice stops; rerun to resume", flush=True)
            told = True
    return future.result()


def missing_resource(scaling_config):
    """What the cluster lacks for the fewest workers allowed, in words; None if nothing."""
    num_workers = scaling_config.num_workers
    fewest = num_workers if isinstance(num_workers, int) else num_workers[0]
    try:
        total = ray.cluster_resources()
    except ray.exceptions.RayError:  # its head does not answer just now
        return None
    for name, amount in scaling_config.resources_per_worker.items():
        needed = amount * fewest
        if name == "CPU":
            needed *= 2  # half of them for Ray Data's tasks: see `scaling_config`
        if total.get(name, 0) < needed:
            return (
                f"{fewest} workers need {needed:g} {name}s, the cluster has {total.get(name, 0):g}"
            )
    return None


def start_on_node(node, function, *args, num_gpus=0):
    """Start `function(*args)` as a task on `node`, an entry of `ray.nodes()`; returns its
    reference."""
    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(function).options(num_cpus=0, num_gpus=num_gpus, scheduling_strategy=here)
    return task.remote(*args)


def check_shared_storage(paths):
    """Every node must see each of `paths`, which this process sees: a UserError names a node and
    the path that it lacks."""
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    nodes = [node for node in others if node["Resources"].get("CPU")]
    tasks = [start_on_node(node, missing_paths, [str(path) for path in paths]) for node in nodes]
    for node, missing in zip(nodes, ray.get(tasks), strict=True):
        if missing:
            raise UserError(
                f"node {node['NodeManagerHostname']} does not see {missing[0]}:"
                " put it on storage that all nodes share"
            )


def missing_paths(paths):
    """Those of `paths` that this machine does not see."""
    return [path for path in paths if not os.path.exists(path)]


def user_error_in(error):
    """The `UserError` behind an exception that crossed Ray, of the class that was raised; None if
    there is none.

    It is the exception itself or one of its causes. Only where Ray has lost the cause and kept its
    text is it read from that.
    """
    causes = [error]
    while causes[-1] is not None:
        # A RayTaskError has its original exception as an attribute.
        causes.append(getattr(causes[-1], "cause", None) or causes[-1].__cause__)
    for cause in causes:
        # Ray raises a class of its own, which is a RayTaskError and a UserError, with a trace.
        if isinstance(cause, UserError) and not isinstance(cause, ray.exceptions.RayError):
            return cause
    classes = {cls.__name__: cls for cls in (UserError, *UserError.__subclasses__())}
    in_text = re.findall(rf"\b{UserError.__module__}\.(\w+): (.*)", str(error))  # a traceback's end
    if in_text:
        name, message = in_text[-1]
        return classes.get(name, UserError)(message)
    return None


def training_error(error):
    """The `UserError` behind a failed training, or behind one worker's exception; None if it is not
    the user's."""
    # Both are absent if train_fn ran in this process.
    controller_failure = getattr(error, "controller_failure", None)
    worker_failures = getattr(error, "worker_failures", {})
    for cause in [error, controller_failure, *worker_failures.values()]:
        text = f"{type(cause)} {cause}"
        if re.search(UNUSABLE_GPU, text):
            return UserError(f"a GPU of the cluster: {device.unusable_gpu()}")
        if device.is_out_of_memory(cause):
            return OutOfMemory(
                "out of GPU memory: leave out --cuda_graph, pass --gradient_checkpointing, then"
                " --param_dtype bf16 or --use_lora, or a smaller --train_batch_size or --resolution"
            )
        if "DefaultCPUAllocator: can't allocate memory" in text:
            return OutOfMemory(
                "out of memory: end other programs, pass --use_lora, or a smaller"
                " --train_batch_size or --resolution"
            )
        user_error = user_error_in(cause)
        if user_error:
            return user_error
    return None


class NoRetryForUserErrors(ray.train.UserCallback):
    """Ends the run at once where retrying would not help: Ray Train retries any other failure."""

    def after_exception(self, run_context, worker_exceptions):
        for error in worker_exceptions.values():
            user_error = training_error(error)
            if user_error:
                raise user_error
