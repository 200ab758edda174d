"""Records into images: each from its own record alone, none empty, in batches that fit."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, call

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    SASolverScheduler,
)

import generate
from dreambooth import image_generator
from dreambooth.cli import UserError
from dreambooth.files import generated_images, pipeline_dir
from dreambooth.image_generator import ImageGenerator, build_dpm, load_sampling_pipeline
from dreambooth.machines import device
from tests.test_pipeline_dir import set_json


@pytest.fixture
def generator(generate_args, tmp_path):
    """One that saves into the folder tmp_path/new."""
    return ImageGenerator(generate_args(tmp_path / "new"))


@pytest.fixture
def with_scheduler(model_dir, tmp_path):
    """A copy of the model with another scheduler: with_scheduler(DDIMScheduler, beta_end=0.013)."""

    def copy(cls, **config):
        folder = shutil.copytree(model_dir, tmp_path / "model")
        config = {"_class_name": cls.__name__, **config}
        (folder / pipeline_dir.SCHEDULER).write_text(json.dumps(config))
        set_json(folder / pipeline_dir.INDEX, scheduler=["diffusers", cls.__name__])
        return folder

    return copy


@pytest.fixture(scope="module")
def records(sampling_args):
    """The records of six images of two prompts."""
    prompts = ["photo of a car", "photo of a house, at night"]
    return generate.list_records(sampling_args("out", prompts=prompts, num_samples_per_prompt=3))


@pytest.fixture(scope="module")
def images(generate_args, records):
    """Their images, (6, 3, 64, 64), as sampled together at the first attempt."""
    return ImageGenerator(generate_args("out")).sample(records, attempt=0)


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


def test_all_images_differ(generator, records, images):
    """So do those of another seed or attempt, and with other settings of the sampler."""
    assert images.shape == (6, 3, 64, 64)
    assert torch.pdist(images.flatten(1)).min() > 0.1
    others = [
        generator.sample([{**records[0], "seed": 1}], attempt=0),
        generator.sample(records[:1], attempt=1),
    ]
    for name in ("guidance_scale", "num_inference_steps"):
        setattr(generator.args, name, 3)
        others.append(generator.sample(records[:1], attempt=0))
    others = torch.cat([images[:1], *others]).flatten(1)
    assert torch.pdist(others).min() > 0


def test_every_image_and_attempt_starts_from_noise_of_its_own(records):
    """Also those of two prompts with the same number: else they would look alike. The same record
    always starts from the same noise."""

    def noise(record, attempt):
        generator = image_generator.noise_generator(record, attempt)
        return tuple(torch.randn(4, generator=generator).tolist())

    starts = [noise(record, attempt) for record in records for attempt in (0, 1)]
    assert len(set(starts)) == 2 * 6
    assert noise({**records[0], "file": "elsewhere.png"}, 0) == starts[0]


def test_the_scheduler_and_compilation_are_as_asked_for(with_scheduler, generate_args, tmp_path):
    """By default DPM-Solver++, which adds noise at each step if the model's own scheduler does, as
    pocket's; of a model with another scheduler it is deterministic."""
    own = ImageGenerator(generate_args(tmp_path)).pipeline.scheduler
    assert own.config.algorithm_type == "sde-dpmsolver++"
    args = {"model_dir": with_scheduler(PNDMScheduler, beta_end=0.012)}
    plain = ImageGenerator(generate_args(tmp_path, **args)).pipeline
    assert type(plain.scheduler) is DPMSolverMultistepScheduler
    assert plain.scheduler.config.use_karras_sigmas
    assert plain.scheduler.config.algorithm_type == "dpmsolver++"
    args |= {"scheduler": "model", "compile": True, "num_inference_steps": 5}
    other = ImageGenerator(generate_args(tmp_path, **args)).pipeline
    assert type(other.scheduler) is PNDMScheduler
    for unet, is_compiled in ((plain.unet, False), (other.unet, True)):
        compiled = [module for module in unet.modules() if module._compiled_call_impl is not None]
        assert bool(compiled) == is_compiled


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (DEISMultistepScheduler, {}),
        (SASolverScheduler, {}),
        (DDIMScheduler, {"rescale_betas_zero_snr": True}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}),
    ],
)
def test_a_model_with_any_scheduler_is_sampled_with_dpm(with_scheduler, scheduler, settings):
    """Which takes its place, also where the model's own could not be made."""
    folder = with_scheduler(scheduler, beta_end=0.013, **settings)
    found = load_sampling_pipeline(folder).scheduler
    assert type(found) is DPMSolverMultistepScheduler
    assert (found.config.algorithm_type, found.config.beta_end) == ("dpmsolver++", 0.013)


def test_a_number_of_steps_that_the_scheduler_does_not_take_is_one_line(with_scheduler):
    folder = with_scheduler(DDIMScheduler)
    load_sampling_pipeline(folder, scheduler="model", num_steps=1000)
    with pytest.raises(UserError, match="scheduler, for 1001 steps, cannot be loaded: .*1000"):
        load_sampling_pipeline(folder, scheduler="model", num_steps=1001)


def test_each_prompt_is_encoded_once(generator, records):
    """And the empty prompt with it."""
    calls = []
    generator.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        generator.sample(records, attempt=0)
    assert len(calls) == 2 * 2


def test_a_record_is_yielded_once_its_image_is_saved(generator, records, tmp_path, capsys):
    """And nothing is said meanwhile."""
    for record in generator.generate(records):
        file = tmp_path / "new" / record["file"]
        assert generated_images.read_record(file) == record
    assert capsys.readouterr().err == ""


def test_a_data_frame_of_records_becomes_one_of_finished_records(generator, records):
    """As Ray Data calls it: a row is a record, of Python's own types."""
    finished = generator(pd.DataFrame(records)).to_dict("records")
    assert finished == records
    assert json.loads(json.dumps(finished)) == finished


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
    found = digests(tmp_path / "new")
    for i, record in enumerate(records):
        image = again[i] if i in (0, 2, 3) else first[i]
        image_generator.to_pil_image(image).save(tmp_path / "0-seed0.png")
        assert [found[record["file"]]] == list(digests(tmp_path).values())


def test_a_model_that_generates_nothing_is_a_user_error(generator, records, monkeypatch):
    attempts = []

    def sample_black(batch, attempt):
        attempts.append(attempt)
        return torch.zeros(len(batch), 3, 64, 64)

    monkeypatch.setattr(generator, "sample", sample_black)
    with pytest.raises(UserError, match="nothing for 'photo of a car': 10 images") as error:
        list(generator.generate(records))
    assert "\n" not in str(error.value)
    assert attempts == list(range(image_generator.MAX_ATTEMPTS))
    assert not Path(generator.folder).exists()


@pytest.fixture
def memory_for(generator, monkeypatch):
    """Let the GPU have memory for so many images: memory_for(3) returns a list of the indices of
    those that are sampled."""

    def limit(most):
        sampled = []

        def sample(batch, attempt):
            assert batch  # else the loop would never end
            if len(batch) > most:
                return None
            sampled.extend(record["index"] for record in batch)
            return torch.rand(len(batch), 3, 8, 8)

        monkeypatch.setattr(generator, "sample", sample)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        generator.batch_size = 10
        return sampled

    return limit


def test_batches_that_do_not_fit_the_memory_are_halved(
    generator, memory_for, sampling_args, capsys
):
    """Ten images: the same ones, none twice, none lost; and each halving is one line."""
    records = generate.list_records(sampling_args("out", num_samples_per_prompt=10))
    sampled = memory_for(3)
    finished = list(generator.generate(records))
    assert sampled == list(range(10))
    assert [record["index"] for record in finished] == list(range(10))
    assert generator.batch_size == 2  # ten, five, two
    assert capsys.readouterr().out.count("out of GPU memory") == 2
    memory_for(0)
    for left in (records, records[:1]):  # the last batch may be smaller than others
        generator.batch_size = 4
        with pytest.raises(UserError, match="one image at a time"):
            list(generator.generate(left))


def test_out_of_memory_is_found_and_other_errors_are_raised(generator, records, monkeypatch):
    """cuBLAS asks for memory of its own."""
    generator.sample(records, attempt=0)  # encodes the prompts
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        monkeypatch.setattr(generator, "pipeline", MagicMock(side_effect=error))
        assert generator.sample(records, attempt=0) is None
    monkeypatch.setattr(generator, "pipeline", MagicMock(side_effect=RuntimeError("sizes differ")))
    with pytest.raises(RuntimeError, match="sizes differ"):
        generator.sample(records, attempt=0)


def test_on_a_cpu_a_batch_is_always_of_the_same_size(generator, records, monkeypatch):
    """Whatever else changes: an image's last bits may depend on it. It follows from the size of the
    image: 16 images of 512 pixels are an hour's work, of which one alone would need as much."""
    sizes = []

    def note(prompt_embeds, **settings):
        sizes.append(len(prompt_embeds))
        return SimpleNamespace(images=torch.zeros(len(prompt_embeds), 3, 64, 64))

    generator.sample(records, attempt=0)  # encodes the prompts
    monkeypatch.setattr(generator, "pipeline", note)
    generator.batch_size = 4
    for _, image in generator.sample_all(records, attempt=0):
        assert image.shape == (3, 64, 64)
    assert sizes == [16, 16]
    for side, batch_size in ((64, 16), (96, 7), (256, 1), (512, 1)):
        assert image_generator.cpu_batch_size(side) == batch_size


def test_on_a_gpu_the_batch_size_follows_from_the_free_memory(monkeypatch):
    """For images of 512 pixels: 1.07 GB each, at least one and at most 16; and of larger ones no
    more than the VAE's widest layer can index with 32 bits."""
    for gigabytes, batch_size in ((80, 16), (17.2, 16), (5, 4), (0.1, 1)):
        free = int(gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 0))
        assert image_generator.batch_size_that_fits(512) == batch_size
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 0))
    assert image_generator.batch_size_that_fits(768) * 768 * 768 * 256 < 2**31


def test_without_a_gpu_minutes_per_image_are_said_before_a_large_model_loads(
    generate_args, monkeypatch, capsys
):
    monkeypatch.setattr(device, "LARGE", 1e6)
    loads = MagicMock(side_effect=UserError("it loads"))
    monkeypatch.setattr(image_generator, "load_sampling_pipeline", loads)
    with pytest.raises(UserError, match="it loads"):
        ImageGenerator(generate_args("out"))
    assert "no GPU: an image takes minutes" in capsys.readouterr().err


def test_pixels_are_rounded_as_torch_rounds():
    """Halves to even. Truncated, 0.999 would be 254."""
    image = torch.cat([torch.arange(3 * 256 - 1) / 2 / 255, torch.tensor([0.999])])
    image = image.clamp(max=1).view(3, 1, 256)
    pixels = np.asarray(image_generator.to_pil_image(image))
    assert pixels.shape == (1, 256, 3)
    assert pixels[0, -1, -1] == 255
    assert torch.equal(torch.tensor(pixels).permute(2, 0, 1), (image * 255).round().byte())


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
    assert called_in == [("samples_0", device.num_cores())]


def test_content_is_finite_and_not_of_one_colour():
    """Little contrast, as in fog, is some."""
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert image_generator.has_content(image)
    red = torch.zeros(3, 8, 8)
    red[0] = 1
    assert not image_generator.has_content(red)
    for contrast, shows in ((0.1, True), (0.01, False)):  # from the darkest pixel to the brightest
        assert image_generator.has_content(0.7 + contrast * image) == shows
    image[0, 0, 0] = float("nan")
    assert not image_generator.has_content(image)
    drawing = torch.zeros(3, 8, 8)  # in red and black: the other channels are 0 everywhere
    drawing[0, :, 4:] = 1
    assert image_generator.has_content(drawing)


def test_a_generator_on_a_cpu_is_float32_and_has_no_safety_checker(generator):
    """The weights on the disk are float16."""
    pipeline = generator.pipeline
    assert pipeline.safety_checker is None
    parameters = [*pipeline.unet.parameters(), *pipeline.vae.parameters()]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


@pytest.mark.parametrize("sigmas", ["use_exponential_sigmas", "use_beta_sigmas"])
def test_a_scheduler_with_other_sigmas_is_sampled_with_karras(sigmas):
    dpm = build_dpm({"beta_schedule": "scaled_linear", "beta_end": 0.012, sigmas: True})
    assert dpm.config.use_karras_sigmas
    assert not dpm.config[sigmas]


def test_a_cosine_schedule_is_sampled_from_its_noise_to_its_end():
    """With Karras' sigmas its first steps would be one timestep, and the last was not there."""
    config = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    for settings, karras in ((config, False), ({"beta_schedule": "scaled_linear"}, True)):
        dpm = image_generator.build_dpm(settings)
        assert dpm.config.use_karras_sigmas == karras
        dpm.set_timesteps(25)
        assert len(set(dpm.timesteps.tolist())) == 25
        sample = torch.ones(1, 4, 8, 8)
        for timestep in dpm.timesteps:
            sample = dpm.step(torch.zeros_like(sample), timestep, sample).prev_sample
        assert sample.isfinite().all()


@pytest.fixture
def sampler(monkeypatch):
    """What stands in for the pipeline of an ImageGenerator."""
    sampler = MagicMock()
    load = MagicMock(return_value=sampler)
    monkeypatch.setattr(image_generator, "load_sampling_pipeline", load)
    sampler.load = load
    return sampler


def test_a_lora_has_the_strength_that_was_asked_for(generate_args, sampler, tmp_path, monkeypatch):
    applied = MagicMock()
    monkeypatch.setattr(image_generator, "apply_lora", applied)
    ImageGenerator(generate_args("out", lora_weights_dir=tmp_path, lora_scale=0.3))
    ImageGenerator(generate_args("out", lora_weights_dir=tmp_path))
    expected = [call(sampler, str(tmp_path), scale) for scale in (0.3, 1.0)]
    assert applied.call_args_list == expected


def test_images_are_of_the_size_that_was_asked_for(generate_args, sampler):
    generator = ImageGenerator(generate_args("out", resolution=96))
    generator._encode_prompt = lambda prompt: {"prompt_embeds": torch.zeros(1, 2)}
    sampler.return_value.images = torch.zeros(7, 3, 96, 96)
    generator.sample([{"prompt": "a", "seed": 0, "index": 0}], attempt=0)
    settings = sampler.call_args.kwargs
    assert (settings["height"], settings["width"]) == (96, 96)


@pytest.fixture
def on_a_gpu(monkeypatch, sampler):
    monkeypatch.setattr(device, "pick_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(image_generator, "batch_size_that_fits", lambda side: 7)
    return sampler


def test_on_a_gpu_a_generator_is_in_float16_with_batches_as_asked_for(generate_args, on_a_gpu):
    """Or of as many images as fit."""
    assert ImageGenerator(generate_args("out", batch_size=3)).batch_size == 3
    assert ImageGenerator(generate_args("out")).batch_size == 7
    assert on_a_gpu.load.call_args.args[1] == torch.float16
    on_a_gpu.to.assert_called_with("cuda")


def test_a_gpu_that_does_not_hold_the_model_is_one_line(generate_args, on_a_gpu):
    on_a_gpu.to.side_effect = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match="the model alone does not fit this GPU"):
        ImageGenerator(generate_args("out"))
    on_a_gpu.to.side_effect = RuntimeError("no such device")
    with pytest.raises(RuntimeError, match="no such device"):
        ImageGenerator(generate_args("out"))


def test_on_a_gpu_compilation_needs_a_compiler(generate_args, on_a_gpu, monkeypatch):
    check = MagicMock(side_effect=UserError("no compiler"))
    monkeypatch.setattr(device, "check_compiler", check)
    with pytest.raises(UserError, match="no compiler"):
        ImageGenerator(generate_args("out", compile=True))
    assert not on_a_gpu.load.called


def test_on_a_cpu_compilation_needs_a_compiler(generate_args, monkeypatch):
    """It is looked for before the model is loaded."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"^--compile needs a C\+\+ compiler"):
        ImageGenerator(generate_args("out", compile=True))


def test_an_image_starts_from_the_noise_of_earlier_versions():
    """Else a folder that is completed after an update would mix two versions' images."""
    record = {"prompt": "photo of a car", "seed": 3, "index": 5}
    noise = torch.randn(1, generator=image_generator.noise_generator(record, 0)).item()
    assert noise == pytest.approx(1.268781, abs=1e-5)
