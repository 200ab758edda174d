"""The Hugging Face Hub's errors, as one line with the remedy."""

import errno
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dreambooth.cli import UserError


@contextmanager
def errors_as_one_line(name, revision, folder, offline_remedy):
    """Turn what fails while `name` at `revision` is downloaded into `folder` into a UserError:
    no network (then `offline_remedy` says what else to do), no such name or revision, a licence to
    be accepted first, no space, no permission."""
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{name} requires accepting its licence: do so on its page, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(f"{name!r} is not on the Hub, or it is private: `hf auth login`") from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r}") from None
    except HFValidationError as error:
        raise UserError(f"{name!r}: {str(error).splitlines()[0]}") from None
    except PermissionError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    except (OSError, HTTPError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise UserError(f"no space left in {folder}") from None
        raise UserError(
            f"no answer from the Hub ({type(error).__name__}):"
            f" check the network, or {offline_remedy}"
        ) from None
