"""A LoRA on a pipeline's models: what it does, whichever program wrote its file."""

import json
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.image_generator import load_sampling_pipeline
from dreambooth.lora import apply_lora, from_peft
from dreambooth.run import export
from tests.test_export import predict as predict_with


@pytest.fixture(scope="module")
def pipeline_with(model_dir):
    """The pipeline of the model, with a LoRA on top: pipeline_with(lora_dir, scale)."""

    def load(lora_dir=None, scale=1.0):
        pipeline = load_sampling_pipeline(model_dir, torch.float32)
        if lora_dir:
            apply_lora(pipeline, lora_dir, scale)
        return pipeline

    return load


@pytest.fixture(scope="module")
def predict(pipeline_with):
    """What U-Net and text encoder predict for fixed inputs: predict(lora_dir, scale)."""
    return lambda *lora: predict_with(pipeline_with(*lora))


def test_a_lora_takes_effect_according_to_its_scale(predict, lora_dir):
    original = predict()
    torch.testing.assert_close(predict(lora_dir, 0.0), original, rtol=0, atol=1e-5)
    half, full = ((predict(lora_dir, scale) - original).norm() for scale in (0.5, 1.0))
    assert 0.01 < half < full


def kohya_name(name):
    """The name of a LoRA's weight, such as "unet.a.b.lora.down.weight", in kohya's files:
    "lora_unet_a_b.lora_down.weight"."""
    part, _, layer = name.removesuffix(".weight").partition(".")
    layer = layer.replace(".lora_linear_layer", "").replace(".lora.", ".")
    layer, _, direction = layer.rpartition(".")
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
    return f"{prefix}_{layer.replace('.', '_')}.lora_{direction}.weight"


@pytest.mark.parametrize("kohya", [True, False])
def test_layers_may_have_alphas_of_their_own(predict, lora_dir, tmp_path, kohya):
    """As in a file whose ranks were reduced: here some layers' second matrices are twice as large,
    and their alphas half their ranks."""
    weights = {}
    for name, weight in load_file(lora_dir / pipeline_dir.LORA_FILE).items():
        layer, _, direction = name.removesuffix(".weight").rpartition(".lora")
        renamed = kohya_name(name) if kohya else name
        if not kohya:
            letter = "A" if direction.endswith("down") else "B"
            renamed = f"{layer}.lora_{letter}.weight"
        halved = sum(map(ord, layer)) % 2
        weights[renamed] = weight * (2 if halved and direction.endswith("up") else 1)
        alpha = kohya_name(name).partition(".")[0] if kohya else layer
        weights[f"{alpha}.alpha"] = torch.tensor(2.0 if halved else 4.0)
    assert len({alpha.item() for name, alpha in weights.items() if name.endswith("alpha")}) == 2
    save_file(weights, tmp_path / "resized.safetensors")
    torch.testing.assert_close(predict(tmp_path), predict(lora_dir), rtol=0, atol=1e-4)


def test_the_alpha_in_a_files_header_counts(predict, lora_dir, tmp_path):
    """Where diffusers' scripts of 2025 and later write it: an alpha of half the rank is half the
    strength."""
    weights = load_file(lora_dir / pipeline_dir.LORA_FILE)
    config = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    text = {**config, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
    header = {f"unet.{name}": value for name, value in config.items()}
    header |= {f"text_encoder.{name}": value for name, value in text.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(header)}
    save_file(weights, tmp_path / pipeline_dir.LORA_FILE, metadata=metadata)
    half = predict(lora_dir, 0.5)
    torch.testing.assert_close(predict(tmp_path, 1.0), half, rtol=0, atol=1e-5)


OTHER_ADAPTERS = [
    "dora_scale", "lokr_w1", "hada_w1_a", "lora_mid", "w_norm", "oft_blocks", "diff_b",
]  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_other_adapters_of_kohya_are_refused_by_name(pipeline_with, tmp_path, kind):
    """Of some, diffusers would load a part without a word."""
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    weights = {f"{layer}.{name}": torch.ones(2, 2) for name in ("lora_up.weight", kind)}
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is of the kind (DoRA|Lo|LyCORIS|OFT).*use a plain LoRA"):
        pipeline_with(str(tmp_path))


def test_a_file_that_is_no_lora_is_a_user_error(pipeline_with, tmp_path):
    save_file({"a.weight": torch.zeros(1)}, tmp_path / pipeline_dir.LORA_FILE)
    with pytest.raises(UserError, match="--lora_weights_dir .* (no LoRA|cannot be loaded)"):
        pipeline_with(str(tmp_path))


@pytest.mark.parametrize(
    "layer",
    [
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    ],
)
def test_a_lora_of_another_model_is_a_user_error(pipeline_with, tmp_path, layer):
    """As that of a text encoder with another width."""
    weights = {f"{layer}.lora_{half}.weight": torch.zeros(7, 7) for half in "AB"}
    save_file(weights, tmp_path / pipeline_dir.LORA_FILE)
    with pytest.raises(UserError, match="is no LoRA for --model_dir: its matrices have other siz"):
        pipeline_with(str(tmp_path))


def test_a_lora_that_is_not_loaded_whole_is_warned_of(pipeline_with, load_models, tmp_path, capsys):
    """As where diffusers meets two layouts of names in one file."""
    _, denoiser, _ = load_models(use_lora=True, lora_layers="all")
    export.save_lora(denoiser, tmp_path)
    pipeline_with(tmp_path)
    assert capsys.readouterr().err == ""
    weights = load_file(tmp_path / pipeline_dir.LORA_FILE)
    mixed = {
        name.replace("lora.down", "lora_A").replace("lora.up", "lora_B")
        if "conv" in name
        else name: p
        for name, p in weights.items()
    }
    save_file(mixed, tmp_path / pipeline_dir.LORA_FILE, metadata={"format": "pt"})
    pipeline_with(tmp_path)
    assert "some of its matrices were not loaded" in capsys.readouterr().err


def test_a_layer_that_the_model_lacks_is_warned_of(pipeline_with, lora_dir, tmp_path, capsys):
    weights = load_file(lora_dir / pipeline_dir.LORA_FILE)
    down = next(name for name in weights if name.startswith("unet.") and ".down." in name)
    for name in (down, down.replace(".down.", ".up.")):
        weights[name.replace("down_blocks.", "down_blocks.7")] = weights[name].clone()
    save_file(weights, tmp_path / pipeline_dir.LORA_FILE, metadata={"format": "pt"})
    pipeline_with(tmp_path)
    count = f"{len(weights) - 2} of {len(weights)} were"
    assert f"as they fit no layer ({count})" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("matrix", ["up", "down"])
def test_a_lora_that_lacks_a_matrix_of_a_pair_is_refused(
    pipeline_with, lora_dir, tmp_path, part, matrix
):
    weights = load_file(lora_dir / pipeline_dir.LORA_FILE)
    del weights[next(n for n in weights if n.startswith(part) and f".{matrix}." in n)]
    save_file(weights, tmp_path / pipeline_dir.LORA_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="is damaged: it has one matrix of .*, and no other"):
        pipeline_with(tmp_path)


@pytest.mark.parametrize("biases", [{"lora_bias": True}, {"bias": "all"}])
def test_an_adapter_of_peft_with_biases_is_refused(tmp_path, biases):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"r": 2, "lora_alpha": 2, **biases}))
    with pytest.raises(UserError, match="has biases, which are not supported"):
        from_peft(
            {"base_model.model.to_q.lora_B.bias": torch.ones(4)}, file, "--lora_weights_dir x"
        )


def test_an_adapter_of_peft_takes_the_same_effect(predict, lora_dir, tmp_path):
    """The folder that PEFT's own save_pretrained writes, with its scale in adapter_config.json."""
    weights = load_file(lora_dir / pipeline_dir.LORA_FILE)
    unet = {name: tensor for name, tensor in weights.items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "unet.safetensors")
    expected = predict(tmp_path / "unet.safetensors", 0.5)
    renamed = {}
    for name, tensor in unet.items():
        name = name.replace(".lora.down.", ".lora_A.").replace(".lora.up.", ".lora_B.")
        name = name.replace(".processor", "").replace("to_out_lora", "to_out.0")
        renamed[name.replace("unet.", "base_model.model.", 1)] = tensor
    (tmp_path / "peft").mkdir()
    save_file(renamed, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    found = predict(tmp_path / "peft", 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Rank-stabilized, the scale is alpha over the rank's root: 1 / 2.
    config = {"r": 4, "lora_alpha": 1, "use_rslora": True}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    found = predict(tmp_path / "peft", 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # A layer may have a rank and an alpha of its own: here 4 and 2 again, among others' 8 and 8.
    pattern = {"to_[qkv]": 2, "to_out.0": 2}
    config = {"r": 8, "lora_alpha": 8, "rank_pattern": {"to_q": 4}, "alpha_pattern": pattern}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    found = predict(tmp_path / "peft", 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_file_of_peft_needs_its_configuration(pipeline_with, tmp_path):
    """Which holds the scale."""
    name = "base_model.model.mid_block.to_q.lora_{}.weight"
    weights = {name.format("A"): torch.zeros(4, 8), name.format("B"): torch.zeros(8, 4)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="PEFT's own file needs adapter_config.json beside it"):
        pipeline_with(str(tmp_path))


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        ("text_model.encoder.layers.0.self_attn.q_proj", "text_encoder"),
        ("single_transformer_blocks.10.attn.to_out", "transformer"),
        ("transformer_blocks.5.attn.to_q", "transformer"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "unet"),
    ],
)
def test_an_adapter_of_peft_is_put_on_the_model_that_has_its_layers(tmp_path, layer, part):
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    weights = {f"base_model.model.{layer}.lora_A.weight": torch.ones(2, 4)}
    found = from_peft(weights, tmp_path / "adapter_config.json", "--lora_weights_dir x")
    assert list(found) == [f"{part}.{layer}.lora_A.weight"]


def test_a_lora_without_matrices_or_scale_is_one_line(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="x.safetensors is empty"):
        apply_lora(MagicMock(), tmp_path, 1.0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    assert from_peft({}, tmp_path / "adapter_config.json", "--lora_weights_dir x") == {}
    for config in (
        {"r": 4},
        {"lora_alpha": 4},
        {"r": 0, "lora_alpha": 4},
        {"r": 4, "lora_alpha": "x"},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="adapter_config.json has no r and lora_alpha"):
            from_peft({}, tmp_path / "adapter_config.json", "--lora_weights_dir x")
