"""Pictures: the same whatever makes them, made once, found again, and never another's."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import generate
from dreambooth import checks, files, models, pictures

PROMPTS = ["photo of unqtkn car, in the snow", "photo of a car"]


def paint(argv):
    generate.main(generate.parse_args(argv))


def digests(folder):
    """The digest of the pixels of each picture, by file name."""
    return {f.name: pictures.pixel_digest(Image.open(f)) for f in sorted(Path(folder).glob("*-seed*.png"))}


@pytest.fixture(scope="module")
def painted(generate_argv, tmp_path_factory):
    """Two prompts, five pictures each, made in this process."""
    folder = tmp_path_factory.mktemp("painted") / "new"
    paint(generate_argv(folder, prompts=PROMPTS, num_samples_per_prompt=5))
    return folder


@pytest.fixture
def copied(painted, tmp_path):
    """A copy of the folder that a test may damage."""
    (tmp_path / "new").mkdir()
    for file in painted.iterdir():
        (tmp_path / "new" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "new"


@pytest.fixture(scope="module")
def lora_dir(load_models, tmp_path_factory):
    """A LoRA that shows: its second matrices are not zero."""
    _, denoiser, _ = load_models(use_lora=True)
    torch.manual_seed(0)
    for name, p in denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp("lora") / "lora"
    models.save_lora(denoiser, folder)
    return folder


def test_every_picture_is_there_with_its_record(painted, model_dir):
    """One line of images.jsonl and one PNG that carries the same record, a picture; a comma stays in
    its prompt (fault 9 of the original, which split prompts at commas)."""
    records = [json.loads(line) for line in (painted / pictures.RECORDS).read_text().splitlines()]
    files = digests(painted)
    assert len(files) == len(set(files.values())) == 10
    assert {r["file"]: r["digest"] for r in records} == files
    assert [r["prompt"] for r in records] == [PROMPTS[0]] * 5 + [PROMPTS[1]] * 5
    for record in records:
        assert pictures.read_record(painted / record["file"]) == record
        assert Image.open(painted / record["file"]).size == (64, 64)
    assert {f.name for f in painted.iterdir()} == {*files, pictures.RECORDS, pictures.CONTACT_SHEET}


def test_contact_sheet_has_a_row_a_prompt(painted):
    """Two rows of five pictures of 192 pixels, with gaps of 6 and captions of 26."""
    assert Image.open(painted / pictures.CONTACT_SHEET).size == (5 * 198 + 6, 2 * (192 + 26 + 6) + 6)


def test_twenty_pictures_made_in_five_ways_are_the_same(generate_argv, tmp_path, ray_address):
    """One at a time, seven at a time, at the default, on one worker of Ray and on two: picture by picture
    the same pixels to the last bit, and the same records."""
    ways = {
        "alone": {}, "batch1": {"batch_size": 1}, "batch7": {"batch_size": 7},
        "ray1": {"use_ray_data": True, "num_workers": 1}, "ray2": {"use_ray_data": True, "num_workers": 2},
    }  # fmt: skip
    for name, way in ways.items():
        paint(generate_argv(tmp_path / name, prompts=PROMPTS, num_samples_per_prompt=10, **way))
    found = [digests(tmp_path / name) for name in ways]
    assert len(set(found[0].values())) == 20
    assert all(other == found[0] for other in found[1:])
    records = [sorted((tmp_path / name / pictures.RECORDS).read_text().splitlines()) for name in ways]
    assert len(records[0]) == 20
    assert all(other == records[0] for other in records[1:])


def test_fewer_pictures_than_workers_with_a_lora(painted, generate_argv, lora_dir, tmp_path, ray_address):
    """Fault 9 of the original: for fewer than four samples the batch size was 0, four GPUs were hard
    wired, and a LoRA was silently ignored with Ray Data. Three pictures for two workers, with a LoRA:
    they are made, they are those made without Ray, and not those made without the LoRA."""
    few = {"prompts": PROMPTS[:1], "num_samples_per_prompt": 3, "lora_weights_dir": lora_dir}
    paint(generate_argv(tmp_path / "ray", use_ray_data=True, num_workers=2, **few))
    paint(generate_argv(tmp_path / "here", **few))
    found, plain = digests(tmp_path / "ray"), digests(painted)
    assert len(found) == 3
    assert found == digests(tmp_path / "here")
    assert all(found[name] != plain[name] for name in found)


def test_seed_and_place_decide_on_a_picture(painted, generate_argv, tmp_path):
    """Another seed gives other pictures; the second prompt's are the same without the first."""
    paint(generate_argv(tmp_path / "other", prompts=PROMPTS[1:], num_samples_per_prompt=2, seed=1))
    assert not set(digests(tmp_path / "other").values()) & set(digests(painted).values())
    paint(generate_argv(tmp_path / "alone", prompts=PROMPTS[1:], num_samples_per_prompt=2))
    assert list(digests(tmp_path / "alone").values()) == list(digests(painted).values())[5:7]


def contents(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}


@pytest.fixture
def unfit(request, tmp_path):
    """Flags that only Ray or the model itself can refuse."""
    (tmp_path / "lora").mkdir()
    if request.param == "no LoRA":
        save_file({"a.weight": torch.zeros(1)}, tmp_path / "lora" / files.LORA_FILE)
    elif request.param == "a LoRA of another model":
        wide = {f"unet.mid_block.attentions.0.proj_in.lora.{way}.weight": torch.zeros(7, 7) for way in ("up", "down")}
        save_file(wide, tmp_path / "lora" / files.LORA_FILE)
    return (
        {"use_ray_data": True, "num_workers": 9}
        if request.param == "workers"
        else {"lora_weights_dir": tmp_path / "lora"}
    )


@pytest.mark.parametrize("unfit", ["workers", "no LoRA", "a LoRA of another model"], indirect=True)
def test_nothing_is_overwritten_by_a_run_that_makes_nothing(
    copied, generate_argv, unfit, ray_address, tmp_path, capsys
):
    before = contents(copied)
    with pytest.raises(checks.UserError, match="--num_workers 9|--lora_weights_dir .* does not fit") as error:
        paint(generate_argv(copied, prompts=["photo of a house"], overwrite=True, **unfit))
    assert "\n" not in str(error.value)
    assert "0%" not in capsys.readouterr().err  # no bar of progress above the line
    assert contents(copied) == before
    with pytest.raises(checks.UserError):
        paint(generate_argv(tmp_path / "fresh", **unfit))
    assert not (tmp_path / "fresh").exists()


def test_both_folders_of_a_comparison_are_checked_before_a_picture(copied, generate_argv, model_dir, tmp_path):
    """The second one holds pictures of another seed."""
    (tmp_path / "out").mkdir()
    copied.rename(tmp_path / "out" / "compared")
    with pytest.raises(checks.UserError, match="compared holds 10 pictures of another"):
        paint(generate_argv(tmp_path / "out", seed=1, compare_to=model_dir))
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["compared"]


def times(folder):
    return {f.name: os.stat(f).st_mtime_ns for f in folder.glob("*-seed*.png")}


def test_second_run_makes_nothing(copied, generate_argv, monkeypatch, capsys):
    """Fault 9 of the original: a restart began again from nothing."""
    monkeypatch.setattr(generate, "Painter", None)
    before = times(copied)
    paint(generate_argv(copied, prompts=PROMPTS, num_samples_per_prompt=5))
    assert times(copied) == before
    assert "0 to make" in capsys.readouterr().out


def test_lost_and_damaged_pictures_are_made_again_alone(copied, painted, generate_argv):
    files, before = sorted(copied.glob("*-seed*.png")), times(copied)
    lost, cut, altered = files[1], files[4], files[8]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1000])
    record, image = pictures.read_record(altered), Image.open(altered)
    image.putpixel((0, 0), (1, 2, 3))
    pictures.save_picture(image, record, altered)
    (copied / ".000-0000-seed0.png.1.tmp").write_bytes(b"half a picture")
    paint(generate_argv(copied, prompts=PROMPTS, num_samples_per_prompt=5))
    assert digests(copied) == digests(painted)
    after = times(copied)
    assert {name for name in after if after[name] != before[name]} == {lost.name, cut.name, altered.name}
    assert len((copied / pictures.RECORDS).read_text().splitlines()) == 10
    assert not list(copied.glob(".*.tmp"))


CHANGES = {
    "prompt": {"prompts": ["photo of a house", PROMPTS[1]]},
    "seed": {"seed": 1},
    "steps": {"num_inference_steps": 3},
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_pictures_are_kept_unless_told_otherwise(copied, painted, generate_argv, change):
    """A folder never mixes pictures of two runs without a word: refused, or replaced with --overwrite."""
    (copied / "my photo.png").write_bytes(b"mine")
    (copied / "notes.txt").write_text("mine")
    argv = generate_argv(copied, **{"prompts": PROMPTS, "num_samples_per_prompt": 5, **CHANGES[change]})
    with pytest.raises(checks.UserError, match="--overwrite"):
        paint(argv)
    assert digests(copied).items() == digests(painted).items()
    if change == "prompt":
        paint([*argv, "--overwrite"])
        new, old = digests(copied), digests(painted)
        assert new.keys() == old.keys()
        assert [new[name] == old[name] for name in sorted(old)] == [False] * 5 + [True] * 5
    assert (copied / "my photo.png").read_bytes() == b"mine"
    assert (copied / "notes.txt").read_text() == "mine"


def test_files_that_generate_has_not_made_are_left_alone(copied, generate_argv):
    """Even one whose name looks alike."""
    Image.new("RGB", (64, 64), "red").save(copied / "my-seedling.png")
    content = (copied / "my-seedling.png").read_bytes()
    paint(generate_argv(copied, prompts=PROMPTS, num_samples_per_prompt=5))
    assert (copied / "my-seedling.png").read_bytes() == content


def test_empty_pictures_are_drawn_again(painted, generate_argv, tmp_path, monkeypatch):
    """Fault 10 of the original: black pictures were saved as class images and trained on. A black,
    a grey and a NaN one in the first round are drawn again; the others are the same as ever."""
    draw = generate.Painter.draw

    def empty_at_first(self, records, attempt):
        drawn = draw(self, records, attempt)
        empty = {0: 0.0, 2: 0.5, 3: float("nan")} if attempt == 0 else {}
        indices = [record["index"] for record in records]
        return [torch.full_like(p, empty[i]) if i in empty else p for i, p in zip(indices, drawn, strict=True)]

    monkeypatch.setattr(generate.Painter, "draw", empty_at_first)
    paint(generate_argv(tmp_path / "new", prompts=PROMPTS[:1], num_samples_per_prompt=5))
    new, old = digests(tmp_path / "new"), digests(painted)
    assert [new[name] == old[name] for name in sorted(new)] == [False, True, False, False, True]
    for file in (tmp_path / "new").glob("*-seed*.png"):
        assert len(Image.open(file).getcolors(4096)) > 100


def test_model_that_draws_nothing_is_told_in_one_line(generate_argv, tmp_path, monkeypatch):
    black = torch.zeros(3, 64, 64)
    monkeypatch.setattr(generate.Painter, "draw", lambda self, records, attempt: [black] * len(records))
    with pytest.raises(checks.UserError, match="draws nothing") as error:
        paint(generate_argv(tmp_path / "new"))
    assert "\n" not in str(error.value)
    assert digests(tmp_path / "new") == {}


@pytest.fixture
def broken_model(load_models, model_dir, tmp_path):
    """A model whose pictures are not numbers."""
    _, denoiser, _ = load_models()
    denoiser.unet.conv_out.bias.data.fill_(float("nan"))
    models.save_pipeline(denoiser, model_dir, tmp_path / "broken")
    return tmp_path / "broken"


def test_worker_that_draws_nothing_is_told_in_one_line(broken_model, generate_argv, tmp_path, ray_address):
    """What arises in an actor of Ray Data reaches the user without its stack trace."""
    argv = generate_argv(tmp_path / "new", model_dir=broken_model, use_ray_data=True)
    with pytest.raises(checks.UserError, match="draws nothing") as error:
        paint(argv)
    assert "\n" not in str(error.value).strip()
    assert "Traceback" not in str(error.value)
    assert digests(tmp_path / "new") == {}


def test_contact_sheet_is_no_picture_of_a_class(painted):
    """The folder can be given to train.py as it is: the sheet and the records are passed over."""
    from dreambooth.images import find_images

    assert [f.name for f in find_images(painted)] == sorted(digests(painted))


def test_fingerprint_tells_models_apart(model_dir, broken_model, lora_dir):
    prints = [pictures.fingerprint(folder) for folder in (model_dir, broken_model, lora_dir)]
    assert len(set(prints)) == 3
    assert pictures.fingerprint(model_dir) == prints[0]
