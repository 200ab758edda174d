"""The page: whole, in one file, and nothing on it asks for a network; and its advice, where a
figure is off and only there."""

import argparse
import base64
import html.parser
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dreambooth.cli import Diverged, UserError
from dreambooth.files import generated_images, pipeline_dir
from dreambooth.report import page
from dreambooth.run import previews, training_log
from dreambooth.run.plan import make_plan
from tests.test_pipeline_dir import set_json

PROMPTS = ["photo of unqtkn car in the snow", "photo of unqtkn car <at night>"]


def rows_of(first, last, noise=0.1, seed=0):
    """Metrics whose loss on class images goes from `first` to `last`, as noisy as a real run's."""
    losses = np.linspace(first, last, 30)
    losses *= 1 + noise * np.random.default_rng(seed).standard_normal(30)
    return [
        {"step": 10 * i, "loss": 0.2 + loss, "instance_loss": 0.2, "class_loss": loss, "lr": 1e-3}
        for i, loss in enumerate(losses, start=1)
    ]


@pytest.fixture
def report(train_args, tmp_path):
    """The directory of a finished run with metrics and previews of three steps."""
    (tmp_path / "tuned").mkdir()
    args = train_args(tmp_path / "tuned", lr=2e-4, lr_scheduler="cosine")
    plan = make_plan(args)
    folder = plan.report_dir
    training_log.prepare(folder, 0)
    training_log.RunRecord(args, plan, "2 cores").finish({"start_s": 2.0, "previews_s": 12.34})
    lines = [json.dumps(row) + "\n" for row in rows_of(0.1, 0.1)]
    (folder / training_log.METRICS).write_text("".join(lines))
    (folder / previews.FOLDER).mkdir()
    for number, prompt in enumerate(PROMPTS):
        for step in (0, 20, 40):
            file = folder / previews.FOLDER / previews.file_name(number, step)
            record = {"prompt": prompt, "seed": 0, "step": step}
            generated_images.save_image(Image.new("RGB", (64, 64), (step, 0, 0)), record, file)
    return folder


@pytest.fixture
def save_after(tmp_path):
    """Save an image of each prompt, as generate.py would: save_after(image) returns their folder,
    in which those before are of black and white halves."""
    folder = tmp_path / "new"
    (folder / "compared").mkdir(parents=True)
    before = Image.new("RGB", (64, 64), "white")
    before.paste("black", (0, 0, 32, 64))

    def save(image=before):
        for number, prompt in enumerate(PROMPTS):
            record = {"prompt": prompt, "seed": 0, "index": 0, "model": "0123", "lora": ""}
            name = generated_images.file_name(number, 0, 0)
            generated_images.save_image(image, record, folder / name)
            generated_images.save_image(before, record, folder / "compared" / name)
        return folder

    return save


class Parsed(html.parser.HTMLParser):
    """The tags of a page, and what a browser would fetch for it."""

    def __init__(self, text):
        super().__init__()
        self.fetched = []
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.fetched.append(value)


def write_page(report, images_dir=None):
    page.main(argparse.Namespace(report_dir=report, images_dir=images_dir))
    return (report / "report.html").read_text(encoding="utf-8")


def test_one_file_that_fetches_nothing(report, save_after):
    text = write_page(report, save_after())
    parsed = Parsed(text)
    assert len(parsed.fetched) >= 5 + 4 + 6
    assert [uri for uri in parsed.fetched if not uri.startswith(("data:", "#"))] == []
    assert "script" not in parsed.tags
    assert re.findall(r"url\((?!#)|@import", text) == []
    assert "default-src 'none'" in text  # and the browser is told so
    assert len(text) < 500_000


def test_photos_before_and_after_previews_curves_and_facts(report, save_after, capsys):
    text = write_page(report, save_after())
    tags = Parsed(text).tags
    sampler = f"in {previews.NUM_INFERENCE_STEPS} steps with guidance {previews.GUIDANCE_SCALE}"
    assert tags.count("svg") == 2  # losses and learning rate: other metrics are not there
    assert tags.count("img") == 5 + 2 * 2 + 2 * 3
    for expected in (
        "Before and after", "While it trained", sampler,
        "2 cores", "0.0002, cosine", "5 instance and 4 class images", "previews 12.3 s",
        "instance images", sys.executable, "&lt;at night&gt;", "show no fault",
    ):  # fmt: skip
        assert expected in text, expected
    assert "<at night>" not in text
    assert capsys.readouterr().out == f"open {report / 'report.html'}\n"  # no advice


def test_images_that_are_not_there_are_named(report, tmp_path, capsys):
    with pytest.raises(UserError, match="--images_dir .*nowhere: no such directory"):
        write_page(report, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    write_page(report, tmp_path / "empty")
    assert "holds no images made with --compare_to" in capsys.readouterr().err


def test_the_page_of_a_run_that_is_older_than_a_flag(report):
    record = json.loads((report / training_log.RECORD).read_text())
    del record["flags"]["prior_target"]
    (report / training_log.RECORD).write_text(json.dumps(record))
    assert "Before and after" not in write_page(report)


def test_a_run_that_failed_at_its_first_step_has_a_page_too(report, train_args):
    args = train_args(report.with_name("tuned"))
    with (
        pytest.raises(Diverged),
        training_log.RunRecord(args, make_plan(args), "2 cores"),
    ):
        raise Diverged("the loss is nan at step 1")
    (report / training_log.METRICS).write_text('{"step": 1, "loss": NaN, "class_loss": NaN}\n')
    assert "diverged: the loss is nan at step 1" in write_page(report)
    (report / training_log.METRICS).unlink()
    shutil.rmtree(report / previews.FOLDER)
    text = write_page(report)
    assert "diverged: the loss is nan at step 1" in text
    assert re.search("<p class=.soft.>tuned, from .*: the loss is nan at step 1", text)
    for heading in ("Before and after", "While it trained", "Curves", "show no fault"):
        assert heading not in text
    assert "The run" in text


def test_images_of_another_prompt_are_not_before_and_after(save_after):
    """What is left in compared/ of an earlier command."""
    folder = save_after()
    first, second = page.find_comparisons(folder)
    record = {"prompt": "photo of a boat", "seed": 0, "index": 0}
    generated_images.save_image(Image.new("RGB", (64, 64)), record, first[-1])
    assert page.find_comparisons(folder) == [second]
    assert page.find_comparisons(None) == []


def test_prompts_that_do_not_name_the_subject_are_what_must_not_change(report, save_after):
    """They stand apart, with how far they have moved beside the subject's, and are not on the model
    card; the identifier tells, wherever it stands."""
    folder = save_after(Image.new("RGB", (64, 64), "white"))  # 128 of 255 away, on average
    assert "What must not change" not in write_page(report, folder)
    record = {"prompt": "photo of a house", "seed": 0, "index": 0}
    name = generated_images.file_name(2, 0, 0)
    for place, brightness in ((folder, 100), (folder / "compared", 55)):
        image = Image.new("RGB", (64, 64), (brightness,) * 3)
        generated_images.save_image(image, record, place / name)
    text = write_page(report, folder)
    assert f"The pixels changed {45 / (255 / math.sqrt(2)):.2f} times as much" in text
    kept = text[text.index("What must not change") : text.index("While it trained")]
    assert "photo of a house" in kept and "unqtkn" not in kept
    card = Image.open(report.with_name("tuned") / "before-after.png")
    assert card.width < 3 * 128 + 200

    flags = {"instance_prompt": "photo of unqtkn car", "class_prompt": "photo of a car"}
    assert page.names_subject("a drawing of unqtkn car", flags)
    assert not page.names_subject("photo of a car at night", flags)
    assert page.names_subject("a painting", {**flags, "class_prompt": None})
    assert page.names_subject("unqtkn car", {**flags, "instance_prompt": "photo of the unqtkn car"})
    assert page.names_subject("Unqtkn, a car, in the snow", flags)
    flags["instance_prompt"] = "photo of my unqtkn car, studio light"
    assert page.names_subject("photo of unqtkn car in the snow", flags)
    assert not page.names_subject("photo of my house", flags)


def test_the_model_card_shows_before_and_after_of_a_finished_run(report, save_after):
    card = report.with_name("tuned") / "README.md"
    write_page(report)
    assert not card.exists()
    write_page(report, save_after())
    assert "](before-after.png)" in card.read_text()
    assert (card.parent / "before-after.png").exists()
    card.write_text(f"{card.read_text()}\nMy own words.\n")
    write_page(report, save_after())
    assert card.read_text().endswith("My own words.\n")


def test_images_of_another_model_are_shown_neither_on_the_page_nor_on_the_card(
    report, save_after, model_dir, capsys
):
    """Of an earlier result, or of another run's."""
    result = report.with_name("tuned")
    shutil.copytree(model_dir, result, dirs_exist_ok=True)
    folder = save_after()
    for model, is_on_card in (("0123", False), (pipeline_dir.fingerprint(result), True)):
        for file in folder.glob("*.png"):
            record = {**generated_images.read_record(file), "model": model, "lora": ""}
            generated_images.save_image(Image.open(file), record, file)
        assert ("Before and after" in write_page(report, folder)) == is_on_card
        assert ("are not of" in capsys.readouterr().err) != is_on_card
        assert (result / "before-after.png").exists() == is_on_card


def test_images_of_another_model_among_its_own_are_not_shown(report, save_after, model_dir, capsys):
    """As a run leaves them that was killed while it replaced an earlier run's."""
    result = report.with_name("tuned")
    shutil.copytree(model_dir, result, dirs_exist_ok=True)
    folder = save_after()
    own, *others = sorted(folder.glob("*.png"))
    for file in (own, *others):
        model = pipeline_dir.fingerprint(result) if file == own else "0123"
        record = {**generated_images.read_record(file), "model": model, "lora": ""}
        generated_images.save_image(Image.open(file), record, file)
    page = write_page(report, folder)
    assert f"{len(others)} of {len(others) + 1} images in" in capsys.readouterr().err
    assert page.count(">after<") == 1


def test_the_page_of_a_copied_result_leaves_the_original_alone(report, save_after, tmp_path):
    for folder in (report, report.with_name("tuned")):
        shutil.copytree(folder, tmp_path / "copy" / folder.name)
    write_page(tmp_path / "copy" / report.name, save_after())
    assert list(report.with_name("tuned").iterdir()) == []
    assert (tmp_path / "copy" / "tuned" / "README.md").exists()


def test_images_of_different_settings_are_said_to_be_so(report, save_after, capsys):
    """As of two commands, only the first of which had --compare_to."""
    folder = save_after()
    for file in folder.glob("*.png"):
        record = {**generated_images.read_record(file), "guidance_scale": 9.0}
        generated_images.save_image(Image.open(file), record, file)
    write_page(report, folder)
    warning = "the images before and after differ in guidance_scale\n"
    assert capsys.readouterr().err.endswith(warning)


def test_a_directory_of_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run\.json: name the \.report directory of a run"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    ("rows", "contrast", "expected"),
    [
        (rows_of(0.1, 0.2), None, [page.FORGETTING]),
        (rows_of(0.1, 0.1), 0.0, [page.BLACK]),
        (rows_of(0.1, 0.1), 0.4, [page.WASHED_OUT]),
        (rows_of(0.1, 0.1), 1.0, []),
        (rows_of(0.1, 0.2)[:3], None, []),  # too few
        ([{"step": row["step"], "loss": row["class_loss"]} for row in rows_of(0.1, 0.5)], None, []),
        ([], None, []),
    ],
)
def test_advice_where_a_figure_is_off_and_only_there(rows, contrast, expected):
    assert page.advice(rows, contrast) == expected


def test_noise_is_not_taken_for_a_rise():
    """Of a loss on class images that stays where it is, in 200 runs."""
    runs = [page.advice(rows_of(0.1, 0.1, noise=0.3, seed=seed), None) for seed in range(200)]
    assert sum(map(bool, runs)) <= 10


def test_black_images_are_advised_on_on_the_page_and_in_the_terminal(report, save_after, capsys):
    text = write_page(report, save_after(Image.new("RGB", (64, 64), "black")))
    for shown in (text, capsys.readouterr().out):
        assert page.BLACK.finding in shown
        assert page.BLACK.remedy in shown
    assert "show no fault" not in text


def test_curves_are_drawn_where_a_notebook_has_set_its_own_way(report, root):
    """Jupyter's `!./run.sh` inherits it, and the environment of the scripts lacks its package."""
    backend = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-m", "dreambooth.report.page", report]
    subprocess.run(command, cwd=root, env=backend, check=True)
    assert "<svg" in (report / "report.html").read_text()


def test_the_page_takes_neither_ray_nor_torch(root):
    """Which take seconds to import."""
    code = "import sys, dreambooth.report.page; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_a_class_loss_that_begins_at_zero_is_no_sign_of_forgetting():
    """That of a run whose target is the original model's prediction."""
    assert page.advice(rows_of(0.0, 0.2), None, prior_target="original") == []


def test_a_run_that_did_not_finish_shows_no_images_and_changes_no_card(
    report, save_after, train_args, capsys
):
    """What lies there is an earlier run's result: beside this run's flags it would be misread."""
    args = train_args(report.with_name("tuned"))
    training_log.RunRecord(args, make_plan(args), "2 cores")
    assert "Before and after" not in write_page(report, save_after())
    assert "of an earlier model and are not shown" in capsys.readouterr().err
    assert list(report.with_name("tuned").iterdir()) == []


def test_each_prompt_is_shown_once_before_any_twice(save_after):
    """As the page shows only the first of many."""
    folder = save_after()
    for number, prompt in enumerate(PROMPTS):
        record = {"prompt": prompt, "seed": 0, "index": 1}
        name = generated_images.file_name(number, 1, 0)
        for place in (folder, folder / "compared"):
            generated_images.save_image(Image.new("RGB", (64, 64)), record, place / name)
    names = [after.name for _, _, after in page.find_comparisons(folder)]
    assert names == [
        "000-0000-seed0.png", "001-0000-seed0.png", "000-0001-seed0.png", "001-0001-seed0.png",
    ]  # fmt: skip


def test_the_change_of_one_channel_counts_as_a_third_of_the_squares(flat_image):
    """Root mean square over all pixels and channels: 60 / sqrt(3) of a change of red alone by 60,
    and the mean of that and of a change of all channels by 20."""
    before = flat_image("before.png", (100, 100, 100))
    red, all_channels = flat_image("red.png", (160, 100, 100)), flat_image("all.png", (120,) * 3)
    one = page.distance([("a car", before, red)])
    assert one == pytest.approx(60 / math.sqrt(3))
    both = page.distance([("a car", before, red), ("a car", before, all_channels)])
    assert both == pytest.approx((60 / math.sqrt(3) + 20) / 2)
    assert page.distance([]) is None


def test_what_is_called_before_is_the_original_models_image(flat_image, tmp_path):
    before = flat_image("before.png", (0, 0, 255))
    after = flat_image("after.png", (255, 0, 0))
    (shown,) = page.shown([("a car", before, after)])
    assert shown["before"] == page.data_uri(before)
    assert shown["after"] == page.data_uri(after)
    page.write_before_after([("a car", before, after)], tmp_path / "card.png")
    pixels = np.asarray(Image.open(tmp_path / "card.png"))
    blue, red = ((pixels == colour).all(2).any(1).argmax() for colour in ((0, 0, 255), (255, 0, 0)))
    assert blue < red


def test_a_page_outlives_the_photos_and_the_result_of_its_run(report, save_after):
    """run.sh replaces its copies with the next subject's; a result may have been moved."""
    record = json.loads((report / training_log.RECORD).read_text())
    record["instance_paths"][0] = "/nowhere/0.png"
    (report / training_log.RECORD).write_text(json.dumps(record))
    report.with_name("tuned").rmdir()
    text = write_page(report, save_after())
    assert Parsed(text).tags.count("img") == 4 + 2 * 2 + 2 * 3


def test_a_page_shows_a_dozen_photos_scaled_down(report, flat_image, tmp_path):
    photo = flat_image("large.png", 0, size=(4000, 3000))
    set_json(report / training_log.RECORD, instance_paths=[str(photo)] * 50)
    text = write_page(report)
    assert text.count('alt="photo ') == 12
    uri = re.search(r'src="data:image/jpeg;base64,([^"]+)" alt="photo 1"', text)[1]
    assert Image.open(io.BytesIO(base64.b64decode(uri))).size == (320, 240)


def test_a_strip_shows_the_preview_of_each_step(report):
    (first, _) = page.film_strips(report)
    assert [image["step"] for image in first["images"]] == [0, 20, 40]
    assert len({image["data"] for image in first["images"]}) == 3


def test_the_page_says_whether_a_lora_was_trained(report):
    record = json.loads((report / training_log.RECORD).read_text())
    assert dict(page.table_rows(record))["LoRA"] == "no"
    record["flags"]["use_lora"] = True
    assert dict(page.table_rows(record))["LoRA"] == "rank 4"


def test_of_either_kind_a_dozen_comparisons_are_shown():
    flags = {"instance_prompt": "photo of unqtkn car", "class_prompt": "photo of a car"}
    of_subject, of_class = ([(flags[name], i, i) for i in range(20)] for name in flags)
    shown = page.subjects_and_others(of_subject + of_class, flags)
    assert shown == (of_subject[:12], of_class[:12])


def test_a_small_image_is_shown_to_the_last_bit(tmp_path):
    """JPEG would smear the 64 pixels of pocket's."""
    pixels = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kind, _, encoded = page.data_uri(tmp_path / "a.png").partition(",")
    assert kind == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))) == pixels).all()


def test_the_last_third_of_the_class_loss_is_compared_with_the_first():
    """Whatever is between them."""
    for losses, rises in (
        ([0.1] * 3 + [0.9, 0, 0.9] + [0.2] * 3, True),
        ([0.2] * 3 + [0.1] * 2 + [0.3] + [0.2] * 3, False),
    ):
        assert page.class_loss_rises([{"class_loss": loss} for loss in losses]) == rises
