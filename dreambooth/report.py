"""What a training run reports: facts at set-up, progress (a bar on a terminal, else a line every
few steps), where the seconds went, and the metrics files beside the result."""

import math
import time
from contextlib import contextmanager

import torch

from dreambooth import progress
from dreambooth.cli import UserError
from dreambooth.metrics import MetricsWriter, report_dir

DIVERGED = "lower --lr, with --restart; nothing was saved"
LOSSES = ("loss", "instance_loss", "class_loss")  # of a step, in this order


class Report:
    """Kept by each worker, shown by rank 0. Nothing in an ordinary step waits for the device:
    losses stay on it until a line is due, every `log_every` steps.

    `started` is when the script began, in seconds since the epoch. Beside `output_dir` rank 0
    writes the metrics. `show`: "lines", "bar", or "nothing", where the driver shows the bar.
    """

    def __init__(self, plan, log_every, started, enabled, output_dir=None, show="lines"):
        self.plan = plan
        self.log_every = log_every
        self.enabled = enabled
        self.folder = report_dir(output_dir) if enabled and output_dir else None
        self.show = show if enabled else "nothing"
        self.metrics = {}
        self.phase_began = started
        self.unread_losses = []
        self.first_step = None
        self.writer = None
        self.bar = None
        self._end_phase("start")

    def _end_phase(self, name):
        now = time.time()
        self.metrics[f"{name}_s"] = now - self.phase_began
        self.phase_began = now

    @contextmanager
    def aside(self, name):
        """For what is done between two steps: its seconds are counted under `name`, and neither as
        part of the steps nor in images per second."""
        self._wait_for_device()
        began = time.time()
        yield
        self._wait_for_device()
        seconds = time.time() - began
        self.metrics[f"{name}_s"] = self.metrics.get(f"{name}_s", 0.0) + seconds
        self.phase_began += seconds

    def _wait_for_device(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def models_are_ready(self, parameters, num_workers, device, first_step=0):
        """Call when models and optimizer are set up, `first_step` steps into the run."""
        self.device = device
        self._end_phase("load")
        millions = sum(p.numel() for p in parameters) / 1e6
        dtype = parameters[0].dtype
        if self.enabled:
            text = f"training {millions:.2f} M parameters in {dtype}: {num_workers} x {device.type}"
            print(text, flush=True)
        if self.folder:
            self.writer = MetricsWriter(self.folder, first_step)
        if self.show == "bar":
            self.bar = progress.new_bar(self.plan.num_steps, first_step)

    def step_is_done(self, step, losses, grad_norm, lr):
        """Call after each step, with its losses as in `LOSSES`. UserError, with the step: a loss
        that is not finite."""
        if self.first_step is None:
            self.first_step = step
            # It alone waits: for compilation, and for the device, so that neither counts as part
            # of the other steps.
            losses.tolist()
            self._end_phase("first_step")
        self.unread_losses.append(losses.reshape(-1))
        if (step + 1) % self.log_every == 0 or step + 1 == self.plan.num_steps:
            self._log(step, grad_norm, lr)
        if self.bar is not None:
            self.bar.update()

    def _log(self, step, grad_norm, lr):
        losses = mean_of_workers(torch.stack(self.unread_losses))
        losses = losses.tolist()  # here the CPU waits for the device
        self.unread_losses = []
        grad_norm = grad_norm.item()
        means = [sum(column) / len(column) for column in zip(*losses, strict=True)]
        row = {"step": step + 1, **dict(zip(LOSSES, means, strict=False))}
        row.update(grad_norm=grad_norm, lr=lr, images_per_s=self._images_per_s(step))
        if self.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.writer:
            self.writer.add(row)
        for number, values in enumerate(losses, start=step + 2 - len(losses)):
            if not math.isfinite(values[0]):
                self._give_up(f"the loss is {values[0]} at step {number}")
        if not math.isfinite(grad_norm):  # an earlier step's would show in the losses
            self._give_up(f"the gradients are not finite at step {step + 1}")
        self.metrics["loss"] = losses[-1][0]
        if self.bar is not None:
            progress.show(self.bar, row)
        if self.show == "lines":
            print(self._line(row), flush=True)

    def _give_up(self, reason):
        if self.bar is not None:
            self.bar.close()
        raise UserError(f"{reason}: {DIVERGED}")

    def _images_per_s(self, step):
        images_per_step = len(self.plan.prompt_ids) * self.plan.pairs_per_step
        num_images = images_per_step * (step - self.first_step)
        return num_images / max(time.time() - self.phase_began, 1e-9)

    def _line(self, row):
        memory = f" peak {row['peak_gib']:.1f} GiB" if "peak_gib" in row else ""
        halves = ""
        if "class_loss" in row:
            halves = f" (instance {row['instance_loss']:.4f}, class {row['class_loss']:.4f})"
        return (
            f"step {row['step']}/{self.plan.num_steps} loss {row['loss']:.4f}{halves}"
            f" grad norm {row['grad_norm']:.3f} lr {row['lr']:.2e}"
            f" {row['images_per_s']:.1f} images/s{memory}"
        )

    def steps_are_done(self):
        """Call after the last step."""
        self._end_phase("steps")
        if self.bar is not None:
            self.bar.close()
        if self.writer:
            self.writer.close()

    def summary(self):
        """Call after saving. Returns the run's metrics: the last loss, and the seconds of each
        phase under names that end with "_s"."""
        self._end_phase("save")
        return self.metrics


def mean_of_workers(losses):
    """The mean of all workers' `losses`, a tensor; each worker must call it."""
    if not torch.distributed.is_initialized():
        return losses
    torch.distributed.all_reduce(losses)
    return losses / torch.distributed.get_world_size()


def where_the_seconds_went(metrics):
    """One line of a run's metrics: "start 8.0 s, load 1.2 s, ..."."""
    phases = {name: value for name, value in metrics.items() if name.endswith("_s")}
    return ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {seconds:.1f} s"
        for name, seconds in phases.items()
    )
