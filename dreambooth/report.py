"""What a training run prints: facts at set-up, a line every few steps, where the seconds went."""

import math
import time

import torch

from dreambooth.cli import UserError


class Report:
    """Kept by each worker, printed by rank 0. Nothing in an ordinary step waits for the device:
    losses stay on it until a line is due, every `log_every` steps.

    `started` is when the script began, in seconds since the epoch.
    """

    def __init__(self, plan, log_every, started, enabled):
        self.plan = plan
        self.log_every = log_every
        self.enabled = enabled
        self.metrics = {}
        self.phase_began = started
        self.unread_losses = []
        self.first_step = None
        self._end_phase("start")

    def _end_phase(self, name):
        now = time.time()
        self.metrics[f"{name}_s"] = now - self.phase_began
        self.phase_began = now

    def _print(self, text):
        if self.enabled:
            print(text, flush=True)

    def models_are_ready(self, parameters, num_workers, device):
        """Call when models and optimizer are set up."""
        self.device = device
        self._end_phase("load")
        millions = sum(p.numel() for p in parameters) / 1e6
        dtype = parameters[0].dtype
        self._print(
            f"training {millions:.2f} M parameters in {dtype}: {num_workers} x {device.type}"
        )

    def step_is_done(self, step, loss, grad_norm, lr):
        """Call after each step. UserError, with the step: a loss that is not finite."""
        if self.first_step is None:
            self.first_step = step
            # It alone waits: for compilation, and for the device, so that neither counts as part
            # of the other steps.
            loss.item()
            self._end_phase("first_step")
        self.unread_losses.append(loss)
        if (step + 1) % self.log_every == 0 or step + 1 == self.plan.num_steps:
            self._log(step, grad_norm, lr)

    def _log(self, step, grad_norm, lr):
        losses = torch.stack(self.unread_losses).tolist()  # here the CPU waits for the device
        self.unread_losses = []
        for number, loss in enumerate(losses, start=step + 2 - len(losses)):
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {number}: lower --lr; nothing was saved"
                )
        if not math.isfinite(grad_norm.item()):  # an earlier step's would show in the losses
            raise UserError(
                f"the gradients are not finite at step {step + 1}: lower --lr; nothing was saved"
            )
        self.metrics["loss"] = losses[-1]
        images_per_step = len(self.plan.prompt_ids) * self.plan.pairs_per_step
        num_images = images_per_step * (step - self.first_step)
        rate = num_images / max(time.time() - self.phase_began, 1e-9)
        memory = ""
        if self.device.type == "cuda":
            memory = f" peak {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB"
        self._print(
            f"step {step + 1}/{self.plan.num_steps} loss {sum(losses) / len(losses):.4f}"
            f" grad norm {grad_norm.item():.3f} lr {lr:.2e} {rate:.1f} images/s{memory}"
        )

    def steps_are_done(self):
        """Call after the last step."""
        self._end_phase("steps")

    def summary(self):
        """Call after saving. Returns the run's metrics: the last loss, and the seconds of each
        phase under names that end with "_s"."""
        self._end_phase("save")
        return self.metrics


def where_the_seconds_went(metrics):
    """One line of a run's metrics: "start 8.0 s, load 1.2 s, ..."."""
    phases = {name: value for name, value in metrics.items() if name.endswith("_s")}
    return ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')} {seconds:.1f} s"
        for name, seconds in phases.items()
    )
