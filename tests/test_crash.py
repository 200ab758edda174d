"""Generation survives what preemptible machines do: killed drivers and killed actors."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import generate
from dreambooth import pictures

ROOT = Path(__file__).parents[1]
PROMPTS = ("photo of a car", "photo of a red house, at night")


def arguments(model_dir, folder, count):
    return [
        "--model_dir", str(model_dir), "--output_dir", str(folder), "--prompts", *PROMPTS,
        "--num_samples_per_prompt", str(count), "--num_inference_steps", "3",
    ]  # fmt: skip


def digests(folder):
    return {file.name: pictures.read_record(file)["digest"] for file in Path(folder).glob("*-seed*.png")}


def test_killed_drivers_lose_and_repeat_nothing(model_dir, tmp_path):
    """`kill -9` at ten different moments, then a run to the end: every picture whole, none made again
    once it was there, and the same pictures as an undisturbed run's."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    generate.main(generate.parse_args(arguments(model_dir, calm, 48)))
    command = [sys.executable, "generate.py", *arguments(model_dir, killed, 48)]
    made = {}
    for at_least in (1, 5, 17, 20, 33, 36, 49, 52, 65, 81):  # while a batch of 16 is saved, or at the start
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(killed.glob("0*-seed0.png"))) < at_least:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for file in killed.glob("0*-seed0.png"):
            assert pictures.read_record(file) is not None, f"{file.name} is unreadable"
            assert made.setdefault(file.name, file.stat().st_mtime_ns) == file.stat().st_mtime_ns, "made twice"
    generate.main(generate.parse_args(arguments(model_dir, killed, 48)))
    assert len(digests(calm)) == 96
    assert digests(killed) == digests(calm)
    assert all((killed / name).stat().st_mtime_ns == stamp for name, stamp in made.items())
    lines = [json.loads(line) for line in (killed / pictures.RECORDS).read_text().splitlines()]
    assert {line["file"]: line["digest"] for line in lines} == digests(calm)
    assert not list(killed.glob(".*.tmp"))


def painters():
    """The process ids of Ray Data's actors that paint."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::") and b"Painter" in command:
            found.append(int(folder.name))
    return found


def test_work_of_a_killed_actor_is_done_by_another(model_dir, ray_address, tmp_path):
    """One of two actors is killed after the first picture: the run completes, with the same digests."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    generate.main(generate.parse_args(arguments(model_dir, calm, 24)))
    args = generate.parse_args([*arguments(model_dir, killed, 24), "--use_ray_data", "--num_workers", "2"])
    generate.check_args(args)
    victims = []
    for _ in generate.paint_with_ray(args, generate.plan(args)):
        if not victims:
            victims = painters()[:1]
            os.kill(victims[0], signal.SIGKILL)
    assert victims
    assert len(digests(calm)) == 48
    assert digests(killed) == digests(calm)
