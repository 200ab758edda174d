"""The pocket model, and the small world that it was trained on."""

from pathlib import Path

POCKET_DIR = Path(__file__).parent / "model"
