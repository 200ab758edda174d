"""What must be set before torch and Ray are imported."""

import gc
import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # see cluster.py
gc.set_threshold(10_000)  # at 700, Python's own, a sixth of the time to import torch and diffusers
