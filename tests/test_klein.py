"""FLUX.2-klein, a flow: a tiny model of its architecture, with random weights."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

import generate
import train
from dreambooth import dataset, latents, models
from dreambooth.cli import UserError
from dreambooth.families import Flux2Klein
from dreambooth.files import generated_images, pipeline_dir
from dreambooth.image_generator import load_sampling_pipeline
from dreambooth.images import load_crops
from dreambooth.lora import apply_lora
from dreambooth.run import export
from dreambooth.run.plan import check_flags
from dreambooth.run.training_log import read_run_record
from dreambooth.schedules import FlowSchedule
from tests.test_export import run_export
from tests.test_pipeline_dir import set_json

CPU = torch.device("cpu")
PROMPTS = ["photo of unqtkn car", "photo of a car"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build_tokenizer():
    """A byte-level BPE without merges, with a chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *special])}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2],
        chat_template=TEMPLATE, model_max_length=131072,
    )  # fmt: skip


@pytest.fixture(scope="session")
def klein_dir(tmp_path_factory):
    """A pipeline directory whose VAE has statistics away from 0 and 1, for images of 64 px."""
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, sample_size=64,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-2, 3, 16))
    vae.bn.running_var.copy_(torch.linspace(0.3, 4, 16))
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=27,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        )
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=16,
        mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = Flux2KleinPipeline(scheduler, vae, text_encoder, build_tokenizer(), transformer)
    folder = tmp_path_factory.mktemp("klein") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def step(train_args, klein_dir, tmp_path_factory):
    """What a step has at hand, as train_fn prepares it: a photo that is not square."""
    photo = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (13, 20, 3), np.uint8)
    Image.fromarray(pixels).resize((200, 130)).save(photo)
    args = train_args("out", model_dir=klein_dir, use_lora=True, prior_loss_weight=0.6)
    vae, denoiser, schedule = models.load_models(args, CPU)
    encoded = denoiser.family.encode_prompts(args, PROMPTS, CPU)
    rows = {"position": np.array([3, 8])}
    for number, kind in enumerate(("instance", "class")):
        rows[kind] = np.array([str(photo), str(photo)])
        rows[f"{kind}_prompt"] = np.array([number, number])
    images = dataset.collate(load_crops(rows, 64, seed=0))
    (batch,) = latents.encode_batches(vae, [images], denoiser.family, encoded, CPU)
    return args, vae, denoiser, schedule, images, batch


@pytest.fixture(scope="module")
def plain(klein_dir):
    return Flux2KleinPipeline.from_pretrained(klein_dir)


def test_posteriors_are_patches_normalized_as_the_pipeline_normalizes_latents(step, plain):
    _, vae, denoiser, _, images, batch = step
    assert batch["posteriors"].shape == (4, 2, 16, 16, 16)
    with torch.no_grad():
        distribution = vae.encode(images["images"]).latent_dist
        expected = plain._encode_vae_image(images["images"], None)
    torch.testing.assert_close(batch["posteriors"][:, 0], expected, rtol=1e-4, atol=1e-4)
    # The standard deviation has the scale and not the shift: twice it is the difference of two.
    above, below = (distribution.mean + sign * distribution.std for sign in (1, -1))
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    difference = plain._patchify_latents(above - below) / variance.sqrt().view(1, -1, 1, 1)
    torch.testing.assert_close(2 * batch["posteriors"][:, 1], difference, rtol=1e-4, atol=1e-5)


def test_loss_and_gradients_of_a_step_are_those_of_the_formula(step, plain):
    """noisy = (1 - s) x + s noise, velocity = noise - x, by the pipeline's own functions."""
    args, _, denoiser, schedule, _, batch = step
    mean, std = batch["posteriors"].unbind(1)
    posterior_noise, noise = latents.sample_noise(args.seed, [3, 8], mean.shape[1:], "cpu")
    sigmas = 1 - latents.sample_fractions(args.seed, [3, 8]).float()
    x = mean + std * posterior_noise
    s = sigmas.view(-1, 1, 1, 1)
    noisy = (1 - s) * x + s * noise
    embeds = [plain.encode_prompt(prompt)[0] for prompt in PROMPTS]
    embeds = torch.cat([embeds[0], embeds[0], embeds[1], embeds[1]]).detach()
    velocity = denoiser.transformer(
        plain._pack_latents(noisy), embeds, sigmas,
        plain._prepare_latent_ids(noisy), plain._prepare_text_ids(embeds),
    ).sample  # fmt: skip
    errors = (velocity - plain._pack_latents(noise - x)).square().mean((1, 2))
    expected = errors[:2].mean() + 0.6 * errors[2:].mean()
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, parameters)
    losses = train.forward_backward(denoiser, schedule, iter([batch]), 1, args)
    torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-4, atol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    denoiser.zero_grad()


def test_the_steps_prediction_is_the_pipelines_own_at_its_first_step(step, plain):
    """From the same noise, of latents that are not square."""
    args, _, denoiser, _, _, _ = step
    noise = torch.randn((1, 16, 6, 10), generator=torch.Generator().manual_seed(0))
    seen = []

    def note(module, inputs, settings, output):
        seen.append((settings["timestep"], output[0]))

    handle = plain.transformer.register_forward_hook(note, with_kwargs=True)
    settings = {"height": 24, "width": 40, "num_inference_steps": 3, "guidance_scale": 1}
    plain(prompt=PROMPTS[0], latents=noise, output_type="latent", **settings)
    handle.remove()
    sigma, velocity = seen[0]
    assert sigma == 1
    encoded = denoiser.family.encode_prompts(args, PROMPTS, CPU)
    with torch.no_grad():
        conditions = denoiser.family.conditions(encoded, {"prompt_numbers": [0]})
        predicted = denoiser(noise, torch.tensor([1.0]), conditions)
    torch.testing.assert_close(plain._pack_latents(predicted), velocity, rtol=1e-4, atol=1e-4)


def test_the_sampler_recovers_what_was_overfitted(klein_dir, train_args, step):
    """One latent, trained until it is known: what the pipeline samples from noise is that latent. A
    wrong sign or scale of time would train as well and sample noise."""
    _, _, _, schedule, _, batch = step
    args = train_args("out", model_dir=klein_dir)
    _, denoiser, _ = models.load_models(args, CPU)
    target = torch.randn((1, 16, 4, 6), generator=torch.Generator().manual_seed(1))
    prompt_embeds = batch["conditions"]["prompt_embeds"][:1, :8]  # quicker
    conditions = {"prompt_embeds": prompt_embeds.expand(16, -1, -1)}
    optimizer = torch.optim.AdamW(denoiser.transformer.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        noise = torch.randn((16, 16, 4, 6), generator=generator)
        sigmas = schedule.timesteps_at(torch.rand(16, generator=generator), 1.0)
        noisy = schedule.add_noise(target.expand_as(noise), noise, sigmas)
        loss = (denoiser(noisy, sigmas, conditions) - (noise - target)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    pipeline = load_sampling_pipeline(
        klein_dir, scheduler="model", transformer=denoiser.transformer
    )
    inputs = {"prompt_embeds": conditions["prompt_embeds"][:1], "guidance_scale": 1}
    sampled = pipeline(
        **inputs, height=16, width=24, num_inference_steps=20, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    bn, eps = pipeline.vae.bn, pipeline.vae.config.batch_norm_eps
    mean, scale = (v.view(1, -1, 1, 1) for v in (bn.running_mean, (bn.running_var + eps).sqrt()))
    sampled = (pipeline._patchify_latents(sampled) - mean) / scale
    assert (sampled - target).square().mean() < 0.1 * target.square().mean()


def test_a_run_its_lora_and_its_images(train_here, generate_args, digests, klein_dir, tmp_path):
    """train.py and generate.py; the LoRA's image is that of the plain pipeline, and it runs on a
    distilled model as well, whose defaults are its own."""
    run = train_here(
        model_dir=klein_dir, use_lora=True, lr=1e-2, max_train_steps=2, lora_rank=2,
        preview_prompts=PROMPTS[:1], preview_every=2,
    )  # fmt: skip
    record = read_run_record(run.output_dir.with_name("out.report"))
    assert record["pipeline"] == "Flux2KleinPipeline"
    card = (run.output_dir / "README.md").read_text()
    assert "Flux2KleinPipeline.from_pretrained" in card
    assert "flux2-klein" in card
    flags = {"prompts": PROMPTS[:1], "num_inference_steps": 3}
    generate.main(generate_args(tmp_path / "before", model_dir=klein_dir, **flags))
    tuned = {"model_dir": klein_dir, "lora_weights_dir": run.output_dir}
    generate.main(generate_args(tmp_path / "after", **tuned, **flags))
    assert digests(tmp_path / "before") != digests(tmp_path / "after")
    (image,) = (tmp_path / "after").glob("0*.png")
    made = generated_images.read_record(image)
    assert (made["scheduler"], made["guidance_scale"], made["resolution"]) == ("model", 4.0, 64)

    distilled = copy_as_distilled(klein_dir, tmp_path / "distilled")
    tuned["model_dir"] = distilled
    generate.main(generate_args(tmp_path / "distilled images", **tuned, prompts=PROMPTS[:1]))
    (image,) = (tmp_path / "distilled images").glob("0*.png")
    made = generated_images.read_record(image)
    assert made["guidance_scale"] == 1.0
    assert pipeline_dir.read_facts(distilled).sampler["num_inference_steps"] == 4
    with pytest.raises(UserError, match="is a transformer's LoRA, which ComfyUI reads as it is"):
        run_export("kohya", run.output_dir, "--output", tmp_path / "k.safetensors")


def test_a_run_goes_on_with_another_number_of_workers(run_and_resume, klein_dir):
    """As many as there are, which is two: its LoRA is, to rounding, that of one worker that took
    both steps. Each of them has the original model as its teacher."""
    changes = {"model_dir": klein_dir, "use_lora": True, "prior_target": "original"}
    expected, resumed, _ = run_and_resume("1:2", **changes)
    assert "2 workers" in resumed.stdout
    expected, resumed = (trained_matrices(run.output_dir) for run in (expected, resumed))
    assert (resumed - expected).norm() < 1e-3 * expected.norm()


def trained_matrices(folder):
    """Those that are 0 at first, as one vector."""
    matrices = load_file(folder / pipeline_dir.LORA_FILE)
    return torch.cat([m.double().flatten() for n, m in matrices.items() if "lora_B" in n])


def test_full_fine_tuning_saves_a_pipeline_with_its_own_text_encoder(train_here, klein_dir, plain):
    run = train_here(model_dir=klein_dir, lr=1e-2, max_train_steps=1)
    tuned = Flux2KleinPipeline.from_pretrained(run.output_dir)
    for part, same in (("text_encoder", True), ("vae", True), ("transformer", False)):
        weights = [dict(getattr(pipeline, part).named_parameters()) for pipeline in (tuned, plain)]
        assert weights[0].keys() == weights[1].keys()
        equal = [torch.equal(weight, weights[1][name]) for name, weight in weights[0].items()]
        assert all(equal) == same, part


def test_compared_models_have_their_own_defaults(
    generate_args, sampling_args, klein_dir, tmp_path, capsys
):
    """The distilled one its few steps, its base as many as it needs: images that were made so are
    not made again."""
    distilled = copy_as_distilled(klein_dir, tmp_path / "distilled")
    out = tmp_path / "images"
    for folder, model_dir, steps, scale in (
        (out, distilled, 4, 1.0),
        (out / "compared", klein_dir, 50, 4.0),
    ):
        flags = {"num_inference_steps": steps, "guidance_scale": scale}
        (record,) = generate.list_records(sampling_args(folder, model_dir=model_dir, **flags))
        folder.mkdir()
        generated_images.save_image(Image.new("RGB", (64, 64)), record, folder / record["file"])
    flags = {"model_dir": distilled, "compare_to": klein_dir, "num_inference_steps": False}
    generate.main(generate_args(out, **flags))
    assert capsys.readouterr().out.count(": 0 to generate") == 2
    with pytest.raises(UserError, match="takes multiples of 8"):
        generate.check_args(generate_args("out", model_dir=klein_dir, resolution=68))


def test_guidance_that_a_distilled_model_does_without_is_a_warning(
    sampling_args, klein_dir, tmp_path, capsys
):
    """diffusers switches it off, and the images' records would say otherwise."""
    distilled = copy_as_distilled(klein_dir, tmp_path / "distilled")
    for model_dir, scale, is_warned in (
        (distilled, 4, True),
        (distilled, 1, False),
        (klein_dir, 4, False),
    ):
        generate.check_args(sampling_args("out", model_dir=model_dir, guidance_scale=scale))
        assert ("--guidance_scale changes nothing" in capsys.readouterr().err) == is_warned


def copy_as_distilled(pipeline, folder):
    shutil.copytree(pipeline, folder)
    set_json(folder / "model_index.json", is_distilled=True)
    return folder


@pytest.mark.parametrize("layers", ["attention", "all"])
def test_a_saved_lora_does_in_the_plain_pipeline_what_it_did_in_training(
    train_args, klein_dir, plain, tmp_path, layers
):
    args = train_args("out", model_dir=klein_dir, use_lora=True, lora_layers=layers)
    _, denoiser, _ = models.load_models(args, CPU)
    adapted = {n.split(".lora_")[0] for n, p in denoiser.named_parameters() if p.requires_grad}
    assert "transformer.single_transformer_blocks.1.attn.to_out" in adapted
    assert any("linear_in" in name for name in adapted) == (layers == "all")
    with torch.no_grad():
        for p in denoiser.parameters():
            if p.requires_grad:
                p.add_(0.1)
    export.save_lora(denoiser, tmp_path / "lora")
    pipeline = Flux2KleinPipeline.from_pretrained(klein_dir)
    apply_lora(pipeline, tmp_path / "lora", 1.0)
    states = plain.encode_prompt(PROMPTS[0])[0]
    noise = torch.randn((1, 16, 4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = denoiser(noise, torch.tensor([0.5]), {"prompt_embeds": states})
        denoiser.add_module("transformer", pipeline.transformer)
        theirs = denoiser(noise, torch.tensor([0.5]), {"prompt_embeds": states})
        denoiser.add_module("transformer", plain.transformer)
        without = denoiser(noise, torch.tensor([0.5]), {"prompt_embeds": states})
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - without).abs().max() > 0.01


def test_sigmas_are_shifted_as_the_sampler_shifts_them(klein_dir, tmp_path):
    """A static shift; a dynamic one, which depends on the number of steps, is for sampling."""
    fractions = torch.tensor([0.0, 0.25, 0.5, 0.999], dtype=torch.float64)
    dynamic = FlowSchedule.from_pretrained(klein_dir, "scheduler").timesteps_at(fractions, 1.0)
    torch.testing.assert_close(dynamic, torch.tensor([1, 0.75, 0.5, 0.001]))
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler.save_pretrained(tmp_path / "scheduler")
    shifted = FlowSchedule.from_pretrained(tmp_path, "scheduler").timesteps_at(fractions, 1.0)
    sampler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.001])
    torch.testing.assert_close(shifted, sampler.sigmas[:-1])


def test_a_prompt_may_be_as_long_as_its_template_leaves(klein_dir):
    tokenizer = pipeline_dir.load_tokenizer(klein_dir)
    room = 512 - pipeline_dir.num_template_tokens(tokenizer)
    pipeline_dir.check_prompts(klein_dir, ["x" * room])
    with pytest.raises(UserError, match=f"has {room + 3} tokens, the model takes {room}; 'abc' "):
        pipeline_dir.check_prompts(klein_dir, ["x" * room + "abc"])


def test_what_this_family_does_not_take_is_one_line(
    train_args, generate_args, klein_dir, model_dir, tmp_path, capsys
):
    def refused(expected, **flags):
        with pytest.raises(UserError, match=expected):
            check_flags(train_args(tmp_path / "out", model_dir=klein_dir, **flags))

    refused("^--snr_gamma is for diffusion models", snr_gamma=5.0)
    refused("^--train_text_encoder: FLUX.2-klein's", train_text_encoder=True)
    with pytest.raises(UserError, match="^--scheduler dpm is for diffusion models"):
        generate.check_args(generate_args("out", model_dir=klein_dir, scheduler="dpm"))
    swapped = shutil.copytree(model_dir, tmp_path / "swapped")
    shutil.copy(klein_dir / pipeline_dir.SCHEDULER, swapped / pipeline_dir.SCHEDULER)
    with pytest.raises(UserError, match="FlowMatch.* is not the noise schedule of Stable"):
        pipeline_dir.check_model_dir(swapped)
    distilled = copy_as_distilled(klein_dir, tmp_path / "distilled")
    check_flags(train_args(tmp_path / "out", model_dir=distilled))
    assert "distilled to few steps" in capsys.readouterr().err


def test_the_prompt_is_what_is_sampled_and_the_empty_one_what_is_avoided(klein_dir):
    pipeline = pipeline_dir.load_pipeline(klein_dir, torch.float32)
    found = Flux2Klein().sampler_inputs(pipeline, "photo of a car", torch.device("cpu"))
    for name, text in (("prompt_embeds", "photo of a car"), ("negative_prompt_embeds", "")):
        assert torch.equal(found[name], pipeline.encode_prompt(text)[0]), name
    assert not torch.equal(*found.values())


def test_matrices_on_a_transformer_in_bfloat16_are_float32(load_models, klein_dir):
    """Else most updates would round to nothing."""
    _, denoiser, _ = load_models(klein_dir, autocast=True, use_lora=True)
    assert {p.dtype for p in denoiser.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in denoiser.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}  # loaded so: in float32 it would not fit for a moment
