"""How real do a pocket model's images look? A Fréchet distance, as the field has it, and edges.

    python tests/benchmarks/realism.py --model_dir dreambooth/pocket/model --work_dir /tmp/judge

The features are the 64 of a small classifier that this script trains on renders, with a fixed seed
(class, body, place, and the colours of the parts), and that nothing else sees. The distance between
Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500, eq. 6) is printed for

    renders      two sets of fresh renders: what 2,048 images cannot tell apart
    floor        renders through the model's VAE: the best that its U-Net could do
    guidance g   images of the renders' captions, at guidance 1 and 4

and beside it the strength of edges, the strongest tenth of the Laplacian, relative to renders, and
how often the classifier sees the class, the place and the colour that a caption names.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import generate
from dreambooth.cli import ArgumentParser, absolute_path
from dreambooth.files import atomic
from dreambooth.image_generator import ImageGenerator, to_pil_image
from dreambooth.pocket import render
from tests.benchmarks import fidelity

NUM_FEATURES = 64
PARTS = sorted({part for parts in render.PARTS.values() for part in parts})
BODIES = sorted({body for bodies in render.BODIES.values() for body in bodies})
COLOURS = list(render.COLOURS)


def labels(scene):
    """What the classifier must tell of a scene, as indices; -1 where there is nothing to tell."""
    colours = [scene.parts.get(part) for part in PARTS]
    return [
        render.CLASSES.index(scene.kind),
        render.PLACES.index(scene.place),
        BODIES.index(scene.body) if scene.body in BODIES else -1,
        COLOURS.index(scene.colour),
        *(COLOURS.index(colour) if colour else -1 for colour in colours),
    ]


class Classifier(nn.Module):
    """Images (N, 64, 64, 3) uint8 to 64 features, and from these to `labels`."""

    def __init__(self):
        super().__init__()
        layers = []
        for before, after in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after)]
            layers += [nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, NUM_FEATURES))
        sizes = [len(render.CLASSES), len(render.PLACES), len(BODIES)]
        sizes += [len(COLOURS)] * (1 + len(PARTS))
        self.heads = nn.ModuleList(nn.Linear(NUM_FEATURES, size) for size in sizes)

    def features(self, images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.body(x)

    def forward(self, images):
        features = self.features(images).relu()
        return [head(features) for head in self.heads]


def train_classifier(num_images=30_000, steps=3_000, batch=128, seed=5):
    """A classifier trained on fresh renders."""
    rng = np.random.default_rng(seed)
    scenes = [render.sample_scene(rng) for _ in range(num_images)]
    images = fidelity.render_all(scenes, rng)
    targets = torch.tensor([labels(scene) for scene in scenes])
    torch.manual_seed(seed)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        rows = rng.integers(num_images, size=batch)
        outputs = model(images[rows])
        columns = targets[rows].unbind(1)
        loss = sum(
            F.cross_entropy(o, t, ignore_index=-1)
            for o, t in zip(outputs, columns, strict=True)
            if (t >= 0).any()
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def statistics(classifier, images):
    """Mean (64,) and covariance (64, 64) of the images' features, in float64."""
    parts = [classifier.features(images[i : i + 256]) for i in range(0, len(images), 256)]
    features = torch.cat(parts).double()
    return features.mean(0), features.T.cov()


def frechet_distance(one, other):
    """Between two Gaussians, each a mean and a covariance."""
    (mean_a, cov_a), (mean_b, cov_b) = one, other
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.item()


@torch.inference_mode()
def seen(classifier, images, scenes, captions):
    """The shares of images (N, 64, 64, 3) uint8 that show the class, the place and the colour of
    their scene, over those whose caption names it."""
    parts = [classifier(images[i : i + 256]) for i in range(0, len(images), 256)]
    outputs = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    words = {"class": lambda s: s.kind, "place": lambda s: s.place, "colour": lambda s: s.colour}
    shares = {}
    for name, word in words.items():
        column = ("class", "place", "body", "colour").index(name)
        named = [i for i, scene in enumerate(scenes) if f" {word(scene)}" in captions[i]]
        truth = torch.tensor([labels(scenes[i])[column] for i in named])
        shares[name] = (outputs[column][named].argmax(1) == truth).float().mean().item()
    return shares


def edge_strength(images):
    """The mean of the strongest tenth of the Laplacian of images (N, H, W, 3) uint8 in grey."""
    grey = torch.from_numpy(images).float().mean(3, keepdim=True).permute(0, 3, 1, 2) / 255
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    strengths = F.conv2d(grey, kernel).abs().flatten(1)
    return strengths.topk(strengths.shape[1] // 10, dim=1).values.mean().item()


def generate_images(model_dir, captions, guidance_scale, seed=0):
    """The model's images of `captions`, (N, 64, 64, 3) uint8."""
    flags = ["--model_dir", str(model_dir), "--output_dir", "."]
    generator = ImageGenerator(generate.parse_args([*flags, f"--guidance_scale={guidance_scale}"]))
    records = [{"prompt": text, "seed": seed, "index": i} for i, text in enumerate(captions)]
    images = [image for _, image in generator.sample_all(records, 0)]
    return np.stack([np.asarray(to_pil_image(image)) for image in images]), generator.pipeline.vae


def measure(model_dir, work_dir, count, guidance_scales):
    """Rows of the table: distance, distance beyond the floor, and edges."""
    classifier = Classifier()
    file = Path(work_dir) / "classifier.pt"
    if not file.exists():
        trained = train_classifier()
        atomic.replace_file(file, lambda path: torch.save(trained.state_dict(), path))
    classifier.load_state_dict(torch.load(file))
    classifier.eval()
    rng = np.random.default_rng(11)
    scenes = [render.sample_scene(rng) for _ in range(count)]
    captions = [render.caption(scene, rng) for scene in scenes]
    renders, others = fidelity.render_all(scenes, rng), fidelity.render_all(scenes, rng)
    real = statistics(classifier, renders)
    edges = edge_strength(renders)
    sets = {}
    for scale in guidance_scales:
        sets[f"guidance {scale:g}"], vae = generate_images(model_dir, captions, scale)
    sets = {"renders": others, "floor": fidelity.reconstruct(vae, others), **sets}
    rows = {}
    for name, images in sets.items():
        distance = frechet_distance(real, statistics(classifier, images))
        rows[name] = {"distance": distance, "edges": edge_strength(images) / edges}
        rows[name] |= seen(classifier, images, scenes, captions)
    for name, row in rows.items():
        if name.startswith("guidance"):
            row["beyond the floor"] = row["distance"] - rows["floor"]["distance"]
            row["edges of the VAE's"] = row["edges"] / rows["floor"]["edges"]
    return rows


def main(args):
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    rows = measure(args.model_dir, args.work_dir, args.num_images, args.guidance_scales)
    for name, row in rows.items():
        columns = "  ".join(f"{label} {value:.3f}" for label, value in row.items())
        print(f"{name:>12}  {columns}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model_dir", type=absolute_path, required=True, help="a pocket model")
    add("--work_dir", type=absolute_path, required=True, help="keeps the classifier")
    add("--num_images", type=int, default=2048, help="of each set")
    add("--guidance_scales", type=float, nargs="+", default=[1.0, 4.0], help="of the images")
    add("--json", type=absolute_path, help="write the rows to this file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
