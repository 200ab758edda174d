"""Errors that come back through Ray: which of them are the user's."""

import pytest
import ray
import ray.train
import torch

from dreambooth import ray_errors
from dreambooth.cli import UserError


def chain(error, *causes):
    """`error` with the first of `causes` as its cause, that with the next one as its own, ..."""
    effect = error
    for cause in causes:
        effect.__cause__ = cause
        effect = cause
    return error


def test_a_user_error_is_found_itself():
    assert ray_errors.user_error_in(UserError("a.png: gone")) == "a.png: gone"


def test_a_user_error_is_found_in_a_chain_of_causes():
    error = chain(RuntimeError("task failed"), ValueError("batch 3"), UserError("a.png: gone"))
    assert ray_errors.user_error_in(error) == "a.png: gone"


def test_a_user_error_is_found_as_the_cause_of_a_ray_task_error():
    error = ray.exceptions.RayTaskError("map", "Traceback ...", UserError("a.png: gone"))
    assert ray_errors.user_error_in(error) == "a.png: gone"
    assert ray_errors.user_error_in(error.as_instanceof_cause()) == "a.png: gone"
    assert ray_errors.user_error_in(chain(RuntimeError("worker failed"), error)) == "a.png: gone"


def test_a_user_error_is_found_as_the_cause_of_the_cause_of_a_ray_task_error():
    inner = chain(RuntimeError("in the map function"), UserError("a.png: gone"))
    error = ray.exceptions.RayTaskError("map", "Traceback ...", inner)
    assert ray_errors.user_error_in(error) == "a.png: gone"


def test_a_user_error_is_found_in_a_text_that_is_all_ray_has_kept():
    text = (
        "ray::map() (pid=1)\n  File x.py, line 1\n"
        "dreambooth.cli.UserError: a.png: truncated image\n\nmore"
    )
    assert ray_errors.user_error_in(RuntimeError(text)) == "a.png: truncated image"


def test_of_several_in_a_text_the_last_one_is_it():
    """A traceback ends with what was raised."""
    text = "UserError: first\nDuring handling of it:\nUserError: second"
    assert ray_errors.user_error_in(RuntimeError(text)) == "second"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        ValueError("not a UserError"),
        RuntimeError("MyUserError: of another library"),
        chain(RuntimeError("task failed"), KeyError("bug")),
        ray.exceptions.RayTaskError("map", "Traceback ...", KeyError("bug")),
        ray.exceptions.ActorDiedError(),
    ],
)
def test_a_bug_is_no_user_error(error):
    assert ray_errors.user_error_in(error) is None


def test_a_user_error_really_crosses_ray(ray_address):
    @ray.remote
    def fail():
        raise UserError("a.png: gone")

    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(fail.remote())
    assert ray_errors.user_error_in(raised.value) == "a.png: gone"


def test_a_failed_training_is_the_users_if_a_workers_failure_is():
    error = RuntimeError("training failed")
    error.worker_failures = {0: KeyError("rank 0 waits"), 1: UserError("a.png: gone")}
    found = ray_errors.training_error(error)
    assert type(found) is UserError
    assert str(found) == "a.png: gone"


def test_too_little_gpu_memory_is_a_user_error_with_the_remedies():
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    for failure in (memory, RuntimeError("torch.OutOfMemoryError: CUDA out of memory")):
        error = RuntimeError("training failed")
        error.worker_failures = {0: failure}
        found = ray_errors.training_error(error)
        assert type(found) is UserError
        assert "--gradient_checkpointing" in str(found)


def test_a_failed_training_is_the_users_if_the_controllers_failure_is():
    """There a callback ends the run (below)."""
    error = ray.train.ControllerError(UserError("a.png: gone"))
    assert str(ray_errors.training_error(error)) == "a.png: gone"


def test_a_failure_in_this_process_is_the_users_if_it_is_itself():
    """With one worker and no cluster, there is no other process."""
    assert str(ray_errors.training_error(UserError("a.png: gone"))) == "a.png: gone"


def test_a_bug_in_a_training_is_not_the_users():
    error = RuntimeError("shape mismatch")
    assert ray_errors.training_error(error) is None
    error.worker_failures = {0: ValueError("shape mismatch")}
    assert ray_errors.training_error(error) is None


def test_a_user_error_ends_the_run_and_a_bug_or_a_lost_worker_does_not():
    """Ray Train restarts its workers after any other failure."""
    callback = ray_errors.NoRetryForUserErrors()
    callback.after_exception(None, {0: KeyError("bug"), 1: RuntimeError("node lost")})
    with pytest.raises(UserError, match="^a.png: gone$"):
        callback.after_exception(None, {0: KeyError("bug"), 1: UserError("a.png: gone")})
