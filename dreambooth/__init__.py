"""What must be set before torch and Ray are imported."""

import gc
import os

# How long a thread of torch that waits for another one keeps its core: by default, beside other
# programs, until its share of the time is up.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Of garbage collections: with Python's own, 700, they are a sixth of the time for the imports.
gc.set_threshold(10_000)
