"""A pipeline directory, judged without loading its models; prompts; fingerprints."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dreambooth import model_dir as directory
from dreambooth.cli import UserError


@pytest.fixture
def copied(model_dir, tmp_path):
    """A copy of the model that a test may damage."""
    return shutil.copytree(model_dir, tmp_path / "model")


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def set_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_complete_directory_is_accepted(model_dir):
    assert directory.missing_file(model_dir) is None
    directory.check_model_dir(model_dir)


def test_a_directory_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="--compare_to .*nowhere: no such directory.*cache_model"):
        directory.check_model_dir(tmp_path / "nowhere", "--compare_to")


@pytest.mark.parametrize(
    "part", ["model_index.json", "tokenizer", "text_encoder", "vae", "unet", "scheduler"]
)
def test_a_missing_part_is_named(copied, part):
    remove(copied / part)
    with pytest.raises(UserError, match=f": {part}.* is missing"):
        directory.check_model_dir(copied)


@pytest.mark.parametrize(
    "file",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_missing_file_is_named(copied, file):
    """An interrupted copy: the folder is there, its file is not."""
    remove(copied / file)
    assert directory.missing_file(copied) == file
    with pytest.raises(UserError, match=f"{file} is missing"):
        directory.check_model_dir(copied)


def test_half_precision_copies_alone_do_not_suffice(copied):
    """The loaders do not read files of this name."""
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match="unet/diffusion_pytorch_model.safetensors is missing"):
        directory.check_model_dir(copied)


def test_a_pickle_stands_for_safetensors(copied):
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    pickle = weights.with_suffix(".bin")
    torch.save(load_file(weights), pickle)
    weights.unlink()
    directory.check_model_dir(copied)
    assert pickle in directory.weight_files(copied)
    pickle.unlink()
    with pytest.raises(UserError):
        directory.check_model_dir(copied)


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json"]
)
def test_a_truncated_file_is_named(copied, file):
    content = (copied / file).read_bytes()
    (copied / file).write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"--compare_to: .*{file} is damaged") as error:
        directory.check_model_dir(copied, "--compare_to")
    assert "\n" not in str(error.value)


def test_pipelines_of_another_class_are_refused(copied):
    """An SDXL directory has all these files, and a second text encoder."""
    set_json(copied / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(UserError, match="is a StableDiffusionXLPipeline"):
        directory.check_model_dir(copied)


def test_prediction_types_without_a_loss_are_refused(copied):
    config = copied / "scheduler" / "scheduler_config.json"
    set_json(config, prediction_type="v_prediction")
    directory.check_model_dir(copied)
    set_json(config, prediction_type="sample")
    with pytest.raises(UserError, match="predicts sample"):
        directory.check_model_dir(copied)


def test_number_of_parameters(copied, load_models):
    """From the headers of safetensors; a pickle counts as float32, as on the Hub. (Those here are
    float16.)"""
    vae, denoiser, _ = load_models(copied)
    models = {"vae": vae, "unet": denoiser.unet, "text_encoder": denoiser.text_encoder}
    expected = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert directory.num_parameters(copied) == expected
    unet = copied / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(unet, unet.with_suffix(".bin"))
    assert directory.num_parameters(copied) == expected  # nothing counts twice
    unet.unlink()
    assert directory.num_parameters(copied)["unet"] == unet.with_suffix(".bin").stat().st_size // 4


def test_resolution_comes_from_the_configuration(copied):
    """16 latents a side, each for 4 pixels: the VAE has three levels, so it halves twice."""
    assert directory.resolution(copied) == (64, 4)
    set_json(copied / "unet" / "config.json", sample_size=24)
    assert directory.resolution(copied) == (96, 4)
    set_json(copied / "vae" / "config.json", block_out_channels=[16, 32, 64, 64])
    assert directory.resolution(copied) == (192, 8)


def test_a_prompt_of_the_greatest_length_fits(model_dir):
    """48 tokens, two of which mark beginning and end: 46 words."""
    tokenizer = directory.load_tokenizer(model_dir)
    prompt = "photo of a car " + "on the " * 21
    assert len(tokenizer(prompt).input_ids) == tokenizer.model_max_length == 48
    directory.check_prompt(tokenizer, prompt)


def test_a_prompt_that_is_too_long_is_quoted_where_it_would_be_cut_off(model_dir):
    tokenizer = directory.load_tokenizer(model_dir)
    prompt = "photo of a car " + "on the beach " * 14 + "at night"
    with pytest.raises(UserError, match="48; 'at night' would be cut off") as error:
        directory.check_prompt(tokenizer, prompt)
    assert "prompt too long" in str(error.value)


def test_fingerprint_tells_models_apart(model_dir, broken_model_dir, lora_dir, copied):
    digests = [directory.fingerprint(path) for path in (model_dir, broken_model_dir, lora_dir)]
    assert len(set(digests)) == 3
    assert directory.fingerprint(copied) == digests[0]  # wherever it lies
    set_json(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert directory.fingerprint(copied) != digests[0]


def test_fingerprint_covers_the_pickles_of_a_model_that_is_partly_safetensors(copied):
    (copied / "text_encoder" / "model.safetensors").unlink()
    digests = set()
    for content in (b"a", b"b"):
        (copied / "text_encoder" / "pytorch_model.bin").write_bytes(content)
        digests.add(directory.fingerprint(copied))
    assert len(digests) == 2


def test_directory_of_a_revision_is_that_of_the_hubs_cache(tmp_path):
    expected = tmp_path / "models--CompVis--stable-diffusion-v1-4" / "snapshots" / "abc"
    assert directory.snapshot_dir(tmp_path, "CompVis/stable-diffusion-v1-4", "abc") == expected


def test_a_lora_directory_has_weights(lora_dir, tmp_path):
    directory.check_lora_dir(lora_dir)
    (tmp_path / "other").mkdir()
    shutil.copy(lora_dir / directory.LORA_FILE, tmp_path / "other" / "my_car.safetensors")
    directory.check_lora_dir(tmp_path / "other")  # whatever the file's name
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            UserError, match=f"--lora_weights_dir {folder}: no {directory.LORA_FILE}"
        ):
            directory.check_lora_dir(folder)


def test_a_damaged_lora_is_refused(tmp_path):
    (tmp_path / directory.LORA_FILE).write_bytes(b"\xff" * 5000)
    with pytest.raises(UserError, match=f"{directory.LORA_FILE} is damaged"):
        directory.check_lora_dir(tmp_path)
