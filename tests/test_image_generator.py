"""Records into images: each from its own record alone, none empty, in batches that fit."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file

import generate
from dreambooth import cluster, image_generator, model_dir, outputs
from dreambooth.cli import UserError
from dreambooth.image_generator import ImageGenerator, load_pipeline


@pytest.fixture
def generator(generate_args, tmp_path):
    """One that saves into the folder tmp_path/new."""
    return ImageGenerator(generate_args(tmp_path / "new"))


@pytest.fixture(scope="module")
def records(generate_args):
    """The records of six images of two prompts."""
    prompts = ["photo of a car", "photo of a house, at night"]
    return generate.plan(generate_args("out", prompts=prompts, num_samples_per_prompt=3))


@pytest.fixture(scope="module")
def images(generate_args, records):
    """Their images, (6, 3, 64, 64), as sampled together at the first attempt."""
    return ImageGenerator(generate_args("out")).sample(records, attempt=0)


def predict(unet, text_encoder):
    """What the two predict for fixed latents and token ids."""
    random = torch.Generator().manual_seed(0)
    noisy_latents = torch.randn(2, 4, 16, 16, generator=random)
    prompt_ids = torch.randint(0, 500, (2, 48), generator=random)
    with torch.no_grad():
        hidden_states = text_encoder(prompt_ids)[0]
        return unet(noisy_latents, torch.tensor([10, 900]), hidden_states).sample


def test_an_image_does_not_depend_on_the_images_beside_it(generator, records, images):
    """Not in its last bit: alone, or in batches of four and in another order."""
    alone = generator.sample([records[4]], attempt=0)
    assert torch.equal(alone[0], images[4])
    generator.batch_size = 4
    reordered = list(generator.sample_all(records[::-1], attempt=0))
    assert [record for record, _ in reordered] == records[::-1]
    for i in range(6):
        _, image = reordered[5 - i]
        assert torch.equal(image, images[i])


def test_all_images_differ(images):
    assert images.shape == (6, 3, 64, 64)
    assert torch.pdist(images.flatten(1)).min() > 0.1


def test_another_seed_or_attempt_gives_another_image(generator, records, images):
    other_seed = generator.sample([{**records[0], "seed": 1}], attempt=0)
    other_attempt = generator.sample(records[:1], attempt=1)
    assert not torch.equal(other_seed, images[:1])
    assert not torch.equal(other_attempt, images[:1])
    assert not torch.equal(other_seed, other_attempt)


@pytest.mark.parametrize("name", ["guidance_scale", "num_inference_steps"])
def test_the_settings_of_the_sampler_reach_it(generator, records, images, name):
    setattr(generator.args, name, 3)
    assert not torch.equal(generator.sample(records[:1], attempt=0), images[:1])


def test_the_scheduler_is_the_one_asked_for(generate_args, tmp_path):
    dpm = ImageGenerator(generate_args(tmp_path)).pipeline.scheduler
    assert type(dpm) is DPMSolverMultistepScheduler
    assert dpm.config.use_karras_sigmas
    own = ImageGenerator(generate_args(tmp_path, scheduler="model")).pipeline.scheduler
    assert type(own) is PNDMScheduler


def test_each_prompt_is_encoded_once(generator, records):
    """And the empty prompt with it."""
    calls = []
    generator.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        generator.sample(records, attempt=0)
    assert len(calls) == 2 * 2


def test_repeated_blocks_are_compiled_if_asked_for(generate_args, tmp_path):
    for is_compiled in (False, True):
        unet = ImageGenerator(generate_args(tmp_path, compile=is_compiled)).pipeline.unet
        compiled = [module for module in unet.modules() if module._compiled_call_impl is not None]
        assert bool(compiled) == is_compiled


def is_native(value):
    return type(value) in (str, int, float)


def test_a_data_frame_of_records_becomes_one_of_finished_records(generator, records):
    """As Ray Data calls it: a row is a record. The finished records have Python's own types, and
    equal those of a run without Ray."""
    finished = generator(pd.DataFrame(records)).to_dict("records")
    assert finished == list(generator.generate(records))
    for record, planned in zip(finished, records, strict=True):
        assert all(is_native(value) for value in record.values())
        assert json.loads(json.dumps(record)) == record
        assert {**record, "digest": None} == {**planned, "digest": None}


def test_images_are_saved_with_their_finished_records(generator, records, digests, tmp_path):
    finished = list(generator.generate(records))
    assert {record["file"]: record["digest"] for record in finished} == digests(tmp_path / "new")
    for record in finished:
        assert outputs.read_record(tmp_path / "new" / record["file"]) == record


def test_a_record_is_yielded_once_its_image_is_saved(generator, records, tmp_path):
    for record in generator.generate(records):
        assert (tmp_path / "new" / record["file"]).exists()


def test_empty_images_are_sampled_again(generator, records, images, digests, monkeypatch, tmp_path):
    """Fault 10 of the published example: black images were saved as class images and trained on.
    Black, grey and NaN images of the first attempt are sampled again, and the others are kept."""
    first = images.clone()
    again = generator.sample(records, attempt=1)
    for i, value in ((0, 0.0), (2, 0.5), (3, float("nan"))):
        first[i] = value
    attempts = []

    def sample(batch, attempt):
        attempts.append(attempt)
        rows = [records.index(record) for record in batch]
        return (first, again)[attempt][rows]

    monkeypatch.setattr(generator, "sample", sample)
    finished = list(generator.generate(records))
    assert attempts == [0, 1]
    assert sorted(record["file"] for record in finished) == [record["file"] for record in records]
    for i, record in enumerate(records):
        image = again[i] if i in (0, 2, 3) else first[i]
        expected = outputs.pixel_digest(image_generator.to_pil_image(image))
        assert digests(tmp_path / "new")[record["file"]] == expected


def test_a_model_that_generates_nothing_is_a_user_error(generator, records, monkeypatch):
    attempts = []

    def sample_black(batch, attempt):
        attempts.append(attempt)
        return torch.zeros(len(batch), 3, 64, 64)

    monkeypatch.setattr(generator, "sample", sample_black)
    with pytest.raises(UserError, match="generates nothing for 'photo of a car'") as error:
        list(generator.generate(records))
    assert "\n" not in str(error.value)
    assert attempts == list(range(image_generator.MAX_ATTEMPTS))
    assert not Path(generator.folder).exists()


@pytest.fixture
def little_memory(generator, monkeypatch):
    """A generator whose GPU has memory for three images; `sampled` lists the indices of those."""
    generator.sampled = []

    def sample(batch, attempt):
        if len(batch) > 3:
            return None
        generator.sampled += [record["index"] for record in batch]
        return torch.rand(len(batch), 3, 8, 8)

    monkeypatch.setattr(generator, "sample", sample)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    generator.batch_size = 10
    return generator


def test_batches_that_do_not_fit_the_memory_are_halved(little_memory, generate_args, capsys):
    """Ten images: the same ones, none twice, none lost; and each halving is one line."""
    records = generate.plan(generate_args("out", num_samples_per_prompt=10))
    finished = list(little_memory.generate(records))
    assert little_memory.sampled == list(range(10))
    assert [record["index"] for record in finished] == list(range(10))
    assert little_memory.batch_size == 2  # ten, five, two
    assert capsys.readouterr().out.count("out of GPU memory") == 2


def test_a_gpu_too_small_for_one_image_is_a_user_error(little_memory, records, monkeypatch):
    monkeypatch.setattr(little_memory, "sample", lambda batch, attempt: None)
    with pytest.raises(UserError, match="one image at a time"):
        list(little_memory.generate(records))


def test_out_of_memory_is_found_and_other_errors_are_raised(generator, records, monkeypatch):
    def fail(**kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(generator, "pipeline", fail)
    generator.prompt_embeds = {record["prompt"]: torch.zeros(2, 1, 48, 96) for record in records}
    assert generator.sample(records, attempt=0) is None
    monkeypatch.setattr(generator, "pipeline", lambda: None)
    with pytest.raises(TypeError):
        generator.sample(records, attempt=0)


@pytest.mark.parametrize(
    ("side", "batch_size"), [(64, 16), (96, 7), (128, 4), (256, 1), (512, 1), (768, 1)]
)
def test_on_a_cpu_the_batch_size_follows_from_the_size_of_the_image(monkeypatch, side, batch_size):
    """16 images of 512 pixels are an hour's work, of which one alone would need as much: batches
    are padded."""
    monkeypatch.setattr(model_dir, "resolution", lambda folder: (side, 8))
    assert image_generator.cpu_batch_size("model") == batch_size


def test_on_a_cpu_the_batch_is_always_of_the_same_size(generator, records, monkeypatch):
    """Whatever else changes: an image's last bits may depend on it."""
    sizes = []

    def note(prompt_embeds, **settings):
        sizes.append(len(prompt_embeds))
        return SimpleNamespace(images=torch.zeros(len(prompt_embeds), 3, 64, 64))

    generator.prompt_embeds = {record["prompt"]: torch.zeros(2, 1, 48, 96) for record in records}
    monkeypatch.setattr(generator, "pipeline", note)
    generator.batch_size = 4
    for _, image in generator.sample_all(records, attempt=0):
        assert image.shape == (3, 64, 64)
    assert sizes == [16, 16]


def test_a_gpu_that_cannot_be_used_is_an_error_and_not_the_cpu(generate_args, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="driver"):
        ImageGenerator(generate_args("out"))


@pytest.mark.parametrize(
    ("gigabytes", "batch_size"), [(80, 16), (5, 4), (1.1, 1), (0.1, 1), (17.2, 16)]
)
def test_batch_size_follows_from_the_free_memory(monkeypatch, gigabytes, batch_size):
    """For a model of 512 pixels: 1.07 GB per image, at least one and at most 16."""
    monkeypatch.setattr(model_dir, "resolution", lambda folder: (512, 8))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gigabytes * 1e9), 0))
    assert image_generator.batch_size_that_fits("model") == batch_size


def test_pixels_are_rounded():
    """Truncated, 0.999 would be 254."""
    image = torch.tensor([0.0, 0.999, 1.0]).view(3, 1, 1).expand(3, 2, 4)
    pixels = np.asarray(image_generator.to_pil_image(image))
    assert pixels.shape == (2, 4, 3)
    assert (pixels == [0, 255, 255]).all()


def test_pixels_are_rounded_as_torch_rounds():
    """Halves to even."""
    image = (torch.arange(3 * 256).view(3, 1, 256) / 2 / 255).clamp(max=1)
    pixels = np.asarray(image_generator.to_pil_image(image))
    expected = (image * 255).round().byte()
    assert torch.equal(torch.tensor(pixels).permute(2, 0, 1), expected)


def test_only_the_thread_that_samples_computes_with_several_threads(
    generate_args, records, tmp_path, monkeypatch
):
    """Ray Data makes an actor in one thread and calls it in another, and images are saved in yet
    others: OpenMP would give each a pool of threads, and on a CPU pools slow each other down."""
    called_in = []
    set_num_threads = torch.set_num_threads

    def note(number):
        called_in.append((threading.current_thread().name, number))
        set_num_threads(number)

    monkeypatch.setattr(torch, "set_num_threads", note)
    with ThreadPoolExecutor(thread_name_prefix="loads") as loads:
        args = generate_args(tmp_path / "new")
        generator = loads.submit(ImageGenerator, args).result()
    with ThreadPoolExecutor(thread_name_prefix="samples") as samples:
        finished = samples.submit(lambda: list(generator.generate(records))).result()
    assert len(finished) == len(records)
    assert called_in == [("samples_0", cluster.num_cores())]


def test_content_is_finite_and_not_of_one_colour():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert image_generator.has_content(image)
    assert not image_generator.has_content(torch.zeros(3, 8, 8))
    red = torch.zeros(3, 8, 8)
    red[0] = 1
    assert not image_generator.has_content(red)
    image[0, 0, 0] = float("nan")
    assert not image_generator.has_content(image)


def test_a_pipeline_on_a_cpu_is_float32_and_has_no_safety_checker(model_dir):
    """The weights on the disk are float16."""
    pipeline = load_pipeline(model_dir, "cpu")
    assert pipeline.safety_checker is None
    parameters = [*pipeline.unet.parameters(), *pipeline.vae.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_a_lora_takes_effect_according_to_its_scale(lora_dir, model_dir):
    plain = load_pipeline(model_dir, "cpu")
    original = predict(plain.unet, plain.text_encoder)
    predictions = {}
    for scale in (0.0, 0.5, 1.0):
        pipeline = load_pipeline(model_dir, "cpu", lora_dir, scale)
        predictions[scale] = predict(pipeline.unet, pipeline.text_encoder)
    torch.testing.assert_close(predictions[0.0], original, rtol=0, atol=1e-5)
    half = (predictions[0.5] - original).norm()
    full = (predictions[1.0] - original).norm()
    assert 0.01 < half < full


def kohya_name(name):
    """The name of a LoRA's weight, such as "unet.a.b.lora.down.weight", in kohya's files:
    "lora_unet_a_b.lora_down.weight"."""
    part, _, layer = name.removesuffix(".weight").partition(".")
    layer = layer.replace(".lora_linear_layer", "").replace(".lora.", ".")
    layer, _, direction = layer.rpartition(".")
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
    return f"{prefix}_{layer.replace('.', '_')}.lora_{direction}.weight"


def test_a_lora_of_another_trainer_takes_the_same_effect(lora_dir, model_dir, tmp_path):
    """Under another file name, and with kohya's names for the weights."""
    rank = 4
    weights = {}
    for name, weight in load_file(lora_dir / "pytorch_lora_weights.safetensors").items():
        kohya = kohya_name(name)
        weights[kohya] = weight
        weights[kohya.partition(".")[0] + ".alpha"] = torch.tensor(float(rank))
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in weights
    save_file(weights, tmp_path / "my_car.safetensors")
    theirs = load_pipeline(model_dir, "cpu", tmp_path)
    ours = load_pipeline(model_dir, "cpu", lora_dir)
    found = predict(theirs.unet, theirs.text_encoder)
    expected = predict(ours.unet, ours.text_encoder)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("content", ["no LoRA", "a LoRA of another model"])
def test_a_lora_that_does_not_fit_is_a_user_error(model_dir, tmp_path, content):
    weights = {"a.weight": torch.zeros(1)}
    if content == "a LoRA of another model":
        layer = "unet.mid_block.attentions.0.proj_in.lora"
        weights = {f"{layer}.{way}.weight": torch.zeros(7, 7) for way in ("up", "down")}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="--lora_weights_dir .* does not fit") as error:
        load_pipeline(model_dir, "cpu", str(tmp_path))
    assert "\n" not in str(error.value)
