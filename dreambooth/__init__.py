"""What must be set before torch and Ray are imported."""

import gc
import os

# Where a standard stream is closed (`train.py >&-`), the next file that is opened, a checkpoint or
# other, would get its number, and what is printed.
while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
os.close(descriptor)

# How long a thread of torch that waits for another one keeps its core: by default, beside other
# programs, until its share of the time is up.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Of garbage collections: with Python's own, 700, they are a sixth of the time for the imports.
gc.set_threshold(10_000)
