"""A run's metrics as curves: inline SVG by matplotlib, which a page shows without any file."""

import io
import re

# A curve's title, and the metrics in it with their labels.
CURVES = [
    ("Loss", {"instance_loss": "instance images", "class_loss": "class images"}),
    ("Gradient norm", {"grad_norm": ""}),
    ("Learning rate", {"lr": ""}),
    ("Images per second", {"images_per_s": ""}),
    ("Peak GPU memory, GiB", {"peak_gib": ""}),
]
COLOURS = ["#1f5fa8", "#b3541e"]


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
