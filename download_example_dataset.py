"""Fetch the example photos, five pictures of one dog, from the Hugging Face Hub.

    python download_example_dataset.py images/dog

images/lego-car needs no download, and any folder with four or five photos of your own will do.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError

from dreambooth import checks
from dreambooth.images import find_images

DATASET = "diffusers/dog-example"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)
    parser.add_argument("dir", nargs="?", default="./images/dog", help="where the photos go")
    return parser.parse_args(argv)


def main(args):
    """Download beside the target, and move the photos alone; an existing folder of photos is left as it is."""
    folder = Path(args.dir)
    checks.check_output_dir(folder, "DIR")
    if folder.is_dir() and any(folder.iterdir()):
        print(f"{len(find_images(folder))} photos are in {folder} already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Download beside the target and move the photos alone: no cache folders are left among them.
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        try:
            snapshot_download(
                DATASET, repo_type="dataset", local_dir=temporary, allow_patterns=["*.jpeg", "*.jpg", "*.png"]
            )
        except (OSError, HTTPError) as error:
            raise checks.UserError(
                f"no answer from the Hub ({type(error).__name__}): check the network, or use images/lego-car,"
                " or a folder with photos of your own"
            ) from None
        photos = Path(temporary) / "photos"
        photos.mkdir()
        for photo in find_images(temporary):
            shutil.move(photo, photos)
        if folder.exists():
            folder.rmdir()
        os.rename(photos, folder)
    print(f"{len(find_images(folder))} photos in {folder}")


if __name__ == "__main__":
    checks.run_main(main, parse_args())
