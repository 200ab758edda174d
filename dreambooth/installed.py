"""Whether this Python has the packages that requirements.txt pins. Needs none of them itself.

python -m dreambooth.installed    # exit code 0: all of them, in these versions
"""

import importlib.metadata
import re
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def missing_packages(requirements=REQUIREMENTS):
    """The pins, "name==version", that are not installed in this version, of whatever build."""
    pins = re.findall(
        r"^([\w-]+)(?:\[.*\])?==(\S+)", requirements.read_text(encoding="utf-8"), re.MULTILINE
    )
    missing = []
    for name, version in pins:
        try:
            installed = importlib.metadata.version(name).partition("+")[0]  # of any CUDA build
        except importlib.metadata.PackageNotFoundError:
            installed = None
        if installed != version:
            missing.append(f"{name}=={version}")
    return missing


if __name__ == "__main__":
    sys.exit(bool(missing_packages()))
