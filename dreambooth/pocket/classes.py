"""What the pocket model cannot show: anything but the classes of its small world.

python -m dreambooth.pocket.classes "photo of a dog"    # refused, with exit code 2
"""

import re
from pathlib import Path

from dreambooth.cli import ArgumentParser, UserError, run_main, valid_prompt
from dreambooth.pocket.render import CLASSES

POCKET_DIR = Path(__file__).parent / "model"


def check_classes(prompts):
    """Each of `prompts`, for pocket, must name a class that it knows: any other word is letters to
    its tokenizer, and the images would show nothing."""
    for text in prompts:
        if not set(re.findall("[a-z]+", text.lower())) & set(CLASSES):
            raise UserError(
                f"{text!r}: the pocket model is a world of drawings that knows"
                f" {', '.join(CLASSES[:-1])} and {CLASSES[-1]}; real photos need Stable Diffusion"
                " and a CUDA GPU (README, Your own photos)"
            )


if __name__ == "__main__":
    parser = ArgumentParser("Check that pocket knows the class in each prompt.")
    parser.add_argument("prompts", nargs="+", type=valid_prompt, metavar="PROMPT")
    run_main(lambda args: check_classes(args.prompts), parser.parse_args())
