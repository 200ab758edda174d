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
    """Draws in units of the picture's height, y downwards; after `stand_at`, in tenths of an object's
    width, x from its middle and y upwards from the ground below it."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width, height))
        self.draw = ImageDraw.Draw(self.image)
        self.edge = max(1, height // 90)
        self.light = 1.0  # factor on each colour: shade, and darkness at night
        self.origin, self.unit = (0, 0), (height, height)

    def stand_at(self, x, y, width):
        """Move the origin to the point (x, y), in units of the picture's height."""
        scale = self.unit[0]
        self.origin, self.unit = (x * scale, y * scale), (width / 10 * scale, -width / 10 * scale)

    def _rgb(self, colour):
        rgb = COLOURS[colour] if isinstance(colour, str) else colour
        return tuple(int(min(255, max(0, v * self.light))) for v in rgb)

    def _outline(self, colour):
        return tuple(int(v * 0.45) for v in self._rgb(colour))

    def _pixels(self, points):
        return [(self.origin[0] + x * self.unit[0], self.origin[1] + y * self.unit[1]) for x, y in points]

    def _span(self, x0, y0, x1, y1):
        corners = self._pixels([(x0, y0), (x1, y1)])
        xs, ys = (sorted(values) for values in zip(*corners, strict=True))
        return [(xs[0], ys[0]), (xs[1], ys[1])]

    def box(self, x0, y0, x1, y1, colour, radius=0.0, outline=True):
        edge = {"outline": self._outline(colour), "width": self.edge} if outline else {}
        span, radius = self._span(x0, y0, x1, y1), radius * self.unit[0]
        self.draw.rounded_rectangle(span, radius, fill=self._rgb(colour), **edge)

    def oval(self, x, y, rx, ry, colour, outline=True):
        edge = {"outline": self._outline(colour), "width": self.edge} if outline else {}
        self.draw.ellipse(self._span(x - rx, y - ry, x + rx, y + ry), fill=self._rgb(colour), **edge)

    def poly(self, points, colour):
        points = self._pixels(points)
        self.draw.polygon(points, fill=self._rgb(colour))
        self.draw.line(points + points[:1], fill=self._outline(colour), width=self.edge)


GLASS = (150, 200, 225)
TYRE = (35, 35, 38)
WOOD = (110, 75, 45)


def _sedan(c, paint, roof):
    c.poly([(-3.6, 2.7), (-2.2, 4.8), (1.6, 4.8), (3.2, 2.7)], paint)
    c.poly([(-2.9, 2.8), (-1.9, 4.2), (-0.3, 4.2), (-0.3, 2.8)], GLASS)
    c.poly([(0.2, 2.8), (0.2, 4.2), (1.4, 4.2), (2.4, 2.8)], GLASS)
    c.box(-2.5, 5.2, 1.8, 4.3, roof, 0.3)
    c.box(-5, 3, 5, 0.9, paint, 0.7)


def _van(c, paint, roof):
    c.box(-5, 5.1, 5, 0.9, paint, 0.7)
    c.box(-5, 5.5, 4.4, 4.4, roof, 0.4)
    for x in (-4.3, -1.3, 1.7):
        c.box(x, 4.2, x + 2.4, 2.8, GLASS)


def _pickup(c, paint, roof):
    c.box(-5, 2.9, 5, 0.9, paint, 0.3)
    c.box(-0.2, 4.9, 3.2, 2.7, paint, 0.4)
    c.box(0.5, 4.3, 2.7, 2.9, GLASS)
    c.box(-0.4, 5.3, 3.4, 4.4, roof, 0.3)


def _beetle(c, paint, roof):
    c.oval(0, 1.8, 3.7, 3.4, roof)
    c.poly([(-2.7, 2.5), (-1.7, 4.1), (-0.2, 4.5), (-0.2, 2.5)], GLASS)
    c.poly([(2.7, 2.5), (1.7, 4.1), (0.3, 4.5), (0.3, 2.5)], GLASS)
    c.box(-4.8, 2.9, 4.8, 0.9, paint, 0.9)


def _lego(c, paint, roof):
    """Bricks with studs in two steps, higher to the rear: a shape that no other car has."""
    for i in range(3):
        c.box(1.6 + 1.1 * i, 3.6, 2.3 + 1.1 * i, 2.9, paint)
        c.box(-4.6 + 1.5 * i, 6.5, -3.7 + 1.5 * i, 5.8, roof)
    c.box(-5, 3.1, 5, 0.9, paint)
    c.box(-5, 5.1, 1.2, 2.9, paint)
    c.box(-1.8, 4.8, 1, 3.1, GLASS)
    c.box(-5.3, 6, 0.2, 4.9, roof)


_CARS = {"sedan": _sedan, "van": _van, "pickup": _pickup, "beetle": _beetle, "lego": _lego}


def _draw_car(c, scene):
    """A car seen from its right side."""
    _CARS[scene.body](c, scene.colour, scene.parts.get("roof", scene.colour))
    if "stripe" in scene.parts:
        c.box(-4.9, 2.4, 4.9, 1.6, scene.parts["stripe"], outline=False)
    for x in (-2.8, 2.8):
        c.oval(x, 1.1, 1.2, 1.2, TYRE)
        c.oval(x, 1.1, 0.62, 0.62, scene.hubs, outline=False)


def _draw_house(c, scene):
    wide, high = (3.4, 5.4) if scene.body == "tall" else (4.6, 3.8)
    c.box(-wide, high, wide, 0, scene.colour)
    roof = scene.parts.get("roof", (120, 70, 55))
    c.poly([(-wide - 0.8, high), (0, high + 3.2), (wide + 0.8, high)], roof)
    c.box(-0.8, 2.5, 0.8, 0, scene.parts.get("door", (110, 75, 50)))
    for top in (2.9, 5.0) if scene.body == "tall" else (3.0,):
        for x in (1.3 - wide, wide - 1.3):
            c.box(x - 0.75, top, x + 0.75, top - 1.3, GLASS)


def _draw_boat(c, scene):
    sail = scene.parts.get("sail", "white")
    c.box(-0.2, 8, 0.2, 2, (100, 70, 45), outline=False)
    c.poly([(0.4, 7.8), (0.4, 2.9), (4, 2.9)], sail)
    c.poly([(-0.4, 7.2), (-0.4, 2.9), (-2.8, 2.9)], sail)
    c.poly([(-5, 2.5), (5, 2.5), (3.4, 0), (-3.4, 0)], scene.colour)
    if "stripe" in scene.parts:
        c.poly([(-4.6, 1.8), (4.6, 1.8), (4.1, 1), (-4.1, 1)], scene.parts["stripe"])


def _draw_ball(c, scene):
    r = 3.3
    c.oval(0, r, r, r, scene.colour)
    if "stripe" in scene.parts:
        half, low, high = 0.93 * r, 0.7 * r, 1.3 * r
        c.poly([(-half, high), (half, high), (half, low), (-half, low)], scene.parts["stripe"])
    c.oval(-0.4 * r, 1.55 * r, 0.16 * r, 0.1 * r, (255, 255, 255), outline=False)


def _draw_cup(c, scene):
    c.oval(2.8, 2.9, 1.7, 1.7, scene.parts.get("handle", scene.colour))
    c.oval(2.8, 2.9, 0.9, 0.9, (190, 190, 190), outline=False)
    c.poly([(-2.9, 5.6), (2.9, 5.6), (2.2, 0), (-2.2, 0)], scene.colour)
    if "stripe" in scene.parts:
        c.box(-2.55, 3.4, 2.55, 2.2, scene.parts["stripe"], outline=False)
    c.oval(0, 5.6, 2.9, 0.7, (90, 60, 45))


def _draw_tree(c, scene):
    c.box(-0.6, 3.2, 0.6, 0, scene.parts.get("trunk", WOOD))
    if scene.body == "fir":
        for i in range(3):
            half, base = 3.4 - 0.8 * i, 2 + 1.9 * i
            c.poly([(-half, base), (0, base + 3.2), (half, base)], scene.colour)
    else:
        c.oval(0, 5.6, 3.4, 3.1, scene.colour)


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
    c = _Canvas(round(high * aspect), high)
    _draw_place(c, scene.place, aspect, rng)
    width = rng.uniform(0.56, 0.72)
    x = aspect / 2 + rng.uniform(-0.09, 0.09)
    y = rng.uniform(0.78, 0.88)
    c.light = rng.uniform(0.92, 1.05) * (0.8 if scene.place == "at night" else 1.0)
    shadow = (25, 28, 32) if scene.place == "at night" else (95, 95, 95)
    c.oval(x, y, width * 0.5, 0.025, shadow, outline=False)
    c.stand_at(x, y, width)
    _DRAW[scene.kind](c, scene)
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
