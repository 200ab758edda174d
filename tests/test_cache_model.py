"""Steps 1 and 2: which files of a model are fetched, and what is there already; the example's
photos; and what can fail while something is downloaded from the Hugging Face Hub."""

import errno
import shutil
from types import SimpleNamespace
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

import cache_model
import download_example_dataset
from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir

# As in CompVis/stable-diffusion-v1-4, but with a U-Net without safetensors.
NEEDED = [
    "model_index.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
]
REVISION = NEEDED + [
    "README.md",
    "sd-v1-4.ckpt",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "vae/diffusion_flax_model.msgpack",
]


@pytest.fixture
def run(tmp_path):
    """Run cache_model.py in this process, into the cache tmp_path/hub; returns where the revision
    of the model belongs."""

    def main(model_name, revision="v1"):
        argv = ["--model_dir", str(tmp_path / "hub"), f"--model_name={model_name}"]
        cache_model.main(cache_model.parse_args([*argv, "--revision", revision]))
        return pipeline_dir.snapshot_dir(tmp_path / "hub", model_name, revision)

    return main


@pytest.fixture
def hub(model_dir, flat_image, monkeypatch):
    """A Hub that gives the test's model and two photos: a namespace of the names of its `files` and
    the `calls`, each with what was asked for. Beside photos it leaves cache files of its own."""
    hub = SimpleNamespace(files=REVISION, calls=[])

    def model_info(name, revision):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in hub.files])

    def download_model(name, revision, cache_dir, allow_patterns):
        hub.calls.append((name, revision, sorted(allow_patterns)))
        return str(model_dir)

    def download_photos(name, local_dir, **settings):
        hub.calls.append(name)
        for photo in ("a.jpeg", "b.jpeg"):
            flat_image(photo, 0, folder=local_dir)
        (local_dir / ".cache").mkdir()
        (local_dir / ".cache" / "a.jpeg.metadata").touch()

    monkeypatch.setattr(cache_model, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(cache_model, "snapshot_download", download_model)
    monkeypatch.setattr(download_example_dataset, "snapshot_download", download_photos)
    return hub


def test_a_complete_model_is_not_fetched_again(run, hub, model_dir, tmp_path, capsys):
    """An incomplete one is. The model's directory is the last line printed."""
    snapshot = pipeline_dir.snapshot_dir(tmp_path / "hub", "a/b", "v1")
    shutil.copytree(model_dir, snapshot)
    run("a/b")
    assert hub.calls == []
    assert capsys.readouterr().out.splitlines()[-1] == str(snapshot)
    (snapshot / "vae" / "config.json").unlink()
    run("a/b")
    assert hub.calls == [("a/b", "v1", sorted(NEEDED))]
    assert capsys.readouterr().out.splitlines()[-1] == str(model_dir)


def test_only_what_a_pipeline_needs_is_fetched(run, hub):
    """Safetensors where there are any; no half precision, flax, or safety checker. A branch is
    asked for its newest commit: no directory has its name."""
    run("a/b", revision="main")
    assert hub.calls == [("a/b", "main", sorted(NEEDED))]
    hub.files = [name for name in REVISION if not name.startswith("unet")]
    with pytest.raises(UserError, match="no unet weights"):
        run("a/b")


def test_pocket_is_copied_without_a_network_and_only_where_it_is_not_there(run, capsys):
    snapshot = run("pocket")
    assert capsys.readouterr().out == f"{snapshot}\n"
    pipeline_dir.check_model_dir(snapshot)
    (snapshot / "mark").touch()
    run("pocket")
    assert (snapshot / "mark").exists()
    (snapshot / "unet" / "config.json").unlink()
    run("pocket")
    pipeline_dir.check_model_dir(snapshot)
    assert not (snapshot / "mark").exists()


def test_another_pocket_model_replaces_the_cached_one(run, model_dir, monkeypatch):
    """After a pretraining of one's own."""
    run("pocket")
    monkeypatch.setattr(cache_model, "POCKET_DIR", model_dir)
    snapshot = run("pocket")
    assert pipeline_dir.fingerprint(snapshot) == pipeline_dir.fingerprint(model_dir)


def test_the_folder_holds_the_photos_alone(hub, tmp_path, capsys):
    """And photos that are there are not downloaded again."""
    args = download_example_dataset.parse_args([str(tmp_path / "dog")])
    download_example_dataset.main(args)
    assert sorted(path.name for path in (tmp_path / "dog").iterdir()) == ["a.jpeg", "b.jpeg"]
    assert capsys.readouterr().out == f"photos in {tmp_path / 'dog'}: 2\n"
    (tmp_path / "dog" / "b.jpeg").unlink()
    download_example_dataset.main(args)
    assert hub.calls == ["diffusers/dog-example"]
    assert "already: 1\n" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_refused(hub, tmp_path):
    (tmp_path / "file").write_text("mine")
    below = str(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="--model_dir"):
        cache_model.main(cache_model.parse_args(["--model_dir", below]))
    with pytest.raises(UserError, match="DIR"):
        download_example_dataset.main(download_example_dataset.parse_args([below]))
    assert hub.calls == []


@pytest.mark.parametrize("script", [cache_model, download_example_dataset])
def test_without_an_answer_of_the_hub_the_remedy_is_named(
    assert_one_line, run_script, tmp_path, script
):
    """Told to be offline, as these tests are; and with a closed port of this machine as the Hub."""
    argv = (["--model_dir"] if script == cache_model else []) + [str(tmp_path / "new")]
    remedy = "--model_name pocket" if script == cache_model else "images/lego-car"
    with pytest.raises(UserError, match=f"check the network, or .*{remedy}"):
        script.main(script.parse_args(argv))
    closed = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert_one_line(run_script(script.__file__, *argv, **closed), "check the network", remedy)
    assert list(tmp_path.iterdir()) == []


def test_a_malformed_model_name_is_refused(run):
    for name in ("two words", "a/b/c", "-x"):
        with pytest.raises(UserError, match=f"^'{name}': "):
            run(name)


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
    "user": (UserError("not a diffusers model"), "not a diffusers model"),
}


def test_what_fails_while_downloading_is_one_line_with_the_remedy():
    """A bug keeps its type."""

    def fail(error):
        with cache_model.hub_errors_as_one_line("a/b", "v1", "/cache", "copy it there"):
            raise error

    for name, (error, text) in ERRORS.items():
        with pytest.raises(UserError) as raised:
            fail(error)
        assert text in str(raised.value), name
        assert "\n" not in str(raised.value)
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
