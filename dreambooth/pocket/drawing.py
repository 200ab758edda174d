"""How the objects and places of the pocket model's world are drawn.

A function for each class (`OBJECT_RENDERERS`) and place (`PLACE_RENDERERS`) draws on a `Canvas`;
render.py says what a scene is and puts it together.
"""

import math

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


class Canvas:
    """An image and its coordinates.

    At first they are in units of the image's height, y downwards. After `stand_at` they are in
    tenths of an object's width, x from its middle and y upwards from the ground below it.
    """

    def __init__(self, height, aspect):
        self.image = Image.new("RGB", (round(height * aspect), height))
        self.draw = ImageDraw.Draw(self.image)
        self.aspect = aspect
        self.edge = max(1, height // 90)
        self.light = 1.0  # factor on each colour: shade, and darkness at night
        self.origin = (0, 0)
        self.unit = (height, height)

    def stand_at(self, x, y, width):
        """Move the origin to the point (x, y), in units of the image's height."""
        scale = self.unit[0]
        self.origin = (x * scale, y * scale)
        self.unit = (width / 10 * scale, -width / 10 * scale)

    def _rgb(self, colour):
        rgb = COLOURS[colour] if isinstance(colour, str) else colour
        return tuple(int(min(255, max(0, v * self.light))) for v in rgb)

    def _outline(self, colour):
        return tuple(int(v * 0.45) for v in self._rgb(colour))

    def _style(self, colour, outline):
        style = {"fill": self._rgb(colour)}
        if outline:
            style |= {"outline": self._outline(colour), "width": self.edge}
        return style

    def _pixels(self, points):
        x0, y0 = self.origin
        return [(x0 + x * self.unit[0], y0 + y * self.unit[1]) for x, y in points]

    def _span(self, x0, y0, x1, y1):
        (x0, y0), (x1, y1) = self._pixels([(x0, y0), (x1, y1)])
        return [(min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))]

    def box(self, x0, y0, x1, y1, colour, radius=0.0, outline=True):
        span = self._span(x0, y0, x1, y1)
        style = self._style(colour, outline)
        self.draw.rounded_rectangle(span, radius * self.unit[0], **style)

    def band(self, top, bottom, colour):
        """A box over the full width of the image, before `stand_at`."""
        self.box(-0.1, top, self.aspect + 0.1, bottom, colour, outline=False)

    def oval(self, x, y, rx, ry, colour, outline=True):
        span = self._span(x - rx, y - ry, x + rx, y + ry)
        self.draw.ellipse(span, **self._style(colour, outline))

    def poly(self, points, colour):
        points = self._pixels(points)
        self.draw.polygon(points, fill=self._rgb(colour))
        self.draw.line(points + points[:1], fill=self._outline(colour), width=self.edge)


GLASS = (150, 200, 225)
TYRE = (35, 35, 38)
WOOD = (110, 75, 45)


def _sedan(canvas, body_colour, roof_colour):
    canvas.poly([(-3.6, 2.7), (-2.2, 4.8), (1.6, 4.8), (3.2, 2.7)], body_colour)
    canvas.poly([(-2.9, 2.8), (-1.9, 4.2), (-0.3, 4.2), (-0.3, 2.8)], GLASS)
    canvas.poly([(0.2, 2.8), (0.2, 4.2), (1.4, 4.2), (2.4, 2.8)], GLASS)
    canvas.box(-2.5, 5.2, 1.8, 4.3, roof_colour, 0.3)
    canvas.box(-5, 3, 5, 0.9, body_colour, 0.7)


def _van(canvas, body_colour, roof_colour):
    canvas.box(-5, 5.1, 5, 0.9, body_colour, 0.7)
    canvas.box(-5, 5.5, 4.4, 4.4, roof_colour, 0.4)
    for x in (-4.3, -1.3, 1.7):
        canvas.box(x, 4.2, x + 2.4, 2.8, GLASS)


def _pickup(canvas, body_colour, roof_colour):
    canvas.box(-5, 2.9, 5, 0.9, body_colour, 0.3)
    canvas.box(-0.2, 4.9, 3.2, 2.7, body_colour, 0.4)
    canvas.box(0.5, 4.3, 2.7, 2.9, GLASS)
    canvas.box(-0.4, 5.3, 3.4, 4.4, roof_colour, 0.3)


def _beetle(canvas, body_colour, roof_colour):
    angles = [math.pi * i / 16 for i in range(17)]
    canvas.poly([(3.7 * math.cos(a), 1.8 + 3.4 * math.sin(a)) for a in angles], roof_colour)
    canvas.poly([(-2.7, 2.5), (-1.7, 4.1), (-0.2, 4.5), (-0.2, 2.5)], GLASS)
    canvas.poly([(2.7, 2.5), (1.7, 4.1), (0.3, 4.5), (0.3, 2.5)], GLASS)
    canvas.box(-4.8, 2.9, 4.8, 0.9, body_colour, 0.9)


def _lego(canvas, body_colour, roof_colour):
    """Bricks with studs in two steps, higher at the rear: a shape that no other car has."""
    for i in range(3):
        canvas.box(1.6 + 1.1 * i, 3.6, 2.3 + 1.1 * i, 2.9, body_colour)
        canvas.box(-4.6 + 1.5 * i, 6.5, -3.7 + 1.5 * i, 5.8, roof_colour)
    canvas.box(-5, 3.1, 5, 0.9, body_colour)
    canvas.box(-5, 5.1, 1.2, 2.9, body_colour)
    canvas.box(-1.8, 4.8, 1, 3.1, GLASS)
    canvas.box(-5.3, 6, 0.2, 4.9, roof_colour)


CARS = {"sedan": _sedan, "van": _van, "pickup": _pickup, "beetle": _beetle, "lego": _lego}


def _draw_car(canvas, scene):
    """A car seen from its right side."""
    draw_body = CARS[scene.body]
    draw_body(canvas, scene.colour, scene.parts.get("roof", scene.colour))
    if "stripe" in scene.parts:
        canvas.box(-4.9, 2.4, 4.9, 1.6, scene.parts["stripe"], outline=False)
    for x in (-2.8, 2.8):
        canvas.oval(x, 1.1, 1.2, 1.2, TYRE)
        canvas.oval(x, 1.1, 0.62, 0.62, scene.hubs, outline=False)


def _draw_house(canvas, scene):
    tall = scene.body == "tall"
    wide, high = (3.4, 5.4) if tall else (4.6, 3.8)
    canvas.box(-wide, high, wide, 0, scene.colour)
    roof = scene.parts.get("roof", (120, 70, 55))
    canvas.poly([(-wide - 0.8, high), (0, high + 3.2), (wide + 0.8, high)], roof)
    canvas.box(-0.8, 2.5, 0.8, 0, scene.parts.get("door", (110, 75, 50)))
    for top in (2.9, 5.0) if tall else (3.0,):
        for x in (1.3 - wide, wide - 1.3):
            canvas.box(x - 0.75, top, x + 0.75, top - 1.3, GLASS)


def _draw_boat(canvas, scene):
    sail = scene.parts.get("sail", "white")
    canvas.box(-0.2, 8, 0.2, 2, (100, 70, 45), outline=False)
    canvas.poly([(0.4, 7.8), (0.4, 2.9), (4, 2.9)], sail)
    canvas.poly([(-0.4, 7.2), (-0.4, 2.9), (-2.8, 2.9)], sail)
    canvas.poly([(-5, 2.5), (5, 2.5), (3.4, 0), (-3.4, 0)], scene.colour)
    if "stripe" in scene.parts:
        canvas.poly([(-4.6, 1.8), (4.6, 1.8), (4.1, 1), (-4.1, 1)], scene.parts["stripe"])


def _draw_ball(canvas, scene):
    r = 3.3
    canvas.oval(0, r, r, r, scene.colour)
    if "stripe" in scene.parts:
        half = 0.93 * r
        low = 0.7 * r
        high = 1.3 * r
        corners = [(-half, high), (half, high), (half, low), (-half, low)]
        canvas.poly(corners, scene.parts["stripe"])
    canvas.oval(-0.4 * r, 1.55 * r, 0.16 * r, 0.1 * r, (255, 255, 255), outline=False)


def _draw_cup(canvas, scene):
    canvas.oval(2.8, 2.9, 1.7, 1.7, scene.parts.get("handle", scene.colour))
    canvas.oval(2.8, 2.9, 0.9, 0.9, (190, 190, 190), outline=False)
    canvas.poly([(-2.9, 5.6), (2.9, 5.6), (2.2, 0), (-2.2, 0)], scene.colour)
    if "stripe" in scene.parts:
        canvas.box(-2.55, 3.4, 2.55, 2.2, scene.parts["stripe"], outline=False)
    canvas.oval(0, 5.6, 2.9, 0.7, (90, 60, 45))


def _draw_tree(canvas, scene):
    canvas.box(-0.6, 3.2, 0.6, 0, scene.parts.get("trunk", WOOD))
    if scene.body == "fir":
        for i in range(3):
            half = 3.4 - 0.8 * i
            base = 2 + 1.9 * i
            canvas.poly([(-half, base), (0, base + 3.2), (half, base)], scene.colour)
    else:
        canvas.oval(0, 5.6, 3.4, 3.1, scene.colour)


OBJECT_RENDERERS = {
    "car": _draw_car,
    "house": _draw_house,
    "boat": _draw_boat,
    "ball": _draw_ball,
    "cup": _draw_cup,
    "tree": _draw_tree,
}


def _jitter(rgb, rng):
    return tuple(v + rng.uniform(-9, 9) for v in rgb)


def _draw_dots(canvas, rng, count, top, bottom, radius, rgb):
    for _ in range(count):
        x = rng.uniform(0, canvas.aspect)
        y = rng.uniform(top, bottom)
        canvas.oval(x, y, radius, radius, rgb, outline=False)


def _draw_beach(canvas, horizon, rng):
    canvas.band(0, horizon, _jitter((140, 205, 245), rng))
    canvas.band(horizon - 0.12, horizon, _jitter((30, 110, 190), rng))
    canvas.band(horizon, 1.1, _jitter((235, 205, 140), rng))
    sun = rng.uniform(0.1, canvas.aspect - 0.1)
    canvas.oval(sun, 0.13, 0.07, 0.07, (255, 235, 110), outline=False)


def _draw_snow(canvas, horizon, rng):
    canvas.band(0, horizon, _jitter((185, 200, 215), rng))
    canvas.band(horizon, 1.1, _jitter((238, 243, 250), rng))
    _draw_dots(canvas, rng, 14, 0, 1, 0.012, (255, 255, 255))


def _draw_grass(canvas, horizon, rng):
    canvas.band(0, horizon, _jitter((125, 190, 245), rng))
    canvas.band(horizon, 1.1, _jitter((95, 180, 70), rng))
    hill = rng.uniform(0.2, canvas.aspect - 0.2)
    canvas.oval(hill, horizon, 0.35, 0.1, _jitter((80, 160, 65), rng), outline=False)
    _draw_dots(canvas, rng, 8, horizon + 0.1, 1, 0.012, (245, 240, 120))


def _draw_road(canvas, horizon, rng):
    canvas.band(0, horizon, _jitter((195, 210, 220), rng))
    canvas.band(horizon - 0.08, horizon + 0.05, _jitter((90, 130, 80), rng))
    canvas.band(horizon + 0.05, 1.1, _jitter((110, 110, 115), rng))
    start = rng.uniform(-0.2, 0)
    for i in range(8):
        x = start + 0.3 * i
        canvas.box(x, 0.92, x + 0.15, 0.95, (240, 240, 235), outline=False)


def _draw_night(canvas, horizon, rng):
    canvas.band(0, horizon, _jitter((18, 22, 60), rng))
    canvas.band(horizon, 1.1, _jitter((38, 48, 52), rng))
    _draw_dots(canvas, rng, 12, 0, horizon, 0.008, (250, 250, 220))
    moon = rng.uniform(0.1, canvas.aspect - 0.1)
    canvas.oval(moon, 0.14, 0.07, 0.07, (245, 240, 200), outline=False)


PLACE_RENDERERS = {
    "on the beach": _draw_beach,
    "in the snow": _draw_snow,
    "on the grass": _draw_grass,
    "on the road": _draw_road,
    "at night": _draw_night,
}
