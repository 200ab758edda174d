"""What a training run logs: a line every few steps, and beside its result

    TUNED_MODEL_DIR.report/run.json         command, flags, versions, hardware, and how it ended
    TUNED_MODEL_DIR.report/metrics.jsonl    a line every --log_every steps; losses are means since
                                            the last line
    TUNED_MODEL_DIR.report/tensorboard/     tensorboard --logdir TUNED_MODEL_DIR.report

After a resume, metrics go on from the checkpoint's step: what was logged of later steps is dropped,
as those steps are done again. While a new run has not replaced an earlier one's result, the earlier
report is kept as TUNED_MODEL_DIR.report.previous.
"""

import json
import math
import platform
import shlex
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from dreambooth.cli import Diverged, first_line, warn
from dreambooth.files import atomic, pipeline_dir

RECORD = "run.json"
METRICS = "metrics.jsonl"
PACKAGES = ["torch", "diffusers", "transformers", "peft", "ray"]
LOSSES = ("loss", "instance_loss", "class_loss")  # of a step, in this order
TAGS = {  # under which TensorBoard shows the metrics
    "loss": "loss/total",
    "instance_loss": "loss/instance images",
    "class_loss": "loss/class images",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_s": "images per second",
    "peak_gib": "peak memory, GiB",
    "reserved_gib": "reserved memory, GiB",
}


class TrainingLog:
    """Kept by each worker, shown by rank 0. Nothing in an ordinary step waits for the device:
    losses stay on it until a line is due, every `log_every` steps.

    `started` is when the script began, in seconds since the epoch.
    """

    def __init__(self, plan, device, log_every, started, enabled):
        self.plan = plan
        self.device = device
        self.log_every = log_every
        self.enabled = enabled
        self.folder = plan.report_dir
        # Processes share only the wall clock; it may be set back meanwhile, hence the max.
        self.metrics = {"start_s": max(0.0, time.time() - started)}
        self.phase_began = time.monotonic()
        self.unread_losses = []
        self.waits_for_first = True
        self.first_step = 0
        self.events = None  # TensorBoard's writer
        self.lost = set()  # what could not be written

    def _end_phase(self, name):
        now = time.monotonic()
        self.metrics[f"{name}_s"] = now - self.phase_began
        self.phase_began = now

    @contextmanager
    def timed_apart(self, name):
        """For what is done between two steps: its seconds are counted under `name`, and neither as
        part of the steps nor in images per second."""
        wait_for(self.device)
        began = time.monotonic()
        yield
        wait_for(self.device)
        seconds = time.monotonic() - began
        self.metrics[f"{name}_s"] = self.metrics.get(f"{name}_s", 0.0) + seconds
        self.phase_began += seconds

    def on_models_loaded(self, parameters, num_workers):
        """Say what is trained, and on what."""
        self._end_phase("load")
        millions = sum(p.numel() for p in parameters) / 1e6
        on = f"{num_workers} x {self.device.type}"
        if self.enabled:
            print(
                f"training {millions:.2f} M parameters in {parameters[0].dtype}: {on}", flush=True
            )

    def on_train_begin(self, first_step):
        self.first_step = first_step
        if self.enabled:
            from torch.utils.tensorboard import SummaryWriter  # here: seconds, for rank 0 alone

            prepare(self.folder, first_step)  # again: Ray Train may have restarted the workers
            self.events = SummaryWriter(self.folder / "tensorboard", purge_step=first_step + 1)

    def on_step_end(self, step, losses, grad_norm, lr):
        """`losses` as in `LOSSES`, a tensor; `grad_norm`, before clipping, a scalar one. Diverged,
        with the step: one is not finite."""
        if self.waits_for_first:
            # The first step alone waits: for compilation, and for the device, so that neither
            # counts as part of the other steps.
            self.waits_for_first = False
            losses.tolist()
            self._end_phase("first_step")
        self.unread_losses.append(losses.reshape(-1))
        if step % self.log_every == 0 or step == self.plan.num_steps:
            self._log(step, grad_norm, lr)

    def _log(self, step, grad_norm, lr):
        losses = mean_of_workers(self.unread_losses)
        losses = losses.tolist()  # here the CPU waits for the device
        self.unread_losses = []
        grad_norm = grad_norm.item()
        means = [sum(column) / len(column) for column in zip(*losses, strict=True)]
        row = {"step": step, **dict(zip(LOSSES, means, strict=False))}
        row.update(grad_norm=grad_norm, lr=lr)
        if step > self.first_step + 1:  # the first is timed apart
            row["images_per_s"] = self._images_per_s(step)
        if self.device.type == "cuda":
            row["peak_gib"], row["reserved_gib"] = peak_gib(self.device)
        self.write(row)
        for number, values in enumerate(losses, start=step + 1 - len(losses)):
            if not math.isfinite(values[0]):
                self._give_up(f"the loss is {values[0]} at step {number}")
        if not math.isfinite(grad_norm):  # an earlier step's would show in the losses
            self._give_up(f"the gradients are not finite at step {step}")
        self.metrics["loss"] = losses[-1][0]
        if self.enabled:
            print(self._line(row), flush=True)

    def write(self, row):
        """Add a row of metrics, a dict with the "step", to both files: on rank 0."""
        if self.events is None:
            return
        with self.warn_if_not_written("metrics"):
            atomic.append_line(self.folder / METRICS, json.dumps(row))
            for name, value in row.items():
                if name != "step":
                    self.events.add_scalar(TAGS.get(name, name), value, row["step"])
            self.events.flush()  # a run that is killed keeps its curves

    @contextmanager
    def warn_if_not_written(self, what):
        """An OSError in the body, which writes `what`, is a warning, once: a full disk does not end
        the run."""
        try:
            yield
        except OSError as error:
            if what not in self.lost:
                warn(f"{what} cannot be written to {self.folder} ({error.strerror or error})")
            self.lost.add(what)

    def _give_up(self, reason):
        raise Diverged(f"{reason}: lower --lr, with --restart; no result was saved")

    def _images_per_s(self, step):
        images_per_step = self.plan.images_per_pair * self.plan.pairs_per_step
        num_images = images_per_step * (step - self.first_step - 1)
        return num_images / max(time.monotonic() - self.phase_began, 1e-9)

    def _line(self, row):
        speed = f" {row['images_per_s']:.1f} images/s" if "images_per_s" in row else ""
        memory = f" reserved {row['reserved_gib']:.1f} GiB" if "reserved_gib" in row else ""
        halves = ""
        if "class_loss" in row:
            halves = f" (instance {row['instance_loss']:.4f}, class {row['class_loss']:.4f})"
        return (
            f"step {row['step']}/{self.plan.num_steps} loss {row['loss']:.4f}{halves}"
            f" grad norm {row['grad_norm']:.3f} lr {row['lr']:.2e}"
            f"{speed}{memory}"
        )

    def add_image(self, name, image, step):
        """Show a Pillow image in TensorBoard."""
        import numpy as np

        with self.warn_if_not_written("metrics"):
            self.events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def on_train_end(self):
        self._end_phase("steps")
        if self.events:
            with self.warn_if_not_written("metrics"):
                self.events.close()  # raises what has failed at any time before

    def summary(self):
        """Call after saving. Returns the run's metrics: the last loss, and the seconds of each
        phase under names that end with "_s"."""
        self._end_phase("save")
        return self.metrics


def wait_for(device):
    """Wait until a GPU has done all that it was asked to."""
    if device.type == "cuda":
        import torch  # here: report/page.py reads logs without it

        torch.cuda.synchronize(device)


def peak_gib(device):
    """The most memory that tensors have taken on a GPU, and that torch has reserved for them."""
    import torch

    allocated = torch.cuda.max_memory_allocated(device)
    return allocated / 2**30, torch.cuda.max_memory_reserved(device) / 2**30


def mean_of_workers(losses):
    """The losses of N steps, N tensors (L,), as one (N, L): their means over all workers, each of
    which must call it."""
    import torch

    losses = torch.stack(losses)
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


def prepare(folder, first_step):
    """Make a report's directory ready for a run that goes on after `first_step` steps: the metrics
    of later ones go; with 0 also the curves and the page of an earlier run. A finished one's report
    is copied first, as its result is still in place."""
    if first_step == 0 and read_run_record(folder).get("status") == "finished":
        shutil.rmtree(previous(folder), ignore_errors=True)
        shutil.copytree(folder, previous(folder), ignore=shutil.ignore_patterns("lock"))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in read_metrics(folder) if row["step"] <= first_step]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    atomic.replace_text(folder / METRICS, text)
    if first_step == 0:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        (folder / "report.html").unlink(missing_ok=True)


def report_dir(output_dir):
    """Where what a run logs goes: beside its result."""
    output_dir = Path(output_dir)
    return output_dir.with_name(f"{output_dir.name}.report")


def previous(folder):
    """Where the report of an earlier run is kept until its result is replaced."""
    return folder.with_name(f"{folder.name}.previous")


def read_metrics(folder):
    """The lines of a folder's metrics.jsonl as dicts; [] if there are none. What a crash has cut
    off or spoilt is left out."""
    try:
        text = (Path(folder) / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and "step" in row]


class RunRecord:
    """run.json: what a run was. As a context manager it records the error that ends its body before
    the run has finished."""

    def __init__(self, args, plan, hardware):
        name, revision = pipeline_dir.name_and_revision(args.model_dir)
        self.folder = plan.report_dir
        self.facts = {
            "status": "running",
            # With which the run is resumed, hence without --restart.
            "command": shlex.join([sys.executable, *(a for a in sys.argv if a != "--restart")]),
            "directory": str(Path.cwd()),  # in which it was given
            "flags": vars(args),
            "model": name,
            "revision": revision,
            "pipeline": pipeline_dir.read_facts(args.model_dir).class_name,
            "plan": str(plan),
            "num_steps": plan.num_steps,
            "instance_paths": [str(path) for path in plan.instance_paths],
            "num_class_images": len(plan.class_paths),
            "hardware": hardware,
            "versions": {"Python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        }
        self._write()

    def finish(self, metrics):
        """The run is done; `metrics` are the seconds of its phases and its last loss."""
        self.facts.update(status="finished", metrics=metrics)
        self._write()
        shutil.rmtree(previous(self.folder), ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, error_class, error, trace):
        if error is not None and self.facts["status"] == "running":
            stopped = not isinstance(error, Exception)  # by Ctrl-C or a signal
            self.facts["status"] = getattr(error, "status", "stopped" if stopped else "failed")
            if not isinstance(error, SystemExit):  # its text is an exit code
                self.facts["message"] = first_line(error)
            with suppress(OSError):  # the disk may be full, which may be that error
                self._write()

    def _write(self):
        atomic.replace_text(self.folder / RECORD, json.dumps(self.facts, indent=1))


def read_run_record(folder):
    """The facts in a report's run.json; {} if there is none, or one that is damaged."""
    try:
        facts = json.loads((Path(folder) / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_record = isinstance(facts, dict) and "status" in facts
    return facts if is_record and isinstance(facts.get("flags"), dict) else {}
