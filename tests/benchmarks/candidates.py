"""What would make the recipe better? Each candidate changes one thing in training, for all subjects
and seeds of subjects.py, whose flags this script takes as well.

    python tests/benchmarks/candidates.py --candidate ema --work_dir /tmp/subjects

    ema                exponential moving average of the weights, with a decay of 0.99
    text_encoder_lr    the text encoder's learning rate is a quarter of the U-Net's
    other_classes      every tenth class image is one of all classes in turn, with its own prompt
    empty_prompt       every tenth class image was generated with the empty prompt, and has it
    noise_offset       noise with an offset of 0.1 per image and channel
    mirror             every second crop of a photo is mirrored
    mixed              every second class image is one of all classes or of the empty prompt
    mixed_places       the same, of all classes in all places
    ten_prompts        20 class images of the class in each place, and 20 of each other class
    photos_for_class   no class images: the photos, under the class prompt and those of mixed
    denoised           mixed, with images that the original model denoises in 6 steps
    captions           three of the five photos have a caption that names their place
    frozen_text        --no-train_text_encoder
    min_snr            --snr_gamma 5
    fewer_steps        200 steps, not 300
    faster             the same at lr 4.5e-4, not 3e-4
    noise_target       --prior_target noise, the paper's
    all_noise          the photos are trained at all timesteps, and at lr 2e-4

A candidate that wins becomes part of the recipe; one that does not is a line in RESULTS.md.
"""

import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from dreambooth import dataset, latents, models
from dreambooth.files import atomic
from dreambooth.files.photos import find_images
from dreambooth.pocket import render
from dreambooth.seeds import seed_for
from tests.benchmarks import fidelity, subjects

EMA_DECAY = 0.99
TEXT_ENCODER_LR = 0.25  # times --lr
NOISE_OFFSET = 0.1
OTHER_EVERY = 10  # pairs
NUM_OTHER_IMAGES = 40
FLAGS = {
    "min_snr": "--snr_gamma 5",
    "fewer_steps": "--max_train_steps 200",
    "faster": "--max_train_steps 200 --lr 4.5e-4",
    "noise_target": "--prior_target noise",
    "all_noise": "--max_instance_noise 1 --lr 2e-4",
    "frozen_text": "--no-train_text_encoder",
}


def ema(args):
    original = subjects.train_here

    def train_here(train_args):
        average = []

        @torch.no_grad()
        def on_step(step, denoiser):
            parameters = [p for p in denoiser.parameters() if p.requires_grad]
            if step == 1:
                average.extend(p.clone() for p in parameters)
            decay = min(EMA_DECAY, step / (step + 9))  # forgets the first steps soon
            for mean, p in zip(average, parameters, strict=True):
                mean.lerp_(p, 1 - decay)

        denoiser = original(train_args, on_step)
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        for p, mean in zip(trained, average, strict=True):
            p.data.copy_(mean)
        return denoiser

    return [patch.object(subjects, "train_here", train_here)]


def text_encoder_lr(args):
    load, build = models.load_models, models.build_optimizer
    of_text_encoder = set()

    def load_models(*args):
        vae, denoiser, scheduler = load(*args)
        of_text_encoder.clear()
        of_text_encoder.update(map(id, denoiser.text_encoder.parameters()))
        return vae, denoiser, scheduler

    def build_optimizer(parameters, args):
        unet = [p for p in parameters if id(p) not in of_text_encoder]
        text_encoder = [p for p in parameters if id(p) in of_text_encoder]
        groups = [{"params": unet}, {"params": text_encoder, "lr": args.lr * TEXT_ENCODER_LR}]
        return build(groups, args)

    return [
        patch.object(models, "load_models", load_models),
        patch.object(models, "build_optimizer", build_optimizer),
    ]


def noise_offset(args):
    original = latents.sample_noise

    def sample_noise(seed, positions, latent_shape, device):
        posterior_noise, noise = original(seed, positions, latent_shape, device)
        offsets = []
        for position in positions:
            generator = torch.Generator().manual_seed(seed_for("noise offset", seed, position))
            offsets.append(torch.randn((2, latent_shape[0], 1, 1), generator=generator))
        offset = torch.stack(offsets, dim=1).flatten(0, 1)  # (2B, C, 1, 1), in the noise's order
        return posterior_noise, noise + NOISE_OFFSET * offset

    return [patch.object(latents, "sample_noise", sample_noise)]


def mirror(args):
    original = subjects.load_crops

    def load_crops(pairs, resolution, seed):
        columns = original(pairs, resolution, seed)
        odd = columns["position"] % 2 == 1
        images, keys = columns["instance_image"], columns["instance_key"]
        images[odd] = images[odd][..., ::-1]
        columns["instance_key"] = np.where(odd, np.char.add(keys, ":mirrored"), keys)
        return columns

    return [patch.object(subjects, "load_crops", load_crops)]


def other_classes(args):
    return OtherImages(args, [f"photo of a {kind}" for kind in render.CLASSES]).patches()


def empty_prompt(args):
    return OtherImages(args, [""]).patches()


def mixed(args, **settings):
    prompts = [*(f"photo of a {kind}" for kind in render.CLASSES), ""]
    return OtherImages(args, prompts, every=2, count=20, **settings).patches()


def mixed_places(args):
    prompts = [f"photo of a {kind} {place}" for kind in render.CLASSES for place in render.PLACES]
    return OtherImages(args, [*prompts, ""], every=2, count=5).patches()


def ten_prompts(args):
    def prompts(class_prompt):
        others = [f"photo of a {kind}" for kind in render.CLASSES]
        others.remove(class_prompt)
        return [f"{class_prompt} {place}" for place in render.PLACES] + others

    return OtherImages(args, prompts, every=1, count=20).patches()


def captions(args):
    """Each of three photos has a caption that names its place, the other two have none."""
    places = ("on the grass", "on the road", "on the beach")  # as render.write_photos has them

    def photos(bench, name):
        folder = bench.work_dir / "photos with captions" / name  # the others' stay without
        render.write_photos(name, folder)
        prompt = fidelity.instance_prompt(render.SUBJECTS[name])
        for number, place in enumerate(places):
            (folder / f"{number}.txt").write_text(f"{prompt} {place}\n", encoding="utf-8")
        return folder

    return [patch.object(subjects.Bench, "photos", photos)]


def photos_for_class(args):
    return mixed(args, photos=True)


def denoised(args):
    return mixed(args, num_inference_steps=6)


class OtherImages:
    """Every so-many-th class image is one of `prompts`, in turn, and is trained with its prompt.
    With `photos`, all of them are the pair's photo."""

    def __init__(self, args, prompts, every=None, count=NUM_OTHER_IMAGES, photos=False, **settings):
        """`prompts`: a list, or a function that makes it of the class prompt."""
        self.every, self.photos = every or OTHER_EVERY, photos
        self.prompts_of = prompts if callable(prompts) else lambda class_prompt: prompts
        self.images = lambda prompt: other_images(args, prompt, count, **settings)
        self.originals = dataset.pair_images, subjects.make_plan

    def patches(self):
        return [
            patch.object(dataset, "pair_images", self.pair_images),
            patch.object(subjects, "make_plan", self.make_plan),
        ]

    def make_plan(self, args):
        """With these prompts behind those of the run."""
        plan = self.originals[1](args)
        prompts = self.prompts_of(args.class_prompt)
        self.first = len(plan.prompts)
        plan.prompts += prompts
        self.paths = prompts if self.photos else [self.images(prompt) for prompt in prompts]
        return plan

    def pair_images(self, *args):
        pairs = self.originals[0](*args)
        for n, pair in enumerate(pairs[self.every - 1 :: self.every]):
            which = n % len(self.paths)
            paths = self.paths[which]
            if not self.photos:
                pair["class"] = str(paths[n // len(self.paths) % len(paths)])
            pair["class_prompt"] = self.first + which
        for pair in pairs if self.photos else ():
            pair["class"] = pair["instance"]
        return pairs


def other_images(args, prompt, count, num_inference_steps=25):
    """`count` images of `prompt` by the original model, as class images are made."""
    name = f"{prompt or 'empty prompt'}, {num_inference_steps} steps"
    folder = Path(args.work_dir) / "class" / name
    if not folder.is_dir() or len(find_images(folder)) < count:
        flags = ["--model_dir", args.model_dir, "--guidance_scale", "1"]
        flags += ["--num_inference_steps", str(num_inference_steps)]
        sample = fidelity.Sampler(fidelity.parse_args(flags), args.model_dir)
        images = sample(prompt, count)

        def write(temporary):
            for i, image in enumerate(images):
                Image.fromarray(image).save(temporary / f"{i:03}.png")

        atomic.replace_dir(folder, write)
    return find_images(folder)[:count]


CANDIDATES = {
    "ema": ema,
    "text_encoder_lr": text_encoder_lr,
    "other_classes": other_classes,
    "empty_prompt": empty_prompt,
    "noise_offset": noise_offset,
    "mirror": mirror,
    "captions": captions,
    "ten_prompts": ten_prompts,
    "mixed": mixed,
    "mixed_places": mixed_places,
    "photos_for_class": photos_for_class,
    "denoised": denoised,
}


@contextmanager
def changed_training(name, args):
    """Training as the candidate `name` has it; `args`: those of subjects.py."""
    with ExitStack() as stack:
        if name in CANDIDATES:  # else flags are all that it changes
            for change in CANDIDATES[name](args):
                stack.enter_context(change)
        yield


def main(args):
    args.train_flags += " " + FLAGS.get(args.candidate, "")
    with changed_training(args.candidate, args):
        subjects.main(args, args.candidate)


def parse_args(argv=None):
    parser = subjects.build_parser(__doc__)
    parser.add_argument("--candidate", choices=sorted({*CANDIDATES, *FLAGS}), required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
