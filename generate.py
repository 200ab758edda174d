"""Generate images with a diffusers pipeline: class images with the original one, the subject in
new places with the tuned one.

    python generate.py --model_dir $TUNED_MODEL_DIR --output_dir $IMAGES_NEW_DIR \\
        --prompts "photo of unqtkn dog in the snow" "photo of unqtkn dog on the beach" \\
        --num_samples_per_prompt 4

Image i of a prompt depends on the model, the prompt, the seed, i and the sampler's settings alone:
with or without Ray, on one worker or eight, alone or in a batch, it is the same image (up to
rounding on GPUs, and with another number of CPU cores). A second run of the same command generates
only what is missing.
"""

import argparse
import itertools
import math
from pathlib import Path

from tqdm import tqdm

from dreambooth.cli import (
    ArgumentParser,
    UserError,
    absolute_path,
    check_at_least,
    configure_logs,
    plural,
    read_lines,
    run_main,
    valid_prompt,
    warn,
)
from dreambooth.files import generated_images, pipeline_dir
from dreambooth.image_generator import (
    MAX_BATCH,
    PIPELINE_PIXELS,
    ImageGenerator,
    with_defaults,
)

MAX_SAMPLES = 999_999  # of a prompt: their records are listed in memory


def parse_args(argv=None):
    """The flags, grouped as in train.py."""
    parser = ArgumentParser(__doc__)
    path = {"type": absolute_path}

    add = parser.add_argument_group("model").add_argument
    add("--model_dir", **path, required=True, help="diffusers pipeline directory")
    lora_help = f"a LoRA to apply on top: a file, or a directory with {pipeline_dir.LORA_FILE}"
    add("--lora_weights_dir", **path, help=lora_help)
    add("--lora_scale", type=float, default=1.0, help="strength of the LoRA")
    compare_help = "a second model: its images, from the same noise, go below on the sheet"
    add("--compare_to", **path, help=compare_help)

    add = parser.add_argument_group("images").add_argument
    add("--output_dir", **path, required=True, help="where the images go")
    several = {"nargs": "+", "action": "extend", "type": valid_prompt, "default": []}
    add("--prompts", **several, help="prompts, each in quotes")
    add("--prompts_file", **path, help="a text file with one prompt per line")
    add("--num_samples_per_prompt", type=int, default=1, help="images per prompt")
    add("--seed", type=int, default=0, help="of all noise: the initial one and the sampler's")
    overwrite_help = "replace images made with other settings, and delete those of other prompts"
    add("--overwrite", action="store_true", help=overwrite_help)

    add = parser.add_argument_group("sampler").add_argument
    scheduler_help = (
        "dpm: DPM-Solver++ with Karras sigmas, or SDE-DPM-Solver++ if that is the model's own;"
        f" model: the model's own {defaults_by_family('scheduler')}"
    )
    add("--scheduler", choices=["dpm", "model"], help=scheduler_help)
    steps_help = f"denoising steps {defaults_by_family('num_inference_steps')}"
    add("--num_inference_steps", type=int, help=steps_help)
    guidance_help = f"classifier-free guidance scale {defaults_by_family('guidance_scale')}"
    add("--guidance_scale", type=float, help=guidance_help)
    add("--resolution", type=int, help="side of the images in pixels (default: the model's)")

    add = parser.add_argument_group("run").add_argument
    add("--use_ray_data", action="store_true", help="batch inference on all GPUs of the cluster")
    workers_help = "actors, with --use_ray_data (default: one per GPU; one without GPUs)"
    add("--num_workers", type=int, help=workers_help)
    batch_help = f"images per batch on a GPU (default: what fits, at most {MAX_BATCH})"
    add("--batch_size", type=int, help=batch_help)
    add("--compile", action="store_true", help="compile the model's repeated blocks")
    add("--dry_run", action="store_true", help="check everything, and generate nothing")
    add("--verbose", action="store_true", help="show the logs of Ray and the other libraries")
    return parser.parse_args(argv)


def defaults_by_family(name):
    """For --help: Stable Diffusion's default, and of other families those that differ."""
    first, *others = pipeline_dir.PIPELINES.values()
    default = first.sampler[name]
    texts = [f"{f.name}: {f.sampler[name]}" for f in others if f.sampler[name] != default]
    return f"(default: {'; '.join([str(default), *texts])})"


def check_args(args):
    """Find the user's mistakes before anything costly starts; adds --prompts_file's lines to
    `args.prompts`."""
    check_at_least(
        args, 1, "num_samples_per_prompt", "num_inference_steps", "num_workers", "batch_size"
    )
    if args.num_samples_per_prompt > MAX_SAMPLES:
        raise UserError(f"--num_samples_per_prompt must be at most {MAX_SAMPLES}")
    check_at_least(args, 0, "seed", "guidance_scale")
    if not math.isfinite(args.lora_scale):
        raise UserError(f"--lora_scale is {args.lora_scale}: must be finite")
    if args.num_workers and not args.use_ray_data:
        warn("--num_workers is for --use_ray_data: this process generates all images itself")
    if args.lora_scale != 1 and not args.lora_weights_dir:
        warn("--lora_scale is for --lora_weights_dir: it changes nothing")
    pipeline_dir.check_model_dir(args.model_dir)
    if args.compare_to:
        pipeline_dir.check_model_dir(args.compare_to, "--compare_to")
    side = args.resolution  # else the first model's own, which the second must take as well
    for model_dir in filter(None, (args.model_dir, args.compare_to)):
        facts = pipeline_dir.read_facts(model_dir)
        if args.scheduler == "dpm" and facts.is_flow:
            raise UserError("--scheduler dpm is for diffusion models: leave it out")
        if facts.is_distilled and (args.guidance_scale or 0) > 1:
            warn(f"--guidance_scale changes nothing: {model_dir} is distilled to do without it")
        side = pipeline_dir.check_resolution(model_dir, side, PIPELINE_PIXELS)
    if args.lora_weights_dir:
        pipeline_dir.lora_file(args.lora_weights_dir)
    if args.prompts_file:
        args.prompts = args.prompts + read_lines(args.prompts_file, "--prompts_file")
    if not args.prompts:
        raise UserError("no prompt: pass --prompts or --prompts_file")
    if len(set(args.prompts)) < len(args.prompts):
        raise UserError("a prompt is given twice: use --num_samples_per_prompt for more images")
    for model_dir in filter(None, (args.model_dir, args.compare_to)):
        pipeline_dir.check_prompts(model_dir, args.prompts)


def list_records(args):
    """The record of each image: everything that it depends on, and its file's name."""
    lora = args.lora_weights_dir
    settings = {
        "model": pipeline_dir.fingerprint(args.model_dir),
        "lora": pipeline_dir.lora_fingerprint(lora) if lora else "",
        "lora_scale": args.lora_scale if lora else 1.0,
        "scheduler": args.scheduler,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "resolution": args.resolution,
    }
    records = []
    for p, prompt in enumerate(args.prompts):
        for i in range(args.num_samples_per_prompt):
            name = generated_images.file_name(p, i, args.seed)
            own = {"file": name, "prompt": prompt, "seed": args.seed, "index": i}
            records.append({**own, **settings})
    return records


def find_existing(args, planned):
    """The images in --output_dir (generated_images.Existing) beside the records `planned` for it.

    With --overwrite, those that are not planned are stale. UserError: without it, some image there
    was made with another prompt, model or setting, or has been changed since.
    """
    existing = generated_images.find_existing(args.output_dir, planned)
    if args.overwrite:
        others = [Path(args.output_dir) / record["file"] for record in existing.others]
        return existing._replace(others=[], stale=existing.stale + others)
    if existing.stale:
        raise UserError(
            f"--output_dir {args.output_dir} holds {len(existing.stale)} images made with another"
            f" prompt, model or setting, or changed since ({existing.stale[0].name}): use another"
            " folder, or pass --overwrite"
        )
    return existing


def generate_missing(args, planned, existing):
    """Generate the `planned` images that do not exist; returns the paths of all by prompt.

    Existing files are replaced or removed only once the first new image is there: by then model,
    LoRA, GPUs and cluster have proved right.
    """
    folder = Path(args.output_dir)
    generated_images.remove_leftovers(folder)
    finished = {record["file"] for record in existing.finished}
    missing = [record for record in planned if record["file"] not in finished]
    count = f"{plural(len(planned), 'image')} of {plural(len(args.prompts), 'prompt')} in {folder}"
    print(f"{count}: {len(missing)} to generate")
    new_records = iter(())
    if missing:
        new_records = iter(start_generating(args, missing))
    first = list(itertools.islice(new_records, 1))
    for name in {file.name for file in existing.stale} - {record["file"] for record in planned}:
        (folder / name).unlink(missing_ok=True)
    generated_images.write_metadata(folder, existing.others + existing.finished + first)
    if missing:
        for record in tqdm(new_records, total=len(missing), initial=1, unit="image"):
            generated_images.append_metadata(folder, record)
    return {
        prompt: [folder / record["file"] for record in planned if record["prompt"] == prompt]
        for prompt in args.prompts
    }


def start_generating(args, records):
    """An iterator over `records`, each of which it yields once its image is saved."""
    if args.use_ray_data:
        from dreambooth.batch_inference import generate_with_ray  # here: Ray takes seconds

        return generate_with_ray(args, records)
    return ImageGenerator(args).generate(records)


def main(args):
    """Check the arguments, generate what is missing, and lay it all out on a contact sheet."""
    configure_logs(args.verbose)
    check_args(args)
    runs = [with_defaults(args)]  # so that the records hold numbers
    folder = Path(args.output_dir)
    if args.compare_to:
        other = {"model_dir": args.compare_to, "lora_weights_dir": None}
        other |= {"output_dir": str(folder / "compared"), "resolution": runs[0].resolution}
        runs.append(with_defaults(argparse.Namespace(**{**vars(args), **other})))
    plans = [list_records(run) for run in runs]
    # Look into both folders, which may refuse, before any image is generated.
    found = [find_existing(*pair) for pair in zip(runs, plans, strict=True)]
    if args.dry_run:
        return
    images = [generate_missing(*job) for job in zip(runs, plans, found, strict=True)]
    rows = {}
    for prompt in args.prompts:
        rows[prompt] = images[0][prompt]
        if args.compare_to:
            name, _ = pipeline_dir.name_and_revision(args.compare_to)
            rows[f"{prompt}, by {name}"] = images[1][prompt]
    sheet = folder / generated_images.CONTACT_SHEET
    generated_images.contact_sheet(rows, sheet)
    print(f"look at {sheet}")


if __name__ == "__main__":
    run_main(main, parse_args())
