"""A page that says whether a run worked: one report.html that opens without a network.

    python -m dreambooth.report.page $TUNED_MODEL_DIR.report --images_dir $IMAGES_NEW_DIR

It shows what the run has logged (metrics, previews, run.json), the images that generate.py has made
with --compare_to, before and after, and advice where a figure is off. Images whose prompts do not
name the subject are shown as what must not change. It also puts a picture of both into the model
card beside the result, unless you have edited that. Run it again at any time, also while the run
trains.
"""

import base64
import io
import math
import os
import re
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import jinja2
from PIL import Image, ImageChops, ImageStat

from dreambooth.cli import ArgumentParser, UserError, absolute_path, run_main, warn, words
from dreambooth.files import atomic, generated_images
from dreambooth.files.decode import open_image
from dreambooth.run import export, previews, training_log

PAGE = "report.html"
MAX_SIDE = 320  # pixels of an image on the page
MAX_PHOTOS = 12
MAX_COMPARISONS = 12
SETTINGS = ("scheduler", "num_inference_steps", "guidance_scale", "resolution")

# A curve's title, and the metrics in it with their labels.
CURVES = [
    ("Loss", {"instance_loss": "instance images", "class_loss": "class images"}),
    ("Gradient norm, before clipping", {"grad_norm": ""}),
    ("Learning rate", {"lr": ""}),
    ("Images per second", {"images_per_s": ""}),
    ("Peak GPU memory, GiB", {"peak_gib": "tensors", "reserved_gib": "reserved"}),
]
COLOURS = ["#1f5fa8", "#b3541e"]

MIN_ROWS = 6  # of metrics: fewer do not show a trend
MIN_RISE = 1.1  # of the loss on class images, last third against first third
MIN_CONTRAST = 0.6  # of images after, relative to before
NO_CONTRAST = 0.05


class Advice(NamedTuple):
    """What a figure says, and what to change."""

    finding: str
    remedy: str


FORGETTING = Advice(
    "The loss on class images rises: the model is forgetting the class.",
    "Raise --prior_loss_weight, or train for fewer steps.",
)
BLACK = Advice(
    "The images are black or of one colour.",
    "Lower --lr to a tenth; check the class images for black ones.",
)
WASHED_OUT = Advice(
    "The images have far less contrast than the original model's.",
    "Lower --lr or train for fewer steps; sample with a lower --guidance_scale.",
)


def advice(rows, relative_contrast, prior_target="noise"):
    """The `Advice` that the run's metrics (the lines of metrics.jsonl) and the contrast of its
    images, relative to the original model's (None without images), call for. Where the original
    model is the class half's target, that half's loss begins at 0 and rises by nature."""
    found = [FORGETTING] if prior_target == "noise" and class_loss_rises(rows) else []
    if relative_contrast is not None and relative_contrast < MIN_CONTRAST:
        found.append(BLACK if relative_contrast < NO_CONTRAST else WASHED_OUT)
    return found


def class_loss_rises(rows):
    """Whether the mean class loss of the last third of the run is above the first third's: by a
    tenth, and by more than twice the standard error."""
    losses = [row["class_loss"] for row in rows if "class_loss" in row]
    if len(losses) < MIN_ROWS or not all(map(math.isfinite, losses)):
        return False
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    error = math.hypot(stdev(first), stdev(last)) / math.sqrt(third)
    rise = mean(last) - mean(first)
    return mean(last) > MIN_RISE * mean(first) and rise > 2 * error


def all_curves(rows):
    """The SVG of each curve for which `rows` (the lines of metrics.jsonl) have numbers."""
    svgs = []
    for title, names in CURVES:
        known = {name: label for name, label in names.items() if any(name in row for row in rows)}
        if known:
            svgs.append(curve(title, known, rows))
    return svgs


def curve(title, names, rows):
    """One curve over the steps, as an SVG element."""
    os.environ["MPLBACKEND"] = "svg"  # a notebook's may name one that is not installed
    import matplotlib  # here: takes a second
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.2, 2.3), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=10, loc="left")
        for colour, (name, label) in zip(COLOURS, names.items(), strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(
                *zip(*points, strict=True), color=colour, label=label, marker=".", ms=4, lw=1.2
            )
        axes.set_xlabel("steps", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.5)
        if any(names.values()):
            axes.legend(fontsize=8, frameon=False)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return to_element(text.getvalue(), title)


def to_element(svg, title):
    """The <svg> of an SVG file, which takes the width that the page gives it."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    return element.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def data_uri(path, max_side=MAX_SIDE):
    """The image as a data URI, scaled down; small images stay as they are."""
    image = open_image(path)
    image.thumbnail((max_side, max_side))
    encoded = io.BytesIO()
    kind = "PNG" if max(image.size) <= 128 else "JPEG"
    image.save(encoded, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def find_comparisons(images_dir):
    """The images that generate.py has made with --compare_to: prompt, before and after (paths), one
    per prompt and then the next."""
    if not images_dir:
        return []
    comparisons = []
    for after in sorted(Path(images_dir).glob("*-seed*.png")):
        before = after.parent / "compared" / after.name
        record, other = map(generated_images.read_record, (after, before))
        same = ("prompt", "seed", "index")
        if record and other and all(record[name] == other[name] for name in same):
            comparisons.append((record["index"], record["prompt"], before, after))
    comparisons.sort(key=lambda comparison: comparison[0])
    return [comparison[1:] for comparison in comparisons]


def contrast(path):
    """The standard deviation of an image's brightness."""
    with Image.open(path) as image:
        return ImageStat.Stat(image.convert("L")).stddev[0]


def relative_contrast(comparisons):
    """The mean contrast of the images after, relative to those before; None without images."""
    before = sum(contrast(before) for _, before, _ in comparisons)
    if not before:
        return None
    return sum(contrast(after) for _, _, after in comparisons) / before


def names_subject(prompt, flags):
    """Whether `prompt` has a word of the run's instance prompt that its class prompt lacks, such as
    the identifier. Without a class prompt nobody knows it, and every prompt counts."""
    if not flags["class_prompt"]:
        return True
    own = words(flags["instance_prompt"]) - words(flags["class_prompt"])
    return not own or bool(own & words(prompt))


def distance(comparisons):
    """How far the images have moved: the root mean square of the change of their pixels, averaged
    over `comparisons`; None without any."""
    if not comparisons:
        return None
    changes = []
    for _, *paths in comparisons:
        before, after = (open_image(path) for path in paths)
        rms_per_channel = ImageStat.Stat(ImageChops.difference(before, after)).rms
        changes.append(math.sqrt(mean(rms**2 for rms in rms_per_channel)))
    return mean(changes)


def film_strips(folder):
    """Each prompt's previews in the order of their steps."""
    strips = []
    for by_step in previews.find(folder).values():
        steps = sorted(by_step)
        record = generated_images.read_record(by_step[steps[0]]) or {}
        images = [{"step": step, "data": data_uri(by_step[step], 184)} for step in steps]
        strips.append({"prompt": record.get("prompt", ""), "images": images})
    return strips


def table_rows(record):
    """The rows of the page's table on a run: labels and texts."""
    flags = record["flags"]
    revision = f", revision {record['revision']}" if record["revision"] else ""
    rows = [
        ("model", record["model"] + revision),
        ("status", ": ".join(filter(None, [record["status"], record.get("message")]))),
        ("images and steps", record["plan"]),
        ("learning rate", f"{flags['lr']:g}, {flags['lr_scheduler']}"),
        ("prior loss weight", f"{flags['prior_loss_weight']:g}"),
        ("LoRA", f"rank {flags['lora_rank']}" if flags["use_lora"] else "no"),
        ("seed", flags["seed"]),
        ("hardware", record["hardware"]),
        ("versions", ", ".join(f"{name} {v}" for name, v in record["versions"].items())),
    ]
    if "metrics" in record:
        rows.append(
            ("where the seconds went", training_log.where_the_seconds_went(record["metrics"]))
        )
    return rows


def render(folder, record, comparisons, kept):
    """The page's HTML, and the advice on it, for the run in `record` (training_log.py), whose
    report is in `folder`. `comparisons` and `kept`: what `subjects_and_others` returns."""
    rows = training_log.read_metrics(folder)
    moved = distance(comparisons)
    found = advice(
        rows, relative_contrast(comparisons), record["flags"].get("prior_target", "noise")
    )
    photos = [path for path in record["instance_paths"] if Path(path).exists()]
    template = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(template).render(
        name=Path(record["flags"]["output_dir"]).name,
        record=record,
        flags=record["flags"],
        advice=found,
        photos=[data_uri(path) for path in photos[:MAX_PHOTOS]],
        comparisons=shown(comparisons),
        kept=shown(kept),
        relative_distance=distance(kept) / moved if kept and moved else None,
        strips=film_strips(folder),
        preview_steps=previews.NUM_INFERENCE_STEPS,
        preview_guidance=previews.GUIDANCE_SCALE,
        curves=all_curves(rows),
        facts=table_rows(record),
    )
    return html, found


def subjects_and_others(comparisons, flags):
    """Of `comparisons`, those whose prompts name the run's subject, and the others; of each at most
    MAX_COMPARISONS."""
    subjects = [comparison for comparison in comparisons if names_subject(comparison[0], flags)]
    others = [comparison for comparison in comparisons if comparison not in subjects]
    return subjects[:MAX_COMPARISONS], others[:MAX_COMPARISONS]


def made_by(output_dir, comparisons):
    """Of `comparisons`, those whose images after are of the result in `output_dir`. (A run that is
    killed, or another one, may have replaced some.)"""
    made, own = {}, []
    for comparison in comparisons:
        after = generated_images.read_record(comparison[2])
        model = after.get("model"), after.get("lora")
        if model not in made:
            made[model] = export.has_made(output_dir, after)
        if made[model]:
            own.append(comparison)
    return own


def shown(comparisons):
    """For the template: prompt, and both images as data URIs, of each of `comparisons`."""
    return [
        {"prompt": prompt, "before": data_uri(before), "after": data_uri(after)}
        for prompt, before, after in comparisons
    ]


def write_before_after(comparisons, file):
    """The image of the model card: a row before, a row after."""
    rows = {
        "original model": [before for _, before, _ in comparisons],
        "tuned model": [after for _, _, after in comparisons],
    }
    generated_images.contact_sheet(rows, file, columns=5, side=128)


def main(args):
    """Write report.html into `args.report_dir`. UserError: no run is recorded there."""
    folder = Path(args.report_dir)
    record = training_log.read_run_record(folder)
    if not record:
        raise UserError(f"{folder} holds no run.json: name the .report directory of a run")
    if args.images_dir and not Path(args.images_dir).is_dir():
        raise UserError(f"--images_dir {args.images_dir}: no such directory")
    output_dir = folder.with_name(folder.name.removesuffix(".report"))  # they may have been moved
    comparisons = find_comparisons(args.images_dir)
    if args.images_dir and not comparisons:
        warn(f"--images_dir {args.images_dir} holds no images made with --compare_to")
    own = made_by(output_dir, comparisons)
    if len(own) < len(comparisons):
        warn(
            f"{len(comparisons) - len(own)} of {len(comparisons)} images in {args.images_dir} are"
            f" not of {output_dir}, but of another model, and are not shown: generate them anew"
            " with --overwrite"
        )
    if own:
        before, after = map(generated_images.read_record, own[0][1:])
        if record["status"] != "finished":
            warn(
                f"the images in {args.images_dir} are of an earlier model and are not shown: this"
                f" run has made none ({record['status']})"
            )
            own = []
        elif differing := [name for name in SETTINGS if before.get(name) != after.get(name)]:
            warn(f"the images before and after differ in {', '.join(differing)}")
    of_subject, of_others = subjects_and_others(own, record["flags"])
    html, findings = render(folder, record, of_subject, of_others)
    atomic.replace_text(folder / PAGE, html)
    if of_subject and record["status"] == "finished" and export.may_write_card(output_dir, record):
        write_before_after(of_subject, folder / export.IMAGE)
        export.write_card(output_dir, record, folder / export.IMAGE)
    for item in findings:
        print(f"{item.finding} {item.remedy}")
    print(f"open {folder / PAGE}")


if __name__ == "__main__":
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("report_dir", type=absolute_path, help="TUNED_MODEL_DIR.report, beside a result")
    add("--images_dir", type=absolute_path, help="images that generate.py made with --compare_to")
    run_main(main, parser.parse_args())
