"""The training loop of the pocket model's pretraining."""

import os
import time
import zlib

import numpy as np
import torch

WARM_UP = 200  # steps
LR_DECAY = 0.2  # share of the steps, the last, in which the learning rate falls to 0
SECONDS_BETWEEN_SAVES = 180


class Run:
    """A resumable training loop: AdamW, linear warm-up, a constant learning rate that falls to 0 in
    the last fifth of the steps, an EMA of the weights.

    As the learning rate is constant until the last fifth, a run can be resumed with more steps:
    what was trained so far is what the longer run would have trained.
    """

    def __init__(self, name, module, work_dir, steps, lr, ema):
        self.name = name
        self.module = module
        self.steps = steps
        self.lr = lr
        self.ema = ema
        self.file = work_dir / f"{name}.pt"
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr, weight_decay=1e-2)
        self.average = {k: v.clone() for k, v in module.state_dict().items()}
        self.step = 0
        if self.file.exists():
            self._resume()

    def _resume(self):
        state = torch.load(self.file, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step = state["step"]
        print(f"{self.name}: resumed at step {self.step}", flush=True)

    def save(self):
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.file)

    def _set_lr(self):
        warm_up = (self.step + 1) / WARM_UP
        decay = (self.steps - self.step) / (LR_DECAY * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, warm_up, decay)

    def _update_average(self):
        keep = min(self.ema, self.step / (self.step + 10))
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - keep)
            else:
                self.average[name].copy_(value)

    def _train_step(self, loss_of_step):
        rng = np.random.default_rng((zlib.crc32(self.name.encode()), self.step))
        torch.manual_seed(self.step)
        self._set_lr()
        loss = loss_of_step(rng)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._update_average()
        return loss.item()

    def train(self, loss_of_step):
        """Minimise `loss_of_step(rng)`, a scalar; at the end the module holds the EMA."""
        start = saved = time.monotonic()
        first = self.step
        losses = []
        while self.step < self.steps:
            losses.append(self._train_step(loss_of_step))
            if self.step % 100 == 0:
                seconds = (time.monotonic() - start) / (self.step - first)
                minutes_left = seconds * (self.steps - self.step) / 60
                print(
                    f"{self.name} {self.step}/{self.steps} loss {np.mean(losses):.4f}"
                    f" {seconds:.3f} s per step, {minutes_left:.0f} min left",
                    flush=True,
                )
                losses = []
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                self.save()
                saved = time.monotonic()
        self.save()
        self.module.load_state_dict(self.average)
