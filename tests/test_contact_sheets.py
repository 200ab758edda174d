"""The captions of contact sheets: whole, and honest about what is not shown."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dreambooth import outputs

FONT = ImageFont.load_default(size=16)
LONG = "photo of unqtkn car in the snow beside a red house with a white door, by embedded"


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "cars"), (8, "cars"), (9, "cars (8 of 9 shown)")]
)
def test_a_caption_says_how_many_are_not_shown(count, expected):
    assert outputs.caption_of_row("cars", ["a.png"] * count, columns=8) == expected


@pytest.mark.parametrize("text", [LONG, "W" * 200, "i" * 500, "/a/long/path" * 20, "写真 " * 60])
@pytest.mark.parametrize("width", [60, 468, 1578])
def test_a_long_caption_takes_lines_that_fit_and_loses_nothing(text, width):
    lines = outputs.wrap(text, FONT, width)
    assert max(FONT.getlength(line) for line in lines) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_words_are_not_broken_where_they_fit():
    lines = outputs.wrap(LONG, FONT, 468)
    assert " ".join(lines) == LONG
    assert len(lines) == 2
    assert outputs.wrap("a short caption", FONT, 468) == ["a short caption"]


def test_a_caption_that_does_not_fit_pushes_its_images_down(flat_image, tmp_path):
    """One image of 192 pixels per row: the sheet is as wide as it always is at least, 480."""
    red = flat_image("red.png", (255, 0, 0))
    outputs.contact_sheet({"short": [red], LONG: [red], "last": [red]}, tmp_path / "sheet.png")
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (3 * (26 + 192 + 6) + 20 + 6, 480, 3)
    is_red = (pixels[:, 10] == (255, 0, 0)).all(axis=1)
    tops = np.flatnonzero(is_red[1:] & ~is_red[:-1]) + 1
    assert tops.tolist() == [32, 32 + 224 + 20, 32 + 2 * 224 + 20]
    assert (pixels[:, -6:] == 255).all()  # no caption runs into the margin


def test_sheets_with_short_captions_look_as_they_always_did(flat_image, tmp_path):
    """Drawn here in the plainest way."""
    red = flat_image("red.png", (255, 0, 0), size=(192, 192))
    outputs.contact_sheet({"one": [red] * 3, "two": [red]}, tmp_path / "sheet.png")
    expected = Image.new("RGB", (3 * 198 + 6, 2 * 224 + 6), "white")
    draw = ImageDraw.Draw(expected)
    for row, (caption, count) in enumerate([("one", 3), ("two", 1)]):
        draw.text((6, 6 + row * 224 + 2), caption, fill="black", font=FONT)
        for column in range(count):
            expected.paste(
                (255, 0, 0),
                (6 + column * 198, 6 + row * 224 + 26, 198 + column * 198, 224 + row * 224),
            )
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), np.asarray(expected))
