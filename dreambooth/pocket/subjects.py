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


BODY_RENDERERS = {"windmill": draw_windmill, "tugboat": draw_tugboat, "teapot": draw_teapot}
