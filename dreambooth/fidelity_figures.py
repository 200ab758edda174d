"""Figures of fidelity for the report's page: what fidelity.py prints, or your own as JSON."""

import json
from pathlib import Path

from dreambooth.cli import UserError


def read(file):
    """The figures of fidelity by model: of JSON, {"original": {"subject": 0.1}, "tuned": {...}}, or
    of what fidelity.py prints. UserError: it is neither."""
    if not file:
        return {}
    try:
        text = Path(file).read_text()
        figures = json.loads(text) if text.lstrip().startswith("{") else parse(text)
        if not all(
            isinstance(value, float | int) for row in figures.values() for value in row.values()
        ):
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise UserError(f"--figures {file} is neither JSON nor the output of fidelity.py") from None
    return figures


def parse(text):
    """The rows that fidelity.py prints: a model's name, then names and numbers in turn. Those of
    the judge and of the original model's world are not a model's."""
    figures = {}
    for line in text.splitlines():
        name, *words = line.split() or [""]
        if words and len(words) % 2 == 0 and name not in ("judge", "world"):
            values = map(float, words[1::2])
            figures[name] = dict(zip(words[::2], values, strict=True))
    if not figures:
        raise ValueError("no rows")
    return figures


def table(figures):
    """Column names and rows of text for the page; None without figures."""
    if not figures:
        return None
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    rows = [
        (model, [f"{row[name]:.2f}" if name in row else "" for name in columns])
        for model, row in figures.items()
    ]
    return {"columns": columns, "rows": rows}
