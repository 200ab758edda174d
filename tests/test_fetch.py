"""Steps 1 and 2: what is fetched, what is there already, and what a user is told where nothing can be fetched."""

import shutil
from pathlib import Path

import pytest

import cache_model
import download_example_dataset
from dreambooth import checks
from dreambooth.checks import UserError


@pytest.mark.parametrize("how", ["offline", "no answer"])
def test_no_network_for_the_model(assert_one_line, run_script, tmp_path, how):
    """Told to be offline, and with a Hub that does not answer (a closed port of this machine)."""
    env = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    argv = ["--model_dir", tmp_path / "model", "--model_name", "CompVis/stable-diffusion-v1-4"]
    result = run_script("cache_model.py", *argv, **env)
    assert_one_line(result, "network", "--model_name pocket")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("how", ["offline", "no answer"])
def test_no_network_for_the_photos(assert_one_line, run_script, tmp_path, how):
    env = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = run_script("download_example_dataset.py", tmp_path / "dog", **env)
    assert_one_line(result, "network", "images/lego-car")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["two words", "a/b/c", "-x"])
def test_model_name_that_is_none(tmp_path, name):
    args = cache_model.parse_args(["--model_dir", str(tmp_path / "model"), f"--model_name={name}"])
    with pytest.raises(UserError):
        cache_model.main(args)


def test_unwritable_folders_in_steps_one_and_two(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--model_dir"):
        cache_model.main(cache_model.parse_args(["--model_dir", str(tmp_path / "file" / "below")]))
    with pytest.raises(UserError, match="DIR"):
        download_example_dataset.main(download_example_dataset.parse_args([str(tmp_path / "file" / "below")]))


def test_whole_model_is_not_fetched_again_and_half_a_model_is(tmp_path, model_dir, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(cache_model, "fetch_from_hub", lambda *args: fetched.append(args) or model_dir)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "v1"
    shutil.copytree(model_dir, snapshot)
    args = cache_model.parse_args(["--model_dir", str(tmp_path), "--model_name", "a/b", "--revision", "v1"])
    cache_model.main(args)
    assert fetched == []
    assert capsys.readouterr().out.splitlines()[-1] == str(snapshot)
    for missing in ("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer"):
        path = snapshot / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        cache_model.main(args)
        assert fetched.pop() == (str(tmp_path), "a/b", "v1")
        shutil.rmtree(snapshot)
        shutil.copytree(model_dir, snapshot)


def test_pocket_needs_no_network_and_is_copied_once(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_model, "POCKET_DIR", model_dir)
    args = cache_model.parse_args(["--model_dir", str(tmp_path / "hub"), "--model_name", "pocket", "--revision", "v1"])
    for _ in range(2):
        cache_model.main(args)
        snapshot = Path(capsys.readouterr().out.strip())
        assert snapshot == tmp_path / "hub" / "models--pocket" / "snapshots" / "v1"
        checks.check_model_dir(snapshot)
        (snapshot / "mark").touch()  # what is whole is not written again
    assert (snapshot / "mark").exists()
    (snapshot / "unet" / "config.json").unlink()
    cache_model.main(args)
    assert (snapshot / "unet" / "config.json").exists()


def test_only_what_a_pipeline_needs_is_fetched():
    """Names as in CompVis/stable-diffusion-v1-4, and a revision without safetensors."""
    names = [
        "model_index.json", "README.md", "sd-v1-4.ckpt", "tokenizer/vocab.json", "tokenizer/merges.txt",
        "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin", "safety_checker/model.safetensors", "safety_checker/config.json",
        "unet/config.json", "unet/diffusion_pytorch_model.bin", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_flax_model.msgpack",
        "scheduler/scheduler_config.json",
    ]  # fmt: skip
    assert sorted(cache_model.files_to_fetch(names)) == sorted([
        "model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt", "text_encoder/config.json",
        "text_encoder/model.safetensors", "unet/config.json", "unet/diffusion_pytorch_model.bin", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
    ])  # fmt: skip
    with pytest.raises(UserError, match="unet"):
        cache_model.files_to_fetch([name for name in names if not name.startswith("unet")])
