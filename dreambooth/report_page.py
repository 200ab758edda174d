"""A page that says whether a run worked: one report.html that opens without a network.

    python -m dreambooth.report_page $TUNED_MODEL_DIR.report --images_dir $IMAGES_NEW_DIR

It shows what the run has recorded (metrics, previews, run.json) and the images that generate.py has
made with --compare_to, before and after; fidelity.py's figures with --figures. Run it again at any
time, also while the run trains.
"""

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image, ImageStat

from dreambooth import (
    advice,
    atomic,
    curves,
    fidelity_figures,
    metrics,
    model_card,
    outputs,
    previews,
    run_record,
)
from dreambooth.cli import ArgumentParser, UserError, absolute_path, run_main
from dreambooth.images import open_image
from dreambooth.report import where_the_seconds_went

PAGE = "report.html"
MAX_SIDE = 320  # pixels of an image on the page
MAX_PHOTOS = 12
MAX_PAIRS = 12


def data_uri(path, max_side=MAX_SIDE):
    """The image as a data URI, scaled down; small images stay as they are."""
    image = open_image(path)
    image.thumbnail((max_side, max_side))
    encoded = io.BytesIO()
    kind = "PNG" if max(image.size) <= 128 else "JPEG"
    image.save(encoded, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def find_pairs(images_dir):
    """The images that generate.py has made with --compare_to: prompt, before and after (paths), one
    per prompt and then the next, at most MAX_PAIRS."""
    if not images_dir:
        return []
    pairs = []
    for after in sorted(Path(images_dir).glob("*-seed*.png")):
        before = after.parent / "compared" / after.name
        record, record_before = outputs.read_record(after), outputs.read_record(before)
        same = ("prompt", "seed", "index")
        if record and record_before and all(record[k] == record_before[k] for k in same):
            pairs.append((record["index"], record["prompt"], before, after))
    pairs.sort(key=lambda pair: pair[0])
    return [pair[1:] for pair in pairs[:MAX_PAIRS]]


def contrast(path):
    """The standard deviation of an image's brightness."""
    with Image.open(path) as image:
        return ImageStat.Stat(image.convert("L")).stddev[0]


def relative_contrast(pairs):
    """The mean contrast of the images after, relative to those before; None without images."""
    before = sum(contrast(before) for _, before, _ in pairs)
    if not before:
        return None
    return sum(contrast(after) for _, _, after in pairs) / before


def film_strips(folder):
    """Each prompt's previews in the order of their steps."""
    strips = []
    for by_step in previews.find(folder).values():
        steps = sorted(by_step)
        record = outputs.read_record(by_step[steps[0]]) or {}
        images = [{"step": step, "data": data_uri(by_step[step], 184)} for step in steps]
        strips.append({"prompt": record.get("prompt", ""), "images": images})
    return strips


def facts_of(record):
    """What the page's table says of a run: labels and texts."""
    flags = record["flags"]
    revision = f", revision {record['revision']}" if record["revision"] else ""
    facts = [
        ("model", record["model"] + revision),
        ("status", record["status"]),
        ("images and steps", record["plan"]),
        ("learning rate", f"{flags['lr']:g}, {flags['lr_scheduler']}"),
        ("prior loss weight", f"{flags['prior_loss_weight']:g}"),
        ("LoRA", f"rank {flags['lora_rank']}" if flags["use_lora"] else "no"),
        ("seed", flags["seed"]),
        ("hardware", record["hardware"]),
        ("versions", ", ".join(f"{name} {v}" for name, v in record["versions"].items())),
    ]
    if "seconds" in record:
        facts.append(("where the seconds went", where_the_seconds_went(record["seconds"])))
    return facts


def render(folder, images_dir=None, figures=None):
    """The page's HTML, and the advice on it as a list of rules."""
    record = run_record.read(folder)
    rows = metrics.read(folder)
    pairs = find_pairs(images_dir)
    figures = figures or {}
    tuned = [values for model, values in figures.items() if model != "original"]
    facts = advice.Facts(
        rows=rows,
        status=record["status"],
        tuned=tuned[0] if tuned else {},
        original=figures.get("original", {}),
        contrast=relative_contrast(pairs),
    )
    rules = advice.advice(facts)
    photos = [path for path in record["instance_paths"] if Path(path).exists()]
    template = Path(__file__).with_name("report.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(template).render(
        name=Path(record["flags"]["output_dir"]).name,
        record=record,
        flags=record["flags"],
        advice=rules,
        photos=[data_uri(path) for path in photos[:MAX_PHOTOS]],
        pairs=[
            {"prompt": prompt, "before": data_uri(before), "after": data_uri(after)}
            for prompt, before, after in pairs
        ],
        strips=film_strips(folder),
        curves=curves.all_curves(rows),
        figures=fidelity_figures.table(figures),
        facts=facts_of(record),
    )
    return html, rules


def write_before_after(pairs, file):
    """The image of the model card: a row before, a row after."""
    rows = {
        "original model": [before for _, before, _ in pairs],
        "tuned model": [after for _, _, after in pairs],
    }
    outputs.contact_sheet(rows, file, columns=5, side=128)


def main(args):
    """Write report.html into `args.report_dir`. UserError: no run is recorded there."""
    folder = Path(args.report_dir)
    record = run_record.read(folder)
    if not record:
        raise UserError(f"{folder} holds no run.json: name the .report directory of a run")
    html, rules = render(folder, args.images_dir, fidelity_figures.read(args.figures))
    atomic.replace_file(folder / PAGE, lambda file: file.write_text(html, encoding="utf-8"))
    pairs = find_pairs(args.images_dir)
    output_dir = Path(record["flags"]["output_dir"])
    if pairs and record["status"] == "finished" and output_dir.is_dir():
        write_before_after(pairs, folder / model_card.IMAGE)
        model_card.write(output_dir, folder / model_card.IMAGE)
    for rule in rules:
        print(f"{rule.name}: {rule.finding} {rule.remedy}")
    print(f"open {folder / PAGE}")


if __name__ == "__main__":
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("report_dir", type=absolute_path, help="TUNED_MODEL_DIR.report, beside a result")
    add("--images_dir", type=absolute_path, help="images that generate.py made with --compare_to")
    add("--figures", type=absolute_path, help="what tests/benchmarks/fidelity.py printed, or JSON")
    run_main(main, parser.parse_args())
