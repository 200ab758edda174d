"""Checkpoints of a training run: the same command, given again, resumes where the last one stopped.

    TUNED_MODEL_DIR.checkpoints/lock              locked by the process of the run
    TUNED_MODEL_DIR.checkpoints/fingerprint.json  all that decides the run's result
    TUNED_MODEL_DIR.checkpoints/step_000100/      a complete checkpoint: state.pt and complete.json

A checkpoint holds all that changes from step to step: trained weights, optimizer, learning-rate
schedule. Pairs, crops, noise and timesteps follow from their position in the run (seeds.py). So a
resumed run ends with the weights of an uninterrupted one: to the last bit on a CPU.

Where a run resumes is decided once for each group of workers, when train.py builds the dataset:
`find_newest` names the step, the data begin with its pairs, and the workers restore its checkpoint.
"""

import json
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch.utils._pytree import tree_leaves, tree_map_only

from dreambooth.cli import Diverged, Stopped, UserError, first_line, is_full, warn
from dreambooth.files import atomic
from dreambooth.machines import device

SHORT_RUN = 60  # seconds, before which a run writes no checkpoint by default
ROOM = 4 * 2**30  # bytes of memory that a copy of the state leaves free
ECHO = 1.0  # seconds within which a second TERM counts as the first one
# Steps after which Ray is asked whether a node will be taken away, for which all workers must wait.
PREEMPTION_CHECK_EVERY = 10


def checkpoint_dir(folder, step):
    """The directory of the checkpoint after `step` steps of the run in `folder`."""
    return Path(folder) / f"step_{step:06d}"


def find_newest(folder):
    """The number of steps at the newest complete checkpoint in `folder`; 0 if there is none.
    OSError: the storage fails, and what it holds is not known."""
    for path in sorted(Path(folder).glob("step_*"), reverse=True):
        try:
            complete = json.loads((path / "complete.json").read_text(encoding="utf-8"))
            if (path / "state.pt").stat().st_size == complete["num_bytes"]:
                return complete["step"]
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
            continue
    return 0


def steps_done(plan, args):
    """The number of steps that the run of these flags resumes after; 0: it begins. UserError: the
    checkpoints there belong to a run with another fingerprint."""
    step = find_newest(plan.run_dir)
    if args.restart or not (plan.run_dir / "fingerprint.json").exists():
        return 0
    if step:
        check_fingerprint(plan.run_dir, plan.fingerprint(args))
    return step


def prepare(plan, args):
    """Lock a run's directory and its report's, and clear the former of what no resumed run needs.
    Returns `steps_done`, and prints it if it is not 0. UserError: another run writes there."""
    folder = plan.run_dir
    for place in (folder, plan.report_dir):  # another run may have its checkpoints elsewhere
        place.mkdir(parents=True, exist_ok=True)
        atomic.lock(place / "lock", args.output_dir)
    step = steps_done(plan, args)
    if step:
        print(f"resuming after step {step}: {checkpoint_dir(folder, step)}")
    for other in folder.iterdir():  # of the previous process: Ray Train's files, a stop request
        if other.name in ("lock", "fingerprint.json") or step and other.name.startswith("step_"):
            continue
        shutil.rmtree(other) if other.is_dir() else other.unlink()
    text = json.dumps(plan.fingerprint(args), indent=1)
    atomic.replace_text(folder / "fingerprint.json", text)
    return step


def check_fingerprint(folder, fingerprint):
    """The run in `folder` must be this one; a UserError names what differs. A flag that is newer
    than that run counts as the same."""
    file = folder / "fingerprint.json"
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{file} is damaged: pass --restart to start over") from None
    now = json.loads(json.dumps(fingerprint))
    differing = [name for name in now if name in earlier and earlier[name] != now[name]]
    if differing:
        changes = ", ".join(f"{name} was {earlier[name]}, is {now[name]}" for name in differing)
        raise UserError(
            f"{folder} holds checkpoints of another run ({changes}):"
            " pass that run's flags to resume it, or --restart to start over"
        )


def remove(folder):
    """Delete a run's checkpoints and Ray Train's files: the result is in place."""
    with suppress(OSError):
        # fingerprint.json first: without it no run resumes from the rest. The lock last: it marks
        # the folder as a run's.
        (folder / "fingerprint.json").unlink(missing_ok=True)
        for path in set(folder.iterdir()) - {folder / "lock"}:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        if set(folder.iterdir()) <= {folder / "lock"}:
            shutil.rmtree(folder, ignore_errors=True)


def remove_unless_needed(folder):
    """`remove`, unless there is a checkpoint to resume from, one is being written, or the storage
    does not answer."""
    with suppress(OSError):
        if not any(Path(folder).glob(".step_*.tmp")) and not find_newest(folder):
            remove(folder)


def write(state, step, folder, limit):
    """Write `state` as the checkpoint of `step`, then delete all but the newest `limit`; returns
    its path. UserError: the disk or the quota is full; earlier checkpoints are kept."""
    path = checkpoint_dir(folder, step)
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with open(temporary / "state.pt", "wb") as file:  # torch's own writer would hide the error
            torch.save(state, file)
        num_bytes = (temporary / "state.pt").stat().st_size
        complete = json.dumps({"step": step, "num_bytes": num_bytes})
        (temporary / "complete.json").write_text(complete, encoding="utf-8")
        for file in (temporary / "state.pt", temporary / "complete.json", temporary):
            atomic.fsync(file)
    except (OSError, RuntimeError) as error:  # the latter after the former, by torch
        shutil.rmtree(temporary, ignore_errors=True)
        if not is_full(error):
            raise
        needed = sum(tensor.nbytes for tensor in tensors_of(state)) / 1e9
        raise UserError(
            f"no space for the checkpoint of step {step} in {folder}, a file of {needed:.2f} GB:"
            " make room, or use another disk with --storage_path, and run the same command again,"
            " without --restart"
        ) from error
    for other in Path(folder).glob("step_*"):
        if other.name >= path.name:  # damaged, as the run went on from an earlier one
            shutil.rmtree(other, ignore_errors=True)
    os.rename(temporary, path)
    atomic.fsync(folder)
    for older in sorted(Path(folder).glob("step_*"))[:-limit]:
        shutil.rmtree(older, ignore_errors=True)
    return path


def read(path):
    """What `write` has written at `path`, as tensors that are mapped to the file: each is read when
    it is used, and none after the file is deleted."""
    settings = {"map_location": "cpu", "weights_only": True}
    try:
        return torch.load(path / "state.pt", mmap=True, **settings)
    except RuntimeError:  # of a file system that maps no files
        return torch.load(path / "state.pt", **settings)


def tensors_of(state):
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def bytes_of_copy(tensor):
    """What a copy in the CPU's memory takes: pinned memory, for a GPU's, comes in powers of two."""
    return 1 << (tensor.nbytes - 1).bit_length() if tensor.is_cuda else tensor.nbytes


def has_room(num_bytes):
    """Whether this machine's memory holds a copy of the state beside Ray's object store, which may
    yet be empty. Where that is not known, it is assumed."""
    free = device.host_memory()
    if free is None:
        return True
    store = 0
    if ray.is_initialized():
        here = ray.get_runtime_context().get_node_id()
        own = [node["Resources"] for node in ray.nodes() if node["NodeID"] == here]
        store = sum(resources.get("object_store_memory", 0) for resources in own)
    return num_bytes + store + ROOM < free * device.GIB


def copy_moments(optimizer):
    """Copy the tensors of an optimizer's state one by one, each into the memory format of its
    parameter: fused optimizers go through both side by side."""
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                own = p if value.shape == p.shape else value
                values[name] = torch.empty_like(own, dtype=value.dtype).copy_(value)


class Checkpointer:
    """Loads and saves what changes from step to step: the trained weights of `denoiser`, and
    `stateful`, objects with `state_dict` and `load_state_dict`, by name.

    Every worker keeps one; rank 0's writes the files. Where the machine has memory for a copy of
    the state, a step waits for that copy alone, and a thread writes it; elsewhere it waits until
    the state is written, tensor by tensor.
    """

    def __init__(self, args, plan, denoiser, stateful, rank):
        self.args = args
        self.folder = plan.run_dir
        self.every = plan.checkpointing_steps
        fewest, most = args.num_workers
        # When workers join, Ray Train stops those there are, perhaps within the first minute.
        self.skip_if_short = args.checkpointing_steps is None and fewest == most
        self.limit = args.checkpoints_total_limit
        self.num_steps = plan.num_steps
        self.denoiser = denoiser
        self.stateful = stateful
        self.rank = rank
        self.started = time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.writing = None  # a future of the path that is being written
        self.buffers = []  # of the copy, kept for the next one
        self.reported = True  # whether Ray Train knows of the last checkpoint
        self.noticed = None  # the preemption for which a checkpoint has been written

    def on_train_begin(self, first_step):
        """Load the checkpoint after `first_step` steps. FileNotFoundError: this worker does not see
        it (yet); Ray Train tries again."""
        if not first_step:
            return
        state = read(checkpoint_dir(self.folder, first_step))
        with torch.no_grad():
            for name, p in self._trained():
                p.copy_(state["weights"][name])
        # The tensors are mapped to a file that will be deleted: they are copied.
        for name, part in self.stateful.items():
            if isinstance(part, torch.optim.Optimizer):
                part.load_state_dict(state[name])
                copy_moments(part)
                for group in part.param_groups:
                    if group.get("triton"):  # optimi's kernels, of a run that began on a GPU
                        group["triton"] = group["params"][0].is_cuda
            else:
                part.load_state_dict(tree_map_only(torch.Tensor, torch.clone, state[name]))

    def on_step_end(self, step, **metrics):
        """UserError: a signal asked the run to stop, and the checkpoint is written; or the disk is
        full."""
        if step == self.num_steps:
            return
        if self.writing and self.writing.done():
            self.writing.result()  # raises what went wrong
        if self.rank == 0 and (self.folder / "stop").exists():
            self._save(step)
            self.writing.result()
            raise Stopped(f"stopped after step {step}")
        if self._is_due(step) or self._preemption_is_near(step):
            self._report()
            self._save(step)

    def on_train_end(self):
        """The last checkpoint may fail: the result is complete without it."""
        error = self.writing and self.writing.exception()  # waits
        if isinstance(error, OSError | UserError):
            warn(f"the last checkpoint was not written, nor is it needed: {first_line(error)}")
            self.writing = None
        self._report()
        self._free_buffers()

    def save_result(self, save):
        """Call `save(denoiser, args)`. Diverged: the weights are not finite, and an earlier result
        is kept. UserError: it fails, for whatever reason; the state of the last step is then a
        checkpoint, if that can be written, and the same command only saves."""
        self._check_finite(self.num_steps)
        try:
            save(self.denoiser, self.args)
        except Exception as error:
            reason = first_line(error)
            try:
                write(self._state(), self.num_steps, self.folder, self.limit)
            except (OSError, UserError):
                raise error from None
            raise UserError(
                f"the result could not be saved ({reason}), but a checkpoint of the last step was:"
                f" fix the cause, then run the same command again{without_restart(self.args)}"
                " to save it"
            ) from error

    def _is_due(self, step):
        """The same on every worker."""
        if not self.every or step % self.every:
            return False
        is_long = time.monotonic() - self.started > SHORT_RUN
        return not self.skip_if_short or broadcast_from_rank_zero(is_long)

    def _preemption_is_near(self, step):
        """Whether Ray has heard, since it was last asked, that a node will be taken away. Every
        worker must ask after the same steps, as the answer is one for all."""
        if step % PREEMPTION_CHECK_EVERY:
            return False
        notice = ray.train.get_preemption_info()
        is_new = notice is not None and notice != self.noticed
        self.noticed = notice
        return is_new

    def _trained(self):
        return [(name, p) for name, p in self.denoiser.named_parameters() if p.requires_grad]

    def _check_finite(self, step):
        """Diverged: a weight is not a finite number after `step` steps."""
        weights = [p.detach() for _, p in self._trained()]
        if not torch.nn.utils.get_total_norm(weights).isfinite():
            raise Diverged(
                f"the weights are not finite after step {step}: lower --lr, with --restart;"
                " no result was saved"
            )

    def _state(self):
        """All that changes from step to step."""
        return {
            "weights": {name: p.detach() for name, p in self._trained()},
            **{name: part.state_dict() for name, part in self.stateful.items()},
        }

    def _copy(self, state):
        """`state` in buffers of the CPU's memory; None if there is no room for them."""
        tensors = tensors_of(state)
        if len(self.buffers) != len(tensors):
            self.buffers = []
            if not has_room(sum(map(bytes_of_copy, tensors))):
                return None
            try:
                self.buffers = [
                    torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                    for tensor in tensors
                ]
            except RuntimeError:  # no memory that can be pinned
                self._free_buffers()
                return None
        for buffer, tensor in zip(self.buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        buffers = iter(self.buffers)
        return tree_map_only(torch.Tensor, lambda tensor: next(buffers), state)

    def _free_buffers(self):
        self.buffers = []
        torch.accelerator.empty_host_cache()  # else torch would keep what was pinned

    def _save(self, step):
        """Write the state, or copy it and start to write it."""
        self.reported = False
        if self.rank != 0:
            return
        if self.writing:
            self.writing.result()
        self._check_finite(step)
        state = self._state()
        copy = self._copy(state)
        self.writing = self.thread.submit(write, copy or state, step, self.folder, self.limit)
        if copy is None:
            wait([self.writing])

    def _report(self):
        """Tell Ray Train of the last checkpoint, once it is written: every worker calls this."""
        if self.reported:
            return
        checkpoint = None
        if self.writing:
            checkpoint = ray.train.Checkpoint.from_directory(self.writing.result())
        ray.train.report(  # [4]
            {},
            checkpoint=checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )
        self.reported = True


def without_restart(args):
    """In words, how the command that resumes a run differs from its own."""
    return ", without --restart," if args.restart else ""


class StopOnSignal:
    """Ctrl-C, TERM, and HUP, of a terminal that is closed or a lost connection, ask the run to stop
    after its current step, with a checkpoint; a second Ctrl-C or TERM stops it at once. A TERM
    within `ECHO` seconds of one is the same: sent to all processes, and passed on by run.sh."""

    def __init__(self, args, folder):
        self.args = args
        self.folder = folder
        self.signal = None
        self.again = False
        self.asked = 0.0  # when
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self._stop)

    def _stop(self, number, frame):
        if number == self.signal == signal.SIGTERM and time.monotonic() - self.asked < ECHO:
            return
        if self.signal and number != signal.SIGHUP:  # of which shells send a second one
            self.again = True
            sys.exit(128 + number)
        self.signal, self.asked = number, time.monotonic()
        with suppress(OSError):  # the run may have ended, and its folder be gone
            (self.folder / "stop").touch()
        with suppress(OSError):  # print would fail inside another print
            os.write(1, b"stopping after this step; interrupt again to stop now\n")

    def exit_if_asked(self, error):
        """If a signal stopped the run, which ended with `error`, say so and exit with its code;
        unless that is another error that the user must see. (After a second signal none is: the
        libraries may have turned its SystemExit into one of their own.)"""
        stopped = isinstance(error, Stopped) or not isinstance(error, UserError)
        if self.signal and (stopped or self.again):
            step = find_newest(self.folder)
            remedy = f"run the same command again{without_restart(self.args)} to resume"
            reason = "" if self.again or isinstance(error, Stopped) else f" ({first_line(error)})"
            print(f"stopped after step {step}{reason}: {remedy}", file=sys.stderr)
            sys.exit(128 + self.signal)
