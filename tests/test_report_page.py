"""The page: whole, in one file, and nothing on it asks for a network."""

import argparse
import html.parser
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from dreambooth import fidelity_figures, metrics, outputs, previews, report_page, run_record
from dreambooth.cli import UserError
from tests.test_advice import curve

PROMPTS = ["photo of unqtkn car in the snow", "photo of unqtkn car <at night>"]


def record_of(folder, photos, **changes):
    flags = {
        "output_dir": str(folder / "tuned"), "instance_prompt": "photo of unqtkn car",
        "class_prompt": "photo of a car", "lr": 2e-4, "lr_scheduler": "cosine",
        "prior_loss_weight": 1.0, "use_lora": False, "lora_rank": 4, "seed": 0,
    }  # fmt: skip
    return {
        "status": "finished", "command": "python train.py --lr 2e-4", "flags": flags,
        "model": "pocket", "revision": "embedded", "plan": "5 instance and 20 class images",
        "num_steps": 300, "instance_paths": [str(path) for path in photos],
        "num_class_images": 20, "hardware": "2 cores", "versions": {"torch": "2.15.0"},
        "seconds": {"start_s": 2.0, "previews_s": 12.34}, **changes,
    }  # fmt: skip


@pytest.fixture
def report(tmp_path, flat_image):
    """The directory of a finished run with previews, photos, and images before and after."""
    folder = metrics.report_dir(tmp_path / "tuned")
    (folder / previews.FOLDER).mkdir(parents=True)
    (tmp_path / "tuned").mkdir()
    photos = [flat_image(f"photo{i}.png", (40 * i, 90, 90), (600, 400)) for i in range(5)]
    run_record.write(folder, record_of(tmp_path, photos))
    rows = curve(0.1, 0.1)
    (folder / metrics.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, prompt in enumerate(PROMPTS):
        for step in (0, 20, 40):
            image = Image.new("RGB", (64, 64), (step, 0, 0))
            outputs.save_image(
                image,
                {"prompt": prompt, "seed": 0, "step": step},
                folder / previews.FOLDER / previews.file_name(number, step),
            )
    return folder


@pytest.fixture
def images_dir(tmp_path):
    """Two prompts' images after, of black and white halves, and before, the same."""
    folder = tmp_path / "new"
    (folder / "compared").mkdir(parents=True)
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 32, 64))
    for number, prompt in enumerate(PROMPTS):
        record = {"prompt": prompt, "seed": 0, "index": 0}
        name = outputs.file_name(number, 0, 0)
        outputs.save_image(image, record, folder / name)
        outputs.save_image(image, record, folder / "compared" / name)
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would fetch, and the texts of headings and table cells."""

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


def write_page(report, **changes):
    settings = {"report_dir": report, "images_dir": None, "figures": None, **changes}
    report_page.main(argparse.Namespace(**settings))
    return (report / report_page.PAGE).read_text(encoding="utf-8")


def test_one_file_that_fetches_nothing(report, images_dir):
    text = write_page(report, images_dir=images_dir)
    page = Page(text)
    assert len(page.fetched) >= 5 + 4 + 6
    assert [uri for uri in page.fetched if not uri.startswith(("data:", "#"))] == []
    assert "script" not in page.tags
    assert re.findall(r"url\((?!#)|@import", text) == []
    assert len(text) < 500_000


def test_photos_before_and_after_film_strip_curves_and_facts(report, images_dir):
    text = write_page(report, images_dir=images_dir)
    page = Page(text)
    assert page.tags.count("svg") == 2  # losses and gradient norm: the other metrics are not there
    assert page.tags.count("img") == 5 + 2 * 2 + 2 * 3
    for expected in (
        "Before and after", "While it trained", "2 cores", "python train.py --lr 2e-4",
        "pocket, revision embedded", "previews 12.3 s", "&lt;at night&gt;", "instance images",
    ):  # fmt: skip
        assert expected in text, expected
    assert "<at night>" not in text


def test_images_of_another_prompt_are_not_before_and_after(images_dir):
    """What is left in compared/ of an earlier command."""
    pairs = report_page.find_pairs(images_dir)
    *_, after = pairs[0]
    record = {"prompt": "photo of a boat", "seed": 0, "index": 0}
    outputs.save_image(Image.new("RGB", (64, 64)), record, after)
    assert report_page.find_pairs(images_dir) == pairs[1:]


def test_a_run_without_images_and_metrics_has_a_page_too(report):
    (report / metrics.FILE).unlink()
    shutil.rmtree(report / previews.FOLDER)
    text = write_page(report)
    assert "Before and after" not in text
    assert "Curves" not in text
    assert "The run" in text


def test_figures_and_advice(report, tmp_path, capsys):
    figures = {"original": {"subject": 0.0}, "tuned": {"subject": 0.12, "prior": 1.0}}
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(figures))
    text = write_page(report, figures=str(file))
    assert "0.12" in text
    assert "has not learned the subject yet" in text
    assert "subject not there: " in capsys.readouterr().out
    assert "has not learned the subject yet" not in write_page(report)


def test_figures_as_fidelity_prints_them(tmp_path):
    file = tmp_path / "figures.txt"
    file.write_text("   judge  class 0.99  place 1.00\noriginal  subject 0.02  DINO 0.35\n"
                    "model-tuned  subject 0.98  DINO 0.61\n")  # fmt: skip
    assert fidelity_figures.read(file) == {
        "original": {"subject": 0.02, "DINO": 0.35},
        "model-tuned": {"subject": 0.98, "DINO": 0.61},
    }


@pytest.mark.parametrize("text", ["", "[1]", '{"tuned": 3}', "no figures here at all", '{"a'])
def test_other_files_are_no_figures(tmp_path, text):
    file = tmp_path / "figures.json"
    file.write_text(text)
    with pytest.raises(UserError, match="neither JSON nor the output"):
        fidelity_figures.read(file)


def test_black_images_are_noticed(report, images_dir):
    black = Image.new("RGB", (64, 64), "black")
    for number, prompt in enumerate(PROMPTS):
        record = {"prompt": prompt, "seed": 0, "index": 0}
        outputs.save_image(black, record, images_dir / outputs.file_name(number, 0, 0))
    assert "black or of one colour" in write_page(report, images_dir=images_dir)


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run\.json"):
        write_page(tmp_path)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
def test_chromium_shows_it_without_an_error_or_a_request(report, images_dir, tmp_path):
    """Its log has no error of the page, and its log of the network no request of the page's."""
    write_page(report, images_dir=images_dir)
    page = report / report_page.PAGE
    log = tmp_path / "net.json"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}"]
    command += ["--disable-background-networking", "--disable-component-update", "--lang=C"]
    command += ["--window-size=500,900", f"--screenshot={tmp_path / 'page.png'}", f"file://{page}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    assert Image.open(tmp_path / "page.png").size == (500, 900)
    sent = re.findall(r'"(?:url|original_url|host)":"([^"]+)"', log.read_text())
    own = [url for url in sent if not url.startswith(("file:", "data:", "chrome", "devtools"))]
    browsers_own = ("gvt1.com", "google.com", "googleapis.com")  # a dictionary, an update
    assert [url for url in own if not any(host in url for host in browsers_own)] == []
