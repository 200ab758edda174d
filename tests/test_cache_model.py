"""Step 1: which files of a model are fetched, and what is there already."""

import shutil
from pathlib import Path

import pytest

import cache_model
from dreambooth import model_dir as directory
from dreambooth.cli import UserError

# Told to be offline, and with a Hub that does not answer: a closed port of this machine.
NO_NETWORK = {
    "offline": {"HF_HUB_OFFLINE": "1"},
    "no answer": {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
}

# As in CompVis/stable-diffusion-v1-4, but with a U-Net without safetensors.
REVISION = [
    "model_index.json",
    "README.md",
    "sd-v1-4.ckpt",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "safety_checker/model.safetensors",
    "safety_checker/config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_flax_model.msgpack",
    "scheduler/scheduler_config.json",
]
NEEDED = {
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
}


@pytest.fixture
def run(tmp_path):
    """Run cache_model.py in this process, into the cache tmp_path/hub."""

    def main(model_name, revision="v1"):
        argv = ["--model_dir", str(tmp_path / "hub"), f"--model_name={model_name}"]
        cache_model.main(cache_model.parse_args([*argv, "--revision", revision]))

    return main


@pytest.mark.parametrize("network", NO_NETWORK)
def test_without_a_network_the_remedy_is_named(assert_one_line, run_script, tmp_path, network):
    argv = ["--model_dir", tmp_path / "hub", "--model_name", "CompVis/stable-diffusion-v1-4"]
    result = run_script("cache_model.py", *argv, **NO_NETWORK[network])
    assert_one_line(result, "check the network", "--model_name pocket")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("name", ["two words", "a/b/c", "-x"])
def test_a_malformed_model_name_is_refused(run, name):
    with pytest.raises(UserError):
        run(name)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    args = cache_model.parse_args(["--model_dir", str(tmp_path / "file" / "below")])
    with pytest.raises(UserError, match="--model_dir"):
        cache_model.main(args)


@pytest.fixture
def fetched(model_dir, monkeypatch):
    """The arguments of the calls to `fetch_from_hub`, which gives the test's model."""
    calls = []

    def fetch(*args):
        calls.append(args)
        return model_dir

    monkeypatch.setattr(cache_model, "fetch_from_hub", fetch)
    return calls


def test_a_complete_model_is_not_fetched_again(run, fetched, model_dir, tmp_path, capsys):
    """Its directory is the last line printed."""
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "v1"
    shutil.copytree(model_dir, snapshot)
    run("a/b")
    assert fetched == []
    assert capsys.readouterr().out.splitlines()[-1] == str(snapshot)


@pytest.mark.parametrize("missing", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_an_incomplete_model_is_fetched(run, fetched, model_dir, tmp_path, missing):
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "v1"
    shutil.copytree(model_dir, snapshot)
    (snapshot / missing).unlink()
    run("a/b")
    assert fetched == [(str(tmp_path / "hub"), "a/b", "v1")]


def test_a_branch_is_asked_for_its_newest_commit(run, fetched, tmp_path):
    """No directory has its name."""
    run("a/b", revision="main")
    assert fetched == [(str(tmp_path / "hub"), "a/b", "main")]


def test_pocket_needs_no_network(run, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_model, "POCKET_DIR", model_dir)
    run("pocket")
    snapshot = Path(capsys.readouterr().out.strip())
    assert snapshot == tmp_path / "hub" / "models--pocket" / "snapshots" / "v1"
    directory.check_model_dir(snapshot)


def test_pocket_is_copied_once_and_again_if_it_is_incomplete(run, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_model, "POCKET_DIR", model_dir)
    snapshot = tmp_path / "hub" / "models--pocket" / "snapshots" / "v1"
    run("pocket")
    (snapshot / "mark").touch()
    run("pocket")
    assert (snapshot / "mark").exists()
    (snapshot / "unet" / "config.json").unlink()
    run("pocket")
    assert (snapshot / "unet" / "config.json").exists()
    assert not (snapshot / "mark").exists()


def test_another_pocket_model_replaces_the_cached_one(
    run, model_dir, broken_model_dir, tmp_path, monkeypatch
):
    """After a pretraining of one's own."""
    snapshot = tmp_path / "hub" / "models--pocket" / "snapshots" / "v1"
    for source in (model_dir, broken_model_dir):
        monkeypatch.setattr(cache_model, "POCKET_DIR", source)
        run("pocket")
        assert directory.fingerprint(snapshot) == directory.fingerprint(source)


def test_only_what_a_pipeline_needs_is_fetched():
    """Safetensors where there are any; no half precision, flax, or safety checker."""
    assert set(cache_model.files_to_fetch(REVISION)) == NEEDED


def test_a_revision_without_a_models_weights_is_refused():
    with pytest.raises(UserError, match="no unet weights"):
        cache_model.files_to_fetch([name for name in REVISION if not name.startswith("unet")])
