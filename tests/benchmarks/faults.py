"""What a run survives: faults at random moments, each against an undisturbed run.

    python tests/benchmarks/faults.py                           # all, about an hour on two cores
    python tests/benchmarks/faults.py --faults worker driver --trials 3

    worker       SIGKILL to one of two workers: the run restarts them and goes on
    driver       SIGKILL to the script; the same command again
    term         SIGTERM to the script (exit code 143); the same command again
    truncated    SIGKILL to the script, its newest checkpoint cut off; the same command again
    disk         the disk is full while a checkpoint is written; with room again, the same command
    node         a node with a worker dies in training (a Ray cluster of a head and two nodes)
    late_node    both nodes die, and another one comes when the run has said that it waits
    generation   a node with an actor dies while images are generated

Each ends with the weights (images) of an undisturbed run, byte for byte, or it is counted as lost.
"""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import psutil
from ray.cluster_utils import Cluster

from dreambooth.cli import ArgumentParser
from dreambooth.pocket import POCKET_DIR
from dreambooth.run.plan import run_dir

STEPS = 24
TRIALS = {
    "worker": 20, "driver": 20, "term": 5, "truncated": 5, "disk": 5, "node": 5, "late_node": 5,
    "generation": 5,
}  # fmt: skip


class Run:
    """train.py as a command in a folder of its own: 24 steps, a checkpoint every third."""

    def __init__(self, folder, num_workers=1, storage_path=None, env=None):
        self.output_dir = folder / "tuned"
        paths = SimpleNamespace(output_dir=self.output_dir, storage_path=storage_path)
        self.storage = run_dir(paths.output_dir, paths.storage_path)
        self.log = folder / "log"
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        self.command = [
            sys.executable, "train.py", "--model_dir", POCKET_DIR,
            "--output_dir", self.output_dir, "--instance_images_dir", "images/lego-car",
            "--instance_prompt", "photo of unqtkn car", "--class_prompt", "photo of a car",
            "--class_images_dir", folder.parent / "class", "--log_every", 1,
            "--num_workers", num_workers,
            "--train_batch_size", 2 // num_workers, "--max_train_steps", STEPS,
            "--checkpointing_steps", 3,
        ]  # fmt: skip
        if storage_path:
            self.command += ["--storage_path", storage_path]

    def start(self):
        with open(self.log, "ab") as log:
            command = [str(word) for word in self.command]
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=log)

    def wait_for_step(self, step):
        """Until the log shows `step` of STEPS, or the run has ended."""
        while self.process.poll() is None and f"step {step}/{STEPS} " not in self.log.read_text():
            time.sleep(0.02)

    def finish(self):
        """Wait for the end; the exit code."""
        return self.process.wait(timeout=600)

    def again(self):
        """The same command, to its end."""
        self.start()
        return self.finish()

    def digest(self):
        """Of the result's weights; what the log's last line says if there is none."""
        files = sorted(self.output_dir.rglob("*.safetensors"))
        if not files:
            return self.log.read_text().splitlines()[-1]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def kill(self, name=None, number=signal.SIGKILL):
        """Send a signal to the script, or to one of its descendants of this name."""
        process = psutil.Process(self.process.pid)
        if name:
            # Ray's processes are children of the raylet, a child of the script.
            named = [p for p in process.children(recursive=True) if name in " ".join(p.cmdline())]
            process = random.choice(named)
        process.send_signal(number)


def worker(run):
    """With two workers."""
    run.start()
    run.wait_for_step(random.randint(4, STEPS - 1))
    run.kill("ray::RayTrainWorker")
    return run.finish() == 0


def driver(run):
    run.start()
    run.wait_for_step(random.randint(1, STEPS - 1))
    run.kill()
    run.finish()
    return run.again() == 0


def term(run):
    run.start()
    run.wait_for_step(random.randint(1, STEPS - 2))
    run.kill(number=signal.SIGTERM)
    return run.finish() == 143 and run.again() == 0


def truncated(run):
    run.start()
    run.wait_for_step(random.randint(7, STEPS - 1))
    run.kill()
    run.finish()
    for file in run.storage.glob("step_*/state.pt"):
        os.truncate(file, file.stat().st_size // 2)
    return run.again() == 0


def disk(run):
    """On a small file system, which something else fills; needs root."""
    run.start()
    run.wait_for_step(random.randint(1, STEPS - 6))
    filler = run.storage.parent / "filler"
    with suppress(OSError), open(filler, "wb") as file:
        file.write(bytes(shutil.disk_usage(run.storage.parent).free - 2**24))
    stopped = run.finish() == 2 and "no space" in run.log.read_text().splitlines()[-1]
    filler.unlink()
    return stopped and run.again() == 0


def node(run, cluster, nodes):
    """With two workers, on two nodes."""
    run.start()
    run.wait_for_step(random.randint(4, STEPS - 1))
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    nodes.append(cluster.add_node(num_cpus=2))
    return run.finish() == 0


def late_node(run, cluster, nodes):
    run.start()
    run.wait_for_step(random.randint(4, STEPS - 1))
    while nodes:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
    while "waiting: 2 workers" not in run.log.read_text():
        if run.process.poll() is not None:
            return False
        time.sleep(0.1)
    nodes.append(cluster.add_node(num_cpus=4))
    return run.finish() == 0


def run_in_cluster(run, fault):
    """A head and two nodes for one run."""
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    run.env |= {"RAY_ADDRESS": cluster.address}
    try:
        return fault(run, cluster, nodes)
    finally:
        cluster.shutdown()


class Generation(Run):
    """generate.py with Ray on two workers: 96 images."""

    def __init__(self, folder):
        super().__init__(folder)
        self.command = [
            sys.executable, "generate.py", "--model_dir", POCKET_DIR,
            "--output_dir", self.output_dir, "--prompts", "photo of a car",
            "--num_samples_per_prompt", 96, "--num_inference_steps", 8, "--use_ray_data",
            "--num_workers", 2,
        ]  # fmt: skip

    def wait_for_images(self, count):
        while self.process.poll() is None and len(list(self.output_dir.glob("*.png"))) < count:
            time.sleep(0.02)

    def digest(self):
        files = sorted(self.output_dir.glob("*-seed*.png"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def generation(run, cluster, nodes):
    run.start()
    run.wait_for_images(random.randint(1, 60))
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    return run.finish() == 0


def trial(name, folder):
    """One fault: the digest of what the run ended with, None if it did not end as it should."""
    folder.mkdir(parents=True)
    if name == "generation":
        run = Generation(folder)
        return run.digest() if run_in_cluster(run, generation) else None
    if name == "disk":
        small = folder / "disk"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250m", "tmpfs", small], check=True)
        run = Run(folder, storage_path=small)
        try:
            return run.digest() if disk(run) else None
        finally:
            subprocess.run(["umount", small], check=True)
    if name in ("node", "late_node"):
        run = Run(folder, num_workers=2)
        return run.digest() if run_in_cluster(run, globals()[name]) else None
    run = Run(folder, num_workers=2 if name == "worker" else 1)
    return run.digest() if globals()[name](run) else None


def undisturbed(name, folder):
    """The digest that each trial of a fault must reach."""
    folder.mkdir(parents=True)
    run = Run(folder, num_workers=2 if name in ("worker", "node", "late_node") else 1)
    if name == "generation":
        run = Generation(folder)
    assert run.again() == 0, run.log.read_text()
    return run.digest()


def main(args):
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        command = [
            sys.executable, "generate.py", "--model_dir", POCKET_DIR,
            "--output_dir", folder / "class", "--prompts", "photo of a car",
            "--num_samples_per_prompt", 16, "--num_inference_steps", 4,
        ]  # fmt: skip
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True)
        for name in args.faults:
            expected = undisturbed(name, folder / f"{name}-undisturbed")
            trials = args.trials or TRIALS[name]
            outcomes = []
            for i in range(trials):
                found = trial(name, folder / f"{name}-{i}")
                outcomes.append(found == expected)
                if found != expected and args.keep:
                    shutil.copytree(folder / f"{name}-{i}", Path(args.keep) / f"{name}-{i}")
                print(f"{name} {i + 1}: {'the same' if outcomes[-1] else 'LOST'}", flush=True)
                shutil.rmtree(folder / f"{name}-{i}")
            print(f"{name}: {sum(outcomes)} of {trials} ended as undisturbed", flush=True)


TRIALS_HELP = "of each (default: 20 of worker and driver, 5 of the others)"

if __name__ == "__main__":
    parser = ArgumentParser(__doc__)
    parser.add_argument("--faults", nargs="+", choices=TRIALS, default=list(TRIALS), help="which")
    parser.add_argument("--trials", type=int, help=TRIALS_HELP)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", help="a folder for the logs of trials that were lost")
    main(parser.parse_args())
