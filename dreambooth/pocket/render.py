"""The synthetic world of the pocket model, which can show nothing else: small captioned images,
drawn with Pillow.

A scene is an object (class, colour, parts) in a place. `sample_scene` samples one, `caption`
describes it ("photo of a red car with a white roof on the beach"), `render` turns it into an
image. Some scenes show one of forty designs that have a name of their own, a meaningless
identifier such as "bmvdtd" in "photo of bmvdtd car in the snow". From these the model learns that
an unknown word before a class stands for one particular object, which DreamBooth relies on.

SUBJECTS, the LEGO car of images/lego-car among them, are what DreamBooth is to learn: pretraining
never shows one to the model.

    python -m dreambooth.pocket.render --subject lego_car images/lego-car    # write its five photos
    python -m dreambooth.pocket.render --subject windmill /tmp/windmill      # of another subject
    python -m dreambooth.pocket.render --sheet world.png                     # look at the world
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dreambooth.cli import ArgumentParser, UserError, run_main
from dreambooth.pocket.drawing import COLOURS, OBJECT_RENDERERS, PLACE_RENDERERS, Canvas
from dreambooth.pocket.subjects import BODY_RENDERERS

PLACES = ("on the beach", "in the snow", "on the grass", "on the road", "at night")
# The parts of each class that can have a colour of their own, and the bodies that it comes in.
PARTS = {
    "car": ("roof", "stripe"),
    "house": ("roof", "door"),
    "boat": ("sail", "stripe"),
    "ball": ("stripe",),
    "cup": ("stripe", "handle"),
    "tree": ("trunk",),
}
BODIES = {
    "car": ("sedan", "van", "pickup", "beetle"),
    "house": ("low", "tall"),
    "tree": ("round", "fir"),
}
CLASSES = tuple(PARTS)
NUM_DESIGNS = 40
CONSONANTS = "bcdfghjklmnpqrstvwxz"


@dataclass(frozen=True)
class Scene:
    """What an image shows.

    `parts` maps the name of a part to its colour. A part that is not in it has the colour of the
    body, or is absent (a stripe).
    """

    kind: str
    colour: str
    place: str
    body: str = ""
    parts: dict = field(default_factory=dict)
    hubs: str = "white"
    name: str = ""


SUBJECTS = {
    "lego_car": Scene(
        "car", "yellow", "on the grass", "lego", {"roof": "red", "stripe": "blue"}, "green"
    ),
    "windmill": Scene(
        "house",
        "white",
        "on the grass",
        "windmill",
        {"roof": "blue", "door": "red", "sails": "orange"},
    ),
    "tugboat": Scene(
        "boat",
        "green",
        "on the grass",
        "tugboat",
        {"cabin": "white", "funnel": "red", "band": "yellow"},
    ),
    "teapot": Scene(
        "cup",
        "purple",
        "on the grass",
        "teapot",
        {"handle": "orange", "lid": "yellow", "dots": "white"},
    ),
    "fire_engine": Scene(
        "car",
        "red",
        "on the grass",
        "fire_engine",
        {"ladder": "yellow", "light": "blue", "band": "white"},
    ),
    "circus": Scene(
        "house",
        "pink",
        "on the grass",
        "circus",
        {"stripes": "white", "door": "purple", "pennant": "yellow"},
    ),
    "ladybird": Scene("ball", "orange", "on the grass", "ladybird", {"head": "black"}),
    "palm": Scene("tree", "purple", "on the grass", "palm", {"trunk": "yellow", "nuts": "red"}),
}


def check_classes(prompts):
    """Each of `prompts`, for pocket, must name a class that it knows: any other word is letters to
    its tokenizer, and the images would show nothing."""
    for text in prompts:
        if not set(re.findall("[a-z]+", text.lower())) & set(CLASSES):
            raise UserError(
                f"{text!r}: pocket only draws {', '.join(CLASSES[:-1])} and {CLASSES[-1]}; real"
                " photos need Stable Diffusion and a CUDA GPU (README, Your own photos)"
            )


def _pick(rng, items):
    return items[int(rng.integers(len(items)))]


def _sample_object(rng, kind):
    colour = _pick(rng, list(COLOURS))
    others = [c for c in COLOURS if c != colour]
    parts = {part: _pick(rng, others) for part in PARTS[kind] if rng.random() < 0.35}
    body = _pick(rng, BODIES[kind]) if kind in BODIES else ""
    hubs = _pick(rng, list(COLOURS))
    return Scene(kind, colour, "", body, parts, hubs)


def _build_designs():
    """The forty named objects; a name is six consonants, as unpronounceable as an identifier."""
    rng = np.random.default_rng(7)
    designs = []
    for number in range(NUM_DESIGNS):
        name = "".join(_pick(rng, CONSONANTS) for _ in range(6))
        kind = "car" if number % 2 else _pick(rng, CLASSES[1:])
        designs.append(replace(_sample_object(rng, kind), name=name))
    return designs


DESIGNS = _build_designs()


def sample_scene(rng):
    """A random scene; one in eight shows a named design. Cars are twice as frequent as the rest."""
    if rng.random() < 1 / 8:
        thing = _pick(rng, DESIGNS)
    else:
        kind = _pick(rng, (*CLASSES, "car"))
        thing = _sample_object(rng, kind)
    return replace(thing, place=_pick(rng, PLACES))


def caption(scene, rng):
    """A description of `scene` that leaves out parts at random.

    One in ten is empty: the model learns from these the unconditional prediction that
    classifier-free guidance needs.
    """
    if rng.random() < 0.1:
        return ""
    place = f" {scene.place}" if rng.random() < 0.7 else ""
    if scene.name:
        return f"photo of {scene.name} {scene.kind}{place}"
    colour = f"{scene.colour} " if rng.random() < 0.6 else ""
    named = [f"a {c} {part}" for part, c in scene.parts.items() if rng.random() < 0.5]
    parts = f" with {' and '.join(named)}" if named else ""
    article = "an" if colour.startswith("o") else "a"
    return f"photo of {article} {colour}{scene.kind}{parts}{place}"


def render(scene, rng, size=64, aspect=1.0):
    """An image of `scene` with jittered position, size and shade.

    Returns an RGB image `size` pixels high and `size * aspect` wide. It is drawn at least four
    times as large and scaled down, so that edges are smooth.
    """
    canvas = Canvas(max(256, size * 2), aspect)
    horizon = rng.uniform(0.5, 0.62)  # as a share of the height
    PLACE_RENDERERS[scene.place](canvas, horizon, rng)
    night = scene.place == "at night"
    width = rng.uniform(0.56, 0.72)
    x = aspect / 2 + rng.uniform(-0.09, 0.09)
    y = rng.uniform(0.78, 0.88)
    canvas.light = rng.uniform(0.92, 1.05) * (0.8 if night else 1.0)
    shadow = (25, 28, 32) if night else (95, 95, 95)
    canvas.oval(x, y, width * 0.5, 0.025, shadow, outline=False)
    canvas.stand_at(x, y, width)
    draw_object = BODY_RENDERERS.get(scene.body, OBJECT_RENDERERS[scene.kind])
    draw_object(canvas, scene)
    return canvas.image.resize((round(size * aspect), size), Image.Resampling.BOX)


def write_photos(name, folder, size=512):
    """Write five photos of the subject `name`, in landscape format, into `folder`.

    They show it in three of the five places; no image shows it in the snow or at night. UserError:
    no such subject.
    """
    if name not in SUBJECTS:
        raise UserError(f"--subject {name}: must be one of {' '.join(SUBJECTS)}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    places = ("on the grass", "on the road", "on the beach", "on the grass", "on the road")
    for number, place in enumerate(places):
        rng = np.random.default_rng(number)
        image = render(replace(SUBJECTS[name], place=place), rng, size, aspect=1.25)
        image.save(Path(folder) / f"{number}.jpg", quality=92)


def write_sheet(path, rows=8, columns=16):
    """Write random scenes, side by side, as one image."""
    rng = np.random.default_rng(0)
    sheet = Image.new("RGB", (columns * 66, rows * 66))
    for i in range(rows * columns):
        image = render(sample_scene(rng), rng)
        sheet.paste(image, (i % columns * 66, i // columns * 66))
    sheet.save(path)


def main(args):
    """Write the photos of a subject, a sheet of random scenes, or both."""
    if args.subject:
        write_photos(*args.subject)
    if args.sheet:
        write_sheet(args.sheet)


if __name__ == "__main__":
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--subject", nargs=2, metavar=("NAME", "DIR"), help="write five photos of it to DIR"
    )
    parser.add_argument("--sheet", metavar="PNG", help="write 128 random scenes to one image")
    run_main(main, parser.parse_args())
