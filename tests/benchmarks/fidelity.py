"""Does a tuned pocket model know its subject, and does it still know everything else?

    python tests/benchmarks/fidelity.py --model_dir $ORIG_MODEL_PATH \\
        --tuned_model_dir $TUNED_MODEL_DIR

The project's own renderer knows how everything in pocket's world looks, the subjects included, so
the judge is exact and needs no network: thousands of renders with labels, and for each generated
image the labels of its nearest neighbours among them, by edges and by colours. The metrics, over
--num_samples images each, for the LEGO car (--pocket_subject names another subject, whose class
stands in the prompts):

    subject       "photo of unqtkn car"               shows the LEGO car
    likeness      "photo of unqtkn car in the snow"   shows the LEGO car as its renderer draws it
                                                      (likeness.py; mean of the five places)
    composition   "photo of unqtkn car in the snow"   shows the LEGO car, and snow (mean of that and
                                                      of "at night")
    prior         "photo of a car"                    shows a car, and not the LEGO car
    diversity     "photo of a car"                    distance between two images
    house, ...    "photo of a house"                  each of the five other classes: shape and
                                                      colours are those of a house

Prior, diversity and the other classes are relative to the original model's, from the same noise,
which no tuned model need surpass. A row says how the judge itself does on fresh renders. What is
below its aim is measured again with --more_samples images, and that number counts.

The metrics of the paper, for real models, are in paper_metrics.py.
"""

import json
import sys
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

import generate
from dreambooth.cli import ArgumentParser
from dreambooth.image_generator import ImageGenerator, to_pil_image
from dreambooth.pocket import render
from tests.benchmarks.likeness import Likeness

SNOW = "in the snow"
NIGHT = "at night"


def colours(images):
    """Images (N, 64, 64, 3) uint8 as (N, 768) features: the mean colour of each 4 x 4 pixels."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return F.avg_pool2d(x, 4).flatten(1)


def edges(images):
    """The same images as (N, 512) features: the strength of horizontal and of vertical edges in
    each 4 x 4 pixels. Strong and weak edges count nearly alike, so that shapes compare whatever
    their colours and the light."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    across = F.pad(x.diff(dim=3).abs().sum(1, keepdim=True), (0, 1))
    down = F.pad(x.diff(dim=2).abs().sum(1, keepdim=True), (0, 0, 0, 1))
    strength = torch.cat([across, down], dim=1)
    return F.avg_pool2d(strength / (strength + 0.15), 4).flatten(1)


@torch.inference_mode()
def reconstruct(vae, images):
    """Images (N, 64, 64, 3) uint8 through the model's VAE: as soft as what it generates."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    latents = [vae.encode(part).latent_dist.mode() for part in x.split(64)]
    decoded = torch.cat([vae.decode(part).sample for part in latents])
    pixels = ((decoded + 1) * 127.5).round().clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def subject_in_turn(subject, count):
    """`count` scenes of `subject`, in each place in turn."""
    places = render.PLACES
    return [replace(subject, place=places[i % len(places)]) for i in range(count)]


def render_all(scenes, rng):
    """Images of `scenes`, (N, 64, 64, 3) uint8."""
    return np.stack([np.asarray(render.render(scene, rng)) for scene in scenes])


class LabelledRenders:
    """Scenes and the features of their renders.

    The renders have gone through `vae`, as generated images have: compared with crisp renders, a
    house with soft edges passes for a car.
    """

    def __init__(self, scenes, rng, vae=None):
        renders = render_all(scenes, rng)
        if vae is not None:
            renders = reconstruct(vae, renders)
        self.scenes = scenes
        self.colours = colours(renders)
        self.edges = edges(renders)


def label_world(vae=None, count=12_000, seed=1):
    """Random scenes of pocket's world, which the judges of all subjects share."""
    rng = np.random.default_rng(seed)
    scenes = [render.sample_scene(rng) for _ in range(count)]
    return LabelledRenders(scenes, rng, vae)


def label_subject(subject, vae=None, count=2_000, seed=2):
    """Scenes of `subject`, which its judge knows beside the world's."""
    return LabelledRenders(subject_in_turn(subject, count), np.random.default_rng(seed), vae)


class Judge:
    """Labels an image by its nearest neighbours among renders of the `world` and `own` ones, of one
    `subject`.

    The nearest by edges names the class, the nearest by colours all else (place, colour, subject
    or not). `vae`: that of the model whose images are judged.
    """

    def __init__(self, subject, world, own, vae=None):
        self.subject = subject
        self.vae = vae
        self.scenes = world.scenes + own.scenes
        self.colours = torch.cat([world.colours, own.colours])
        self.edges = torch.cat([world.edges, own.edges])

    def nearest(self, images):
        """For each of `images` (N, 64, 64, 3) uint8 its nearest scenes by edges and by colours."""
        by_edges = torch.cdist(edges(images), self.edges).argmin(1).tolist()
        by_colours = torch.cdist(colours(images), self.colours).argmin(1).tolist()
        return [(self.scenes[e], self.scenes[c]) for e, c in zip(by_edges, by_colours, strict=True)]

    def __call__(self, images):
        """A scene for each of `images`, of the class that its edges name."""
        return [replace(colour, kind=edge.kind) for edge, colour in self.nearest(images)]

    def shows(self, kind, images):
        """The share of `images` whose shape and colours are of the class `kind`."""
        return share(e.kind == c.kind == kind for e, c in self.nearest(images))

    @cached_property
    def likeness(self):
        return Likeness(self.subject, self.vae and partial(reconstruct, self.vae))

    def is_subject(self, scene):
        """Whether `scene` shows the subject."""
        return scene.kind == self.subject.kind and scene.body == self.subject.body


def share(values):
    """The share of true ones among booleans."""
    values = list(values)
    return sum(values) / len(values)


def diversity(images):
    """Mean distance between the colours of two of the images."""
    return torch.pdist(colours(images)).mean().item()


class Sampler:
    """One model's images of a prompt, by generate.py's ImageGenerator; each is generated once."""

    def __init__(self, args, model_dir, lora_weights_dir=None):
        flags = {
            "model_dir": model_dir,
            "output_dir": ".",
            "guidance_scale": args.guidance_scale,
            "scheduler": args.scheduler,
            "num_inference_steps": args.num_inference_steps,
        }
        if lora_weights_dir:
            flags["lora_weights_dir"] = lora_weights_dir
        argv = [f"--{name}={value}" for name, value in flags.items()]
        self.generator = ImageGenerator(generate.parse_args(argv))
        self.num_samples = args.num_samples
        self.seed = args.seed
        self.cache = {}

    def __call__(self, prompt, num_samples=None):
        """`num_samples` images, --num_samples where not given: (N, H, W, 3) uint8."""
        count = num_samples or self.num_samples
        if (prompt, count) not in self.cache:
            records = [{"prompt": prompt, "seed": self.seed, "index": i} for i in range(count)]
            images = [image for _, image in self.generator.sample_all(records, 0)]
            self.cache[prompt, count] = np.stack([np.asarray(to_pil_image(i)) for i in images])
        return self.cache[prompt, count]


def class_prompt(subject):
    return f"photo of a {subject.kind}"


def instance_prompt(subject):
    return f"photo of unqtkn {subject.kind}"


def other_classes(subject):
    return [kind for kind in render.CLASSES if kind != subject.kind]


AIMS = {
    "subject": 0.95,
    "likeness": 0,  # no aim: it compares recipes
    "composition": 0.85,
    "prior": 0.95,
    "diversity": 0.9,
    "others": 0.9,
}


def aim_of(metric):
    """A metric's aim; that of `others` for each class."""
    return AIMS.get(metric, AIMS["others"])


class Metrics:
    """The metrics of the docstring for one model, each a function of the number of images.

    `sample(prompt, count)` gives the model's images, `original(prompt, count)` those of the
    original model from the same noise.
    """

    def __init__(self, sample, original, judge):
        self.sample, self.original, self.judge = sample, original, judge
        self.names = ["subject", "likeness", "composition", "prior", "diversity"]
        self.names += other_classes(judge.subject)

    def __call__(self, name, count):
        if name in render.CLASSES:
            return self.other(name, count)
        return getattr(self, name)(count)

    def subject(self, count):
        scenes = self.judge(self.sample(instance_prompt(self.judge.subject), count))
        return share(map(self.judge.is_subject, scenes))

    def in_place(self, place, count):
        return self.sample(f"{instance_prompt(self.judge.subject)} {place}", count)

    def likeness(self, count):
        shown = [(self.in_place(place, count), place) for place in render.PLACES]
        return float(np.mean([self.judge.likeness(*pair) for pair in shown]))

    def composition(self, count):
        shares = []
        for place in (SNOW, NIGHT):
            scenes = self.judge(self.in_place(place, count))
            shares.append(share(self.judge.is_subject(s) and s.place == place for s in scenes))
        return float(np.mean(shares))

    def prior(self, count):
        return self.relative(class_prompt(self.judge.subject), count, self.prior_of)

    def prior_of(self, images):
        kind = self.judge.subject.kind
        scenes = self.judge(images)
        return share(s.kind == kind and not self.judge.is_subject(s) for s in scenes)

    def diversity(self, count):
        return self.relative(class_prompt(self.judge.subject), count, diversity)

    def other(self, kind, count):
        return self.relative(f"photo of a {kind}", count, lambda i: self.judge.shows(kind, i))

    def relative(self, prompt, count, measure):
        original = measure(self.original(prompt, count))
        return measure(self.sample(prompt, count)) / max(original, 1 / count)


def subject_report(sample, original, judge, count, more=None):
    """The metrics of one model by name. With `more`, what is below its aim with `count` images is
    measured again with so many."""
    metrics = Metrics(sample, original, judge)
    report = {}
    for name in metrics.names:
        report[name] = metrics(name, count)
        if more and report[name] < aim_of(name):
            report[name] = metrics(name, more)
    return report


def original_report(original, judge, count):
    """The original model's own shares, to which those of tuned models are relative."""
    metrics = Metrics(original, original, judge)
    members = original(class_prompt(judge.subject), count)
    others = {
        kind: judge.shows(kind, original(f"photo of a {kind}", count))
        for kind in other_classes(judge.subject)
    }
    return {"prior": metrics.prior_of(members), "diversity": diversity(members), **others}


def judge_accuracy(judge, count=1000):
    """The judge's accuracy on renders that it has not seen: the most that any model could reach."""
    rng = np.random.default_rng(99)
    scenes = [render.sample_scene(rng) for _ in range(count // 2)]
    scenes += subject_in_turn(judge.subject, count // 2)
    images = render_all(scenes, rng)
    if judge.vae is not None:
        images = reconstruct(judge.vae, images)
    pairs = list(zip(scenes, judge(images), strict=True))
    own = range(count // 2, len(scenes))
    in_places = [(images[[i for i in own if scenes[i].place == p]], p) for p in render.PLACES]
    accuracy = {
        "class": share(true.kind == judged.kind for true, judged in pairs),
        "place": share(true.place == judged.place for true, judged in pairs),
        "colour": share(true.colour == judged.colour for true, judged in pairs),
        "subject": share(judge.is_subject(a) == judge.is_subject(b) for a, b in pairs),
        "likeness": float(np.mean([judge.likeness(*pair) for pair in in_places])),
    }
    for kind in other_classes(judge.subject):
        members = images[[i for i, scene in enumerate(scenes) if scene.kind == kind]]
        accuracy[kind] = judge.shows(kind, members)
    return accuracy


def print_row(name, metrics):
    columns = [f"{key} {value:.2f}" for key, value in metrics.items()]
    print(f"{name:>12}  {'  '.join(columns)}", flush=True)


def samplers_of(args):
    """A `Sampler` for the original model and for each tuned one, by name."""
    samplers = {"original": Sampler(args, args.model_dir)}
    for folder in args.tuned_model_dir:
        samplers[Path(folder).name] = Sampler(args, folder)
    for folder in args.lora_weights_dir:
        samplers[Path(folder).name] = Sampler(args, args.model_dir, folder)
    return samplers


def main(args):
    """A row for the judge itself, one for the original model, one for each tuned model."""
    samplers = samplers_of(args)
    original = samplers.pop("original")
    subject = render.SUBJECTS[args.pocket_subject]
    vae = original.generator.pipeline.vae
    judge = Judge(subject, label_world(vae), label_subject(subject, vae), vae)
    rows = {"judge": judge_accuracy(judge)}
    rows["original"] = original_report(original, judge, args.num_samples)
    for name, row in rows.items():
        print_row(name, row)
    for name, sample in samplers.items():
        rows[name] = subject_report(sample, original, judge, args.num_samples, args.more_samples)
        print_row(name, rows[name])
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def build_parser(description):
    """The flags that say which models are sampled, and how."""
    parser = ArgumentParser(description)
    add = parser.add_argument
    add("--model_dir", required=True, help="the original model")
    add("--tuned_model_dir", nargs="+", default=[], help="tuned models: a row each")
    add("--lora_weights_dir", nargs="+", default=[], help="LoRAs on the original: a row each")
    add("--num_samples", type=int, default=64, help="images per prompt")
    add("--num_inference_steps", type=int, default=25, help="denoising steps")
    add("--scheduler", choices=["dpm", "model"], default="dpm", help="as in generate.py")
    add("--guidance_scale", type=float, default=3.0, help="weight of the prompt")
    add("--seed", type=int, default=0, help="seed of the images")
    return parser


def parse_args(argv=None):
    parser = build_parser(__doc__)
    add = parser.add_argument
    add("--more_samples", type=int, default=192, help="where a metric is below its aim")
    add("--json", help="write the rows to this file as well")
    subjects = list(render.SUBJECTS)
    add("--pocket_subject", choices=subjects, default="lego_car", help="what pocket has learned")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
