"""Images of a few prompts while a run trains: the same noise each time, so that one sees the
subject appear, and overfitting begin.

    TUNED_MODEL_DIR.report/previews/000-step000100.png     prompt 0 after 100 steps
    TUNED_MODEL_DIR.report/film-strip.png                  a row per prompt, a column per preview

Rank 0 generates them between two steps with the models that it trains; the other workers wait for
it when they next average gradients.
"""

import re
from pathlib import Path

import torch

from dreambooth import outputs

FOLDER = "previews"
FILM_STRIP = "film-strip.png"
NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 5.0


def file_name(prompt_number, step):
    """The name of a prompt's preview after `step` steps."""
    return f"{prompt_number:03d}-step{step:06d}.png"


def find(folder):
    """The previews in a report's directory: paths by step by number of the prompt, in order."""
    found = {}
    for path in sorted((Path(folder) / FOLDER).glob("*.png")):
        match = re.fullmatch(r"(\d{3,})-step(\d{6,})\.png", path.name)
        if match:
            prompt_number, step = map(int, match.groups())
            found.setdefault(prompt_number, {})[step] = path
    return found


class Previews:
    """Generates a preview of each of `args.preview_prompts` before the first step, every
    `args.preview_every` steps, and after the last."""

    def __init__(self, args, plan, vae, denoiser, report):
        self.prompts = args.preview_prompts if args.preview_every and report.writer else []
        self.every = args.preview_every
        self.num_steps = plan.num_steps
        self.seed = args.seed
        self.model_dir = args.model_dir
        self.vae = vae
        self.denoiser = denoiser
        self.report = report
        self.pipeline = None  # built when first needed

    def step_is_done(self, step):
        """Call with the number of steps done: 0 before the first."""
        if self.prompts and (step % self.every == 0 or step == self.num_steps):
            with self.report.aside("previews"):
                self._generate(step)

    def _generate(self, step):
        folder = self.report.folder / FOLDER
        folder.mkdir(exist_ok=True)
        remove_later(self.report.folder, step)
        if self.pipeline is None:
            self.pipeline = build_pipeline(self.model_dir, self.vae, self.denoiser)
        training = self.denoiser.training
        self.denoiser.eval()
        for number, prompt in enumerate(self.prompts):
            image = self._sample(prompt)
            record = {"prompt": prompt, "seed": self.seed, "step": step}
            outputs.save_image(image, record, folder / file_name(number, step))
            self.report.writer.add_image(f"previews/{prompt}", image, step)
        self.denoiser.train(training)
        write_film_strip(self.report.folder)

    @torch.no_grad()
    def _sample(self, prompt):
        """Image 0 of `prompt`, from the noise from which generate.py starts it."""
        from dreambooth.image_generator import noise_generator, to_pil_image

        record = {"prompt": prompt, "seed": self.seed, "index": 0}
        device = next(self.denoiser.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.denoiser.autocast):
            images = self.pipeline(
                prompt,
                generator=noise_generator(record, attempt=0),
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                output_type="pt",
            ).images
        return to_pil_image(images[0].float().nan_to_num().cpu())


def build_pipeline(model_dir, vae, denoiser):
    """A pipeline of the models that are being trained: no weight is copied."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        model_dir,
        vae=vae,
        text_encoder=denoiser.text_encoder,
        unet=denoiser.unet,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, use_karras_sigmas=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def remove_later(folder, step):
    """Remove the previews of later steps than `step`: of the run before a resume, or another."""
    for by_step in find(folder).values():
        for other, path in by_step.items():
            if other > step:
                path.unlink()


def write_film_strip(folder):
    """Lay all previews out on one sheet."""
    rows = {}
    for by_step in find(folder).values():
        paths = [by_step[step] for step in sorted(by_step)]
        prompt = (outputs.read_record(paths[0]) or {}).get("prompt", "")
        steps = ", ".join(map(str, sorted(by_step)))
        rows[f"{prompt} after {steps} steps"] = paths
    if rows:
        columns = max(len(paths) for paths in rows.values())
        outputs.contact_sheet(rows, Path(folder) / FILM_STRIP, columns, side=128)
