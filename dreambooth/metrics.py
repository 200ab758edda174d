"""A run's metrics, beside its result: TensorBoard's event files, and the same as JSON lines.

    TUNED_MODEL_DIR.report/metrics.jsonl      a line every --log_every steps: means since the last
    TUNED_MODEL_DIR.report/tensorboard/       tensorboard --logdir TUNED_MODEL_DIR.report

After a resume both go on from the checkpoint's step: what was recorded of later steps is dropped,
as those steps are done again.
"""

import json
import shutil
from pathlib import Path

from dreambooth import atomic

FILE = "metrics.jsonl"
# The tags under which TensorBoard shows them.
TAGS = {
    "loss": "loss/total",
    "instance_loss": "loss/instance images",
    "class_loss": "loss/class images",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_s": "images per second",
    "peak_gib": "peak memory, GiB",
}


def report_dir(output_dir):
    """Where what a run records goes: beside its result."""
    output_dir = Path(output_dir)
    return output_dir.with_name(f"{output_dir.name}.report")


def read(folder):
    """The lines of a folder's metrics.jsonl as dicts; [] if there are none. A last line that a
    crash has cut off is left out."""
    try:
        lines = (Path(folder) / FILE).read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class MetricsWriter:
    """Appends the metrics of a run that begins, or goes on, after `first_step` steps."""

    def __init__(self, folder, first_step):
        from torch.utils.tensorboard import SummaryWriter  # here: takes seconds, for rank 0 alone

        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_until(self.folder, first_step)
        self.events = SummaryWriter(self.folder / "tensorboard", purge_step=first_step + 1)

    def add(self, row):
        """Append one row, a dict with "step", the number of steps done, and numbers by name."""
        atomic.append_line(self.folder / FILE, json.dumps(row))
        for name, value in row.items():
            if name in TAGS:
                self.events.add_scalar(TAGS[name], value, row["step"])
        self.events.flush()  # a run that is killed keeps its curves

    def add_image(self, name, image, step):
        """Add a Pillow image to TensorBoard's."""
        import numpy as np

        self.events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self):
        """Write what TensorBoard's writer still holds."""
        self.events.close()


def keep_until(folder, step):
    """Drop the rows of later steps; with `step` 0 all of them, and the curves of earlier runs."""
    rows = [row for row in read(folder) if row["step"] <= step]
    if step == 0:
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    atomic.replace_file(folder / FILE, lambda file: file.write_text(text))
