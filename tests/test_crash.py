"""Both scripts survive what preemptible machines do: they are stopped and killed, and so are the
processes that they start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import generate
from dreambooth.batch_inference import generate_with_ray
from dreambooth.files import generated_images
from tests.test_train import weights_of

PROMPTS = ["photo of a car", "photo of a red house, at night"]


def kill_after(process, folder, num_images):
    """Wait until `folder` holds so many images, and kill."""
    while process.poll() is None and len(list(folder.glob("0*-seed0.png"))) < num_images:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_scripts_lose_nothing_and_repeat_nothing(
    generate_argv, generate_args, digests, root, tmp_path
):
    """`kill -9` while the first batch of 16 is being saved, at its end, and at the start of the
    next; then a run to the end: every image is complete, none is generated again once it is there,
    and they are those of a run that nobody killed."""
    flags = {"prompts": PROMPTS, "num_samples_per_prompt": 20}
    undisturbed = tmp_path / "undisturbed"
    killed = tmp_path / "killed"
    generate.main(generate_args(undisturbed, **flags))
    command = [sys.executable, "generate.py", *generate_argv(killed, **flags)]
    created = {}
    for num_images in (5, 16, 17):
        process = subprocess.Popen(
            command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        kill_after(process, killed, num_images)
        for file in killed.glob("0*-seed0.png"):
            assert generated_images.read_record(file) is not None, f"{file.name} is unreadable"
            stamp = file.stat().st_mtime_ns
            assert created.setdefault(file.name, stamp) == stamp, "generated twice"
    assert 17 <= len(created) < 40
    generate.main(generate_args(killed, **flags))
    assert len(digests(killed)) == 40
    assert digests(killed) == digests(undisturbed)
    for name, stamp in created.items():
        assert (killed / name).stat().st_mtime_ns == stamp
    lines = (killed / generated_images.METADATA).read_text().splitlines()
    assert sorted(json.loads(line)["file_name"] for line in lines) == sorted(digests(killed))
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


def test_images_are_the_same_with_ray_and_without_and_if_an_actor_is_killed(
    sampling_args, ray_address, digests, lora_dir, tmp_path
):
    """Forty images with a LoRA on two actors, one of which is killed after the first image: to the
    last bit those that are generated without Ray, with the same records. Fault 9 of the published
    example: with Ray Data a LoRA was silently ignored."""
    flags = {"prompts": PROMPTS, "num_samples_per_prompt": 20, "lora_weights_dir": lora_dir}
    local = sampling_args(tmp_path / "local", **flags)
    generate.main(local)
    args = sampling_args(tmp_path / "ray", use_ray_data=True, num_workers=2, **flags)
    generate.check_args(args)
    finished = []
    for record in generate_with_ray(args, generate.list_records(args)):
        if not finished:
            os.kill(actors()[0], signal.SIGKILL)
        finished.append(record)
    assert len(digests(tmp_path / "local")) == 40
    assert digests(tmp_path / "ray") == digests(tmp_path / "local")
    assert finished == generate.list_records(local)
    assert json.loads(json.dumps(finished)) == finished  # of Python's own types


def test_a_stopped_training_run_goes_on_to_the_last_bit(
    one_worker, train_argv, train_here, ray_address, root, tmp_path, monkeypatch
):
    """TERM, sent before the first step to the script and to all processes of its Ray, as `timeout`
    does, ends the run after that step, with a checkpoint. The same command then ends with the
    weights of a run that nobody stopped: here in a worker of a Ray that is there already, and no
    longer in the script's own process."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *train_argv(tmp_path / "out", log_every=1)],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("training "):
            os.killpg(process.pid, signal.SIGTERM)
    errors = process.stderr.read()
    assert process.wait() == 128 + signal.SIGTERM
    assert errors == "stopped after step 1: run the same command again to resume\n"
    assert sorted(os.listdir(tmp_path)) == ["out.checkpoints", "out.report"]

    monkeypatch.setenv("RAY_ADDRESS", ray_address)
    resumed = train_here(tmp_path / "out")
    assert "resuming after step 1" in resumed.stdout
    assert sorted(os.listdir(tmp_path)) == ["out", "out.report"]
    assert weights_of(tmp_path / "out") == weights_of(one_worker.output_dir)
