"""Download the example photos, five of one dog, from the Hugging Face Hub.

    python download_example_dataset.py images/dog

images/lego-car needs no download, and any folder with four or five photos of your own will do.
"""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from cache_model import hub_errors_as_one_line
from dreambooth.cli import ArgumentParser, absolute_path, run_main
from dreambooth.files import atomic
from dreambooth.files.photos import find_images

DATASET = "diffusers/dog-example"


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "dir", nargs="?", type=absolute_path, default="./images/dog", help="where the photos go"
    )
    return parser.parse_args(argv)


def download_photos(folder):
    """Fill `folder` with the photos alone: the Hub's cache files are not left among them."""
    offline_remedy = "use images/lego-car or photos of your own"
    with hub_errors_as_one_line(DATASET, "main", folder, offline_remedy):
        snapshot_download(
            DATASET,
            repo_type="dataset",
            local_dir=folder / "download",
            allow_patterns=["*.jpeg", "*.jpg", "*.png"],
        )
    for photo in find_images(folder / "download"):
        shutil.move(photo, folder)
    shutil.rmtree(folder / "download")


def main(args):
    """Download the photos; an existing folder of photos is left as it is."""
    folder = Path(args.dir)
    atomic.check_writable(folder, "DIR")
    with atomic.locked(folder.parent):  # two runs may begin at once
        if folder.is_dir() and {file.name for file in folder.iterdir()} - atomic.FILE_MANAGERS:
            print(f"photos in {folder} already: {len(find_images(folder))}")
            return
        atomic.replace_dir(folder, download_photos)
    print(f"photos in {folder}: {len(find_images(folder))}")


if __name__ == "__main__":
    run_main(main, parse_args())
