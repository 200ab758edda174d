"""Where the pocket model is, and the classes of its small world: it can show nothing else."""

import re
from pathlib import Path

from dreambooth.cli import UserError
from dreambooth.pocket.render import CLASSES

POCKET_DIR = Path(__file__).parent / "model"


def check_classes(prompts):
    """Each of `prompts`, for pocket, must name a class that it knows: any other word is letters to
    its tokenizer, and the images would show nothing."""
    for text in prompts:
        if not set(re.findall("[a-z]+", text.lower())) & set(CLASSES):
            raise UserError(
                f"{text!r}: pocket only draws {', '.join(CLASSES[:-1])} and {CLASSES[-1]}; real"
                " photos need Stable Diffusion and a CUDA GPU (README, Your own photos)"
            )
