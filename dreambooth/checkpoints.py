"""Checkpoints of a training run: the same command, given again, resumes where the last one stopped.

    TUNED_MODEL_DIR.checkpoints/lock              locked by the process of the run
    TUNED_MODEL_DIR.checkpoints/run.json          what decides the run's result
    TUNED_MODEL_DIR.checkpoints/step_000100/      a complete checkpoint: state.pt and complete.json

A checkpoint holds all that changes from step to step: trained weights, optimizer, learning-rate
schedule. Pairs, crops, noise and timesteps follow from their position in the run (seeds.py). So a
resumed run ends with the weights of an uninterrupted one: to the last bit on a CPU.
"""

import json
import os
import shutil
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from dreambooth import atomic
from dreambooth.cli import UserError


def run_dir(args):
    """Where a run's checkpoints are, and Ray Train's own files: every node must see it."""
    output_dir = Path(args.output_dir)
    if args.storage_path:  # where other results may have the same name
        path_hash = f"{zlib.crc32(str(output_dir).encode()):08x}"
        return Path(args.storage_path) / f"{output_dir.name}-{path_hash}.checkpoints"
    return output_dir.with_name(f"{output_dir.name}.checkpoints")


def find_newest(folder):
    """The newest complete checkpoint in `folder` and its step; (None, 0) if there is none."""
    for path in sorted(Path(folder).glob("step_*"), reverse=True):
        try:
            complete = json.loads((path / "complete.json").read_text())
            if (path / "state.pt").stat().st_size == complete["num_bytes"]:
                return path, complete["step"]
        except (OSError, ValueError, KeyError):
            continue
    return None, 0


def prepare(args, identity):
    """Make the run's directory ready, for this process alone, and say if a run resumes.

    `identity`: a flat dict of all that decides the result. UserError: the checkpoints there belong
    to a run with another one, or to a run that has not ended.
    """
    folder = run_dir(args)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.lock(folder / "lock", args.output_dir)
    path, step = find_newest(folder)
    if args.restart or not (folder / "run.json").exists():
        path = None
    if path:
        check_identity(folder, identity)
        print(f"resuming after step {step}: {path}")
    for other in folder.iterdir():  # of the previous process: Ray Train's files, a stop request
        if other.name in ("lock", "run.json") or path and other.name.startswith("step_"):
            continue
        shutil.rmtree(other) if other.is_dir() else other.unlink()
    text = json.dumps(identity, indent=1)
    atomic.replace_file(folder / "run.json", lambda file: file.write_text(text))


def remove(folder):
    """Delete a run's checkpoints and Ray Train's files: the result is in place."""
    with suppress(OSError):
        (folder / "run.json").unlink()  # first: without it, no run resumes from the rest
    shutil.rmtree(folder, ignore_errors=True)


def remove_unless_needed(folder):
    """The same if the run has no checkpoint to go on from."""
    if find_newest(folder) == (None, 0):
        remove(folder)


def check_identity(folder, identity):
    """The run in `folder` must be this one; a UserError names what differs."""
    try:
        earlier = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        earlier = {}
    now = json.loads(json.dumps(identity))
    differing = [name for name in now if earlier.get(name) != now[name]]
    if differing:
        changes = ", ".join(f"{name} was {earlier.get(name)}, is {now[name]}" for name in differing)
        raise UserError(
            f"{folder} holds checkpoints of another run ({changes}):"
            " give that run's flags to resume it, or --restart to start over"
        )


def write(state, step, folder, limit):
    """Write `state` as the checkpoint of `step`, then delete all but the newest `limit`; returns
    its path. UserError: the disk or the quota is full; earlier checkpoints are kept."""
    path = Path(folder) / f"step_{step:06d}"
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with open(temporary / "state.pt", "wb") as file:  # torch's own writer would hide the error
            torch.save(state, file)
        num_bytes = (temporary / "state.pt").stat().st_size
        complete = json.dumps({"step": step, "num_bytes": num_bytes})
        (temporary / "complete.json").write_text(complete)
        for file in (temporary / "state.pt", temporary / "complete.json", temporary):
            atomic.flush(file)
    except (OSError, RuntimeError) as error:  # the latter after the former, by torch
        shutil.rmtree(temporary, ignore_errors=True)
        if not atomic.is_full(error):
            raise
        needed = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
        raise UserError(
            f"no space for the checkpoint of step {step} in {folder}, which takes"
            f" {needed / 1e9:.2f} GB: make room and give the same command again"
        ) from error
    for other in Path(folder).glob("step_*"):
        if other.name >= path.name:  # damaged, as the run went on from an earlier one
            shutil.rmtree(other, ignore_errors=True)
    os.rename(temporary, path)
    atomic.flush(folder)
    for older in sorted(Path(folder).glob("step_*"))[:-limit]:
        shutil.rmtree(older, ignore_errors=True)
    return path
