"""Model families: a step of each has the loss and the gradients of its published formula, and its
pipeline samples what it was trained for. Here a tiny SDXL with random weights."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import generate
import train
from dreambooth import dataset, latents, models
from dreambooth.cli import UserError
from dreambooth.families import StableDiffusion, StableDiffusionXL, repeat
from dreambooth.files import generated_images, pipeline_dir
from dreambooth.image_generator import ImageGenerator, with_defaults
from dreambooth.images import load_crops
from dreambooth.run import export
from dreambooth.run.plan import check_flags
from dreambooth.run.training_log import read_run_record
from tests.test_export import run_export
from tests.test_pipeline_dir import set_json

WIDTHS = (32, 48)  # of the two text encoders
MEAN, STD = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]  # of latents, as Playground's VAE has them


@pytest.fixture(scope="session")
def xl_dir(model_dir, tmp_path_factory):
    """An SDXL of 64 px and 1 M parameters, whose VAE shifts and scales its latents."""
    tokenizer = pipeline_dir.load_tokenizer(model_dir)
    torch.manual_seed(0)
    text = {
        "vocab_size": len(tokenizer), "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 48, "intermediate_size": 64, "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    encoders = [
        cls(CLIPTextConfig(hidden_size=width, projection_dim=WIDTHS[1], **text))
        for cls, width in zip((CLIPTextModel, CLIPTextModelWithProjection), WIDTHS, strict=True)
    ]
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTHS[1],
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8, latent_channels=4,
        scaling_factor=0.7, latents_mean=MEAN, latents_std=STD, sample_size=64,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae, *encoders, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )
    folder = tmp_path_factory.mktemp("xl") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A photo that is neither square nor of the training's size."""
    file = tmp_path_factory.mktemp("photo") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (130, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return str(file)


@pytest.fixture(scope="module")
def step(train_args, xl_dir, photo):
    """What a step of the tiny SDXL has at hand, as train_fn prepares it."""
    args = train_args("out", model_dir=xl_dir, preview_prompts=["a house"], preview_every=1)
    vae, denoiser, scheduler = models.load_models(args, torch.device("cpu"))
    prompts = ["photo of unqtkn car", "photo of a car"]
    encoded = denoiser.family.encode_prompts(args, prompts, torch.device("cpu"))
    rows = {"position": np.array([3, 8])}
    for number, kind in enumerate(("instance", "class")):
        rows[kind] = np.array([photo, photo])
        rows[f"{kind}_prompt"] = np.array([number, number])
    images = dataset.collate(load_crops(rows, 64, seed=0))
    (batch,) = latents.encode_batches(vae, [images], denoiser.family, encoded, torch.device("cpu"))
    return args, vae, denoiser, scheduler, prompts, images, batch, encoded


def test_time_ids_are_those_of_each_image_rows_before_columns(step, photo):
    """Its own height and width; top and left of the crop in the resized image, 64 by 98; and the
    crop's size. Class images have their own, not their instance image's."""
    *_, images, batch, _ = step
    time_ids = batch["conditions"]["added_cond_kwargs"]["time_ids"]
    assert time_ids.dtype == torch.float32
    assert time_ids[:, :2].tolist() == [[130, 200]] * 4
    assert time_ids[:, 4:].tolist() == [[64, 64]] * 4
    assert (time_ids[:, 2] == 0).all()
    resized = np.asarray(Image.open(photo).resize((98, 64), Image.Resampling.LANCZOS))
    lefts = time_ids[:, 3].int().tolist()
    assert len(set(lefts)) > 1
    for left, image in zip(lefts, images["images"], strict=True):
        crop = torch.tensor(resized[:, left : left + 64].transpose(2, 0, 1) / 127.5 - 1)
        torch.testing.assert_close(image.double(), crop, rtol=0, atol=1e-6)


def formula(step, weight):
    """The loss of the batch written out: SDXL's conditioning, epsilon prediction, the
    prior-preserving loss; with the pipeline's own models and nothing of ours."""
    args, vae, denoiser, _, prompts, images, batch, _ = step
    pipeline = StableDiffusionXLPipeline.from_pretrained(args.model_dir, add_watermarker=False)
    embeds, pooled = [], []
    for prompt in prompts:
        e, _, p, _ = pipeline.encode_prompt(prompt, None, "cpu", 1, True)
        embeds += [e, e]
        pooled += [p, p]
    with torch.no_grad():
        posterior = vae.encode(images["images"]).latent_dist
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in (MEAN, STD))
    posterior_noise, noise = latents.sample_noise(args.seed, [3, 8], (4, 16, 16), "cpu")
    timesteps = (latents.sample_fractions(args.seed, [3, 8]) * 1000).long()
    x = (posterior.mean + posterior.std * posterior_noise - mean) * 0.7 / std
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = torch.cumprod(1 - beta, 0)[timesteps].view(-1, 1, 1, 1).float()
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    sizes = images["sizes"].float()
    time_ids = torch.cat([sizes, torch.full((4, 2), 64.0)], 1)
    added = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
    predicted = denoiser.unet(noisy, timesteps, torch.cat(embeds), added_cond_kwargs=added).sample
    errors = (predicted - noise).square().mean((1, 2, 3))
    return errors[:2].mean() + weight * errors[2:].mean()


def test_loss_and_gradients_of_a_step_are_those_of_the_formula(step):
    args, _, denoiser, scheduler, _, _, batch, _ = step
    args.prior_loss_weight = 0.6
    expected = formula(step, 0.6)
    parameters = list(denoiser.unet.parameters())
    expected_gradients = torch.autograd.grad(expected, parameters)
    losses = train.forward_backward(denoiser, scheduler, iter([batch]), 1, args)
    torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(parameters, expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    denoiser.zero_grad()


def test_the_steps_prediction_is_the_pipelines_own_at_its_first_step(step):
    """From the same noise, for a whole image of the model's size."""
    args, _, denoiser, _, prompts, _, _, encoded = step
    pipeline = pipeline_dir.load_pipeline(args.model_dir, torch.float32)
    seen = {}

    def note(module, inputs, settings, output):
        seen.setdefault(
            "inputs", (inputs, output.sample if hasattr(output, "sample") else output[0])
        )

    pipeline.unet.register_forward_hook(note, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(prompts[0], num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    (noisy, timestep), expected = seen["inputs"][0][:2], seen["inputs"][1]
    batch = {
        "prompt_numbers": [0],
        "sizes": torch.tensor([[64, 64, 0, 0]]),
        "images": torch.zeros(1, 3, 64, 64),
    }
    conditions = denoiser.family.conditions(encoded, batch)
    with torch.no_grad():
        found = denoiser(noisy, timestep.reshape(1), conditions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_prompts_are_encoded_as_the_pipeline_does_the_empty_one_as_zeros(step):
    """Hidden states of both encoders side by side, and the second one's projection."""
    *_, encoded = step
    assert encoded["prompt_embeds"].shape == (2, 48, sum(WIDTHS))
    assert encoded["pooled_prompt_embeds"].shape == (2, WIDTHS[1])
    preview = encoded["previews"]["a house"]
    assert preview["prompt_embeds"].shape == (1, 48, sum(WIDTHS))
    assert not preview["negative_prompt_embeds"].any()
    assert not preview["negative_pooled_prompt_embeds"].any()


@pytest.mark.parametrize("use_lora", [False, True])
def test_a_run_its_result_and_its_images(
    train_here, generate_args, digests, xl_dir, tmp_path, use_lora
):
    """train.py and generate.py on it; the card names its pipeline. A LoRA's kohya file reads back
    bit for bit."""
    run = train_here(
        model_dir=xl_dir, use_lora=use_lora, lr=1e-2, max_train_steps=2,
        preview_prompts=["photo of unqtkn car"], preview_every=2,
    )  # fmt: skip
    record = read_run_record(run.output_dir.with_name("out.report"))
    assert record["pipeline"] == "StableDiffusionXLPipeline"
    assert "StableDiffusionXLPipeline.from_pretrained" in (run.output_dir / "README.md").read_text()
    flags = {"model_dir": xl_dir, "prompts": ["photo of unqtkn car"]}
    generate.main(generate_args(tmp_path / "before", **flags))
    tuned = {"lora_weights_dir": run.output_dir} if use_lora else {"model_dir": run.output_dir}
    generate.main(generate_args(tmp_path / "after", **{**flags, **tuned}))
    before, after = digests(tmp_path / "before"), digests(tmp_path / "after")
    assert before.keys() == after.keys()
    assert before != after
    (image,) = (tmp_path / "after").glob("0*.png")
    made = generated_images.read_record(image)
    assert (made["guidance_scale"], made["resolution"]) == (5.0, 64)
    if use_lora:
        run_export("kohya", run.output_dir, "--output", tmp_path / "k.safetensors")
        weights = load_file(tmp_path / "k.safetensors")
        assert all(name.startswith("lora_unet_") for name in weights)
        generate.main(
            generate_args(tmp_path / "kohya", **flags, lora_weights_dir=tmp_path / "k.safetensors")
        )
        assert digests(tmp_path / "kohya") == after


def test_the_image_of_a_trained_lora_is_that_of_the_plain_pipeline(load_models, xl_dir, tmp_path):
    _, denoiser, _ = load_models(xl_dir, use_lora=True)
    torch.manual_seed(0)
    for name, parameter in denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    export.save_lora(denoiser, tmp_path)
    plain = StableDiffusionXLPipeline.from_pretrained(xl_dir, add_watermarker=False)
    plain.load_lora_weights(tmp_path)
    inputs = {
        "added_cond_kwargs": {"text_embeds": torch.ones(1, WIDTHS[1]), "time_ids": torch.ones(1, 6)}
    }
    noisy, states = torch.ones(1, 4, 16, 16), torch.ones(1, 48, sum(WIDTHS))
    with torch.no_grad():
        ours = denoiser.eval().unet(noisy, torch.tensor([500]), states, **inputs).sample
        theirs = plain.unet(noisy, torch.tensor([500]), states, **inputs).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_this_family_does_not_take_is_one_line(train_args, xl_dir, tmp_path):
    check_flags(train_args(tmp_path / "out", model_dir=xl_dir))
    with pytest.raises(UserError, match="Stable Diffusion XL's text encoders are not trained"):
        check_flags(train_args(tmp_path / "out", model_dir=xl_dir, train_text_encoder=True))
    copied = shutil.copytree(xl_dir, tmp_path / "edm")
    set_json(copied / pipeline_dir.SCHEDULER, _class_name="EDMEulerScheduler")
    with pytest.raises(UserError, match="EDM noise schedule"):
        pipeline_dir.check_model_dir(copied)
    (copied / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(UserError, match="is a SanaPipeline; these scripts take .*2.x; .*XL"):
        pipeline_dir.check_model_dir(copied)


def test_runs_of_images_with_the_same_prompt_share_its_encoding():
    """Captions: the index of each image's prompt, in the order of the batch."""
    prompts = {"input_ids": torch.arange(8).view(4, 2)}
    found = StableDiffusion().conditions(prompts, {"prompt_numbers": [0, 0, 3, 1, 1, 1]})
    assert found["input_ids"].tolist() == [[0, 1], [6, 7], [2, 3]]
    assert found["counts"] == [2, 1, 3]
    one = StableDiffusion().one_per_image(found)
    assert one["input_ids"][:, 0].tolist() == [0, 0, 6, 2, 2, 2]
    assert one.keys() == {"input_ids"} and StableDiffusionXL().one_per_image(one) is one
    assert repeat(found["input_ids"], found["counts"])[:, 0].tolist() == [0, 0, 6, 2, 2, 2]


def test_text_encoders_that_are_not_trained_are_saved_in_float32(load_models, xl_dir, tmp_path):
    """Whatever the original's files have, which for SDXL is float16 where that is all there is."""
    original = shutil.copytree(xl_dir, tmp_path / "original")
    for part in ("text_encoder", "text_encoder_2"):
        file = original / part / "model.safetensors"
        save_file({n: t.half() for n, t in load_file(file).items()}, file, {"format": "pt"})
        set_json(original / part / "config.json", dtype="float16")
    _, denoiser, _ = load_models(original)
    export.save_pipeline(denoiser, original, tmp_path / "tuned")
    for file in (tmp_path / "tuned").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}, file


def test_a_vae_that_overflows_in_float16_is_not_tried_in_it(step):
    """SDXL's own, as its configuration says; the one that was mended for float16 is."""
    _, vae, denoiser, *_ = step
    for force_upcast in (True, False):
        vae.register_to_config(force_upcast=force_upcast)
        assert denoiser.family.vae_in_float16(vae) == (not force_upcast)


def test_images_are_decoded_after_the_memory_did_not_suffice_for_it(
    xl_dir, generate_args, tmp_path, monkeypatch
):
    """The pipeline has a float16 VAE decode in float32, and after an error leaves it there."""
    args = generate_args(tmp_path / "new", model_dir=xl_dir, prompts=["a car", "a cat"])
    args = with_defaults(args)
    args.num_inference_steps = 2
    generator = ImageGenerator(args)
    generator.padded_size, generator.batch_size = None, 2  # as on a GPU
    generator.dtype, vae = torch.float16, generator.pipeline.vae
    generator.pipeline.to(torch.float16)
    decode, sizes = vae.decode, []

    def fail_with_two(latents, **settings):
        sizes.append((len(latents), vae.dtype))
        if len(latents) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents, **settings)

    monkeypatch.setattr(vae, "decode", fail_with_two)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    records = generate.list_records(args)
    assert [record for record, _ in generator.sample_all(records, 0)] == records
    assert sizes == [(2, torch.float32), (1, torch.float32), (1, torch.float32)]


def test_each_tokenizer_has_the_limit_of_its_own_text_encoder(xl_dir, tmp_path):
    folder = shutil.copytree(xl_dir, tmp_path / "xl")
    set_json(folder / "text_encoder_2" / "config.json", max_position_embeddings=20)
    for part, limit in (("tokenizer", 48), ("tokenizer_2", 20)):
        assert pipeline_dir.load_tokenizer(folder, part).model_max_length == limit
    with pytest.raises(UserError, match="the model takes 20"):
        pipeline_dir.check_prompts(folder, ["a car " * 15])
