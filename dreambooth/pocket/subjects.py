"""Subjects for DreamBooth to learn: each belongs to a class that the pocket model knows, and has
parts that no member of that class has. Pretraining never shows them to the model: none of their
bodies is in render.BODIES. The LEGO car's body is beside the other cars in drawing.py.

Coordinates are those of a canvas after `stand_at`: tenths of the object's width, x from its middle
and y upwards from the ground below it.
"""

IRON = (60, 60, 66)


def draw_windmill(canvas, scene):
    """A tower with a round cap and four sails that cross in front of it: no house has sails."""
    canvas.poly([(-2.9, 0), (-1.8, 5.6), (1.8, 5.6), (2.9, 0)], scene.colour)
    canvas.oval(0, 5.6, 2, 1.3, scene.parts["roof"])
    canvas.box(-0.7, 2.2, 0.7, 0, scene.parts["door"])
    for dx, dy in ((1, 1), (-1, 1), (-1, -1), (1, -1)):
        tip = (2.9 * dx, 5.6 + 2.9 * dy)
        side = (2.9 * dx + 0.9 * dy, 5.6 + 2.9 * dy - 0.9 * dx)
        root = (0.9 * dx + 0.9 * dy, 5.6 + 0.9 * dy - 0.9 * dx)
        canvas.poly([(0, 5.6), tip, side, root], scene.parts["sails"])
    canvas.oval(0, 5.6, 0.5, 0.5, IRON)


def draw_tugboat(canvas, scene):
    """A high bow, a cabin, a funnel with a band, and tyres along the hull; no mast and no sail."""
    canvas.box(-3.4, 5.2, 0.8, 2.4, scene.parts["cabin"])
    for x in (-2.9, -0.9):
        canvas.box(x, 4.6, x + 1.2, 3.4, (150, 200, 225))
    canvas.box(1.3, 6.9, 3, 2.4, scene.parts["funnel"])
    canvas.box(1.3, 6.2, 3, 5.3, scene.parts["band"], outline=False)
    hull = [(-5, 2.5), (3.2, 2.5), (5, 3.8), (4.2, 0), (-4.2, 0)]
    canvas.poly(hull, scene.colour)
    for x in (-3.2, -1, 1.2, 3.4):
        canvas.oval(x, 1.3, 0.7, 0.7, IRON, outline=False)


def draw_teapot(canvas, scene):
    """A round body with dots, a spout, and a lid with a knob: no cup has any of these."""
    canvas.oval(3.3, 3.2, 1.5, 1.7, scene.parts["handle"])
    canvas.oval(3.3, 3.2, 0.8, 1, (190, 190, 190), outline=False)
    canvas.poly([(-2.2, 1.4), (-5, 4.9), (-4.2, 5.3), (-2, 3.9)], scene.parts["handle"])
    canvas.oval(0, 2.9, 3.2, 2.9, scene.colour)
    canvas.oval(0, 5.5, 1.9, 0.6, scene.parts["lid"])
    canvas.oval(0, 6.4, 0.6, 0.6, scene.parts["lid"])
    for x, y in ((-1.6, 3.6), (0, 2.2), (1.6, 3.6), (0, 4.4), (-1.5, 1.5), (1.5, 1.5)):
        canvas.oval(x, y, 0.5, 0.5, scene.parts["dots"], outline=False)


def draw_fire_engine(canvas, scene):
    """Red from end to end, a ladder of thin rungs that rises to the front, a light on the cab:
    longer than any other car, and asymmetric."""
    canvas.box(-5, 4, 2, 0.9, scene.colour, 0.2)
    canvas.box(1.8, 5, 5, 0.9, scene.colour, 0.5)
    canvas.box(3, 4.5, 4.6, 3.1, (150, 200, 225))
    canvas.box(2.6, 5.6, 3.6, 5, scene.parts["light"], 0.2)
    canvas.box(-4.9, 2.2, 4.9, 1.8, scene.parts["band"], outline=False)
    for y in (4.4, 5.3):
        canvas.poly([(-5, y), (2.2, y + 1.6), (2.2, y + 1.9), (-5, y + 0.3)], scene.parts["ladder"])
    for i in range(6):
        x = -4.6 + 1.2 * i
        y = 4.5 + 0.267 * (i - 0.3)
        canvas.box(x, y + 1.1, x + 0.25, y, scene.parts["ladder"], outline=False)
    for x in (-3.4, 3):
        canvas.oval(x, 1.1, 1.2, 1.2, (35, 35, 38))
        canvas.oval(x, 1.1, 0.6, 0.6, scene.hubs, outline=False)


def draw_circus(canvas, scene):
    """A tent in two colours from the ground to a pennant: stripes all over, and no window."""
    for i in range(6):
        colour = scene.colour if i % 2 else scene.parts["stripes"]
        left, right = -4.2 + 1.4 * i, -2.8 + 1.4 * i
        canvas.box(left, 3.4, right, 0, colour, outline=False)
        canvas.poly([(left * 1.15, 3.4), (0, 7.2), (right * 1.15, 3.4)], colour)
    canvas.poly([(-1, 0), (0, 3), (1, 0)], scene.parts["door"])
    canvas.box(-0.12, 8.6, 0.12, 7, IRON, outline=False)
    canvas.poly([(0.1, 8.6), (0.1, 7.7), (1.9, 8.2)], scene.parts["pennant"])


def draw_ladybird(canvas, scene):
    """A ball with a face: dots all over a seam, a dark head on one side, two thin feelers."""
    canvas.oval(2.4, 3.4, 1.9, 1.9, scene.parts["head"])
    for dx in (0.8, 1.7):
        canvas.poly([(2.6, 4.6), (2.6 + dx, 6.7), (2.8 + dx, 6.7), (3, 4.6)], scene.parts["head"])
    canvas.oval(-0.6, 3.3, 3.3, 3.3, scene.colour)
    canvas.box(-0.75, 6.5, -0.45, 0.1, scene.parts["head"], outline=False)
    for x, y in ((-2.4, 4.4), (-2.6, 2.2), (-1.5, 3.3), (0.5, 4.9), (1.2, 3.2), (0.4, 1.6)):
        canvas.oval(x, y, 0.55, 0.55, scene.parts["head"], outline=False)
    canvas.oval(3.3, 3.9, 0.35, 0.35, (245, 245, 245), outline=False)


def draw_palm(canvas, scene):
    """A thin trunk that leans, with rings, six narrow fronds, and two coconuts on one side."""
    canvas.poly([(-1.6, 0), (-0.6, 0), (1.2, 5.6), (0.7, 5.8)], scene.parts["trunk"])
    for i in range(5):
        x, y = -1.1 + 0.36 * i, 0.7 + 1.05 * i
        canvas.box(x - 0.35, y + 0.15, x + 0.45, y, IRON, outline=False)
    for dx, dy in ((-4.4, 0.4), (-3.6, 2.4), (-1.2, 3.4), (1.6, 3.2), (3.6, 1.6), (3.9, -0.9)):
        tip = (0.9 + dx, 5.8 + dy)
        canvas.poly([(0.7, 5.3), tip, (1.1, 6.4)], scene.colour)
    for x, y in ((1.5, 5.1), (2.2, 5.6)):
        canvas.oval(x, y, 0.5, 0.5, scene.parts["nuts"])


BODY_RENDERERS = {
    "windmill": draw_windmill,
    "tugboat": draw_tugboat,
    "teapot": draw_teapot,
    "fire_engine": draw_fire_engine,
    "circus": draw_circus,
    "ladybird": draw_ladybird,
    "palm": draw_palm,
}
