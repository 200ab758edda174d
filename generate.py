"""Generate images with a Stable Diffusion model: class images with the original one, the subject in
new places with the tuned one.

    python generate.py --model_dir $TUNED_MODEL_DIR --output_dir $IMAGES_NEW_DIR \\
        --prompts "photo of unqtkn car in the snow" "photo of unqtkn car at night" \\
        --num_samples_per_prompt 4

Image i of a prompt depends on the model, the prompt, the seed, i and the sampler's settings alone:
with or without Ray, on one worker or eight, alone or in a batch, it is the same image (on GPUs, to
rounding). A second run of the same command generates only what is missing.
"""

import argparse
import itertools
from pathlib import Path

from tqdm import tqdm

from dreambooth import atomic, logs, model_dir, outputs
from dreambooth.cli import (
    ArgumentParser,
    UserError,
    absolute_path,
    check_at_least,
    read_lines,
    run_main,
    valid_prompt,
)
from dreambooth.image_generator import MAX_BATCH, ImageGenerator
from dreambooth.pocket import classes


def parse_args(argv=None):
    """The flags, grouped as in train.py."""
    parser = ArgumentParser(__doc__)
    path = {"type": absolute_path}

    add = parser.add_argument_group("model").add_argument
    add("--model_dir", **path, required=True, help="diffusers pipeline directory")
    add("--lora_weights_dir", **path, help=f"directory with {model_dir.LORA_FILE}, to apply on top")
    add("--lora_scale", type=float, default=1.0, help="strength of the LoRA")
    compare_help = "a second model: its images, from the same noise, go below on the sheet"
    add("--compare_to", **path, help=compare_help)

    add = parser.add_argument_group("images").add_argument
    add("--output_dir", **path, required=True, help="where the images go")
    add("--prompts", nargs="+", type=valid_prompt, default=[], help="prompts, each in quotes")
    add("--prompts_file", **path, help="a text file with one prompt per line")
    add("--num_samples_per_prompt", type=int, default=1, help="images per prompt")
    add("--seed", type=int, default=0, help="of the initial noise")
    overwrite_help = "delete old images there that this command would not generate"
    add("--overwrite", action="store_true", help=overwrite_help)

    add = parser.add_argument_group("sampler").add_argument
    scheduler_help = "dpm: DPM-Solver++ with Karras sigmas; model: the model's own"
    add("--scheduler", choices=["dpm", "model"], default="dpm", help=scheduler_help)
    add("--num_inference_steps", type=int, default=25, help="denoising steps")
    add("--guidance_scale", type=float, default=7.5, help="strength of the prompt's guidance")

    add = parser.add_argument_group("run").add_argument
    add("--use_ray_data", action="store_true", help="batch inference on all GPUs of the cluster")
    workers_help = "Ray Data's actors (default: one per GPU; one without GPUs)"
    add("--num_workers", type=int, help=workers_help)
    batch_help = f"images per batch on a GPU (default: what fits, at most {MAX_BATCH})"
    add("--batch_size", type=int, help=batch_help)
    add("--compile", action="store_true", help="compile the U-Net's repeated blocks")
    add("--verbose", action="store_true", help="show the logs of Ray and the other libraries")
    return parser.parse_args(argv)


def check_args(args):
    """Find the user's mistakes before anything costly starts; complete the prompts."""
    check_at_least(
        args, 1, "num_samples_per_prompt", "num_inference_steps", "num_workers", "batch_size"
    )
    check_at_least(args, 0, "seed", "guidance_scale", "lora_scale")
    model_dir.check_model_dir(args.model_dir)
    if args.compare_to:
        model_dir.check_model_dir(args.compare_to, "--compare_to")
    if args.lora_weights_dir:
        model_dir.check_lora_dir(args.lora_weights_dir)
    atomic.check_writable(args.output_dir)
    if args.prompts_file:
        args.prompts = args.prompts + read_lines(args.prompts_file, "--prompts_file")
    if not args.prompts:
        raise UserError("no prompt: give --prompts or --prompts_file")
    if len(set(args.prompts)) < len(args.prompts):
        raise UserError("a prompt is given twice: use --num_samples_per_prompt for more images")
    for pipeline_dir in (args.model_dir, args.compare_to):
        if pipeline_dir:
            classes.check_prompts(pipeline_dir, args.prompts)
            tokenizer = model_dir.load_tokenizer(pipeline_dir)
            for prompt in args.prompts:
                model_dir.check_prompt(tokenizer, prompt)


def plan(args):
    """The record of each image: everything that it depends on, and its file's name."""
    lora = args.lora_weights_dir
    settings = {
        "model": model_dir.fingerprint(args.model_dir),
        "lora": model_dir.fingerprint(lora) if lora else "",
        "lora_scale": args.lora_scale,
        "scheduler": args.scheduler,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
    }
    records = []
    for p, prompt in enumerate(args.prompts):
        for i in range(args.num_samples_per_prompt):
            name = outputs.file_name(p, i, args.seed)
            own = {"file": name, "prompt": prompt, "seed": args.seed, "index": i}
            records.append({**own, **settings})
    return records


def find_existing(args):
    """The planned records; those whose images exist; the records of other images, which stay; and
    the files of stale images, which do not. Without --overwrite these are a UserError: images with
    a planned name and other settings. With it they are all images that are not planned."""
    planned = plan(args)
    finished, others, stale = outputs.find_existing(args.output_dir, planned)
    if args.overwrite:
        stale += [Path(args.output_dir) / record["file"] for record in others]
        others = []
    elif stale:
        raise UserError(
            f"--output_dir {args.output_dir} holds {len(stale)} images made with another prompt,"
            f" model or setting ({stale[0].name}): name another folder, or give --overwrite"
        )
    return planned, finished, others, stale


def generate_missing(args, planned, finished, others, stale):
    """Generate what `find_existing` did not find; returns the paths of all images by prompt.

    Existing files are replaced or removed only once the first new image is there: by then model,
    LoRA, GPUs and cluster have proved right.
    """
    folder = Path(args.output_dir)
    outputs.remove_leftovers(folder)
    existing = {record["file"] for record in finished}
    missing = [record for record in planned if record["file"] not in existing]
    count = f"{len(planned)} images of {len(args.prompts)} prompt(s) in {folder}"
    print(f"{count}: {len(missing)} to generate")
    if missing:
        if args.use_ray_data:
            from dreambooth.batch_inference import generate_with_ray  # here: Ray takes seconds

            new_records = generate_with_ray(args, missing)
        else:
            new_records = ImageGenerator(args).generate(missing)
        finished = finished + list(itertools.islice(new_records, 1))
    for name in {file.name for file in stale} - {record["file"] for record in planned}:
        (folder / name).unlink(missing_ok=True)
    outputs.write_records(folder, others + finished)
    if missing:
        for record in tqdm(new_records, total=len(missing), initial=1, unit="image"):
            outputs.append_record(folder, record)
    return {
        prompt: [folder / record["file"] for record in planned if record["prompt"] == prompt]
        for prompt in args.prompts
    }


def main(args):
    """Check the arguments, generate what is missing, and lay it all out on a contact sheet."""
    logs.configure(args.verbose)
    check_args(args)
    folder = Path(args.output_dir)
    runs = [args]
    if args.compare_to:
        other = {"model_dir": args.compare_to, "lora_weights_dir": None}
        other["output_dir"] = str(folder / "compared")
        runs.append(argparse.Namespace(**{**vars(args), **other}))
    found = [find_existing(run) for run in runs]  # in both folders, before an image is generated
    images = [generate_missing(run, *existing) for run, existing in zip(runs, found, strict=True)]
    rows = {}
    for prompt in args.prompts:
        rows[prompt] = images[0][prompt]
        if args.compare_to:
            name, _ = model_dir.name_and_revision(args.compare_to)
            rows[f"{prompt}, by {name}"] = images[1][prompt]
    sheet = folder / outputs.CONTACT_SHEET
    outputs.contact_sheet(rows, sheet)
    print(f"look at {sheet}")


if __name__ == "__main__":
    run_main(main, parse_args())
