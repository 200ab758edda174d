"""The libraries' own logs and progress bars: off, unless a script runs with --verbose."""

import logging
import os
import warnings
from contextlib import contextmanager

# For the libraries and the processes that Ray starts, which inherit them.
QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
}
# One of Ray Train's loggers has no name of its own: it is the root logger.
LOGGERS = (None, "ray", "ray.data", "ray.train", "ray.tune", "diffusers", "transformers", "peft")


def configure(verbose):
    """Silence the libraries in this process and in those that Ray starts from it, unless `verbose`.

    What fails is raised in any case. Call it before Ray starts and before models load.
    """
    if verbose:
        return
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextmanager
def silent_stderr(verbose):
    """Hide stderr, also that of C++ code and of processes started meanwhile, unless `verbose`."""
    if verbose:
        yield
        return
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def hide_progress_bars(verbose):
    """The same for the bars with which diffusers and transformers load models. Imports both."""
    import diffusers
    import transformers

    if not verbose:
        diffusers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.set_verbosity(logging.CRITICAL)
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity(logging.CRITICAL)
