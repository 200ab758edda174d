"""A pipeline directory, judged without loading its models; prompts; fingerprints; loading it."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.pocket import POCKET_DIR


@pytest.fixture
def copied(model_dir, tmp_path):
    """A copy of the model that a test may damage."""
    return shutil.copytree(model_dir, tmp_path / "model")


def set_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_missing_is_named(copied, tmp_path):
    """A part, or a file of an interrupted copy, whose folder is there."""
    pipeline_dir.check_model_dir(copied)
    with pytest.raises(UserError, match="--compare_to .*nowhere: no such directory.*cache_model"):
        pipeline_dir.check_model_dir(tmp_path / "nowhere", "--compare_to")
    for name in (
        "model_index.json", "tokenizer", "text_encoder", "vae", "unet", "scheduler",
        "unet/config.json", "text_encoder/model.safetensors",
    ):  # fmt: skip
        aside = (copied / name).rename(tmp_path / "aside")
        assert pipeline_dir.missing_file(copied).startswith(name)
        with pytest.raises(UserError, match=f": {name}.* is missing"):
            pipeline_dir.check_model_dir(copied)
        aside.rename(copied / name)
    assert pipeline_dir.missing_file(copied) is None
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "aside")
    weights.symlink_to("../blobs/0123")  # as in a cache whose blobs were not copied
    assert pipeline_dir.missing_file(copied) == "unet/diffusion_pytorch_model.safetensors"


def test_a_part_of_a_pipeline_is_told_from_the_whole(copied):
    with pytest.raises(UserError, match=f"unet is a part of a pipeline: pass {copied}$"):
        pipeline_dir.check_model_dir(copied / "unet")


def test_a_model_and_a_lora_in_each_others_place_are_told_apart(model_dir, lora_dir):
    with pytest.raises(UserError, match="is a LoRA: pass it as --lora_weights_dir, and its base"):
        pipeline_dir.check_model_dir(lora_dir)
    with pytest.raises(UserError, match=r"is a whole model .--model_dir., no LoRA"):
        pipeline_dir.lora_file(model_dir)


def test_full_precision_goes_before_half_and_safetensors_before_pickles(copied):
    """Whatever is there is read: a pickle, half precision alone."""
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    half = weights.with_name("diffusion_pytorch_model.fp16.safetensors")
    pickle = weights.with_suffix(".bin")
    shutil.copy(weights, half)
    torch.save(load_file(half), pickle)
    for file, variant in ((weights, None), (pickle, None), (half, "fp16")):
        assert pipeline_dir.weights(copied, "unet") == (variant, [file])
        pipeline_dir.check_model_dir(copied)
        file.unlink()
    other = shutil.copy(copied / "vae" / weights.name, weights.with_name("unet.bf16.safetensors"))
    with pytest.raises(
        UserError, match=f"unet/{weights.name} is missing .*fp16 are read, not {Path(other).name}"
    ):
        pipeline_dir.check_model_dir(copied)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_and_half_precision_models_are_trained_and_sampled(
    copied, load_models, model_dir, variant
):
    """As diffusers and transformers write them."""
    pipeline = pipeline_dir.load_pipeline(model_dir, torch.float16)
    for part, size in (("unet", "3MB"), ("text_encoder", "300KB")):
        shutil.rmtree(copied / part)
        getattr(pipeline, part).save_pretrained(
            copied / part, max_shard_size=size, **({"variant": variant} if variant else {})
        )
    assert len(pipeline_dir.weights(copied, "unet").files) > 2
    assert pipeline_dir.weights(copied, "text_encoder").variant == variant
    pipeline_dir.check_model_dir(copied)
    _, expected, _ = load_models()
    _, found, _ = load_models(copied)
    for p, q in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
    assert pipeline_dir.num_parameters(copied) == pipeline_dir.num_parameters(model_dir)
    loaded = pipeline_dir.load_pipeline(copied, torch.float32)
    assert torch.equal(loaded.unet.conv_in.weight, expected.unet.conv_in.weight)
    (index,) = (copied / "unet").glob("*.index*.json")
    name = f"diffusion_pytorch_model{'.fp16' if variant else ''}.safetensors.index.json"
    aside = index.rename(copied / "aside")
    assert pipeline_dir.missing_file(copied) == f"unet/{name}"
    aside.rename(index)
    last = pipeline_dir.weights(copied, "unet").files[-1]
    last.unlink()  # as an interrupted download leaves it
    assert pipeline_dir.missing_file(copied) == f"unet/{last.name}"


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_a_missing_weight_is_refused(copied, load_models, part):
    """The libraries draw random numbers in its place, and say so in a log that is off."""
    (file,) = (copied / part).glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[3]
    weights[f"transformer.{name}"] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    pipeline_dir.check_model_dir(copied)
    with pytest.raises(UserError, match=f"/{part} has no weights for .*: fetch or copy it again"):
        pipeline_dir.load_pipeline(copied)
    with pytest.raises(UserError, match=f"/{part} has no weights for .*: fetch or copy it again"):
        load_models(copied)  # to train


def test_a_field_that_is_null_is_not_set_and_another_type_is_refused(copied, model_dir):
    """Stable Diffusion XL's U-Net says `"upcast_attention": null`."""
    config = copied / "unet" / "config.json"
    set_json(config, upcast_attention=None)
    expected = pipeline_dir.load_pipeline(model_dir, torch.float32).unet.conv_in.weight
    loaded = pipeline_dir.load_pipeline(copied, torch.float32)
    assert torch.equal(loaded.unet.conv_in.weight, expected)
    set_json(copied / "vae" / "config.json", sample_size=[64, 64])
    pipeline_dir.load_pipeline(copied, torch.float32)
    set_json(config, upcast_attention="no")
    with pytest.raises(UserError, match="unet/config.json has upcast_attention: .no.*bool"):
        pipeline_dir.load_pipeline(copied, torch.float32)
    set_json(config, upcast_attention=None, norm_eps=True)
    with pytest.raises(UserError, match="unet/config.json has norm_eps: true, not .*float"):
        pipeline_dir.load_pipeline(copied, torch.float32)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_a_truncated_file_is_named(copied, file):
    content = (copied / file).read_bytes()
    (copied / file).write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"--compare_to: .*{file} is damaged") as error:
        pipeline_dir.check_model_dir(copied, "--compare_to")
    assert "\n" not in str(error.value)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (copied / file).write_text(pointer)
    with pytest.raises(UserError, match=f"{file} is damaged .*: .git lfs pull. in "):
        pipeline_dir.check_model_dir(copied)


def test_models_that_the_scripts_cannot_train_are_refused(copied):
    """Those of another prediction type than the loss, and other families."""
    config = copied / "scheduler" / "scheduler_config.json"
    set_json(config, prediction_type="v_prediction")
    pipeline_dir.check_model_dir(copied)
    set_json(config, prediction_type="sample")
    with pytest.raises(UserError, match="predicts sample"):
        pipeline_dir.check_model_dir(copied)
    for name, model in (
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "FLUX.1"),
        ("Flux2Pipeline", "FLUX.2"),
    ):
        set_json(copied / "model_index.json", _class_name=name)
        with pytest.raises(UserError, match=f"is {model} .{name}.; these scripts take Stable"):
            pipeline_dir.check_model_dir(copied)
    set_json(copied / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(UserError, match="tokenizer_2/tokenizer.json is missing"):
        pipeline_dir.check_model_dir(copied)


def test_a_model_that_was_made_to_sample_in_few_steps_is_asked_about(copied, capsys):
    """Training it as any other undoes that."""
    pipeline_dir.check_model_dir(copied)
    assert capsys.readouterr().err == ""
    for name in ("LCMScheduler", "TCDScheduler"):
        set_json(copied / "scheduler" / "scheduler_config.json", _class_name=name)
        pipeline_dir.check_model_dir(copied)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: --model_dir {copied} was made to sample in few steps")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"class_embed_type": "timestep"}, "unet has class_embed_type, which"),
        ("unet", {"num_class_embeds": 10}, "unet has num_class_embeds, which"),
        ("unet", {"addition_embed_type": "text_time"}, "unet has addition_embed_type, which"),
        ("text_encoder", {"hidden_size": 768}, r"text_encoder and unet do not belong .* \(768 and"),
        ("unet", {"out_channels": 8}, r"vae and unet do not belong together \(4 and 8"),
        ("unet", {"cross_attention_dim": [768] * 3}, r"do not belong together \(96 and 768 wide"),
        ("unet", {"_class_name": "UNet2DModel"}, "unet is a UNet2DModel; .* UNet2DConditionModel"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "vae is a AutoencoderTiny"),
        ("vae", {"scaling_factor": None}, "vae/config.json has scaling_factor: None"),
    ],
)
def test_parts_of_other_pipelines_are_refused(copied, part, changes, message):
    """They load, and would fail in the first step."""
    set_json(copied / part / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        pipeline_dir.check_model_dir(copied)


def test_resolution_comes_from_the_configuration(copied):
    """Latents a side, each for 4 pixels, as the VAE has three levels and halves twice; of a U-Net
    that names two sides, or none. With a fourth level, 8 pixels."""
    config = copied / "unet" / "config.json"
    for size, expected in ((16, 64), ([16, 24], 64), ([32, 24], 96), (None, 64), ("x", 64)):
        set_json(config, sample_size=size)
        assert pipeline_dir.resolution(copied) == (expected, 4)
    set_json(config, sample_size=24)
    set_json(copied / "vae" / "config.json", block_out_channels=[16, 32, 64, 64])
    assert pipeline_dir.resolution(copied) == (192, 8)


def test_a_file_that_is_no_directory_or_no_object_is_refused(copied, tmp_path):
    for suffix in (".safetensors", ".CKPT", ".gguf"):
        file = (tmp_path / "sd").with_suffix(suffix)
        file.write_bytes(b"")
        for given in (file, tmp_path):
            with pytest.raises(UserError, match=rf"sd{suffix} is a single file.*from_single_file"):
                pipeline_dir.check_model_dir(given)
        file.unlink()
    with pytest.raises(UserError, match="model_index.json: a file, not a directory"):
        pipeline_dir.check_model_dir(copied / "model_index.json")
    for content, reason in ((b"[]", "no JSON object"), (b"\xef\xbb\xbf{}", "byte order mark")):
        (copied / "model_index.json").write_bytes(content)
        with pytest.raises(UserError, match=f"model_index.json is damaged .{reason}"):
            pipeline_dir.check_model_dir(copied)


def test_number_of_parameters(copied, load_models):
    """From the headers of safetensors; a pickle counts as float32, as on the Hub. (Those here are
    float16.)"""
    vae, denoiser, _ = load_models(copied)
    models = {"vae": vae, "unet": denoiser.unet, "text_encoder": denoiser.text_encoder}
    expected = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert pipeline_dir.num_parameters(copied) == expected
    unet = copied / "unet" / "diffusion_pytorch_model.safetensors"
    pickle = unet.with_suffix(".bin")
    shutil.copy(unet, pickle)
    assert pipeline_dir.num_parameters(copied) == expected  # nothing counts twice
    unet.unlink()
    assert pipeline_dir.num_parameters(copied)["unet"] == pickle.stat().st_size // 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": [None, None]}, "model_index.json has vae: .null, null., no class"),
        ({"tokenizer": None}, "model_index.json has tokenizer: null, no class"),
        ({"scheduler": ["my_pipeline", "MyScheduler"]}, "has scheduler: .*, no class"),
        (
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "takes a CLIPTextModel",
        ),
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet is a UNet2DModel; .* takes a UNet2DCond"),
    ],
)
def test_the_index_names_a_class_of_the_libraries_for_each_part(copied, changes, message):
    """Else a run trained to its end, and its result could not be saved, or not be loaded."""
    pipeline_dir.check_model_dir(copied)
    set_json(copied / "model_index.json", **changes)
    with pytest.raises(UserError, match=message):
        pipeline_dir.check_model_dir(copied)


def test_a_prompt_that_is_too_long_is_quoted_where_it_would_be_cut_off(model_dir):
    """48 tokens, two of which mark beginning and end: 46 words fit."""
    longest = "photo of a car " + "on the " * 21
    assert len(longest.split()) == 46
    pipeline_dir.check_prompts(model_dir, [longest])
    with pytest.raises(UserError, match="48; 'at night' would be cut off") as error:
        pipeline_dir.check_prompts(model_dir, [longest, longest + "at night"])
    assert "prompt too long" in str(error.value)


def test_a_token_that_the_text_encoder_has_no_embedding_of_is_named(copied):
    """That of a textual inversion, which was saved in the tokenizer alone."""
    tokenizer = pipeline_dir.load_tokenizer(copied)
    tokenizer.add_tokens("<my-cat>")
    tokenizer.save_pretrained(copied / "tokenizer")
    pipeline_dir.check_prompts(copied, ["photo of a car"])
    with pytest.raises(UserError, match="the text encoder has no embedding of '<my-cat>'"):
        pipeline_dir.check_prompts(copied, ["photo of a <my-cat> car"])


def test_pocket_alone_is_asked_for_its_classes(model_dir, tmp_path):
    """Wherever it lies: run.sh uses the copy in the cache."""
    pipeline_dir.check_prompts(model_dir, ["photo of a dog"])
    for folder in (POCKET_DIR, shutil.copytree(POCKET_DIR, tmp_path / "cached")):
        pipeline_dir.check_prompts(folder, ["photo of a car"])
        with pytest.raises(UserError, match="'photo of a dog': pocket only draws car"):
            pipeline_dir.check_prompts(folder, ["photo of a car", "photo of a dog"])


def test_fingerprint_tells_models_apart(model_dir, broken_model_dir, lora_dir, copied, tmp_path):
    """By weights, also of a pickle beside safetensors, and by configurations; wherever they lie."""
    fingerprints = {pipeline_dir.fingerprint(broken_model_dir)}
    fingerprints.add(pipeline_dir.lora_fingerprint(lora_dir))
    peft = shutil.copytree(lora_dir, tmp_path / "peft")
    for alpha in (4, 1):  # the scale of PEFT's own files is not in them
        (peft / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
        fingerprints.add(pipeline_dir.lora_fingerprint(peft))
    fingerprints.add(pipeline_dir.fingerprint(copied))
    (copied / "safety_checker").mkdir()  # fetched by another program; no part of the pipeline here
    (copied / "safety_checker" / "config.json").write_text("{}")
    assert pipeline_dir.fingerprint(model_dir) == pipeline_dir.fingerprint(copied)
    set_json(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    fingerprints.add(pipeline_dir.fingerprint(copied))
    (copied / "text_encoder" / "model.safetensors").unlink()
    for content in (b"a", b"b"):
        (copied / "text_encoder" / "pytorch_model.bin").write_bytes(content)
        fingerprints.add(pipeline_dir.fingerprint(copied))
    assert len(fingerprints) == 8


def test_directory_of_a_revision_is_that_of_the_hubs_cache(tmp_path):
    folder = pipeline_dir.snapshot_dir(tmp_path, "CompVis/stable-diffusion-v1-4", "abc")
    assert folder == tmp_path / "models--CompVis--stable-diffusion-v1-4" / "snapshots" / "abc"
    assert pipeline_dir.name_and_revision(folder) == ("CompVis/stable-diffusion-v1-4", "abc")
    assert pipeline_dir.name_and_revision("/data/my-model") == ("my-model", "")


def test_which_lora_of_a_directory_is_applied(lora_dir, tmp_path):
    """Ours by its name, else the only one, never the first of a listing; a file is itself."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"--lora_weights_dir {folder}: no pytorch_lora"):
            pipeline_dir.lora_file(folder)
    first = Path(
        shutil.copy(lora_dir / pipeline_dir.LORA_FILE, tmp_path / "tom-000002.safetensors")
    )
    assert pipeline_dir.lora_file(tmp_path) == first
    second = Path(shutil.copy(first, tmp_path / "tom.safetensors"))
    with pytest.raises(UserError, match=r"several LoRAs \(tom-000002.safetensors, tom.safetensors"):
        pipeline_dir.lora_file(tmp_path)
    assert pipeline_dir.lora_file(second) == second
    own = Path(shutil.copy(first, tmp_path / pipeline_dir.LORA_FILE))
    assert pipeline_dir.lora_file(tmp_path) == own
    own.write_bytes(own.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{pipeline_dir.LORA_FILE} is damaged"):
        pipeline_dir.lora_file(tmp_path)


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_the_fingerprint_of_a_model_depends_on_weights_anywhere_in_its_files(copied, part):
    """Two tuned models differ in nothing else: not in their files' sizes or headers."""
    before = pipeline_dir.fingerprint(copied)
    (file,) = (copied / part).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    assert pipeline_dir.fingerprint(copied) != before


def test_of_two_limits_of_a_prompt_the_smaller_one_holds(copied):
    """The tokenizer's own, which it need not know, or that of the text encoder's positions, of
    which there are 48."""
    file = copied / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    for own, limit in (({"model_max_length": 20}, 20), ({"model_max_length": 1000}, 48), ({}, 48)):
        file.write_text(json.dumps({**config, **own}))
        assert pipeline_dir.load_tokenizer(copied).model_max_length == limit
        with pytest.raises(UserError, match=f"has .* tokens, the model takes {limit}"):
            pipeline_dir.check_prompts(copied, ["a car " * 40])


def test_a_tokenizer_may_be_in_two_files(model_dir, tmp_path):
    """As Stable Diffusion 1.4's is on the Hub; both are needed."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    for name in ("merges.txt", "vocab.json"):
        assert pipeline_dir.missing_file(folder) == "tokenizer/tokenizer.json"
        (folder / "tokenizer" / name).write_text("{}")
    assert pipeline_dir.missing_file(folder) is None


def test_memory_or_storage_that_fails_is_no_fault_of_the_model():
    """The first is answered with flags that take less, the second may pass."""
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ESTALE, "Stale file handle"),
    ):
        with pytest.raises(type(error)) as raised, pipeline_dir.loading("unet"):
            raise error
        assert raised.value is error
    with pytest.raises(UserError, match="unet cannot be loaded: odd"), pipeline_dir.loading("unet"):
        raise RuntimeError("odd")


def test_a_lora_in_another_format_is_one_line(tmp_path):
    (tmp_path / "lora.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="lora.ckpt is no .safetensors file; convert it"):
        pipeline_dir.lora_file(tmp_path / "lora.ckpt")


def test_a_unet_whose_blocks_take_texts_of_several_widths_is_not_judged(copied):
    """By the first block's width."""
    set_json(copied / "unet" / "config.json", cross_attention_dim=[64, 96, 96])
    assert pipeline_dir.check_model_dir(copied) is None


def test_a_damaged_vocabulary_is_named(copied):
    """Beside tokenizer.json, too, as older versions of the libraries read it."""
    (copied / "tokenizer" / "vocab.json").write_text('{"a": 1')
    with pytest.raises(UserError, match="vocab.json is damaged"):
        pipeline_dir.check_model_dir(copied)


def test_each_shard_must_be_whole(copied):
    unet = copied / "unet" / "diffusion_pytorch_model.safetensors"
    first, second = (unet.with_stem(f"{unet.stem}-0000{i}-of-00002") for i in (1, 2))
    shutil.copy(unet, second)
    unet.rename(first)
    unet.with_name(f"{unet.name}.index.json").write_text("{}")
    pipeline_dir.check_model_dir(copied)
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{second.name} is damaged"):
        pipeline_dir.check_model_dir(copied)
    second.unlink()
    with pytest.raises(UserError, match=rf"{second.name} is missing \(cache_model"):
        pipeline_dir.check_model_dir(copied)
