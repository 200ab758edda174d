"""What a run was: TUNED_MODEL_DIR.report/run.json, for report_page.py and model_card.py.

Command, flags, versions, model and revision, hardware; and at the end where the seconds went, or
what ended the run.
"""

import json
import platform
import shlex
import shutil
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from dreambooth import (
    atomic,
    checkpoints,
    cluster,
    metrics,
    model_dir,
    previews,
    progress,
    ray_errors,
)
from dreambooth.cli import UserError

FILE = "run.json"
PACKAGES = ["torch", "diffusers", "transformers", "peft", "ray"]


def read(folder):
    """The record in a report's directory; {} if there is none."""
    try:
        return json.loads((Path(folder) / FILE).read_text())
    except (OSError, ValueError):
        return {}


@contextmanager
def recorded(args, plan, num_gpus):
    """Record the run that the body carries out, and show the progress bar of several workers. The
    body gets the record, and puts the seconds into its "seconds"."""
    folder = metrics.report_dir(args.output_dir)
    _, first_step = checkpoints.find_newest(checkpoints.run_dir(args))
    prepare(folder, first_step)
    record = describe(args, plan, num_gpus)
    write(folder, record)
    in_driver = cluster.runs_in_driver(args.num_workers)
    follows = progress.shown_by_worker(in_driver) == "nothing"
    try:
        with progress.follow(folder, plan.num_steps, follows):
            yield record
        record["status"] = "finished"
        write(folder, record)  # the card reads it
        write_card(args.output_dir)
    except BaseException as error:
        message = str(ray_errors.training_error(error) or error).strip() or "stopped"
        record["status"] = message.splitlines()[0]
        raise
    finally:
        write(folder, record)


def write_card(output_dir):
    """Put the model card into the result. UserError: there is none here."""
    from dreambooth import model_card  # here: it reads the record

    if not Path(output_dir).is_dir():
        raise UserError(f"{output_dir} is on another node: it must be on shared storage")
    model_card.write(output_dir)


def prepare(folder, first_step):
    """Make a report's directory ready for a run that goes on after `first_step` steps: an earlier
    run's previews and page go. Nothing else in the directory is touched."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics.keep_until(folder, first_step)
    previews.remove_later(folder, first_step)
    if first_step == 0:
        shutil.rmtree(folder / previews.FOLDER, ignore_errors=True)
        for name in (previews.FILM_STRIP, "report.html"):
            (folder / name).unlink(missing_ok=True)


def describe(args, plan, num_gpus):
    """All that is known of a run when it begins."""
    name, revision = model_dir.name_and_revision(args.model_dir)
    return {
        "status": "running",
        "command": shlex.join(["python", *sys.argv]),
        "flags": vars(args),
        "model": name,
        "revision": revision,
        "plan": str(plan),
        "num_steps": plan.num_steps,
        "instance_paths": [str(path) for path in plan.instance_paths],
        "num_class_images": len(plan.class_paths),
        "hardware": hardware(num_gpus),
        "versions": {"Python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }


def hardware(num_gpus):
    """The machine in words."""
    import torch

    if num_gpus and torch.cuda.is_available():
        return f"{num_gpus} x {torch.cuda.get_device_name(0)}"
    if num_gpus:
        return f"{num_gpus} GPUs of a cluster"
    return f"{cluster.num_cores()} cores ({platform.machine()}), no GPU"


def write(folder, record):
    """Replace the record in a report's directory."""
    text = json.dumps(record, indent=1)
    atomic.replace_file(Path(folder) / FILE, lambda file: file.write_text(text))
