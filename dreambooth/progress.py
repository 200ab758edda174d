"""One progress bar on a terminal, however many workers train.

In Ray Train's local mode the process that trains shows the bar. With several workers the driver
does: it follows the metrics that rank 0 appends to metrics.jsonl. Where there is no terminal, as on
a log file or in CI, report.py prints a line every few steps instead.
"""

import sys
import threading
from contextlib import contextmanager

from tqdm import tqdm

from dreambooth import metrics

SECONDS_BETWEEN_LOOKS = 0.5


def on_terminal():
    """Whether a person watches: both outputs of this process are a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def shown_by_worker(in_driver):
    """What rank 0 shows: "bar", "lines", or "nothing", where the driver shows the bar."""
    if not on_terminal():
        return "lines"
    return "bar" if in_driver else "nothing"


def new_bar(num_steps, first_step):
    """A tqdm bar over a run's steps."""
    return tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True, leave=True)


def show(bar, row):
    """Put the losses and the rate of a row of metrics behind the bar."""
    names = {"instance_loss": "instance", "class_loss": "class", "images_per_s": "images/s"}
    shown = {label: f"{row[name]:.3g}" for name, label in names.items() if name in row}
    bar.set_postfix(shown, refresh=False)


@contextmanager
def follow(folder, num_steps, enabled):
    """Show a bar while the body runs, from the metrics that another process writes to `folder`."""
    if not enabled:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(folder, num_steps, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _follow(folder, num_steps, done):
    bar = None
    finished = False
    while not finished:
        finished = done.wait(SECONDS_BETWEEN_LOOKS)  # then one last look
        rows = metrics.read(folder)
        if not rows:
            continue
        if bar is None:
            bar = new_bar(num_steps, 0)
        show(bar, rows[-1])
        bar.update(rows[-1]["step"] - bar.n)  # backwards if workers went on from a checkpoint
        bar.refresh()
    if bar is not None:
        bar.close()
