"""Images of a few prompts while a run trains: the same noise each time, so that one sees the
subject appear, and overfitting begin.

    TUNED_MODEL_DIR.report/previews/000-step000100.png     prompt 0 after 100 steps
    TUNED_MODEL_DIR.report/film-strip.png                  a row per prompt, a column per preview

Rank 0 generates them between two steps with the models that it trains; the other workers wait for
it when they next average gradients.
"""

import re
import shutil
from pathlib import Path

from dreambooth.files import generated_images

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
    `args.preview_every` steps, and after the last: on rank 0."""

    def __init__(self, args, plan, vae, denoiser, encoded_prompts, log):
        self.enabled = log.enabled
        self.prompts = args.preview_prompts if log.enabled else []
        self.every = args.preview_every
        self.num_steps = plan.num_steps
        self.folder = plan.report_dir
        self.seed = args.seed
        self.resolution = plan.resolution
        self.model_dir = args.model_dir
        self.vae = vae
        self.denoiser = denoiser
        self.inputs = encoded_prompts.get("previews")  # where a family encodes its prompts once
        self.log = log
        self.pipeline = None  # built when first needed

    def on_train_begin(self, first_step):
        """Previews of an earlier run, or of steps that are done again, go."""
        if self.enabled and first_step == 0:
            shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
            (self.folder / FILM_STRIP).unlink(missing_ok=True)
        elif self.enabled:
            remove_outdated(self.folder, first_step, self.prompts)
        self.on_step_end(first_step)

    def on_step_end(self, step, **metrics):
        if self.prompts and (step % self.every == 0 or step == self.num_steps):
            with self.log.timed_apart("previews"), self.log.warn_if_not_written("previews"):
                self._generate(step)

    def on_train_end(self):
        pass

    def _generate(self, step):
        (self.folder / FOLDER).mkdir(exist_ok=True)
        if self.pipeline is None:
            self.pipeline = self._build_pipeline()
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            images = [self._sample(prompt) for prompt in self.prompts]
        finally:
            self.denoiser.train(training)
        for number, (prompt, image) in enumerate(zip(self.prompts, images, strict=True)):
            record = {"prompt": prompt, "seed": self.seed, "step": step}
            file = self.folder / FOLDER / file_name(number, step)
            generated_images.save_image(image, record, file)
            self.log.add_image(f"previews/{prompt}", image, step)
        write_film_strip(self.folder)

    def _sample(self, prompt):
        """Image 0 of `prompt`, from the noise from which generate.py starts it, but always with
        NUM_INFERENCE_STEPS and GUIDANCE_SCALE."""
        import torch  # here: report/page.py looks at previews without it

        from dreambooth.image_generator import PIPELINE_PIXELS, noise_generator, to_pil_image

        side = self.resolution - self.resolution % PIPELINE_PIXELS
        record = {"prompt": prompt, "seed": self.seed, "index": 0}
        device = next(self.denoiser.parameters()).device.type
        autocast = torch.autocast(device, torch.bfloat16, enabled=self.denoiser.autocast)
        with torch.no_grad(), autocast:
            images = self.pipeline(
                **(self.inputs[prompt] if self.inputs else {"prompt": prompt}),
                generator=noise_generator(record, attempt=0),
                height=side,
                width=side,
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                output_type="pt",
            ).images
        return to_pil_image(images[0].float().nan_to_num().cpu())

    def _build_pipeline(self):
        """A pipeline of the models that are being trained: no weight is copied."""
        from dreambooth.image_generator import load_sampling_pipeline

        facts = self.denoiser.family.facts
        parts = {"vae": self.vae, facts.backbone: self.denoiser.backbone}
        for name in facts.text_encoders:
            parts[name] = getattr(self.denoiser, name, None)  # None where prompts are encoded
        scheduler, steps = facts.sampler["scheduler"], NUM_INFERENCE_STEPS
        return load_sampling_pipeline(self.model_dir, scheduler=scheduler, num_steps=steps, **parts)


def remove_outdated(folder, first_step, prompts):
    """Remove what a resumed run will not show: previews of later steps than `first_step`, what a
    power cut has truncated, and those of other prompts, unless there are no `prompts` now."""
    for number, by_step in find(folder).items():
        for step, file in by_step.items():
            record = generated_images.read_record(file)
            is_other = record and record["prompt"] not in prompts[number : number + 1]
            is_damaged = not generated_images.is_whole(file)
            if step > first_step or is_damaged or prompts and is_other:
                file.unlink()


def write_film_strip(folder):
    """Lay all previews out on one sheet."""
    rows = {}
    for by_step in find(folder).values():
        paths = [by_step[step] for step in sorted(by_step)]
        prompt = (generated_images.read_record(paths[0]) or {}).get("prompt", "")
        steps = ", ".join(map(str, sorted(by_step)))
        rows[f"{prompt} after {steps} steps"] = paths
    if rows:
        columns = max(len(paths) for paths in rows.values())
        generated_images.contact_sheet(rows, Path(folder) / FILM_STRIP, columns, side=128)
