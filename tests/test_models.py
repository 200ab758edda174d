"""What is frozen, what trains and in which precision; models into directories and back."""

import errno
import os
from itertools import product
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import train
from dreambooth import checks, files, latents, models
from dreambooth.checks import UserError
from dreambooth.files import check_replaceable, replace_dir
from dreambooth.loss import training_loss
from dreambooth.seeds import seed_for


@pytest.fixture
def loaded(load_models):
    return load_models()


def predict(unet, text_encoder):
    """What the two say about fixed latents and words."""
    generator = torch.Generator().manual_seed(0)
    latents, ids = torch.randn(2, 4, 16, 16, generator=generator), torch.randint(0, 500, (2, 48), generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 900]), text_encoder(ids)[0]).sample


def under_autocast(denoiser):
    """The same as in a training step."""
    with torch.autocast("cpu", torch.bfloat16):
        return predict(denoiser.unet, denoiser.text_encoder)


def test_full_training_trains_unet_and_text_encoder_in_float32(loaded):
    vae, denoiser, scheduler = loaded
    assert {p.dtype for m in (vae, denoiser) for p in m.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in vae.parameters())
    assert not vae.training
    assert all(p.requires_grad for p in denoiser.parameters())
    assert denoiser.training
    for part in (denoiser.unet, denoiser.text_encoder):
        assert sum(p.numel() for p in part.parameters()) > 300_000
    assert scheduler.alphas_cumprod.dtype == torch.float32


def test_frozen_layers_in_bfloat16_change_no_bit_of_the_loss(load_models):
    """Autocast would round them at every step. Norms and embeddings, which it leaves in float32, stay so."""
    losses = []
    for halved in (True, False):
        _, denoiser, scheduler = load_models(use_lora=True, autocast=True)
        frozen = {p.dtype for p in denoiser.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16, torch.float32}
        if not halved:
            denoiser.float()
        for name, p in denoiser.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(p, 0.01)
        # The same float32 numbers behind both: those that bfloat16 can hold.
        batch = {"posteriors": torch.ones(2, 2, 4, 16, 16), "prompt_ids": torch.arange(96).view(2, 48)}
        losses.append(
            training_loss(
                denoiser,
                scheduler,
                {**batch, "positions": [0]},
                latents.draw(0, {**batch, "positions": [0]}, 1000),
                1.0,
            )
        )
    assert torch.equal(*losses)


def test_lora_trains_low_rank_matrices_on_both_and_nothing_else(loaded, load_models):
    _, denoiser, _ = loaded
    before = {name: p.clone() for name, p in denoiser.named_parameters()}
    prediction = under_autocast(denoiser)
    vae, denoiser, _ = load_models(use_lora=True, lora_rank=3, autocast=True)
    assert not any(p.requires_grad for p in vae.parameters())
    trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {min(p.shape) for p in trained.values()} == {3}
    for part, targets in models.LORA_TARGETS.items():
        for target in targets:
            assert any(name.startswith(part) and f".{target}.lora_B" in name for name in trained)
    frozen = {name.replace(".base_layer", ""): p for name, p in denoiser.named_parameters() if name not in trained}
    assert frozen.keys() == before.keys()
    assert all(torch.equal(frozen[name], p.to(frozen[name].dtype)) for name, p in before.items())
    # At the start the LoRA adds nothing, as its second matrices are zero.
    assert torch.equal(under_autocast(denoiser), prediction)


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}, {"precision": "bf16"}])
def test_text_encoder_can_be_left_as_it_is(load_models, changes):
    """Also to the last bit: trained weights in bfloat16 are no reason to round those that stay."""
    original = load_models()[1].text_encoder.state_dict()
    _, denoiser, _ = load_models(**changes, no_train_text_encoder=True)
    assert not any(p.requires_grad for p in denoiser.text_encoder.parameters())
    assert any(p.requires_grad for p in denoiser.unet.parameters())
    kept = denoiser.text_encoder.state_dict()
    assert kept.keys() == original.keys()
    assert all(kept[name].dtype == torch.float32 and torch.equal(kept[name], w) for name, w in original.items())


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [({}, torch.float32), ({"autocast": True}, torch.bfloat16), ({"precision": "bf16"}, torch.bfloat16)],
)
def test_forward_pass_is_bfloat16_where_asked_for_or_needed(load_models, changes, dtype):
    """On a GPU it is asked for; on a CPU it gains nothing, and only bfloat16 weights need it."""
    _, denoiser, _ = load_models(**changes)
    seen = []
    denoiser.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad():
        denoiser(torch.ones(2, 4, 16, 16), torch.tensor([10, 900]), torch.arange(96).view(2, 48))
    assert seen == [dtype]


@pytest.mark.parametrize("use_lora", [False, True])
def test_on_a_gpu_the_forward_pass_is_bfloat16(train_argv, monkeypatch, use_lora):
    """What load_models decides for a CUDA device, with the weights left on the CPU: autocast, channels_last, and a
    LoRA's frozen layers in bfloat16."""

    def on_cpu(load):
        return lambda *args, **kwargs: load(*args, **{**kwargs, "device_map": "cpu"})

    for cls in (models.AutoencoderKL, models.CLIPTextModel, models.UNet2DConditionModel):
        monkeypatch.setattr(cls, "from_pretrained", on_cpu(cls.from_pretrained))
    monkeypatch.setattr(models.DDPMScheduler, "from_pretrained", MagicMock())
    args = train.parse_args(train_argv("out", use_lora=use_lora))
    _, denoiser, _ = models.load_models(args, torch.device("cuda"))
    assert denoiser.autocast
    assert denoiser.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert denoiser.unet.conv_in.weight.dtype == (torch.bfloat16 if use_lora else torch.float32)
    assert {p.dtype for p in denoiser.parameters() if p.requires_grad} == {torch.float32}


def test_the_vae_takes_few_pixels_at_a_time(loaded, monkeypatch):
    """So that encoding does not need more memory than training; and the latents are the same."""
    vae, images, sizes = loaded[0], torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)), []
    whole = latents.encode(vae, images)
    vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for pixels, expected in ((3 * 64 * 64 - 1, [2, 2, 1]), (1, [1] * 5)):
        sizes.clear()
        monkeypatch.setattr(latents, "PIXELS_AT_ONCE", pixels)
        torch.testing.assert_close(latents.encode(vae, images), whole, rtol=1e-4, atol=1e-5)
        assert sizes == expected


def test_each_prompt_is_encoded_once_however_many_images_it_has(load_models):
    """Six images and two prompts: the same prediction and gradients as with a prompt for each image."""
    x = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    two = torch.randint(0, 500, (2, 48), generator=torch.Generator().manual_seed(1))
    results = []
    for ids in (two, two.repeat_interleave(3, 0)):
        _, denoiser, _ = load_models()
        rows = []
        denoiser.text_encoder.register_forward_pre_hook(lambda module, inputs, rows=rows: rows.append(len(inputs[0])))
        prediction = denoiser(x, torch.tensor([10, 300, 500, 600, 800, 900]), ids)
        (prediction * torch.linspace(-1, 1, 6).view(6, 1, 1, 1)).sum().backward()
        gradients = [p.grad.flatten() for p in denoiser.text_encoder.encoder.parameters()]
        results.append((rows, prediction.detach(), torch.cat(gradients)))
    (few, first, gradient), (many, second, other) = results
    assert (few, many) == ([2], [6])
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    assert (gradient - other).norm() < 1e-5 * other.norm()


@pytest.mark.parametrize("use_lora", [False, True])
def test_gradient_checkpointing_changes_no_gradient(load_models, use_lora):
    """Nor does it lose that of a LoRA behind frozen layers."""
    gradients = []
    for checkpointing in (False, True):
        _, denoiser, _ = load_models(use_lora=use_lora, gradient_checkpointing=checkpointing, autocast=True)
        calls = []
        for layer in (denoiser.unet.mid_block.resnets[1].conv1, denoiser.text_encoder.encoder.layers[0].mlp.fc1):
            layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        for name, p in denoiser.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        generator = torch.Generator().manual_seed(0)
        x, ids = torch.randn(2, 4, 16, 16, generator=generator), torch.randint(0, 500, (2, 48), generator=generator)
        prediction = denoiser(x, torch.tensor([10, 900]), ids)
        prediction.float().square().mean().backward()
        assert len(calls) == (4 if checkpointing else 2)  # both computed again on the way back
        gradients.append({name: p.grad for name, p in denoiser.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_saved_pipeline_loads_bit_for_bit(loaded, load_models, model_dir, tmp_path):
    vae, denoiser, _ = loaded
    generator = torch.Generator().manual_seed(1)
    for p in denoiser.parameters():
        p.data += 1e-5 * torch.randn(p.shape, generator=generator)
    models.save_pipeline(denoiser, model_dir, tmp_path / "tuned")
    vae_again, denoiser_again, _ = load_models(tmp_path / "tuned")
    for module, again in ((vae, vae_again), (denoiser, denoiser_again)):
        assert module.state_dict().keys() == again.state_dict().keys()
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in module.state_dict().items())
    for file in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "tuned" / file).read_bytes().strip() == (model_dir / file).read_bytes().strip()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "tuned")
    assert pipeline.safety_checker is None
    found, expected = (predict(m.unet, m.text_encoder) for m in (pipeline, denoiser))
    assert torch.equal(found, expected)
    assert os.listdir(tmp_path) == ["tuned"]


def test_saved_files_carry_no_trace_of_compilation(load_models, model_dir, tmp_path):
    """Elsewhere `_orig_mod` is in the names of compiled weights, and no loader finds them."""
    names = []
    for compiled in (False, True):
        _, denoiser, _ = load_models(compile=compiled)
        assert any(m._compiled_call_impl is not None for m in denoiser.modules()) == compiled
        models.save_pipeline(denoiser, model_dir, tmp_path / str(compiled))
        names.append(load_file(tmp_path / str(compiled) / "unet" / "diffusion_pytorch_model.safetensors").keys())
    assert names[0] == names[1]


def test_saved_lora_does_in_a_fresh_pipeline_what_it_did_in_training(loaded, model_dir, tmp_path):
    """Also fault 12 of the original, whose LoRA was built by hand on private API that is gone."""
    _, denoiser, _ = loaded
    untouched = predict(denoiser.unet, denoiser.text_encoder)
    models.add_lora(denoiser, rank=4)
    torch.manual_seed(0)
    for name, p in denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    trained = predict(denoiser.unet, denoiser.text_encoder)
    models.save_lora(denoiser, tmp_path / "lora")
    assert os.listdir(tmp_path / "lora") == [files.LORA_FILE]
    pipeline = StableDiffusionPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "lora")
    again = predict(pipeline.unet, pipeline.text_encoder)
    torch.testing.assert_close(again, trained, rtol=0, atol=1e-5)
    assert (again - untouched).abs().max() > 0.01
    # Both parts are in it: each without its own LoRA says something else.
    pipeline.text_encoder.disable_adapters()
    assert (predict(pipeline.unet, pipeline.text_encoder) - trained).abs().max() > 1e-3


@pytest.fixture
def with_saved_lora(loaded, tmp_path):
    """A denoiser with a LoRA that shows, which is saved in the folder "lora" as well."""
    _, denoiser, _ = loaded
    models.add_lora(denoiser, rank=2)
    for name, p in denoiser.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.05)
    models.save_lora(denoiser, tmp_path / "lora")
    return denoiser


def test_loaded_pipeline_has_no_safety_checker_and_takes_a_lora(with_saved_lora, model_dir, tmp_path):
    denoiser = with_saved_lora
    said = {}
    for scale in (0.0, 0.5, 1.0):
        pipeline = models.load_pipeline(model_dir, tmp_path / "lora", scale, "cpu")
        assert pipeline.safety_checker is None
        said[scale] = predict(pipeline.unet, pipeline.text_encoder)
    plain = models.load_pipeline(model_dir, None, 1.0, "cpu")
    torch.testing.assert_close(said[0.0], predict(plain.unet, plain.text_encoder), rtol=0, atol=1e-5)
    torch.testing.assert_close(said[1.0], predict(denoiser.unet, denoiser.text_encoder), rtol=0, atol=1e-5)
    distance = {scale: (s - said[0.0]).norm() for scale, s in said.items()}
    assert 0 < distance[0.5] < distance[1.0]


def test_lora_file_of_another_trainer_is_read(with_saved_lora, model_dir, tmp_path):
    """Under another file name and with kohya's names for the weights, as far as diffusers reads them."""
    denoiser = with_saved_lora
    kohya = {}
    for name, weight in load_file(tmp_path / "lora" / files.LORA_FILE).items():
        part, _, layer = name.removesuffix(".weight").partition(".")
        layer, _, end = layer.replace(".lora_linear_layer", "").replace(".lora.", ".").rpartition(".")
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[part] + "_" + layer.replace(".", "_")
        kohya |= {f"{prefix}.lora_{end}.weight": weight, f"{prefix}.alpha": torch.tensor(2.0)}
    (tmp_path / "other").mkdir()
    save_file(kohya, tmp_path / "other" / "my_car.safetensors")
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down") for name in kohya)
    pipeline = models.load_pipeline(model_dir, tmp_path / "other", 1.0, "cpu")
    found, expected = (predict(m.unet, m.text_encoder) for m in (pipeline, denoiser))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def write_one(folder):
    (folder / "model_index.json").write_text("new")


def test_result_replaces_the_earlier_one_whole(tmp_path):
    out = tmp_path / "deep" / "tuned"
    replace_dir(out, lambda folder: (folder / "a").write_text("old"))
    replace_dir(out, write_one)
    assert os.listdir(out) == ["model_index.json"]
    assert os.listdir(tmp_path / "deep") == ["tuned"]


def test_failed_save_leaves_the_earlier_result_untouched(tmp_path):
    replace_dir(tmp_path / "tuned", lambda folder: (folder / "model_index.json").write_text("old"))

    def fail(error):
        def write(folder):
            write_one(folder)
            raise error

        return write

    for name in ("tuned", "first"):
        with pytest.raises(OSError, match="broken"):
            replace_dir(tmp_path / name, fail(OSError("broken")))
        with pytest.raises(UserError, match=f"no space left to write {tmp_path / name}"):
            replace_dir(tmp_path / name, fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    assert (tmp_path / "tuned" / "model_index.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["tuned"]  # a full disk is not left full


def test_what_a_killed_save_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".tuned.new").mkdir()
    (tmp_path / ".tuned.new" / "half").write_text("a model")
    replace_dir(tmp_path / "tuned", write_one)
    assert os.listdir(tmp_path) == ["tuned"]
    assert (tmp_path / "tuned" / "model_index.json").read_text() == "new"


def test_save_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    """A crash after the first rename: the earlier result is whole under a name next to its own."""
    replace_dir(tmp_path / "tuned", lambda folder: (folder / "model_index.json").write_text("old"))
    rename, calls = os.rename, []

    def crash_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", crash_second)
    with pytest.raises(KeyboardInterrupt):
        replace_dir(tmp_path / "tuned", write_one)
    assert "old" in [file.read_text() for file in tmp_path.rglob("model_index.json")]


def test_folders_with_other_files_are_not_replaced(tmp_path):
    """A new, an empty and an earlier result's directory may be replaced; one with anything else may not,
    even beside an earlier result."""
    check_replaceable(tmp_path / "new", files.RESULT_NAMES)
    check_replaceable(tmp_path, files.RESULT_NAMES)
    (tmp_path / "model_index.json").write_text("")
    (tmp_path / "unet").mkdir()
    check_replaceable(tmp_path, files.RESULT_NAMES)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        check_replaceable(tmp_path, files.RESULT_NAMES)


def test_a_link_stays_a_link_to_the_new_result(tmp_path):
    """A model directory is often a link to a larger disk: what it points to is replaced, not the link."""
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for text in ("first", "second"):
        replace_dir(tmp_path / "link", lambda folder, text=text: (folder / "a.txt").write_text(text))
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk" / "model" / "a.txt").read_text() == text
    assert sorted(f.name for f in tmp_path.rglob("*")) == ["a.txt", "disk", "link", "model"]


def test_what_a_user_caused_in_a_worker_is_one_line():
    """Ray wraps a worker's error in its stack trace; a fault of ours keeps it."""
    wrapped = "UserDefinedError: ray::map()\n  File x.py\ndreambooth.checks.UserError: a.png: truncated image\n\nmore"
    told = checks.explain(SimpleNamespace(worker_failures={0: RuntimeError(wrapped)}))
    assert isinstance(told, UserError)
    assert str(told) == "a.png: truncated image"
    assert str(checks.explain(SimpleNamespace(worker_failures={1: UserError("a.png: gone")}))) == "a.png: gone"
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert "--gradient_checkpointing" in str(checks.explain(SimpleNamespace(worker_failures={0: memory})))
    ours = RuntimeError("shape mismatch")
    ours.worker_failures = {0: ValueError("shape mismatch")}
    with pytest.raises(RuntimeError, match="shape mismatch"):
        checks.explain(ours)


def test_seeds_are_equal_for_equal_numbers_only():
    seeds = {numbers: seed_for(*numbers) for numbers in product(range(8), range(50), range(2))}
    assert len(set(seeds.values())) == len(seeds)
    assert all(seed_for(*numbers) == seed for numbers, seed in seeds.items())
    assert all(0 <= seed < 2**63 for seed in seeds.values())
    assert seed_for(0, 1) != seed_for(1, 0)
