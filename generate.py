"""Make pictures with a Stable Diffusion model: class images with the original one, and the subject
in new places with the tuned one.

    python generate.py --model_dir $TUNED_MODEL_DIR --output_dir $IMAGES_NEW_DIR \\
        --prompts "photo of unqtkn car in the snow" "photo of unqtkn car at night" --num_samples_per_prompt 4

Picture i of a prompt follows from the model, the prompt, the seed, i and the sampler's settings
alone: with or without Ray, on one worker or eight, alone or in a batch, it is the same picture. A
second run of the same command makes only what is missing.
"""

import argparse
import itertools
import json
import math
import re
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dreambooth import checks, files, pictures
from dreambooth.seeds import seed_for

# On a CPU each forward pass takes so many pictures, the last ones filled up: the arithmetic of a
# picture, to the last bit, may depend on the size of the batch that it is in, never on the others.
CPU_BATCH = 16
OWN_NAME = re.compile(r"\d{3,}-\d{4,}-seed\d+\.png")  # prompt, picture and seed
MAX_BATCH = 16  # on a GPU: larger ones are hardly faster
BYTES_A_PIXEL = 4096  # of GPU memory that a picture in the making takes; an estimate, halved batches mend it
REDRAWS = 10  # a picture without content is drawn again so many times with other noise


def parse_args(argv=None):
    """The flags, grouped as in train.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)

    group = parser.add_argument_group("model")
    group.add_argument("--model_dir", required=True, help="diffusers pipeline directory")
    group.add_argument("--lora_weights_dir", help=f"directory with {files.LORA_FILE}, to apply on top")
    group.add_argument("--lora_scale", type=float, default=1.0, help="strength of the LoRA")
    group.add_argument("--compare_to", help="a second model: its pictures, from the same noise, go below on the sheet")

    group = parser.add_argument_group("pictures")
    group.add_argument("--output_dir", required=True, help="where the pictures go")
    group.add_argument("--prompts", nargs="+", default=[], help="one or more prompts, each an argument of its own")
    group.add_argument("--prompts_file", help="a text file with a prompt a line")
    group.add_argument("--num_samples_per_prompt", type=int, default=1, help="pictures a prompt")
    group.add_argument("--seed", type=int, default=0, help="of the noise that pictures start from")
    group.add_argument(
        "--overwrite", action="store_true", help="replace pictures of other prompts, seeds or models there"
    )

    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--scheduler", choices=["dpm", "model"], default="dpm",
        help="dpm: DPM-Solver++ with Karras steps; model: the model's own",
    )  # fmt: skip
    group.add_argument("--num_inference_steps", type=int, default=25, help="denoising steps")
    group.add_argument("--guidance_scale", type=float, default=7.5, help="weight of the prompt")

    group = parser.add_argument_group("run")
    group.add_argument("--use_ray_data", action="store_true", help="batch inference on all GPUs of the cluster")
    group.add_argument("--num_workers", type=int, help="with --use_ray_data (default: one a GPU; one without GPUs)")
    group.add_argument(
        "--batch_size", type=int,
        help=f"pictures at a time on a GPU (default: as its memory allows, {MAX_BATCH} at most); on a CPU {CPU_BATCH}",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="compile the U-Net's repeated blocks: for many pictures")
    return parser.parse_args(argv)


def check_args(args):
    """Find what the user got wrong before anything costly starts; complete the prompts."""
    checks.check_at_least(args, 1, "num_samples_per_prompt", "num_inference_steps", "num_workers", "batch_size")
    checks.check_at_least(args, 0, "seed", "guidance_scale", "lora_scale")
    checks.check_model_dir(args.model_dir)
    if args.compare_to:
        checks.check_model_dir(args.compare_to, "--compare_to")
    checks.check_output_dir(args.output_dir)
    for name in (
        "model_dir",
        "compare_to",
        "output_dir",
        "lora_weights_dir",
    ):  # the actors may run in another directory
        setattr(args, name, getattr(args, name) and str(Path(getattr(args, name)).absolute()))
    if args.prompts_file:
        if not Path(args.prompts_file).is_file():
            raise checks.UserError(f"--prompts_file {args.prompts_file}: no such file")
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise checks.UserError(f"--prompts_file {args.prompts_file} is no UTF-8 text") from None
        args.prompts = args.prompts + [line.strip() for line in lines if line.strip()]
    if not args.prompts:
        raise checks.UserError("no prompt: give --prompts or --prompts_file")
    if len(set(args.prompts)) < len(args.prompts):
        raise checks.UserError("a prompt is given twice: use --num_samples_per_prompt for more pictures of it")
    for model_dir in filter(None, (args.model_dir, args.compare_to)):
        tokenizer = files.load_tokenizer(model_dir)
        for prompt in args.prompts:
            checks.check_prompt(tokenizer, prompt)
    if args.lora_weights_dir and not list(Path(args.lora_weights_dir).glob("*.safetensors")):
        raise checks.UserError(f"--lora_weights_dir {args.lora_weights_dir}: no {files.LORA_FILE} there")
    for file in Path(args.lora_weights_dir).glob("*.safetensors") if args.lora_weights_dir else ():
        checks.check_whole(file, "--lora_weights_dir")


def plan(args):
    """The record of each picture to be made: all that it follows from, and its file's name."""
    settings = {
        "model": pictures.fingerprint(args.model_dir),
        "lora": pictures.fingerprint(args.lora_weights_dir) if args.lora_weights_dir else "",
        "lora_scale": args.lora_scale,
        "scheduler": args.scheduler,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
    }
    return [
        {"file": f"{p:03d}-{i:04d}-seed{args.seed}.png", "prompt": prompt, "seed": args.seed, "index": i, **settings}
        for p, prompt in enumerate(args.prompts)
        for i in range(args.num_samples_per_prompt)
    ]


def look_up(args):
    """What `args` ask for, and what is in its folder already: the records planned; of those whose pictures are there,
    whole and made as planned, the finished records; the files of pictures that were made otherwise.

    UserError: there are such, and they may not be replaced. Damaged pictures, and files that generate.py has not
    made, are neither.
    """
    folder, planned = Path(args.output_dir), plan(args)
    wanted, done, strange = {record["file"]: record for record in planned}, [], []
    for file in sorted(f for f in folder.glob("*.png") if OWN_NAME.fullmatch(f.name)):
        if record := pictures.read_record(file):
            as_planned = {key: record[key] for key in record if key != "digest"} == wanted.get(file.name)
            done.append(record) if as_planned else strange.append(file)
    if strange and not args.overwrite:
        raise checks.UserError(
            f"--output_dir {folder} holds {len(strange)} pictures of another prompt, seed, model or setting"
            f" (such as {strange[0].name}): name another directory, or replace them with --overwrite"
        )
    return planned, done, strange


class Painter:
    """Loads the pipeline once and paints records, in batches; also the callable of Ray Data's actors."""

    def __init__(self, args):
        from diffusers import DPMSolverMultistepScheduler  # here: with Ray, and with nothing to make, not needed

        from dreambooth import models

        models.quiet()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":  # Ray gives an actor one thread; and the number of threads shows in the last bits
            torch.set_num_threads(checks.cores())
        self.args, self.folder, self.prompt_embeds = args, Path(args.output_dir), {}
        self.batch_size = CPU_BATCH if self.device == "cpu" else args.batch_size or batch_that_fits(args.model_dir)
        self.pipeline = models.load_pipeline(args.model_dir, args.lora_weights_dir, args.lora_scale, self.device)
        if args.compile:
            self.pipeline.unet.compile_repeated_blocks()
        if args.scheduler == "dpm":
            self.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
                self.pipeline.scheduler.config, use_karras_sigmas=True
            )

    def embed(self, prompt):
        """Prompt and empty prompt through the text encoder, once a prompt: two (1, L, D) tensors."""
        if prompt not in self.prompt_embeds:
            self.prompt_embeds[prompt] = self.pipeline.encode_prompt(prompt, self.device, 1, True)
        return self.prompt_embeds[prompt]

    @torch.inference_mode()
    def draw(self, records, attempt):
        """The pictures (N, 3, H, W) in [0, 1] of N records; None where the GPU's memory does not suffice."""
        size = CPU_BATCH if self.device == "cpu" else len(records)
        filled = (records + [records[-1]] * size)[:size]
        seeds = [seed_for(r["seed"], r["index"], zlib.crc32(r["prompt"].encode()), attempt) for r in filled]
        prompt_embeds, negative_embeds = zip(*(self.embed(r["prompt"]) for r in filled), strict=True)
        try:
            images = self.pipeline(
                prompt_embeds=torch.cat(prompt_embeds),
                negative_prompt_embeds=torch.cat(negative_embeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=self.args.num_inference_steps,
                guidance_scale=self.args.guidance_scale,
                output_type="pt",
            ).images
        except torch.OutOfMemoryError:
            return None
        return images[: len(records)].float().cpu()

    def draw_all(self, records, attempt):
        """Yields each record with its picture, in batches of a size for which the memory suffices."""
        start = 0
        while start < len(records):
            batch = records[start : start + self.batch_size]
            images = self.draw(batch, attempt)
            if images is None:  # the memory of the failed batch is free only here, outside of `except`
                torch.cuda.empty_cache()
                if len(batch) == 1:
                    raise checks.UserError("out of GPU memory with one picture at a time: use a larger GPU")
                self.batch_size = len(batch) // 2
                print(f"out of GPU memory: goes on with {self.batch_size} pictures at a time", flush=True)
                continue
            yield from zip(batch, images, strict=True)
            start += len(batch)

    def save(self, record, picture):
        """Write one picture; returns its record with its digest."""
        image = to_image(picture)
        finished = {**record, "digest": pictures.pixel_digest(image)}
        self.folder.mkdir(parents=True, exist_ok=True)
        pictures.save_picture(image, finished, self.folder / record["file"])
        return finished

    def paint(self, records):
        """Draw and save the pictures of `records`; yields each record, with its picture's digest, once that is saved.

        A picture without content (black, one colour, not a number) is never saved: it is drawn again.
        """
        saving, left = deque(), list(records)
        with ThreadPoolExecutor() as threads:  # pictures are encoded and written while the next ones are drawn
            for attempt in range(REDRAWS):
                empty = []
                for record, picture in self.draw_all(left, attempt):
                    if has_content(picture):
                        saving.append(threads.submit(self.save, record, picture))
                    else:
                        empty.append(record)
                    while saving and saving[0].done():
                        yield saving.popleft().result()
                if not (left := empty):
                    break
            yield from (saved.result() for saved in saving)
        if left:
            prompt = left[0]["prompt"]
            raise checks.UserError(f"the model draws nothing for {prompt!r}: {REDRAWS} empty pictures in a row")

    def __call__(self, batch):
        """Ray Data's way to call `paint`: rows of records in, rows of finished records out, both as JSON."""
        return {"records": [json.dumps(list(self.paint(json.loads(records)))) for records in batch["records"]]}


def batch_that_fits(model_dir):
    """The number of pictures for which the GPU's free memory should suffice, MAX_BATCH at the most."""
    side, _ = files.model_resolution(model_dir)
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(MAX_BATCH, free // (side * side * BYTES_A_PIXEL)))


def to_image(picture):
    """A (3, H, W) picture in [0, 1] as an image of 8 bits."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


def has_content(picture):
    """Whether a (3, H, W) picture shows anything: finite, and not of one colour."""
    return bool(torch.isfinite(picture).all()) and picture.std(dim=(1, 2)).max().item() > 0.01


def paint_with_ray(args, missing):
    """Paint on an actor pool, an actor a GPU (one where there is none); yields finished records."""
    import ray.data  # here, so that painting without Ray does not wait for its start

    from dreambooth.cluster import start_ray

    num_gpus, num_cpus = start_ray()
    checks.check_gpus(args.num_workers or 1, num_gpus, num_cpus)
    num_workers = args.num_workers or max(1, num_gpus)
    # Batches small enough to occupy every worker, and then no more workers than batches.
    batch_size = min(args.batch_size or MAX_BATCH, math.ceil(len(missing) / num_workers)) if num_gpus else CPU_BATCH
    batches = [json.dumps(missing[i : i + batch_size]) for i in range(0, len(missing), batch_size)]
    num_workers = min(num_workers, len(batches))
    painted = ray.data.from_items([{"records": b} for b in batches], override_num_blocks=len(batches)).map_batches(
        Painter,
        fn_constructor_args=(args,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=1 if num_gpus else 0,
        num_cpus=0 if num_gpus else min(1.0, num_cpus / (2 * num_workers)),  # Ray Data's tasks need the rest
    )
    try:
        for row in painted.iter_rows():
            yield from json.loads(row["records"])
    except ray.exceptions.RayError as error:  # with a UserError of an actor somewhere in its text, or a fault of ours
        if message := checks.user_error_in(error):
            raise checks.UserError(message) from None
        raise


def paint_here(args, missing):
    """Paint in this process; yields finished records."""
    yield from Painter(args).paint(missing)


def make_pictures(args, planned, done, strange):
    """Make what is missing of the pictures that `look_up` found; returns the path of each, prompt by prompt.

    What was there is replaced or removed only when the first new picture is drawn: model, LoRA, GPUs and cluster
    are right then.
    """
    folder = Path(args.output_dir)
    for leftover in [*folder.glob(".*-seed*.png.*.tmp"), *folder.glob(f".{pictures.RECORDS}.tmp")]:
        leftover.unlink()
    finished = {record["file"] for record in done}
    missing = [record for record in planned if record["file"] not in finished]
    print(f"{len(planned)} pictures of {len(args.prompts)} prompt(s) in {folder}: {len(missing)} to make")
    paint = paint_with_ray if args.use_ray_data else paint_here
    painted = paint(args, missing) if missing else iter(())
    first = list(itertools.islice(painted, 1))
    for name in {file.name for file in strange} - {record["file"] for record in planned}:
        (folder / name).unlink()
    pictures.write_records(folder, done + first)
    for record in tqdm(painted, total=len(missing), initial=len(first), unit="picture", disable=not missing):
        pictures.append_record(folder, record)
    return {prompt: [folder / r["file"] for r in planned if r["prompt"] == prompt] for prompt in args.prompts}


def main(args):
    """Check what the user gave, make what is missing, and lay it all out on a contact sheet."""
    check_args(args)
    folder, runs = Path(args.output_dir), [args]
    if args.compare_to:
        other = {"model_dir": args.compare_to, "lora_weights_dir": None, "output_dir": str(folder / "compared")}
        runs.append(argparse.Namespace(**{**vars(args), **other}))
    found = [look_up(run) for run in runs]  # in both folders, before a picture is made
    rows, *compared = (make_pictures(run, *what) for run, what in zip(runs, found, strict=True))
    for below in compared:
        name = Path(args.compare_to).name
        rows = {caption: row for p in args.prompts for caption, row in ((p, rows[p]), (f"{p}, by {name}", below[p]))}
    pictures.contact_sheet(rows, folder / pictures.CONTACT_SHEET)
    print(f"look at {folder / pictures.CONTACT_SHEET}")


if __name__ == "__main__":
    checks.run_main(main, parse_args())
