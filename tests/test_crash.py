"""Both scripts survive what preemptible machines do: stopped and killed scripts, killed actors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import generate
from dreambooth import outputs
from dreambooth.batch_inference import generate_with_ray

PROMPTS = ["photo of a car", "photo of a red house, at night"]


@pytest.fixture
def flags():
    return {"prompts": PROMPTS, "num_inference_steps": 3}


def read_digests(folder):
    """As the records say, by file name."""
    files = folder.glob("*-seed*.png")
    return {file.name: outputs.read_record(file)["digest"] for file in files}


def kill_after(process, folder, num_images):
    """Wait until `folder` holds so many images, and kill."""
    while process.poll() is None and len(list(folder.glob("0*-seed0.png"))) < num_images:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_scripts_lose_nothing_and_repeat_nothing(
    generate_argv, generate_args, root, tmp_path, flags
):
    """`kill -9` at several moments, then a run to the end: every image is complete, none is
    generated again once it is there, and they are those of a run that nobody killed."""
    flags["num_samples_per_prompt"] = 48
    undisturbed = tmp_path / "undisturbed"
    killed = tmp_path / "killed"
    generate.main(generate_args(undisturbed, **flags))
    command = [sys.executable, "generate.py", *generate_argv(killed, **flags)]
    created = {}
    # While a batch of 16 is being saved, at its end, and at the start of the next one.
    for num_images in (1, 5, 17, 20, 33, 36, 49, 65, 81):
        process = subprocess.Popen(
            command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        kill_after(process, killed, num_images)
        for file in killed.glob("0*-seed0.png"):
            assert outputs.read_record(file) is not None, f"{file.name} is unreadable"
            stamp = file.stat().st_mtime_ns
            assert created.setdefault(file.name, stamp) == stamp, "generated twice"
    generate.main(generate_args(killed, **flags))
    digests = read_digests(killed)
    assert len(digests) == 96
    assert digests == read_digests(undisturbed)
    for name, stamp in created.items():
        assert (killed / name).stat().st_mtime_ns == stamp
    lines = (killed / outputs.RECORDS).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {record["file"]: record["digest"] for record in records} == digests
    assert list(killed.glob(".*.tmp")) == []


def parent_of(process_id):
    """The id of a process's parent; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def is_ours(process_id):
    """Whether a process descends from this one: other Rays on this machine are left alone."""
    while process_id > 1:
        process_id = parent_of(process_id)
        if process_id == os.getpid():
            return True
    return False


def actors():
    """The process ids of the Ray Data actors that generate."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        process_id = int(folder.name)
        if command.startswith(b"ray::") and b"ImageGenerator" in command and is_ours(process_id):
            found.append(process_id)
    return found


def test_the_images_of_a_killed_actor_are_generated_by_another(
    generate_args, ray_address, tmp_path, flags
):
    """One of two actors is killed after the first image: the run completes, with the same
    images."""
    flags["num_samples_per_prompt"] = 24
    undisturbed = tmp_path / "undisturbed"
    killed = tmp_path / "killed"
    generate.main(generate_args(undisturbed, **flags))
    args = generate_args(killed, use_ray_data=True, num_workers=2, **flags)
    generate.check_args(args)
    victim = None
    for _ in generate_with_ray(args, generate.plan(args)):
        if victim is None:
            victim = actors()[0]
            os.kill(victim, signal.SIGKILL)
    assert victim is not None
    assert len(read_digests(killed)) == 48
    assert read_digests(killed) == read_digests(undisturbed)


@pytest.fixture
def stop_after_step_1(root):
    """Start a training command with one worker, send TERM before the first step, and wait for its
    end: the step is completed and saved."""

    def stop(argv):
        process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        for line in process.stdout:
            if line.startswith("training "):
                process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
        assert process.wait() == 128 + signal.SIGTERM
        assert errors == "stopped after step 1: run the same command again to resume\n"

    return stop


def test_a_stopped_training_run_goes_on_to_the_last_bit(
    one_worker, train_argv, run_script, stop_after_step_1, tmp_path
):
    """The same command ends with the weights of a run that nobody stopped."""
    argv = ["train.py", *train_argv(tmp_path / "out", log_every=1)]
    stop_after_step_1(argv)
    assert not (tmp_path / "out").exists()
    resumed = run_script(*argv)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 1" in resumed.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.report"]
    files = sorted(one_worker.output_dir.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        name = file.relative_to(one_worker.output_dir)
        assert file.read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_run_goes_on_with_another_number_of_workers(
    two_workers, train_argv, run_script, stop_after_step_1, update, tmp_path
):
    """One worker takes the first of two steps, two the second: the weights are, to rounding, those
    of two workers that took both. (A pair used twice or not at all would change them.)"""

    def argv(num_workers):
        changes = {**two_workers.changes, "num_workers": num_workers}
        changes["gradient_accumulation_steps"] = 4 // num_workers
        return ["train.py", *train_argv(tmp_path / "out", log_every=1, **changes)]

    stop_after_step_1(argv(1))
    resumed = run_script(*argv(2))
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 1" in resumed.stdout
    assert "2 x cpu" in resumed.stdout
    resumed_run = SimpleNamespace(output_dir=tmp_path / "out")
    expected = update(two_workers)
    assert (update(resumed_run) - expected).norm() < 1e-3 * expected.norm()
