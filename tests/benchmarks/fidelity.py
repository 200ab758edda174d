"""Does a tuned pocket model know its subject, and does it still know everything else?

    python tests/benchmarks/fidelity.py --model_dir $ORIG_MODEL_PATH --tuned_model_dir $TUNED_MODEL_DIR

The project's own renderer knows how everything in pocket's world looks, the lego car included, so
the judge is exact and offline: thousands of rendered pictures with labels, and for each generated
picture the label of its nearest neighbour among them. Reported, over --num_samples pictures each:

    subject       "photo of unqtkn car"               shows the lego car
    composition   "photo of unqtkn car in the snow"   shows the lego car, and snow (mean of that and of "at night")
    prior         "photo of a car"                    shows a car, and not the lego car
    diversity     "photo of a car"                    distance between two of them, relative to before
    others        "photo of a house"                  shows a house

With a real model, --encoder names a DINO and a CLIP directory, and the figures are the paper's: see encoders.py.

    python tests/benchmarks/fidelity.py --model_dir $ORIG_MODEL_PATH --tuned_model_dir $TUNED_MODEL_DIR \\
        --encoder ~/dino-vits16 ~/clip-vit-base-patch32 --instance_images_dir images/dog --live_subject \\
        --num_samples 4 --guidance_scale 7.5
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import generate
from dreambooth import checks
from dreambooth.images import find_images, open_image
from dreambooth.pocket import render
from tests.benchmarks.encoders import LIVE, OBJECT, Encoders, paper_report

SNOW, NIGHT = "in the snow", "at night"


def colours(pictures):
    """Pictures (N, 64, 64, 3) uint8 as (N, 768) rows: colours at 16 x 16 points, each the mean of 4 x 4 pixels."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    return F.avg_pool2d(x, 4).flatten(1)


def edges(pictures):
    """The same as (N, 512) rows: how much edge, across and down, there is at 16 x 16 points; strong and
    weak edges count nearly alike, so that shapes compare whatever their colours and the light."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    across = F.pad(x.diff(dim=3).abs().sum(1, keepdim=True), (0, 1))
    down = F.pad(x.diff(dim=2).abs().sum(1, keepdim=True), (0, 0, 0, 1))
    strength = torch.cat([across, down], dim=1)
    return F.avg_pool2d(strength / (strength + 0.15), 4).flatten(1)


@torch.inference_mode()
def through(vae, pictures):
    """Pictures (N, 64, 64, 3) uint8 as the model's autoencoder shows them: as soft as what it generates."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    seen = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(64)])
    return ((seen + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


class Judge:
    """Labels a picture by its nearest neighbours among renders: the one by edges names its class, the one
    by colours all else (place, colour, subject or not). The renders have gone through `vae`, as generated
    pictures have: against crisp ones a house with soft edges passes for a car."""

    def __init__(self, vae=None, num_world=12_000, num_subject=2_000, seed=1):
        rng = np.random.default_rng(seed)
        scenes = [render.sample_scene(rng) for _ in range(num_world)]
        scenes += [replace(render.LEGO_CAR, place=render.PLACES[i % 5]) for i in range(num_subject)]
        self.scenes = scenes
        renders = np.stack([np.asarray(render.render(scene, rng)) for scene in scenes])
        if vae is not None:
            renders = through(vae, renders)
        self.known = {space: space(renders) for space in (colours, edges)}

    def __call__(self, pictures):
        """A scene for each picture; pictures (N, 64, 64, 3) uint8."""
        nearest = {space: torch.cdist(space(pictures), known).argmin(1) for space, known in self.known.items()}
        pairs = zip(nearest[colours].tolist(), nearest[edges].tolist(), strict=True)
        return [replace(self.scenes[c], kind=self.scenes[e].kind) for c, e in pairs]


def is_subject(scene):
    return scene.kind == "car" and scene.body == render.LEGO_CAR.body


def share(scenes, condition):
    return sum(map(condition, scenes)) / len(scenes)


def diversity(pictures):
    """Mean distance between the features of two of the pictures."""
    return torch.pdist(colours(pictures)).mean().item()


class Sampler:
    """One model's pictures of a prompt, through generate.py's own painter; drawn once."""

    def __init__(self, args, model_dir, lora_weights_dir=None):
        flags = {name: getattr(args, name) for name in ("guidance_scale", "scheduler", "num_inference_steps")}
        if lora_weights_dir:
            flags["lora_weights_dir"] = lora_weights_dir
        words = [f"--{name}={value}" for name, value in {"model_dir": model_dir, "output_dir": ".", **flags}.items()]
        self.painter, self.args, self.drawn = generate.Painter(generate.parse_args(words)), args, {}

    def __call__(self, prompt, count=None):
        """`count` pictures, --num_samples where not given: (count, H, W, 3) uint8."""
        key = prompt, count or self.args.num_samples
        if key not in self.drawn:
            records = [{"prompt": prompt, "seed": self.args.seed, "index": i} for i in range(key[1])]
            images = [generate.to_image(picture) for _, picture in self.painter.draw_all(records, 0)]
            self.drawn[key] = np.stack([np.asarray(image) for image in images])
        return self.drawn[key]


def subject_report(draw, judge, before):
    """The figures of the docstring for one model; `draw(prompt)` samples it, `before` is the original's
    pictures of "photo of a car"."""
    cars, token = draw("photo of a car"), "photo of unqtkn car"
    judged = judge(cars)
    return {
        "subject": share(judge(draw(token)), is_subject),
        "composition": np.mean(
            [
                share(judge(draw(f"{token} {place}")), lambda s, place=place: is_subject(s) and s.place == place)
                for place in (SNOW, NIGHT)
            ]
        ),
        "prior": share(judged, lambda s: s.kind == "car" and not is_subject(s)),
        "diversity": diversity(cars) / diversity(before),
        "others": share(judge(draw("photo of a house")), lambda s: s.kind == "house"),
    }


def world_report(draw, judge):
    """How often a picture shows what its caption says: class, place and colour, for the original model."""
    right = {"class": [], "place": [], "colour": []}
    for kind in render.CLASSES:
        for place in render.PLACES:
            colour = list(render.COLOURS)[(len(right["class"]) * 2) % len(render.COLOURS)]
            scenes = judge(draw(f"photo of {'an' if colour == 'orange' else 'a'} {colour} {kind} {place}"))
            right["class"].append(share(scenes, lambda s, kind=kind: s.kind == kind))
            right["place"].append(share(scenes, lambda s, place=place: s.place == place))
            right["colour"].append(share(scenes, lambda s, colour=colour: s.colour == colour))
    return {name: float(np.mean(values)) for name, values in right.items()}


def judge_accuracy(judge, count=1000):
    """The judge on renders that it has not seen: the most that any model could reach."""
    rng = np.random.default_rng(99)
    scenes = [render.sample_scene(rng) for _ in range(count // 2)]
    scenes += [replace(render.LEGO_CAR, place=render.PLACES[i % 5]) for i in range(count // 2)]
    found = judge(np.stack([np.asarray(render.render(scene, rng)) for scene in scenes]))
    pairs = list(zip(scenes, found, strict=True))
    tests = {
        "class": lambda a, b: a.kind == b.kind, "place": lambda a, b: a.place == b.place,
        "colour": lambda a, b: a.colour == b.colour, "subject": lambda a, b: is_subject(a) == is_subject(b),
    }  # fmt: skip
    return {name: np.mean([test(a, b) for a, b in pairs]) for name, test in tests.items()}


def print_row(name, figures):
    print(f"{name:>12}  " + "  ".join(f"{key} {value:.2f}" for key, value in figures.items()), flush=True)


def main(args):
    samplers = {"original": Sampler(args, args.model_dir)}
    samplers |= {Path(folder).name: Sampler(args, folder) for folder in args.tuned_model_dir}
    samplers |= {Path(folder).name: Sampler(args, args.model_dir, folder) for folder in args.lora_weights_dir}
    if args.encoder:
        encoders = Encoders(*args.encoder, device=samplers["original"].painter.device)
        photos = [np.asarray(open_image(path)) for path in find_images(args.instance_images_dir)]
        for name, draw in samplers.items():
            scenes = LIVE if args.live_subject else OBJECT
            print_row(name, paper_report(draw, encoders, photos, args.subject, args.class_name, scenes))
        return
    judge = Judge(samplers["original"].painter.pipeline.vae)
    print_row("judge", judge_accuracy(judge))
    if args.world:
        print_row("world", world_report(lambda prompt: samplers["original"](prompt, 8), judge))
    before = samplers["original"]("photo of a car")
    for name, draw in samplers.items():
        print_row(name, subject_report(draw, judge, before))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=checks.HelpFormatter)
    parser.add_argument("--model_dir", required=True, help="the original pocket model")
    parser.add_argument("--tuned_model_dir", nargs="+", default=[], help="tuned ones: a row each")
    parser.add_argument("--lora_weights_dir", nargs="+", default=[], help="LoRAs on the original: a row each")
    parser.add_argument("--num_samples", type=int, default=64, help="pictures a prompt")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--scheduler", choices=["dpm", "model"], default="dpm", help="as in generate.py")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="weight of the prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    parser.add_argument("--world", action="store_true", help="also report how well the original knows its world")
    parser.add_argument("--encoder", nargs=2, metavar=("DINO_DIR", "CLIP_DIR"), help="the paper's figures with these")
    parser.add_argument("--instance_images_dir", help="with --encoder: photos of the subject")
    parser.add_argument("--subject", default="unqtkn dog", help="with --encoder: its name in prompts")
    parser.add_argument("--class_name", default="dog", help="with --encoder: of its class")
    parser.add_argument("--live_subject", action="store_true", help="with --encoder: the paper's scenes for animals")
    main(parser.parse_args())
