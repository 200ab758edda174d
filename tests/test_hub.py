"""What can fail while something is downloaded from the Hugging Face Hub, in one line."""

import errno
from unittest.mock import MagicMock

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dreambooth import hub
from dreambooth.cli import UserError

ANSWER = MagicMock()  # of the Hub
ERRORS = {
    "licence": (GatedRepoError("403", response=ANSWER), "a/b requires accepting its licence"),
    "name": (RepositoryNotFoundError("404", response=ANSWER), "'a/b' is not on the Hub"),
    "revision": (RevisionNotFoundError("404", response=ANSWER), "a/b has no revision 'v1'"),
    "malformed name": (HFValidationError("Repo id must\nbe short"), "'a/b': Repo id must"),
    "permission": (PermissionError(errno.EACCES, "denied"), "/cache cannot be written"),
    "full disk": (OSError(errno.ENOSPC, "No space left"), "no space left in /cache"),
    "offline": (OfflineModeIsEnabled("offline"), "check the network, or copy it there"),
    "not cached": (LocalEntryNotFoundError("no"), "check the network, or copy it there"),
    "no connection": (ConnectionError("refused"), "check the network, or copy it there"),
    "server": (HTTPError("502"), "no answer from the Hub (HTTPError)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_fails_is_one_line_with_the_remedy(name):
    error, text = ERRORS[name]
    with (
        pytest.raises(UserError) as raised,
        hub.errors_as_one_line("a/b", "v1", "/cache", "copy it there"),
    ):
        raise error
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bug_keeps_its_type():
    with pytest.raises(ZeroDivisionError), hub.errors_as_one_line("a/b", "v1", "/cache", "x"):
        raise ZeroDivisionError


def test_a_user_error_inside_stays_as_it_is():
    with (
        pytest.raises(UserError, match="^not a diffusers model$"),
        hub.errors_as_one_line("a/b", "v1", "/cache", "x"),
    ):
        raise UserError("not a diffusers model")
