"""Generates the image of each record, in this process or as an actor of Ray Data.

A record is a dict that says all an image depends on: prompt, seed, index, file name, and settings.
"""

import argparse
import gc
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from dreambooth.cli import UserError, configure_logs
from dreambooth.families import family_of
from dreambooth.files import generated_images, pipeline_dir
from dreambooth.lora import apply_lora
from dreambooth.machines import device
from dreambooth.seeds import seed_for

PIPELINE_PIXELS = 8  # the sides of images that diffusers' pipelines generate are multiples of it
CPU_PIXELS = 16 * 64 * 64  # per batch on a CPU
MAX_BATCH = 16  # on a GPU: larger batches are hardly faster
VAE_WIDTH = 256  # channels of the decoder's widest layer at full size
MIN_LAST_ALPHA = 1e-4  # Stable Diffusion's cumulative alpha ends at 0.0047
KEPT_PROMPTS = 32  # encoded: of FLUX.2-klein, 15 MiB of GPU memory each
MAX_ATTEMPTS = 10  # an image without content is sampled again, with other noise


class ImageGenerator:
    """Loads the pipeline once and generates the images of records in batches."""

    def __init__(self, args):
        configure_logs(args.verbose, loads_models=True)
        self.args = args = with_defaults(args)
        self.device = device.pick_device()
        self.padded_size = cpu_batch_size(args.resolution) if self.device == "cpu" else None
        if args.compile:
            device.check_compiler("--compile", self.device)
        if self.device == "cpu":
            warn_if_images_are_slow(args)
        self.folder = Path(args.output_dir)
        self.family = family_of(args.model_dir)
        self.inputs = {}  # of the pipeline, by prompt
        self.dtype = self.family.dtype_on_gpu if self.device == "cuda" else torch.float32
        self.pipeline = load_sampling_pipeline(
            args.model_dir, self.dtype, args.scheduler, args.num_inference_steps
        )
        if args.lora_weights_dir:
            apply_lora(self.pipeline, args.lora_weights_dir, args.lora_scale)
        backbone = getattr(self.pipeline, self.family.facts.backbone)
        if self.device == "cpu":  # a GPU's group norms undo it
            backbone.to(memory_format=torch.channels_last)
        if self.device == "cuda":
            gc.collect()  # the model before --compare_to's: FLUX.2-klein's refers to itself
        try:
            self.pipeline.to(self.device)
        except RuntimeError as error:
            if not device.is_out_of_memory(error):
                raise
            raise UserError("out of GPU memory: the model alone does not fit this GPU") from None
        if self.device == "cuda":
            torch.cuda.empty_cache()  # what another model has left, as with --compare_to
        self.batch_size = self.padded_size or args.batch_size
        if self.batch_size is None:  # asked here, with the weights on the GPU
            self.batch_size = batch_size_that_fits(args.resolution)
        if args.compile:
            backbone.compile_repeated_blocks()

    def __call__(self, batch):
        """For Ray Data: a data frame of records in, the finished records out."""
        return pd.DataFrame(list(self.generate(batch.to_dict("records"))))

    def generate(self, records):
        """Generate and save the images of `records`; yields each record once its image is saved.

        An image without content (all of one colour, or with NaNs) is never saved: it is sampled
        again with other noise.
        """
        saving = deque()
        remaining = list(records)
        with ThreadPoolExecutor() as threads:  # which save images while the next ones are sampled
            for attempt in range(MAX_ATTEMPTS):
                empty = []
                for record, image in self.sample_all(remaining, attempt):
                    if has_content(image):
                        saving.append(threads.submit(self.save, record, image))
                    else:
                        empty.append(record)
                    while saving and saving[0].done():
                        yield saving.popleft().result()
                remaining = empty
                if not remaining:
                    break
            yield from (saved.result() for saved in saving)
        if remaining:
            prompt = remaining[0]["prompt"]
            raise UserError(
                f"the model generates nothing for {prompt!r}: {MAX_ATTEMPTS} images without content"
            )

    def sample_all(self, records, attempt):
        """Yields each record with its image, in batches of a size for which the memory suffices."""
        start = 0
        while start < len(records):
            batch = records[start : start + self.batch_size]
            images = self.sample(batch, attempt)
            if images is None:  # only here, outside of `except`, is the failed batch's memory free
                self._halve_batch_size(len(batch))
                continue
            yield from zip(batch, images, strict=True)
            start += len(batch)

    def _halve_batch_size(self, failed):
        self.pipeline.vae.to(self.dtype)  # SDXL's is in float32 while it decodes
        torch.cuda.empty_cache()
        if failed == 1:
            raise UserError("out of GPU memory with one image at a time: use a larger GPU")
        self.batch_size = failed // 2
        print(f"out of GPU memory: continuing with batches of {self.batch_size}", flush=True)

    @torch.inference_mode()
    def sample(self, records, attempt):
        """The images (N, 3, H, W) in [0, 1] of N records; None if the GPU runs out of memory."""
        if self.device == "cpu":
            # Ray gives an actor one thread; and the number of threads shows in the last bits. Not
            # in __init__, which Ray Data calls in another thread: OpenMP would give both of them
            # a pool of threads, and two pools get in each other's way.
            torch.set_num_threads(device.num_cores())
        size = self.padded_size or len(records)
        padded = (records + [records[-1]] * size)[:size]
        try:
            inputs = [self._encode_prompt(record["prompt"]) for record in padded]
            images = self.pipeline(
                **{name: torch.cat([given[name] for given in inputs]) for name in inputs[0]},
                generator=[noise_generator(record, attempt) for record in padded],
                height=self.args.resolution,
                width=self.args.resolution,
                num_inference_steps=self.args.num_inference_steps,
                guidance_scale=self.args.guidance_scale,
                output_type="pt",
            ).images
        except RuntimeError as error:
            if not device.is_out_of_memory(error):
                raise
            return None
        return images[: len(records)].float().cpu()

    def _encode_prompt(self, prompt):
        """What the pipeline needs of a prompt: tensors (1, ...) by name, kept for later images."""
        if prompt not in self.inputs:
            if len(self.inputs) == KEPT_PROMPTS:
                self.inputs.clear()
            self.inputs[prompt] = self.family.sampler_inputs(self.pipeline, prompt, self.device)
        return self.inputs[prompt]

    def save(self, record, image):
        """Write one image (3, H, W); returns its record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        generated_images.save_image(to_pil_image(image), record, self.folder / record["file"])
        return record


def with_defaults(args):
    """The arguments with the model's own scheduler, steps, guidance and resolution where none are
    given."""
    side, _ = pipeline_dir.resolution(args.model_dir)
    defaults = {**pipeline_dir.read_facts(args.model_dir).sampler, "resolution": side}
    missing = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    return argparse.Namespace(**{**vars(args), **missing})


def warn_if_images_are_slow(args):
    """Say that an image takes long, with a large model and without a GPU."""
    device.warn_if_slow(pipeline_dir.num_parameters(args.model_dir), "an image")


def load_sampling_pipeline(model_dir, dtype=None, scheduler="dpm", num_steps=10, **parts):
    """The pipeline of `model_dir` to sample from; `parts` are models to take in place of its own.
    `scheduler`: "dpm", that of `build_dpm`, or "model", the model's own. UserError: a part cannot
    be loaded, or the scheduler does not take `num_steps`."""
    if scheduler != "model":  # the model's own may be one that is not even installed
        with pipeline_dir.loading(f"{model_dir}/scheduler"):
            config = pipeline_dir.read_config(Path(model_dir) / pipeline_dir.SCHEDULER, model_dir)
            parts["scheduler"] = build_dpm(config)
    pipeline = pipeline_dir.load_pipeline(model_dir, dtype, **parts)
    with pipeline_dir.loading(f"{model_dir}/scheduler, for {num_steps} steps,"):
        shift = {"mu": 1.0} if pipeline.scheduler.config.get("use_dynamic_shifting") else {}
        pipeline.scheduler.set_timesteps(num_steps, **shift)  # fails here, not after minutes
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_dpm(config):
    """DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) with the sigmas of Karras et al. 2022 (arXiv
    2206.00364) for a noise schedule; the one that adds noise at each step if the model's own
    scheduler is that.

    Where the last timestep is all but pure noise (cosine, zero SNR), without Karras: its first
    steps are all so noisy that they fall on that one timestep.
    """
    from diffusers import DPMSolverMultistepScheduler  # here: not needed if nothing is missing

    adds_noise = config.get("algorithm_type") == "sde-dpmsolver++"
    kind = "sde-dpmsolver++" if adds_noise else "dpmsolver++"
    config = {**config, "algorithm_type": kind}
    config |= {"use_exponential_sigmas": False, "use_beta_sigmas": False}
    dpm = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    if dpm.alphas_cumprod[-1] < MIN_LAST_ALPHA:
        dpm = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=False)
    return dpm


def noise_generator(record, attempt):
    """The generator of an image's random numbers: its record and the attempt alone decide them."""
    prompt = zlib.crc32(record["prompt"].encode())
    seed = seed_for("image", record["seed"], record["index"], prompt, attempt)
    return torch.Generator().manual_seed(seed)


def cpu_batch_size(side):
    """The number of images per forward pass on a CPU, padded at the end: 16 at 64 px, 1 from 184 px
    on. Constant for a size: an image's arithmetic may depend, in the last bits, on the size of its
    batch, but never on the other images in it."""
    return max(1, CPU_PIXELS // side**2)


def batch_size_that_fits(side):
    """The number of images of `side` pixels for which the GPU's free memory should suffice, at most
    MAX_BATCH, and for which the VAE's widest layer has an index that fits 32 bits."""
    free, _ = torch.cuda.mem_get_info()
    pixels = side * side
    fits = free // (pixels * device.BYTES_PER_PIXEL)
    return max(1, min(MAX_BATCH, fits, (2**31 - 1) // (pixels * VAE_WIDTH)))


def to_pil_image(image):
    """A (3, H, W) image in [0, 1] with 8 bits per channel.

    In numpy, as it is called in the threads that save images: for OpenMP's pools, see `sample`.
    """
    pixels = image.numpy().transpose(1, 2, 0) * np.float32(255)
    return Image.fromarray(pixels.round().astype(np.uint8))


def has_content(image):
    """Whether a (3, H, W) image shows anything: finite, and not of one colour."""
    return bool(torch.isfinite(image).all()) and image.std(dim=(1, 2)).max().item() > 0.01
