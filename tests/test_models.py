"""What is frozen, what is trained and in which precision; models into directories and back."""

import os
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from dreambooth import image_generator, models, saving
from dreambooth import model_dir as directory
from dreambooth.loss import training_loss


def random_inputs(num_images=2):
    """Latents, timesteps and the token ids of two prompts."""
    generator = torch.Generator().manual_seed(0)
    noisy_latents = torch.randn(num_images, 4, 16, 16, generator=generator)
    timesteps = torch.linspace(10, 900, num_images).long()
    prompt_ids = torch.randint(0, 500, (2, 48), generator=generator)
    return noisy_latents, timesteps, prompt_ids


def predict(model, autocast=False):
    """What the U-Net and text encoder of a denoiser or pipeline predict for fixed inputs."""
    noisy_latents, timesteps, prompt_ids = random_inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden_states = model.text_encoder(prompt_ids)[0]
        return model.unet(noisy_latents, timesteps, hidden_states).sample


def set_second_matrices(denoiser):
    """Give the second matrices of a LoRA, which are zero at first, random values."""
    torch.manual_seed(0)
    for name, parameter in denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def trained_parameters(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def test_full_training_trains_unet_and_text_encoder_in_float32(load_models):
    vae, denoiser, scheduler = load_models()
    assert {p.dtype for module in (vae, denoiser) for p in module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in vae.parameters())
    assert not vae.training
    assert all(p.requires_grad for p in denoiser.parameters())
    assert denoiser.training
    for part in (denoiser.unet, denoiser.text_encoder):
        assert sum(p.numel() for p in part.parameters()) > 300_000
    assert scheduler.alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}, {"param_dtype": "bf16"}])
def test_the_text_encoder_can_be_left_as_it_is(load_models, changes):
    """To the last bit: trained weights in bfloat16 are no reason to round those that stay."""
    _, original, _ = load_models()
    _, denoiser, _ = load_models(**changes, no_train_text_encoder=True)
    assert trained_parameters(denoiser.text_encoder) == {}
    assert trained_parameters(denoiser.unet) != {}
    kept = denoiser.text_encoder.state_dict()
    expected = original.text_encoder.state_dict()
    assert kept.keys() == expected.keys()
    for name, weight in expected.items():
        assert kept[name].dtype == torch.float32
        assert torch.equal(kept[name], weight)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, torch.float32),
        ({"autocast": True}, torch.bfloat16),
        ({"param_dtype": "bf16"}, torch.bfloat16),
    ],
)
def test_forward_pass_is_bfloat16_where_asked_for_or_needed(load_models, changes, dtype):
    """On a GPU it is asked for; on a CPU it gains nothing, and only bfloat16 weights need it."""
    _, denoiser, _ = load_models(**changes)
    dtypes = []
    denoiser.unet.mid_block.register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    with torch.no_grad():
        denoiser(*random_inputs())
    assert dtypes == [dtype]


@pytest.mark.parametrize("use_lora", [False, True])
def test_on_a_gpu_the_forward_pass_is_bfloat16(train_args, monkeypatch, use_lora):
    """What load_models decides for a CUDA device, with the weights left on the CPU: autocast,
    channels_last, and a LoRA's frozen layers in bfloat16."""

    def on_cpu(load):
        return lambda *args, **kwargs: load(*args, **{**kwargs, "device_map": "cpu"})

    for cls in (models.AutoencoderKL, models.CLIPTextModel, models.UNet2DConditionModel):
        monkeypatch.setattr(cls, "from_pretrained", on_cpu(cls.from_pretrained))
    monkeypatch.setattr(models.DDPMScheduler, "from_pretrained", MagicMock())
    args = train_args("out", use_lora=use_lora)
    _, denoiser, _ = models.load_models(args, torch.device("cuda"))
    assert denoiser.autocast
    weight = denoiser.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.dtype == (torch.bfloat16 if use_lora else torch.float32)
    assert {p.dtype for p in trained_parameters(denoiser).values()} == {torch.float32}


def test_each_prompt_is_encoded_once_however_many_images_share_it(load_models):
    """Six images and two prompts: prediction and gradients as with one prompt for each image."""
    noisy_latents, timesteps, prompt_ids = random_inputs(num_images=6)
    weights = torch.linspace(-1, 1, 6).view(6, 1, 1, 1)
    encoded = []
    predictions = []
    gradients = []
    for ids in (prompt_ids, prompt_ids.repeat_interleave(3, 0)):
        _, denoiser, _ = load_models()
        denoiser.text_encoder.register_forward_pre_hook(
            lambda module, inputs: encoded.append(len(inputs[0]))
        )
        prediction = denoiser(noisy_latents, timesteps, ids)
        (prediction * weights).sum().backward()
        layers = denoiser.text_encoder.encoder.parameters()
        predictions.append(prediction.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in layers]))
    assert encoded == [2, 6]
    torch.testing.assert_close(predictions[0], predictions[1], rtol=0, atol=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("use_lora", [False, True])
def test_gradient_checkpointing_changes_no_gradient(load_models, use_lora):
    """Nor does it lose that of a LoRA behind frozen layers. Layers run once more on the way
    back."""
    gradients = []
    for checkpointing in (False, True):
        _, denoiser, _ = load_models(
            use_lora=use_lora, gradient_checkpointing=checkpointing, autocast=True
        )
        set_second_matrices(denoiser)
        calls = []
        for layer in (
            denoiser.unet.mid_block.resnets[1].conv1,
            denoiser.text_encoder.encoder.layers[0].mlp.fc1,
        ):
            layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        denoiser(*random_inputs()).float().square().mean().backward()
        assert len(calls) == (4 if checkpointing else 2)
        gradients.append({name: p.grad for name, p in trained_parameters(denoiser).items()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_lora_trains_low_rank_matrices_on_both_parts_and_nothing_else(load_models):
    """At the start it adds nothing, as its second matrices are zero."""
    _, original, _ = load_models()
    before = dict(original.named_parameters())
    vae, denoiser, _ = load_models(use_lora=True, lora_rank=3, autocast=True)
    assert trained_parameters(vae) == {}
    trained = trained_parameters(denoiser)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {min(p.shape) for p in trained.values()} == {3}
    for part, targets in models.LORA_TARGETS.items():
        for target in targets:
            assert any(name.startswith(part) and f".{target}.lora_B" in name for name in trained)
    _, larger, _ = load_models(use_lora=True, lora_rank=3, lora_layers="all")
    convolutions = {name for name, p in trained_parameters(larger).items() if p.ndim == 4}
    assert {name.split(".")[0] for name in convolutions} == {"unet"}
    assert trained_parameters(larger).keys() > trained.keys()
    frozen = {
        name.replace(".base_layer", ""): p
        for name, p in denoiser.named_parameters()
        if name not in trained
    }
    assert frozen.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(frozen[name], weight.to(frozen[name].dtype))
    assert torch.equal(predict(denoiser, autocast=True), predict(original, autocast=True))


def test_a_loras_first_matrices_follow_from_the_seed(load_models):
    def first_matrices(seed):
        _, denoiser, _ = load_models(use_lora=True, seed=seed)
        trained = trained_parameters(denoiser)
        return torch.cat([p.flatten() for name, p in trained.items() if "lora_A" in name])

    torch.manual_seed(1)  # whatever was sampled before
    first = first_matrices(0)
    assert torch.equal(first_matrices(0), first)
    assert not torch.equal(first_matrices(1), first)


def test_frozen_layers_in_bfloat16_change_no_bit_of_the_loss(load_models):
    """Autocast would round them at every step. Norms and embeddings, which it leaves in float32,
    stay so."""
    losses = []
    for in_float32 in (False, True):
        _, denoiser, scheduler = load_models(use_lora=True, autocast=True)
        frozen = {p.dtype for p in denoiser.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16, torch.float32}
        if in_float32:  # the same numbers: those that bfloat16 can hold
            denoiser.float()
        set_second_matrices(denoiser)
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        loss, _ = training_loss(
            denoiser,
            scheduler,
            posteriors=torch.ones(2, 2, 4, 16, 16),
            prompt_ids=torch.arange(96).view(2, 48),
            posterior_noise=noise,
            noise=noise.flip(0),
            timesteps=torch.tensor([10, 900]),
            prior_loss_weight=1.0,
        )
        losses.append(loss)
    assert torch.equal(losses[0], losses[1])


def test_a_saved_pipeline_loads_bit_for_bit(load_models, model_dir, tmp_path):
    vae, denoiser, _ = load_models()
    generator = torch.Generator().manual_seed(1)
    for parameter in denoiser.parameters():
        parameter.data += 1e-5 * torch.randn(parameter.shape, generator=generator)
    saving.save_pipeline(denoiser, model_dir, tmp_path / "tuned")
    loaded_vae, loaded_denoiser, _ = load_models(tmp_path / "tuned")
    for module, loaded in ((vae, loaded_vae), (denoiser, loaded_denoiser)):
        expected = module.state_dict()
        found = loaded.state_dict()
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(found[name], weight)
    assert os.listdir(tmp_path) == ["tuned"]


def test_a_saved_pipeline_is_complete_for_diffusers(load_models, model_dir, tmp_path):
    """The parts that were not trained are those of the original."""
    _, denoiser, _ = load_models()
    saving.save_pipeline(denoiser, model_dir, tmp_path / "tuned")
    directory.check_model_dir(tmp_path / "tuned")
    assert set(os.listdir(tmp_path / "tuned")) <= set(directory.PIPELINE_NAMES)
    for file in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        saved = (tmp_path / "tuned" / file).read_bytes()
        assert saved.strip() == (model_dir / file).read_bytes().strip()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "tuned")
    assert pipeline.safety_checker is None
    assert torch.equal(predict(pipeline), predict(denoiser))


def test_saved_text_encoders_have_the_names_of_the_hubs_files(load_models, model_dir, tmp_path):
    """Older loaders look for these, and would start from random weights without a warning."""
    _, denoiser, _ = load_models()
    saving.save_pipeline(denoiser, model_dir, tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in weights


def test_saved_files_carry_no_trace_of_compilation(load_models, model_dir, tmp_path):
    """Elsewhere `_orig_mod` is in the names of compiled weights, and no loader finds them."""
    names = []
    for is_compiled in (False, True):
        _, denoiser, _ = load_models(compile=is_compiled)
        compiled = [m for m in denoiser.modules() if m._compiled_call_impl is not None]
        assert bool(compiled) == is_compiled
        folder = tmp_path / str(is_compiled)
        saving.save_pipeline(denoiser, model_dir, folder)
        names.append(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").keys())
    assert names[0] == names[1]


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_saved_lora_does_in_a_fresh_pipeline_what_it_did_in_training(
    load_models, model_dir, tmp_path, layers
):
    """Also fault 12 of the published example, whose LoRA was built by hand on private API that no
    longer exists."""
    _, denoiser, _ = load_models(use_lora=True, lora_layers=layers)
    original = predict(denoiser)
    set_second_matrices(denoiser)
    trained = predict(denoiser)
    saving.save_lora(denoiser, tmp_path / "lora")
    assert os.listdir(tmp_path / "lora") == [directory.LORA_FILE]
    pipeline = StableDiffusionPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "lora")
    loaded = predict(pipeline)
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-5)
    assert (loaded - original).abs().max() > 0.01
    # Both parts are in the file: without the text encoder's the prediction is another.
    pipeline.text_encoder.disable_adapters()
    assert (predict(pipeline) - trained).abs().max() > 1e-3


def test_a_lora_that_is_not_loaded_whole_is_warned_of(load_models, model_dir, tmp_path, capsys):
    """As where diffusers meets two layouts of names in one file."""
    _, denoiser, _ = load_models(use_lora=True, lora_layers="all")
    saving.save_lora(denoiser, tmp_path)
    image_generator.load_pipeline(model_dir, "cpu", tmp_path)
    assert capsys.readouterr().err == ""
    weights = load_file(tmp_path / directory.LORA_FILE)
    mixed = {
        name.replace("lora.down", "lora_A").replace("lora.up", "lora_B")
        if "conv" in name
        else name: p
        for name, p in weights.items()
    }
    save_file(mixed, tmp_path / directory.LORA_FILE, metadata={"format": "pt"})
    image_generator.load_pipeline(model_dir, "cpu", tmp_path)
    assert "some of its matrices were not loaded" in capsys.readouterr().err


def test_a_lora_of_the_unet_alone_is_saved_and_loaded(load_models, model_dir, tmp_path):
    _, denoiser, _ = load_models(use_lora=True, no_train_text_encoder=True)
    set_second_matrices(denoiser)
    saving.save_lora(denoiser, tmp_path / "lora")
    weights = load_file(tmp_path / "lora" / directory.LORA_FILE)
    assert all(name.startswith("unet.") for name in weights)
    pipeline = StableDiffusionPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(predict(pipeline), predict(denoiser), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_lora", [False, True])
def test_what_is_saved_follows_from_the_flags(
    load_models, train_args, model_dir, tmp_path, use_lora
):
    _, denoiser, _ = load_models(use_lora=use_lora)
    saving.save(denoiser, train_args(tmp_path / "out", use_lora=use_lora))
    assert (tmp_path / "out" / directory.LORA_FILE).exists() == use_lora
    assert (tmp_path / "out" / "model_index.json").exists() != use_lora
