"""Settings of the process, made before torch and Ray are imported."""

import gc
import os
import sys

# Where a standard stream is closed (`train.py >&-`), the next file that is opened, such as a
# checkpoint, would get its descriptor, and all that is printed would go into that file.
while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
os.close(descriptor)

# How long an idle thread of torch spins, and so keeps its core from other programs. (By default:
# until its time slice ends.)
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # Ray's default; train.py knows no other
# Python's garbage collector goes through all modules again and again while they are imported, 0.9 s
# of each script on two cores, unless it waits for more new objects than by default (700).
gc.set_threshold(10_000)


_print_error = sys.excepthook


def _print_unless_interrupted(kind, error, trace):
    """Ctrl-C while modules are imported, which takes seconds, ends a script without their trace."""
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130)
    _print_error(kind, error, trace)


sys.excepthook = _print_unless_interrupted
