"""Does an image show the subject as its renderer draws it?

fidelity.py's Judge names the nearest of its renders, and a car that is too long, or a teapot
without a spout, is still nearest to the subject's. Here the subject is drawn at every position and
size in which a render can show it, and the drawing that fits best is compared with the image, pixel
by pixel, on the subject and in a ring around it. Renders through the VAE have 1 to 3 % of wrong
pixels, a subject that is half as long again 17 % or more. What is a pixel thin, such as a palm's
frond, goes unseen: a pixel may be off by one.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dreambooth.pocket import render
from dreambooth.pocket.drawing import OBJECT_RENDERERS, PLACE_RENDERERS, Canvas
from dreambooth.pocket.subjects import BODY_RENDERERS

SIZE = 64
# The range of each in render.render, in steps of a pixel.
WIDTHS = np.arange(0.55, 0.73, 1 / SIZE)
XS = np.arange(0.40, 0.60, 1 / SIZE)
YS = np.arange(0.77, 0.89, 1 / SIZE)
HORIZONS = np.linspace(0.5, 0.62, 8)
LIGHT = (0.9, 1.08)
RING = 4  # pixels
SHADOW = 2.5  # pixels above the ground from which on the shadow is not in the way
DIFFERENCE = 0.22  # of a colour channel in [0, 1]: from here on a pixel is wrong
LIMIT = 0.12  # an image with more wrong pixels is not like the subject, to the eye as well


def _draw_subject(scene, x, y, width, background):
    """The object alone, without place and shadow: (64, 64, 3) in [0, 1]."""
    canvas = Canvas(4 * SIZE, 1.0)
    canvas.image.paste(background, (0, 0, *canvas.image.size))
    canvas.stand_at(x, y, width)
    draw = BODY_RENDERERS.get(scene.body, OBJECT_RENDERERS[scene.kind])
    draw(canvas, scene)
    return _shrink(canvas)


def _draw_place(place, horizon, rng):
    canvas = Canvas(4 * SIZE, 1.0)
    PLACE_RENDERERS[place](canvas, horizon, rng)
    return _shrink(canvas)


def _shrink(canvas):
    image = canvas.image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


@cache
def _typical_places(place, count=16):
    """The place at each of HORIZONS, (8, 64, 64, 3): the median of `count`, without sun or dots."""
    rng = np.random.default_rng(0)
    drawn = [[_draw_place(place, horizon, rng) for _ in range(count)] for horizon in HORIZONS]
    return torch.from_numpy(np.median(drawn, axis=1))


class Likeness:
    """Compares images with drawings of `subject`, a render.Scene.

    The drawing that is compared goes through `reconstruct`, a function of images (N, 64, 64, 3)
    uint8, such as a model's VAE, so that it is as soft as what a model generates.
    """

    def __init__(self, subject, reconstruct=None):
        self.reconstruct = reconstruct or (lambda images: images)
        placements = [(x, y, width) for width in WIDTHS for x in XS for y in YS]
        on_black, on_white = (
            torch.from_numpy(np.stack([_draw_subject(subject, *p, rgb) for p in placements]))
            for rgb in ((0, 0, 0), (255, 255, 255))
        )
        self.drawn = on_black  # premultiplied by alpha
        self.alpha = 1 - (on_white - on_black).mean(3)
        self.inside = (self.alpha > 0.5).float()
        touched = (self.alpha > 0.01).float()
        around = F.max_pool2d(touched[:, None], 2 * RING + 1, 1, RING)[:, 0] - touched
        ground = torch.tensor([y for _, y, _ in placements])[:, None, None] * SIZE
        self.ring = around * (torch.arange(SIZE)[:, None] < ground - SHADOW)
        self.compared = (touched + self.ring) > 0
        self.places = {place: _typical_places(place) for place in render.PLACES}

    def __call__(self, images, place):
        """The share of `images` that show the subject in `place` as it is drawn."""
        return (self.wrong(images, place) <= LIMIT).double().mean().item()

    def wrong(self, images, place):
        """For each of `images` (N, 64, 64, 3) uint8 the share of wrong pixels, (N,) float32, of
        those on the subject and around it."""
        drawing, compared = self.best_drawing(images, place)
        drawing = self.reconstruct((drawing.clamp(0, 1) * 255).round().byte().numpy())
        first, second = (
            torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (images, drawing)
        )
        # A pixel may be off by one: each must have its like among the other's nine nearest.
        wrong = torch.maximum(_distance(first, second), _distance(second, first)) > DIFFERENCE
        return (wrong & compared).sum((1, 2)) / compared.sum((1, 2))

    def best_drawing(self, images, place):
        """For each image the drawing with the least mean squared difference on the subject and in
        the ring: (N, 64, 64, 3) in [0, 1], and the pixels to compare, (N, 64, 64) bool."""
        images = torch.from_numpy(images).float() / 255
        squared = (images**2).sum(3).flatten(1)
        ring, inside = self.ring.flatten(1), self.inside.flatten(1)
        # |image - light * drawing|^2 on the subject, with the light that makes it least.
        colours = self.drawn / self.alpha.clamp(min=0.5)[..., None] * self.inside[..., None]
        colours = colours.flatten(1)
        products, powers = images.flatten(1) @ colours.T, (colours**2).sum(1)
        dimmed = 0.8 if place == "at night" else 1.0  # as in render.render
        light = (products / powers).clamp(*(dimmed * bound for bound in LIGHT))
        on_subject = squared @ inside.T - 2 * light * products + light**2 * powers
        # |image - place|^2 in the ring, for each horizon.
        differences = []
        for typical in self.places[place]:
            products = (images * typical).sum(3).flatten(1) @ ring.T
            powers = ring @ (typical**2).sum(2).flatten()
            differences.append(on_subject + squared @ ring.T - 2 * products + powers)
        differences = torch.stack(differences, 1) / (inside.sum(1) + ring.sum(1))  # (N, 8, P)
        horizon, best = torch.unravel_index(differences.flatten(1).argmin(1), differences.shape[1:])
        background = self.places[place][horizon] * (1 - self.alpha[best])[..., None]
        light = light.gather(1, best[:, None])[..., None, None]
        return self.drawn[best] * light + background, self.compared[best]


def _distance(images, others):
    """For each pixel of `images` (N, 3, H, W) the least difference, in its worst channel, from the
    nine nearest pixels of `others`: (N, H, W)."""
    padded = F.pad(others, (1, 1, 1, 1), mode="replicate")
    height, width = images.shape[2:]
    shifted = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.stack([(images - s).abs().amax(1) for s in shifted]).amin(0)
