"""Which exceptions raised through Ray are user errors."""

import re

import ray.exceptions
import ray.train

from dreambooth import hardware
from dreambooth.cli import UserError

FAILURES = (  # what fit() raises
    ray.train.TrainingFailedError, ray.exceptions.RayError, RuntimeError, ValueError,
)  # fmt: skip


def user_error_in(error):
    """The message of the `UserError` behind an exception that crossed Ray; None if there is none.

    It is the exception itself or one of its causes. Only where Ray has lost the cause and kept its
    text is it read from that.
    """
    causes = [error]
    while causes[-1] is not None:
        # A RayTaskError has its original exception as an attribute.
        causes.append(getattr(causes[-1], "cause", None) or causes[-1].__cause__)
    for cause in causes:
        if type(cause) is UserError:
            return str(cause)
    in_text = re.findall(rf"\b{UserError.__name__}: (.*)", str(error))
    return in_text[-1] if in_text else None


def training_error(error):
    """The `UserError` behind a failed training, or behind one worker's exception; None if it is not
    the user's."""
    if "requires at least one CUDA device" in str(error):  # NCCL's, on another node
        return UserError(f"a GPU of the cluster: {hardware.unusable_gpu()}")
    # Both are absent if train_fn ran in this process.
    controller_failure = getattr(error, "controller_failure", None)
    worker_failures = getattr(error, "worker_failures", {})
    for cause in [error, controller_failure, *worker_failures.values()]:
        if "torch.OutOfMemoryError" in f"{type(cause)} {cause}":
            return UserError(
                "out of GPU memory: give --gradient_checkpointing, then --param_dtype bf16 or"
                " --use_lora, or a smaller --train_batch_size or --resolution"
            )
        message = user_error_in(cause)
        if message:
            return UserError(message)
    return None


class NoRetryForUserErrors(ray.train.UserCallback):
    """Ends the run at once where retrying would not help: Ray Train retries any other failure."""

    def after_exception(self, run_context, worker_exceptions):
        for error in worker_exceptions.values():
            user_error = training_error(error)
            if user_error:
                raise user_error
