"""Photos as phones and cameras take them: HEIC, colour profiles, floats; and folders that are
likely to be the wrong ones."""

import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from dreambooth import dataset, images
from dreambooth.cli import UserError
from dreambooth.model_dir import check_model_dir
from dreambooth.training_checks import check_flags
from dreambooth.training_plan import make_plan

# The XYZ coordinates, for the white D50 of ICC profiles, of pure red, green and blue.
DISPLAY_P3 = [
    (0.51512, 0.24120, -0.00105),
    (0.29198, 0.69225, 0.04189),
    (0.15710, 0.06657, 0.78407),
]
ADOBE_RGB = [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)]
D50 = (0.9642, 1.0, 0.8249)


def check_and_plan(args):
    check_flags(args)
    return make_plan(args)


def icc_profile(primaries, gamma=None):
    """An ICC profile of version 2 of a display: three primaries, one curve (sRGB's by default)."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in values))

    if gamma:
        curve = b"curv\0\0\0\0" + struct.pack(">IH2x", 1, round(gamma * 256))
    else:
        x = np.linspace(0, 1, 1024)
        linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
        values = (linear * 65535).round().astype(">u2")
        curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + values.tobytes()
    tags = {
        b"wtpt": xyz(D50),
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"P\0" + b"\0" * 78,
    }
    tags.update(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, primaries), strict=True))
    tags.update({name: curve for name in (b"rTRC", b"gTRC", b"bTRC")})
    table = struct.pack(">I", len(tags))
    body = b""
    for name, content in tags.items():
        table += struct.pack(">4s2I", name, 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(
        ">I4xI4s4s4s", 128 + len(table + body), 0x02100000, b"mntr", b"RGB ", b"XYZ "
    )
    header = header.ljust(36, b"\0") + b"acsp" + b"\0" * 28 + xyz(D50)[8:]
    return header.ljust(128, b"\0") + table + body


PROFILES = {"Display P3": icc_profile(DISPLAY_P3), "Adobe RGB": icc_profile(ADOBE_RGB, 2.19921875)}

# How a colour of sRGB is stored in each of the larger colour spaces.
STORED_COLOURS = [
    ("Display P3", (234, 51, 35), (255, 0, 0)),
    ("Display P3", (117, 251, 76), (0, 255, 0)),
    ("Display P3", (0, 0, 245), (0, 0, 255)),
    ("Display P3", (128, 128, 128), (128, 128, 128)),
    ("Adobe RGB", (219, 0, 0), (255, 0, 0)),
    ("Adobe RGB", (144, 255, 60), (0, 255, 0)),
    ("Adobe RGB", (255, 255, 255), (255, 255, 255)),
]


def first_pixel(path):
    image = images.open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".heic"])
@pytest.mark.parametrize(("profile", "stored", "expected"), STORED_COLOURS)
def test_colours_are_converted_from_the_embedded_profile(
    tmp_path, profile, stored, expected, suffix
):
    """Without, a phone's photos would lose a part of their colour."""
    file = tmp_path / f"a{suffix}"
    lossless = {".webp": {"lossless": True}, ".heic": {"quality": -1}}.get(suffix, {})
    Image.new("RGB", (64, 64), stored).save(file, icc_profile=PROFILES[profile], **lossless)
    tolerance = 3 if suffix in (".png", ".tif", ".webp") else 5
    assert np.abs(np.subtract(first_pixel(file), expected)).max() <= tolerance


def test_a_colour_between_the_primaries_is_converted_by_the_textbook(tmp_path):
    """Adobe RGB to linear light by its gamma, to XYZ, to linear sRGB, to sRGB by its curve."""
    stored = np.array([180, 120, 90])
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8), tuple(stored.tolist())).save(file, icc_profile=PROFILES["Adobe RGB"])
    srgb = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410)]
    linear = (stored / 255) ** 2.19921875 @ np.array(ADOBE_RGB) @ np.linalg.inv(srgb)
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(first_pixel(file) - expected).max() < 1.5


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(np.asarray(images.open_image(tmp_path / "a.png")), pixels)


def test_a_profile_holds_for_palettes_and_transparent_images(tmp_path):
    """sRGB red, stored in Display P3; what is transparent is white, whatever its colour."""
    profile = PROFILES["Display P3"]
    Image.new("RGBA", (8, 8), (234, 51, 35, 0)).save(tmp_path / "clear.png", icc_profile=profile)
    Image.new("RGBA", (8, 8), (234, 51, 35, 255)).save(tmp_path / "a.png", icc_profile=profile)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 234, 51, 35])
    palette.save(tmp_path / "palette.png", icc_profile=profile)
    assert first_pixel(tmp_path / "clear.png") == (255, 255, 255)
    for name in ("a.png", "palette.png"):
        assert np.abs(np.subtract(first_pixel(tmp_path / name), (255, 0, 0))).max() <= 2


@pytest.mark.parametrize(
    "profile",
    [b"no profile", b"\0" * 500, PROFILES["Display P3"][:200], PROFILES["Display P3"][:-1400]],
)
def test_a_damaged_profile_is_ignored(tmp_path, profile):
    Image.new("RGB", (8, 8), (234, 51, 35)).save(tmp_path / "a.png", icc_profile=profile)
    assert first_pixel(tmp_path / "a.png") == (234, 51, 35)


@pytest.mark.parametrize(("mode", "colour"), [("L", 100), ("1", 1), ("I;16", 25700), ("CMYK", 0)])
def test_a_profile_for_another_mode_is_ignored(tmp_path, mode, colour):
    """A grey scan with the scanner's RGB profile."""
    plain = tmp_path / "plain.tif"
    Image.new(mode, (8, 8), colour).save(plain)
    profiled = tmp_path / "profiled.tif"
    Image.new(mode, (8, 8), colour).save(profiled, icc_profile=PROFILES["Display P3"])
    assert first_pixel(profiled) == first_pixel(plain)


@pytest.mark.parametrize("suffix", [".heic", ".HEIC", ".heif", ".hif", ".jpg"])
def test_heic_is_read_whatever_it_is_called(tmp_path, suffix):
    """Also as .jpg, as some phones and messengers name it."""
    Image.new("RGB", (64, 48), (200, 100, 50)).save(tmp_path / "a.heic")
    (tmp_path / "a.heic").rename(tmp_path / f"IMG_1{suffix}")
    assert images.find_images(tmp_path) == [tmp_path / f"IMG_1{suffix}"]
    pixels = np.asarray(images.open_image(tmp_path / f"IMG_1{suffix}")).astype(int)
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (1, None),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_heic_is_rotated_once(tmp_path, orientation, stored):
    """It says twice how it is to be rotated: in a property of its own, and in its EXIF data."""
    upright = Image.new("RGB", (64, 48), "black")
    upright.paste("white", (0, 0, 24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upright if stored is None else upright.transpose(stored)
    image.save(tmp_path / "a.heic", exif=exif.tobytes(), quality=-1)
    read = images.open_image(tmp_path / "a.heic")
    assert read.size == (64, 48)
    difference = np.asarray(read).astype(int) - np.asarray(upright)
    assert np.abs(difference).mean() < 2


def test_truncated_heic_is_refused_by_name(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.heic")
    content = (tmp_path / "a.heic").read_bytes()
    for length in np.linspace(0, len(content) - 1, 20).astype(int):
        (tmp_path / "a.heic").write_bytes(content[:length])
        with pytest.raises(UserError, match="a.heic: unreadable or truncated image"):
            images.open_image(tmp_path / "a.heic")


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_images_of_floats_are_neither_black_nor_white(tmp_path, white):
    """From 0 to 1 is the convention for floats; a resized one overshoots a little."""
    values = np.array([[0, 0.2, 0.5, 1, 1.02, -0.02, np.nan, 0]] * 8, np.float32) * white
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "F"
    pixels = np.asarray(images.open_image(tmp_path / "a.tif"))
    assert pixels[0, :, 0].tolist() == [0, 51, 128, 255, 255, 0, 0, 0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_than_three_photos_are_asked_about(flat_image, tmp_path, capsys, count):
    """`images` in place of `images/lego-car`: the banner of the README would be the one photo."""
    for number in range(count):
        flat_image(f"{number}.png", 0, folder=tmp_path / "photos")
    images.warn_if_few(images.find_images(tmp_path / "photos"))
    warning = capsys.readouterr().err
    expected = f"warning: {tmp_path / 'photos'} holds {count} photo{'s' * (count - 1)} (0.png)"
    assert warning.startswith(expected) if count < 3 else warning == ""
    assert len(warning.splitlines()) == (count < 3)


def test_photos_that_are_replaced_by_those_of_another_folder_are_named(
    flat_image, tmp_path, capsys
):
    for name in ("tom", "rex"):
        flat_image("a.png", 0, folder=tmp_path / name / "photos")
    own = tmp_path / "own"
    for _ in range(2):
        images.copy_images(tmp_path / "tom" / "photos", own)
    assert capsys.readouterr().err == ""
    images.copy_images(tmp_path / "rex" / "photos", own)
    assert f"held the photos of {tmp_path / 'tom' / 'photos'}" in capsys.readouterr().err


@pytest.fixture
def phone_photos(tmp_path):
    """A HEIC photo, a JPEG in Display P3, and one whose name is not UTF-8: sRGB red, all three."""
    folder = tmp_path / "phone"
    folder.mkdir()
    Image.new("RGB", (80, 64), (255, 0, 0)).save(
        folder / "IMG_0001.HEIC", format="HEIF", quality=-1
    )
    for name in ("IMG_0002.JPG", b"caf\xe9.jpg".decode(errors="surrogateescape")):
        buffer = BytesIO()
        image = Image.new("RGB", (64, 80), (234, 51, 35))
        image.save(buffer, "JPEG", quality=95, icc_profile=PROFILES["Display P3"])
        (folder / name).write_bytes(buffer.getvalue())
    return folder


def test_a_phones_photos_pass_the_checks_and_reach_the_workers(
    phone_photos, train_args, tmp_path, ray_address, capsys
):
    """From the flags to a worker's batch: every instance image is sRGB red."""
    plan = check_and_plan(train_args(tmp_path / "out", instance_images_dir=phone_photos))
    assert len(plan.instance_paths) == 3
    assert capsys.readouterr().err == ""
    pairs = dataset.pair_images(plan.instance_paths, plan.class_paths, 6, seed=0)
    shards = dataset.DealPairs(6, plan.resolution, seed=0)
    rows = shards.shard(dataset.build_dataset(pairs), rank=0, world_size=1)
    (batch,) = rows.iter_torch_batches(batch_size=6, collate_fn=dataset.collate)
    red = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    assert batch["images"].shape == (12, 3, 64, 64)
    assert (batch["images"][:6] - red).abs().max() < 0.05


def test_a_phones_photos_are_trained_on(phone_photos, train_argv, run_script, tmp_path):
    """As a command; without class images, which this does not need."""
    without = {"prior_loss_weight": 0, "class_images_dir": False, "class_prompt": False}
    argv = train_argv(
        tmp_path / "out", instance_images_dir=phone_photos, max_train_steps=1, **without
    )
    result = run_script("train.py", *argv)
    assert result.returncode == 0, result.stderr
    assert (
        "3 instance and 0 class images at 64 px, 1 steps of 1 pairs, 1 worker(s)" in result.stdout
    )
    assert check_model_dir(tmp_path / "out") is None
