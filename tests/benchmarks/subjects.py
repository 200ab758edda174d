"""Does the recipe hold for every subject? Eight subjects of six classes, each with parts that no
member of its class has, are learned with two seeds and judged as in fidelity.py.

    python tests/benchmarks/subjects.py --work_dir /tmp/subjects                 # run.sh's recipe
    python tests/benchmarks/subjects.py --work_dir /tmp/subjects --recipe lora
    python tests/benchmarks/subjects.py --work_dir /tmp/subjects --subjects lego_car circus \\
        --train_flags="--gradient_accumulation_steps 2 --max_train_steps 150"

The photos are rendered, the class images are generated once per class, and training runs in this
process, without Ray, which gives the same weights as train.py (a test compares them). Each result
is appended to results.jsonl in --work_dir at once; a second run of the same command trains only
what is missing there. The table ends with the worst of each column.
"""

import json
import pickle
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

import generate
import train
from dreambooth import dataset, latents, models
from dreambooth.cli import ArgumentParser, UserError, absolute_path, configure_logs
from dreambooth.files import atomic, generated_images, pipeline_dir
from dreambooth.files.photos import find_images
from dreambooth.images import load_crops
from dreambooth.pocket import POCKET_DIR, render
from dreambooth.run import export
from dreambooth.run.plan import make_plan
from tests.benchmarks import fidelity

STEPS = "--train_batch_size 8 --max_train_steps 300"
SHARED = "--lr_scheduler cosine --prior_loss_weight 3 --prior_target original"
FULL = f"--lr 3e-4 {SHARED} --max_instance_noise 0.85"
LORA = f"--lora_layers all --lora_rank 16 --lr 1.5e-3 {SHARED} --max_instance_noise 0.75"
RECIPES = {"full": f"{STEPS} {FULL}", "lora": f"{STEPS} {LORA} --use_lora"}  # as in run.sh
GUIDANCE = 3  # of those judged
SHEET_COLUMNS = 8


def train_here(args, on_step=None):
    """train.py's run with these flags, in this process, on the CPU, without Ray.

    `on_step(step, denoiser)` is called after each, with the number of steps done. Returns the
    denoiser.
    """
    plan = make_plan(args)
    pairs_per_pass, accumulation_steps = plan.divide(1)
    device = torch.device("cpu")
    vae, denoiser, scheduler = models.load_models(args, device)
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = models.build_optimizer(parameters, args)
    lr_schedule = models.build_lr_schedule(optimizer, plan.num_steps, args)
    prompts = denoiser.family.encode_prompts(args, plan.prompts, device)
    batches = read_batches(plan, pairs_per_pass, args.seed)
    original = models.load_original(args, denoiser, device)
    batches = latents.encode_batches(vae, batches, denoiser.family, prompts, device, original)
    for step in range(plan.num_steps):
        train.forward_backward(denoiser, scheduler, batches, accumulation_steps, args)
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lr_schedule.step()
        if on_step:
            on_step(step + 1, denoiser)
    return denoiser


def read_batches(plan, pairs_per_pass, seed):
    """What Ray Data hands to the only worker: a batch for each forward pass."""
    num_pairs = plan.num_steps * plan.pairs_per_step
    folders = plan.instance_paths, plan.class_paths
    pairs = dataset.pair_images(*folders, num_pairs, seed, plan.captions)
    for start in range(0, num_pairs, pairs_per_pass):
        rows = pairs[start : start + pairs_per_pass]
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        loaded = load_crops(columns, plan.resolution, seed)
        # As they come out of Ray: in other strides, the VAE's last bits would differ.
        yield dataset.collate({name: np.ascontiguousarray(c) for name, c in loaded.items()})


class ImagesOnDisk:
    """A Sampler whose images are kept in `folder` for the next command."""

    def __init__(self, sample, folder):
        self.sample, self.folder = sample, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, prompt, num_samples=None):
        count = num_samples or self.sample.num_samples
        file = self.folder / f"{count} of {prompt}.pickle"
        if not file.exists():
            images = pickle.dumps(self.sample(prompt, count))
            atomic.replace_file(file, lambda path: path.write_bytes(images))
        return pickle.loads(file.read_bytes())


class Bench:
    """Photos, class images, judges and the original model's images, each made when first needed."""

    def __init__(self, args):
        self.args = args
        self.work_dir = Path(args.work_dir)
        sample = self.sampler(args.model_dir)
        self.original = ImagesOnDisk(sample, self.work_dir / "original")
        self.vae = sample.generator.pipeline.vae
        self.world = None
        self.judges = {}

    def sampler(self, model_dir, lora_weights_dir=None):
        flags = ["--model_dir", str(model_dir), "--num_samples", str(self.args.num_samples)]
        flags += ["--guidance_scale", str(GUIDANCE)]
        return fidelity.Sampler(fidelity.parse_args(flags), model_dir, lora_weights_dir)

    def judge(self, name):
        if self.world is None:
            self.world = self.rendered_once("world", fidelity.label_world, self.vae)
        if name not in self.judges:
            subject = render.SUBJECTS[name]
            own = self.rendered_once(name, fidelity.label_subject, subject, self.vae)
            self.judges[name] = fidelity.Judge(subject, self.world, own, self.vae)
        return self.judges[name]

    def rendered_once(self, name, label, *args):
        """`label(*args)`, from a file in --work_dir if it is there: it takes minutes."""
        file = self.work_dir / f"{name}.pickle"
        if not file.exists():
            renders = pickle.dumps(label(*args))
            atomic.replace_file(file, lambda file: file.write_bytes(renders))
        return pickle.loads(file.read_bytes())

    def photos(self, name):
        folder = self.work_dir / "photos" / name
        render.write_photos(name, folder)
        return folder

    def class_images(self, subject):
        """100 images of the subject's class by the original model, as in run.sh."""
        folder = self.work_dir / "class" / subject.kind
        flags = ["--model_dir", self.args.model_dir, "--output_dir", folder]
        flags += ["--prompts", fidelity.class_prompt(subject), "--guidance_scale", "1"]
        flags += ["--overwrite"]
        flags += ["--num_samples_per_prompt", self.args.num_class_images]
        generate.main(generate.parse_args([str(flag) for flag in flags]))
        return folder

    def train_args(self, name, seed, output_dir, train_flags):
        """The arguments of train.py for one subject and seed."""
        subject = render.SUBJECTS[name]
        flags = ["--model_dir", self.args.model_dir, "--output_dir", output_dir]
        flags += ["--instance_images_dir", self.photos(name)]
        flags += ["--instance_prompt", fidelity.instance_prompt(subject)]
        flags += ["--class_images_dir", self.class_images(subject)]
        flags += ["--class_prompt", fidelity.class_prompt(subject)]
        flags += ["--seed", seed, "--num_workers", 1, *train_flags]
        return train.parse_args([str(flag) for flag in flags])

    def report(self, name, model_dir, lora_weights_dir=None, sheet=None):
        """The metrics of a tuned model, which is at `model_dir` or is a LoRA on it."""
        sample = self.sampler(model_dir, lora_weights_dir)
        counts = self.args.num_samples, self.args.more_samples
        metrics = fidelity.subject_report(sample, self.original, self.judge(name), *counts)
        if sheet:
            write_sheet(sheet, {"photos": find_images(self.photos(name))}, sample.cache)
        return metrics

    def run(self, name, seed, train_flags, sheet):
        """Train and judge one subject with one seed; `sheet`: the file for its contact sheet."""
        with tempfile.TemporaryDirectory() as folder:
            args = self.train_args(name, seed, Path(folder) / "tuned", train_flags)
            start = time.time()
            export.save(train_here(args), args)
            seconds = time.time() - start
            if args.use_lora:
                metrics = self.report(name, args.model_dir, args.output_dir, sheet)
            else:
                metrics = self.report(name, args.output_dir, sheet=sheet)
        return {**metrics, "train_seconds": round(seconds, 1)}


def write_sheet(file, rows, images_by_prompt):
    """A contact sheet of `rows` and of the first images of each prompt."""
    rows = dict(rows)
    with tempfile.TemporaryDirectory() as folder:
        for p, ((prompt, _), images) in enumerate(images_by_prompt.items()):
            files = [Path(folder) / f"{p}-{i}.png" for i in range(min(SHEET_COLUMNS, len(images)))]
            for image, path in zip(images, files, strict=False):
                Image.fromarray(image).save(path)
            rows[prompt] = files
        generated_images.contact_sheet(rows, file, SHEET_COLUMNS)


def print_table(results):
    """A row for each result, then the worst of each column."""
    metrics = ("subject", "likeness", "composition", "prior", "diversity", *render.CLASSES)
    for result in results:
        name = f"{result['subject_name']}, {result['seed']}"
        fidelity.print_row(name, {metric: result[metric] for metric in metrics if metric in result})
    shown = [m for m in metrics if any(m in result for result in results)]
    worst = {m: min(result[m] for result in results if m in result) for m in shown}
    fidelity.print_row("worst", worst)


def main(args, candidate=None):
    """Train and judge what has no result in --work_dir yet, and print the table. The `candidate`
    that changes training (candidates.py) names its results and sheets."""
    configure_logs(verbose=False, loads_models=True)
    train_flags = shlex.split(RECIPES[args.recipe]) + shlex.split(args.train_flags)
    file = Path(args.work_dir) / f"{candidate or 'results'}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    mark, model = file.with_name("model"), pipeline_dir.fingerprint(args.model_dir)
    if mark.exists() and mark.read_text(encoding="utf-8") != model:
        raise UserError(f"--work_dir {args.work_dir} belongs to another model: name a new one")
    atomic.replace_text(mark, model)
    finished = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    bench = None
    rows = []
    for name in args.subjects:
        for seed in args.seeds:
            key = {"subject_name": name, "seed": seed, "train_flags": train_flags}
            key["num_samples"] = args.num_samples
            found = [result for result in finished if key.items() <= result.items()]
            if not found:
                bench = bench or Bench(args)
                sheet = file.with_name(f"{name}-{candidate or args.recipe}-seed{seed}.png")
                found = [{**key, **bench.run(name, seed, train_flags, sheet)}]
                atomic.append_line(file, json.dumps(found[0]))
            rows.append(found[0])
    print_table(rows)


def build_parser(description):
    parser = ArgumentParser(description)
    add = parser.add_argument
    add("--work_dir", type=absolute_path, required=True, help="for images, sheets and results")
    add("--model_dir", type=absolute_path, default=str(POCKET_DIR), help="the original model")
    add("--subjects", nargs="+", choices=list(render.SUBJECTS), default=list(render.SUBJECTS))
    add("--seeds", nargs="+", type=int, default=[0, 1], help="seeds of train.py")
    add("--recipe", choices=list(RECIPES), default="full", help="one of run.sh's recipes")
    add("--train_flags", default="", help="more flags of train.py, which override the recipe's")
    add("--num_samples", type=int, default=48, help="images per prompt")
    add("--more_samples", type=int, default=192, help="where a metric is below its aim")
    add("--num_class_images", type=int, default=100, help="as in run.sh")
    return parser


if __name__ == "__main__":
    main(build_parser(__doc__).parse_args())
