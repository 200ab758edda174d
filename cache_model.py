"""Download one revision of a diffusers model from the Hugging Face Hub into its cache layout.

    python cache_model.py --model_dir $ORIG_MODEL_DIR --model_name CompVis/stable-diffusion-v1-4 \\
        --revision b95be7d6f134c3a9e62ee616f310733567f069ce

The last line of the output names the pipeline directory,
$ORIG_MODEL_DIR/models--CompVis--stable-diffusion-v1-4/snapshots/<revision>. Only what the scripts
use is downloaded, as safetensors where the revision has them; complete downloads are not repeated.
The model "pocket" comes with this checkout: it needs no network.
"""

import re
from argparse import ArgumentTypeError
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dreambooth.cli import (
    ArgumentParser,
    UserError,
    absolute_path,
    first_line,
    is_full,
    run_main,
    warn,
)
from dreambooth.files import atomic, pipeline_dir
from dreambooth.pocket import POCKET_DIR


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model_dir", type=absolute_path, required=True, help="the cache, with a folder per model")
    add("--model_name", default="CompVis/stable-diffusion-v1-4", help='on the Hub, or "pocket"')
    add("--revision", type=valid_revision, default="main", help="commit, tag or branch")
    return parser.parse_args(argv)


def valid_revision(text):
    """The type of --revision, which becomes the name of a folder in the cache."""
    if not text:
        raise ArgumentTypeError("is empty; is a shell variable not set?")
    if text.startswith("/") or {".", ".."} & set(text.split("/")):
        raise ArgumentTypeError(f"{text!r} is no commit, tag or branch")
    return text


def files_to_fetch(names, facts):
    """Of a revision's file `names`, those that the scripts use: configurations, tokenizer, and of
    each model the weights that `choose_weights` prefers. Not the safety checker, other copies of
    the weights, flax, onnx or single-file checkpoints. UserError: a model has no weights there."""
    wanted = []
    for name in names:
        part, _, file = name.partition("/")
        is_text = file.endswith((".json", ".txt", ".jinja")) and not re.search(r"index.*json", file)
        if name == pipeline_dir.INDEX or (part in facts.parts and is_text):
            wanted.append(name)
    for part in facts.models:
        found = pipeline_dir.choose_weights(part, names)
        if found is None:
            raise UserError(f"this revision has no {part} weights that can be read")
        wanted += found.files
    return wanted


def fetch_from_hub(cache_dir, model_name, revision):
    """Download what is missing, the index first; returns the pipeline directory. UserError: no
    network, no such model or revision, a licence to accept first, or a model that these scripts do
    not take, of which no weights are downloaded."""
    snapshot = pipeline_dir.snapshot_dir(cache_dir, model_name, revision)
    offline_remedy = (
        f"run this on a machine with a network and copy the directory to {snapshot},"
        " or use --model_name pocket, which needs no network"
    )
    with hub_errors_as_one_line(model_name, revision, cache_dir, offline_remedy):
        info = HfApi().model_info(model_name, revision=revision)
        names = [file.rfilename for file in info.siblings]
        if pipeline_dir.INDEX not in names:
            raise UserError(
                f"{model_name} is no diffusers model: it has no {pipeline_dir.INDEX}; look on its"
                ' page for one that has, often named "...-diffusers"'
            )
        index = hf_hub_download(
            model_name, pipeline_dir.INDEX, revision=info.sha, cache_dir=cache_dir
        )
        index = pipeline_dir.read_config(Path(index), model_name)
        files = files_to_fetch(names, pipeline_dir.facts_of(index, model_name))
        return snapshot_download(
            model_name, revision=revision, cache_dir=cache_dir, allow_patterns=files
        )


def fetched_earlier(cache_dir, model_name, branch):
    """The pipeline directory of the commit that `branch` was when it was last fetched; None if it
    is not in the cache, or not complete."""
    # The branch's name may have slashes.
    ref = pipeline_dir.snapshot_dir(cache_dir, model_name, "x").parents[1] / "refs" / branch
    if not ref.is_file():
        return None
    snapshot = pipeline_dir.snapshot_dir(
        cache_dir, model_name, ref.read_text(encoding="utf-8").strip()
    )
    return None if pipeline_dir.missing_file(snapshot) else snapshot


@contextmanager
def hub_errors_as_one_line(name, revision, folder, offline_remedy):
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
        raise UserError(f"{name!r}: {first_line(error)}") from None
    except PermissionError as error:
        raise UserError(f"{folder} cannot be written: {error}") from None
    except (OSError, HTTPError, RuntimeError) as error:  # the last: of hf_xet, which downloads
        if is_full(error):
            raise UserError(f"no space left in {folder}") from None
        raise UserError(
            f"no answer from the Hub ({type(error).__name__}: {first_line(error)}):"
            f" check the network, or {offline_remedy}"
        ) from None
    except UserError:
        raise
    except (ImportError, ValueError) as error:  # of a proxy or a token that cannot be used
        raise UserError(
            f"the Hub cannot be asked ({first_line(error)}): check variables such as ALL_PROXY and"
            f" HF_TOKEN, or {offline_remedy}"
        ) from None


def copy_pocket(snapshot):
    """Put the embedded model into the directory `snapshot`, unless it is there already."""

    def is_there():
        is_complete = pipeline_dir.missing_file(snapshot) is None
        fingerprint = pipeline_dir.fingerprint
        return is_complete and fingerprint(snapshot) == fingerprint(POCKET_DIR)

    if is_there():
        return
    atomic.check_replaceable(snapshot, pipeline_dir.PIPELINE_NAMES, "--model_dir")
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    atomic.lock(snapshot.with_name(".lock"), snapshot, wait=True)  # two runs may begin at once
    if not is_there():
        atomic.replace_dir(snapshot, lambda folder: atomic.copy_files(POCKET_DIR, folder))


def main(args):
    """Put the model into the cache, unless all of it is there, and print its pipeline directory.
    UserError: it cannot be fetched, or it is a model that these scripts do not take."""
    if Path(args.model_name).is_absolute():
        raise UserError(
            f"--model_name {args.model_name} is a path: pass that directory to train.py and"
            " generate.py as their --model_dir"
        )
    snapshot = pipeline_dir.snapshot_dir(args.model_dir, args.model_name, args.revision)
    if args.model_name == "pocket":
        copy_pocket(snapshot)
    elif pipeline_dir.missing_file(snapshot):  # always for a branch: its newest commit is asked for
        atomic.check_writable(args.model_dir, "--model_dir")
        try:
            snapshot = fetch_from_hub(args.model_dir, args.model_name, args.revision)
        except UserError as error:  # no network, say
            snapshot = fetched_earlier(args.model_dir, args.model_name, args.revision)
            if snapshot is None:
                raise
            warn(f"using what was fetched earlier: {error}")
    pipeline_dir.check_model_dir(snapshot)
    print(snapshot)


if __name__ == "__main__":
    run_main(main, parse_args())
