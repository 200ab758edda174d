"""The images of a run: checked once, then cropped at random."""

import numpy as np
import pytest
from PIL import Image

from dreambooth import images
from dreambooth.cli import UserError


def test_each_image_is_checked_and_refused_by_name(flat_image, tmp_path):
    """A quarter of the resolution is enough."""
    enough = flat_image("enough.png", 0, size=(16, 300))
    images.check_images([enough], 64)
    small = flat_image("icon.png", 0, size=(15, 300))
    with pytest.raises(UserError, match="icon.png: 15 x 300 pixels are too small to train at 64"):
        images.check_images([enough, small], 64)
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(enough.read_bytes()[:-50])
    with pytest.raises(UserError, match="truncated.png"):
        images.check_images([enough, enough, truncated], 64)


def test_the_digest_is_of_the_files_contents_in_their_order(flat_image):
    """It goes into the run's fingerprint: replaced photos are another run, moved ones are not."""
    red = flat_image("red.png", (255, 0, 0))
    blue = flat_image("blue.png", (0, 0, 255))
    digest = images.digest([red, blue])
    assert images.digest([red.rename(red.with_name("renamed.png")), blue]) == digest
    flat_image("red.png", (254, 0, 0))
    others = [images.digest(paths) for paths in ([blue, red.with_name("renamed.png")], [red, blue])]
    assert len({digest, *others}) == 3


@pytest.mark.parametrize("size", [(200, 100), (100, 201), (31, 50)])
def test_the_shorter_side_becomes_the_resolution(flat_image, size):
    """Scaled down or up, in landscape or portrait format; one colour stays that colour."""
    crop, _, _ = images.crop_image(flat_image("a.png", (0, 51, 255), size=size), 64, seed=0)
    assert crop.shape == (3, 64, 64)
    assert crop.dtype == np.uint8
    assert (crop == np.array([0, 51, 255])[:, None, None]).all()


def test_a_photo_that_is_replaced_is_read_anew(tmp_path):
    """In a process that outlives a run, such as a notebook's or Ray's."""
    for color in ((255, 0, 0), (0, 0, 255)):
        Image.new("RGB", (64, 64), color).save(tmp_path / "new.png")
        (tmp_path / "new.png").rename(tmp_path / "a.png")
        crop, _, _ = images.crop_image(str(tmp_path / "a.png"), 64, seed=0)
        assert tuple(crop[:, 0, 0]) == color


def test_resizing_is_antialiased(tmp_path):
    """A fine chequerboard of black and white becomes grey, not a pattern."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "board.png")
    crop, _, _ = images.crop_image(tmp_path / "board.png", 64, seed=0)
    assert np.abs(crop.astype(int) - 127.5).max() < 6


@pytest.fixture
def ramp(tmp_path):
    """An image, 96 x 64, whose column x has the value x: a crop tells where it is from."""
    values = np.tile(np.arange(96, dtype=np.uint8), (64, 1))
    Image.fromarray(values).save(tmp_path / "ramp.png")
    return str(tmp_path / "ramp.png")


def test_crops_follow_from_the_seed_and_lie_inside_the_image(ramp):
    """The left edge is at one of 17 columns, from 0 to 32; equal keys are equal crops. So few that
    a step soon finds each of its crops encoded."""
    places = set()
    for seed in range(200):
        crop, key, size = images.crop_image(ramp, 64, seed)
        again, _, _ = images.crop_image(ramp, 64, seed)
        assert np.array_equal(crop, again)
        left = int(crop[0, 0, 0])
        assert (crop[0] == np.arange(left, left + 64)).all()
        places.add((key, left))
        assert size == (64, 96, 0, left)  # of the photo: height and width; of the crop: top, left
    keys = {key for key, _ in places}
    edges = {left for _, left in places}
    assert len(keys) == len(places)
    assert edges == set(range(0, 33, 2))


def test_a_pairs_crops_depend_on_its_position_and_not_on_its_batch(ramp):
    """The two images of a pair are cropped apart; without class images there is no class column."""
    positions = np.arange(20)
    batch = {"position": positions, "instance": [ramp] * 20, "class": [ramp] * 20}
    batch.update(instance_prompt=positions % 3, class_prompt=positions % 2)
    whole = images.load_crops(batch, 64, seed=1)
    assert whole["instance_image"].shape == whole["class_image"].shape == (20, 3, 64, 64)
    assert list(whole["instance_key"]) != list(whole["class_key"])
    assert np.array_equal(whole["class_prompt"], positions % 2)
    part = {"position": positions[7:9], "instance": [ramp] * 2, "instance_prompt": [0, 1]}
    alone = images.load_crops(part, 64, seed=1)
    columns = {"instance_image", "instance_key", "instance_size", "instance_prompt"}
    assert set(alone) == {"position", *columns}
    assert np.array_equal(alone["instance_size"], whole["instance_size"][7:9])
    assert np.array_equal(alone["instance_image"], whole["instance_image"][7:9])
    other = images.load_crops(batch, 64, seed=2)
    assert list(other["instance_key"]) != list(whole["instance_key"])


def test_crops_of_a_portrait_differ_by_their_rows(tmp_path):
    """The left edge of each is 0: the key tells them apart, else all would have the first one's
    latents."""
    rows = np.tile(np.arange(96, dtype=np.uint8)[:, None], (1, 64))
    Image.fromarray(rows).save(tmp_path / "portrait.png")
    places = set()
    for seed in range(40):
        crop, key, size = images.crop_image(str(tmp_path / "portrait.png"), 64, seed)
        top = int(crop[0, 0, 0])
        assert size == (96, 64, top, 0)
        places.add((key, top))
    assert len({key for key, _ in places}) == len({top for _, top in places}) == len(places) > 8


def test_crops_are_those_of_earlier_versions(tmp_path):
    """So that a run that is resumed after an update goes on with its own."""
    Image.new("RGB", (200, 130)).save(tmp_path / "a.png")
    batch = {"position": np.array([5, 6]), "instance": [str(tmp_path / "a.png")] * 2}
    found = images.load_crops({**batch, "instance_prompt": np.zeros(2)}, 64, seed=3)
    assert found["instance_size"].tolist() == [[130, 200, 0, 12], [130, 200, 0, 34]]


def test_an_image_keeps_its_proportions_to_half_a_pixel(tmp_path):
    """100 by 201 pixels become 64 by 129, not 128: the last column is seen."""
    Image.new("RGB", (201, 100)).save(tmp_path / "a.png")
    lefts = {images.crop_image(str(tmp_path / "a.png"), 64, seed)[2][3] for seed in range(1000)}
    assert max(lefts) == 129 - 64
