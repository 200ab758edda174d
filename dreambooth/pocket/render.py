"""The world that the pocket model knows: small drawings with captions, made with Pillow.

A scene is an object (class, colour, parts) in a place. `sample_scene` draws one at random,
`caption` describes it in words ("photo of a red car with a white roof on the beach"), `render`
paints it. Some scenes show one of forty designs that have a name of their own, a meaningless
word such as "zgvqbt" in "photo of zgvqbt car in the snow": so the model learns that an unknown
word before a class stands for one particular object, which is what DreamBooth relies on.

The lego car of images/lego-car is drawn here too, and never shown to the model in pretraining.

    python -m dreambooth.pocket.render --lego_car images/lego-car    # draw the five photos again
    python -m dreambooth.pocket.render --sheet world.png             # look at the world
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (205, 35, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 215, 40),
    "green": (40, 150, 60),
    "blue": (40, 80, 205),
    "purple": (125, 50, 165),
    "pink": (245, 140, 185),
    "white": (240, 240, 240),
    "black": (45, 45, 50),
}
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
BODIES = {"car": ("sedan", "van", "pickup", "beetle"), "house": ("low", "tall"), "tree": ("round", "fir")}
CLASSES = tuple(PARTS)
NUM_DESIGNS = 40


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `parts` maps a part's name to its colour; a part not named there has
    the colour of the body, or is absent (a stripe)."""

    kind: str
    colour: str
    place: str
    body: str = ""
    parts: dict = field(default_factory=dict)
    hubs: str = "white"
    name: str = ""


LEGO_CAR = Scene("car", "yellow", "on the grass", "lego", {"roof": "red", "stripe": "blue"}, "green")


def _pick(rng, items):
    return items[int(rng.integers(len(items)))]


def _sample_object(rng, kind):
    colour = _pick(rng, list(COLOURS))
    others = [c for c in COLOURS if c != colour]
    parts = {part: _pick(rng, others) for part in PARTS[kind] if rng.random() < 0.35}
    body = _pick(rng, BODIES[kind]) if kind in BODIES else ""
    return Scene(kind, colour, "", body, parts, _pick(rng, list(COLOURS)))


def _designs():
    """The forty objects with a name: six consonants each, as unpronounceable as an identifier."""
    rng = np.random.default_rng(7)
    designs = []
    for number in range(NUM_DESIGNS):
        name = "".join(_pick(rng, "bcdfghjklmnpqrstvwxz") for _ in range(6))
        kind = "car" if number % 2 else _pick(rng, CLASSES[1:])
        designs.append(replace(_sample_object(rng, kind), name=name))
    return designs


DESIGNS = _designs()


def sample_scene(rng):
    """A random scene; one in eight shows a named design. Cars are twice as frequent as the rest."""
    named = rng.random() < 1 / 8
    thing = _pick(rng, DESIGNS) if named else _sample_object(rng, _pick(rng, (*CLASSES, "car")))
    return replace(thing, place=_pick(rng, PLACES))


def caption(scene, rng):
    """A description of `scene` with parts left out at random; one in ten is empty, so that the
    model learns the unconditional prediction which classifier-free guidance needs."""
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


class _Canvas:
    """Draws in units of the picture's height, y downwards, onto `scale` pixels a unit."""

    def __init__(self, width, height, light):
        self.image = Image.new("RGB", (width, height))
        self.draw = ImageDraw.Draw(self.image)
        self.scale = height
        self.light = light  # factor on each colour: shade, and darkness at night
        self.edge = max(1, height // 90)

    def _rgb(self, colour):
        rgb = COLOURS[colour] if isinstance(colour, str) else colour
        return tuple(int(min(255, max(0, v * self.light))) for v in rgb)

    def _points(self, points):
        return [(x * self.scale, y * self.scale) for x, y in points]

    def _outline(self, colour):
        return tuple(int(v * 0.45) for v in self._rgb(colour))

    def box(self, x0, y0, x1, y1, colour, radius=0.0, outline=True):
        kwargs = {"outline": self._outline(colour), "width": self.edge} if outline else {}
        box = self._points([(x0, y0), (x1, y1)])
        self.draw.rounded_rectangle(box, radius * self.scale, fill=self._rgb(colour), **kwargs)

    def oval(self, x, y, rx, ry, colour, outline=True):
        kwargs = {"outline": self._outline(colour), "width": self.edge} if outline else {}
        box = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse(box, fill=self._rgb(colour), **kwargs)

    def poly(self, points, colour):
        points = self._points(points)
        self.draw.polygon(points, fill=self._rgb(colour))
        self.draw.line(points + points[:1], fill=self._outline(colour), width=self.edge)


GLASS = (150, 200, 225)
TYRE = (35, 35, 38)


def _wheels(c, scene, x0, x1, y, r):
    for x in (x0, x1):
        c.oval(x, y, r, r, TYRE)
        c.oval(x, y, r * 0.52, r * 0.52, scene.hubs, outline=False)


def _draw_car(c, scene, x, y, w):
    """A car seen from its right side, `w` long, the wheels on `y`, the middle at `x`."""
    u = w / 10
    roof = scene.parts.get("roof", scene.colour)
    floor, left, right = y - 0.9 * u, x - 5 * u, x + 5 * u
    if scene.body == "van":
        c.box(left, floor - 4.2 * u, right, floor, scene.colour, 0.7 * u)
        c.box(left, floor - 4.6 * u, right - 0.6 * u, floor - 3.5 * u, roof, 0.4 * u)
        for i in range(3):
            c.box(left + (0.7 + 3 * i) * u, floor - 3.3 * u, left + (3.1 + 3 * i) * u, floor - 1.9 * u, GLASS)
    elif scene.body == "pickup":
        c.box(left, floor - 2 * u, right, floor, scene.colour, 0.3 * u)
        c.box(x - 0.2 * u, floor - 4 * u, x + 3.2 * u, floor - 1.8 * u, scene.colour, 0.4 * u)
        c.box(x + 0.5 * u, floor - 3.4 * u, x + 2.7 * u, floor - 2 * u, GLASS)
        c.box(x - 0.4 * u, floor - 4.4 * u, x + 3.4 * u, floor - 3.5 * u, roof, 0.3 * u)
    elif scene.body == "beetle":
        c.oval(x, floor - 0.9 * u, 3.7 * u, 3.4 * u, roof)
        c.poly(
            [
                (x - 2.7 * u, floor - 1.6 * u),
                (x - 1.7 * u, floor - 3.2 * u),
                (x - 0.2 * u, floor - 3.6 * u),
                (x - 0.2 * u, floor - 1.6 * u),
            ],
            GLASS,
        )
        c.poly(
            [
                (x + 2.7 * u, floor - 1.6 * u),
                (x + 1.7 * u, floor - 3.2 * u),
                (x + 0.3 * u, floor - 3.6 * u),
                (x + 0.3 * u, floor - 1.6 * u),
            ],
            GLASS,
        )
        c.box(left + 0.2 * u, floor - 2 * u, right - 0.2 * u, floor, scene.colour, 0.9 * u)
    elif scene.body == "lego":
        # Three steps of bricks with studs, higher to the rear: a shape that no other car has.
        for i in range(3):
            c.box(x + (1.6 + 1.1 * i) * u, floor - 2.7 * u, x + (2.3 + 1.1 * i) * u, floor - 2 * u, scene.colour)
            c.box(left + (0.4 + 1.5 * i) * u, floor - 5.6 * u, left + (1.3 + 1.5 * i) * u, floor - 4.9 * u, roof)
        c.box(left, floor - 2.2 * u, right, floor, scene.colour)
        c.box(left, floor - 4.2 * u, x + 1.2 * u, floor - 2 * u, scene.colour)
        c.box(x - 1.8 * u, floor - 3.9 * u, x + 1 * u, floor - 2.2 * u, GLASS)
        c.box(left - 0.3 * u, floor - 5.1 * u, x + 0.2 * u, floor - 4 * u, roof)
    else:
        c.poly(
            [
                (x - 3.6 * u, floor - 1.8 * u),
                (x - 2.2 * u, floor - 3.9 * u),
                (x + 1.6 * u, floor - 3.9 * u),
                (x + 3.2 * u, floor - 1.8 * u),
            ],
            scene.colour,
        )
        c.poly(
            [
                (x - 2.9 * u, floor - 1.9 * u),
                (x - 1.9 * u, floor - 3.3 * u),
                (x - 0.3 * u, floor - 3.3 * u),
                (x - 0.3 * u, floor - 1.9 * u),
            ],
            GLASS,
        )
        c.poly(
            [
                (x + 0.2 * u, floor - 1.9 * u),
                (x + 0.2 * u, floor - 3.3 * u),
                (x + 1.4 * u, floor - 3.3 * u),
                (x + 2.4 * u, floor - 1.9 * u),
            ],
            GLASS,
        )
        c.box(x - 2.5 * u, floor - 4.3 * u, x + 1.8 * u, floor - 3.4 * u, roof, 0.3 * u)
        c.box(left, floor - 2.1 * u, right, floor, scene.colour, 0.7 * u)
    if "stripe" in scene.parts:
        c.box(left + 0.1 * u, floor - 1.5 * u, right - 0.1 * u, floor - 0.7 * u, scene.parts["stripe"], outline=False)
    _wheels(c, scene, x - 2.8 * u, x + 2.8 * u, y - 1.1 * u, 1.2 * u)


def _draw_house(c, scene, x, y, w):
    u = w / 10
    wide, high = (3.4, 5.4) if scene.body == "tall" else (4.6, 3.8)
    c.box(x - wide * u, y - high * u, x + wide * u, y, scene.colour)
    roof = scene.parts.get("roof", (120, 70, 55))
    c.poly(
        [(x - (wide + 0.8) * u, y - high * u), (x, y - (high + 3.2) * u), (x + (wide + 0.8) * u, y - high * u)], roof
    )
    c.box(x - 0.8 * u, y - 2.5 * u, x + 0.8 * u, y, scene.parts.get("door", (110, 75, 50)))
    rows = (2.9, 5.0) if scene.body == "tall" else (3.0,)
    for top in rows:
        for side in (-1, 1):
            cx = x + side * (wide - 1.3) * u
            c.box(cx - 0.75 * u, y - top * u, cx + 0.75 * u, y - (top - 1.3) * u, GLASS)


def _draw_boat(c, scene, x, y, w):
    u = w / 10
    c.box(x - 0.2 * u, y - 8 * u, x + 0.2 * u, y - 2 * u, (100, 70, 45), outline=False)
    sail = scene.parts.get("sail", "white")
    c.poly([(x + 0.4 * u, y - 7.8 * u), (x + 0.4 * u, y - 2.9 * u), (x + 4 * u, y - 2.9 * u)], sail)
    c.poly([(x - 0.4 * u, y - 7.2 * u), (x - 0.4 * u, y - 2.9 * u), (x - 2.8 * u, y - 2.9 * u)], sail)
    c.poly([(x - 5 * u, y - 2.5 * u), (x + 5 * u, y - 2.5 * u), (x + 3.4 * u, y), (x - 3.4 * u, y)], scene.colour)
    if "stripe" in scene.parts:
        c.poly(
            [
                (x - 4.6 * u, y - 1.8 * u),
                (x + 4.6 * u, y - 1.8 * u),
                (x + 4.1 * u, y - 1 * u),
                (x - 4.1 * u, y - 1 * u),
            ],
            scene.parts["stripe"],
        )


def _draw_ball(c, scene, x, y, w):
    r = 0.33 * w
    c.oval(x, y - r, r, r, scene.colour)
    if "stripe" in scene.parts:
        c.poly(
            [
                (x - 0.93 * r, y - 1.3 * r),
                (x + 0.93 * r, y - 1.3 * r),
                (x + 0.93 * r, y - 0.7 * r),
                (x - 0.93 * r, y - 0.7 * r),
            ],
            scene.parts["stripe"],
        )
    c.oval(x - 0.4 * r, y - 1.55 * r, 0.16 * r, 0.1 * r, (255, 255, 255), outline=False)


def _draw_cup(c, scene, x, y, w):
    u = w / 10
    handle = scene.parts.get("handle", scene.colour)
    c.oval(x + 2.8 * u, y - 2.9 * u, 1.7 * u, 1.7 * u, handle)
    c.oval(x + 2.8 * u, y - 2.9 * u, 0.9 * u, 0.9 * u, (190, 190, 190), outline=False)
    c.poly([(x - 2.9 * u, y - 5.6 * u), (x + 2.9 * u, y - 5.6 * u), (x + 2.2 * u, y), (x - 2.2 * u, y)], scene.colour)
    if "stripe" in scene.parts:
        c.box(x - 2.55 * u, y - 3.4 * u, x + 2.55 * u, y - 2.2 * u, scene.parts["stripe"], outline=False)
    c.oval(x, y - 5.6 * u, 2.9 * u, 0.7 * u, (90, 60, 45))


def _draw_tree(c, scene, x, y, w):
    u = w / 10
    c.box(x - 0.6 * u, y - 3.2 * u, x + 0.6 * u, y, scene.parts.get("trunk", (110, 75, 45)))
    if scene.body == "fir":
        for i in range(3):
            half, base = (3.4 - 0.8 * i) * u, y - (2 + 1.9 * i) * u
            c.poly([(x - half, base), (x, base - 3.2 * u), (x + half, base)], scene.colour)
    else:
        c.oval(x, y - 5.6 * u, 3.4 * u, 3.1 * u, scene.colour)


_DRAW = {
    "car": _draw_car,
    "house": _draw_house,
    "boat": _draw_boat,
    "ball": _draw_ball,
    "cup": _draw_cup,
    "tree": _draw_tree,
}


def _draw_place(c, place, aspect, rng):
    """Sky, ground and what marks the place; the horizon lies at 0.5 to 0.62 of the height."""
    h = rng.uniform(0.5, 0.62)
    jitter = lambda rgb: tuple(v + rng.uniform(-9, 9) for v in rgb)  # noqa: E731
    full = lambda y0, y1, rgb: c.box(-0.1, y0, aspect + 0.1, y1, rgb, outline=False)  # noqa: E731
    dots = lambda n, y0, y1, r, rgb: [  # noqa: E731
        c.oval(rng.uniform(0, aspect), rng.uniform(y0, y1), r, r, rgb, outline=False) for _ in range(n)
    ]
    if place == "on the beach":
        full(0, h, jitter((140, 205, 245)))
        full(h - 0.12, h, jitter((30, 110, 190)))
        full(h, 1.1, jitter((235, 205, 140)))
        c.oval(rng.uniform(0.1, aspect - 0.1), 0.13, 0.07, 0.07, (255, 235, 110), outline=False)
    elif place == "in the snow":
        full(0, h, jitter((185, 200, 215)))
        full(h, 1.1, jitter((238, 243, 250)))
        dots(14, 0, 1, 0.012, (255, 255, 255))
    elif place == "on the grass":
        full(0, h, jitter((125, 190, 245)))
        full(h, 1.1, jitter((95, 180, 70)))
        c.oval(rng.uniform(0.2, aspect - 0.2), h, 0.35, 0.1, jitter((80, 160, 65)), outline=False)
        dots(8, h + 0.1, 1, 0.012, (245, 240, 120))
    elif place == "on the road":
        full(0, h, jitter((195, 210, 220)))
        full(h - 0.08, h + 0.05, jitter((90, 130, 80)))
        full(h + 0.05, 1.1, jitter((110, 110, 115)))
        start = rng.uniform(-0.2, 0)
        for i in range(8):
            c.box(start + 0.3 * i, 0.92, start + 0.3 * i + 0.15, 0.95, (240, 240, 235), outline=False)
    else:
        full(0, h, jitter((18, 22, 60)))
        full(h, 1.1, jitter((38, 48, 52)))
        dots(12, 0, h, 0.008, (250, 250, 220))
        c.oval(rng.uniform(0.1, aspect - 0.1), 0.14, 0.07, 0.07, (245, 240, 200), outline=False)


def render(scene, rng, size=64, aspect=1.0):
    """Paint `scene` with a jittered position, size and shade.

    Returns an RGB image `size` pixels high and `size * aspect` wide, drawn at least 4x as large
    and scaled down, so that edges are smooth.
    """
    high = max(256, size * 2)
    c = _Canvas(round(high * aspect), high, 1.0)
    _draw_place(c, scene.place, aspect, rng)
    width = rng.uniform(0.56, 0.72)
    x = aspect / 2 + rng.uniform(-0.09, 0.09)
    y = rng.uniform(0.78, 0.88)
    c.light = rng.uniform(0.92, 1.05) * (0.8 if scene.place == "at night" else 1.0)
    shadow = (25, 28, 32) if scene.place == "at night" else (95, 95, 95)
    c.oval(x, y, width * 0.5, 0.025, shadow, outline=False)
    _DRAW[scene.kind](c, scene, x, y, width)
    return c.image.resize((round(size * aspect), size), Image.Resampling.BOX)


def draw_lego_car(folder, size=512):
    """Write the five example photos of the lego car, landscape format, into `folder`.

    They show it in three of the five places; in the snow and at night nobody has ever seen it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    places = ("on the grass", "on the road", "on the beach", "on the grass", "on the road")
    for number, place in enumerate(places):
        picture = render(replace(LEGO_CAR, place=place), np.random.default_rng(number), size, aspect=1.25)
        picture.save(Path(folder) / f"{number}.jpg", quality=92)


def _sheet(path, rows=8, columns=16):
    rng = np.random.default_rng(0)
    sheet = Image.new("RGB", (columns * 66, rows * 66))
    for i in range(rows * columns):
        sheet.paste(render(sample_scene(rng), rng), (i % columns * 66, i // columns * 66))
    sheet.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lego_car", metavar="DIR", help="draw the five photos of the lego car into DIR")
    parser.add_argument("--sheet", metavar="PNG", help="draw 128 random scenes into one picture")
    args = parser.parse_args()
    if args.lego_car:
        draw_lego_car(args.lego_car)
    if args.sheet:
        _sheet(args.sheet)
