"""Checkpoints while a run trains: when they are written, and what ends a run early.

Each worker keeps a `Checkpointer`; rank 0's writes the files (checkpoints.py).
"""

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero
from torch.utils._pytree import tree_map_only

from dreambooth import checkpoints, ray_errors
from dreambooth.cli import UserError
from dreambooth.report import DIVERGED

SHORT_RUN = 60  # seconds: by default, runs shorter than this write no checkpoint
STOPPED = "stopped after step"
STEPS_BETWEEN_NOTICES = 10  # steps between two questions whether a node is about to be preempted


class Checkpointer:
    """Loads and saves what changes from step to step: weights, optimizer, learning-rate schedule.

    A step waits while this is copied to the CPU's memory; a thread then writes it.
    """

    def __init__(self, args, plan, denoiser, optimizer, lr_schedule, rank):
        self.folder = checkpoints.run_dir(args)
        self.every = args.checkpointing_steps
        fewest, most = args.num_workers
        # When workers join, Ray Train stops those there are, perhaps within the first minute.
        self.skip_if_short = self.every is None and fewest == most
        if self.every is None:
            self.every = max(1, round(plan.num_steps / 10))
        self.limit = args.checkpoints_total_limit
        self.num_steps = plan.num_steps
        self.denoiser = denoiser
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.rank = rank
        self.started = time.time()
        self.thread = ThreadPoolExecutor(1)
        self.writing = None  # a future of the path that is being written
        self.reported = True  # whether Ray Train knows of the last checkpoint
        self.noticed = None  # the preemption for which a checkpoint has been written

    def restore(self):
        """On every worker, load the newest checkpoint that rank 0 finds, if any; returns the number
        of steps done."""
        path, step = broadcast_from_rank_zero(checkpoints.find_newest(self.folder))
        if path is None:
            return 0
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, p in self._trained():
                p.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        return step

    def step_is_done(self, step):
        """Call after each step, on every worker, with the number of steps done. UserError: a signal
        asked the run to stop, and the checkpoint is written; or the disk is full."""
        if self.writing and self.writing.done():
            self.writing.result()  # raises what went wrong
        if step == self.num_steps:
            return
        if self.rank == 0 and (self.folder / "stop").exists():
            self._save(step)
            self.writing.result()
            raise UserError(f"{STOPPED} {step}")
        if self._is_due(step) or self._preemption_is_near(step):
            self._report()
            self._save(step)

    def finish(self):
        """Call after the last step, on every worker."""
        self._report()

    def _is_due(self, step):
        if not self.every or step % self.every:
            return False
        is_long = time.time() - self.started > SHORT_RUN
        return not self.skip_if_short or broadcast_from_rank_zero(is_long)

    def _preemption_is_near(self, step):
        """Whether Ray has heard, since it was last asked, that a node will be taken away."""
        if step % STEPS_BETWEEN_NOTICES:
            return False
        notice = ray.train.get_preemption_info()
        is_new = notice is not None and notice != self.noticed
        self.noticed = notice
        return is_new

    def _trained(self):
        return [(name, p) for name, p in self.denoiser.named_parameters() if p.requires_grad]

    def _state(self):
        """A copy of all that changes from step to step, in the CPU's memory."""
        state = {
            "weights": dict(self._trained()),
            "optimizer": self.optimizer.state_dict(),
            "lr_schedule": self.lr_schedule.state_dict(),
        }
        return tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), state)

    def _save(self, step):
        """Copy the state and start to write it."""
        self.reported = False
        if self.rank != 0:
            return
        if self.writing:
            self.writing.result()
        state = self._state()
        if not all(weight.isfinite().all() for weight in state["weights"].values()):
            raise UserError(f"the weights are not finite after step {step}: {DIVERGED}")
        self.writing = self.thread.submit(checkpoints.write, state, step, self.folder, self.limit)

    def _report(self):
        """Tell Ray Train of the last checkpoint, once it is written: every worker calls this."""
        if self.reported:
            return
        checkpoint = None
        if self.rank == 0:
            checkpoint = ray.train.Checkpoint.from_directory(self.writing.result())
        ray.train.report(
            {},
            checkpoint=checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
        )
        self.reported = True


class StopOnSignal:
    """Ctrl-C and TERM ask the run to stop after its current step, with a checkpoint; the second
    time they stop it at once."""

    def __init__(self, folder):
        self.folder = folder
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number, frame):
        if self.signal:
            sys.exit(128 + number)
        self.signal = number
        with suppress(OSError):  # the run may have ended, and its folder be gone
            (self.folder / "stop").touch()
        print("stopping after this step (again: at once)", flush=True)

    def exit_if_asked(self, error):
        """If a signal stopped the run, say so and exit with its code, unless the run ended with
        another `error` that the user must see."""
        user_error = ray_errors.training_error(error)
        if self.signal and (user_error is None or STOPPED in str(user_error)):
            _, step = checkpoints.find_newest(self.folder)
            print(f"{STOPPED} {step}: run the same command again to resume", file=sys.stderr)
            sys.exit(128 + self.signal)
