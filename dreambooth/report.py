"""What a training run says: the facts at set-up, a line every few steps, where the seconds went."""

import math
import time

import torch

from dreambooth.checks import UserError


class Report:
    """Kept by each worker, printed by rank 0. Nothing in an ordinary step waits for the device (but for the
    images of --live_vae): losses stay on it until a line of log is due, every `args.log_every` steps."""

    def __init__(self, args, enabled):
        self.args, self.enabled = args, enabled
        self.seconds, self.last, self.waiting = {}, args.started, []
        self._phase("start")

    def _phase(self, name):
        now = time.time()
        self.seconds[name] = now - self.last
        self.last = now

    def _print(self, text):
        if self.enabled:
            print(text, flush=True)

    def models_are_ready(self, parameters, num_workers, device):
        """Call when models and optimizer are set up."""
        self.device = device
        self._phase("load")
        count = sum(p.numel() for p in parameters) / 1e6
        self._print(f"training {count:.2f} M parameters in {parameters[0].dtype} on {num_workers} x {device.type}")

    def data_are_ready(self):
        """Call when the first batch can be asked for."""
        self._phase("data")
        self.first_step = time.time()

    def step_is_done(self, step, loss, grad_norm, lr):
        """Call after each step. UserError, with the step: a loss that is not finite."""
        if step == 0:  # it alone waits: for compilation, and for the device, whose work is not to count as the others'
            loss.item()
            self._phase("first step")
            self.first_step = time.time()
        self.waiting.append(loss)
        if (step + 1) % self.args.log_every and step + 1 < self.args.steps:
            return
        losses = torch.stack(self.waiting).tolist()  # here the CPU waits for the device
        start, self.waiting = step + 1 - len(losses), []
        for offset, value in enumerate(losses):
            if not math.isfinite(value):
                raise UserError(f"the loss is {value} at step {start + offset + 1}: lower --lr; nothing was saved")
        if not math.isfinite(grad_norm.item()):  # that of an earlier step would show in the losses
            raise UserError(f"the gradients are not finite at step {step + 1}: lower --lr; nothing was saved")
        args, self.loss = self.args, losses[-1]
        images = 2 * args.train_batch_size * args.gradient_accumulation_steps * args.num_workers * step
        rate = images / max(time.time() - self.first_step, 1e-9)
        self._print(
            f"step {step + 1}/{args.steps} loss {sum(losses) / len(losses):.4f} grad norm {grad_norm.item():.3f}"
            f" lr {lr:.2e} {rate:.1f} images/s{self._memory()}"
        )

    def _memory(self):
        if self.device.type != "cuda":
            return ""
        return f" peak {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB"

    def steps_are_done(self):
        """Call after the last step."""
        self._phase("steps")

    def summary(self):
        """Call after saving; prints where the seconds went, and returns the run's metrics."""
        self._phase("save")
        self._print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items()))
        return {"loss": self.loss, **{f"{name.replace(' ', '_')}_s": value for name, value in self.seconds.items()}}
