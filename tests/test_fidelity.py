"""The subjects that DreamBooth learns on pocket, and the judges of tests/benchmarks: they must be
right before what they say means anything."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from dreambooth.cli import UserError
from dreambooth.files.pipeline_dir import load_tokenizer
from dreambooth.pocket import render, subjects
from tests.benchmarks import encoders, fidelity


def test_pretraining_cannot_show_a_subject():
    """Neither a random scene nor a named design has the body of a subject, by whatever seed."""
    world = {body for bodies in render.BODIES.values() for body in bodies}
    bodies = {scene.body for scene in render.SUBJECTS.values()}
    assert not bodies & world
    assert not bodies & {design.body for design in render.DESIGNS}
    assert {*subjects.BODY_RENDERERS, "lego"} == bodies


def test_a_subject_looks_unlike_every_member_of_its_class():
    """Also unlike one that has its colours: it differs by its parts."""
    for subject in render.SUBJECTS.values():
        assert subject.kind in render.CLASSES
        image = np.asarray(render.render(subject, np.random.default_rng(0)), float)
        for body in render.BODIES.get(subject.kind, ("",)):
            member = replace(subject, body=body)
            other = np.asarray(render.render(member, np.random.default_rng(0)), float)
            assert (np.abs(image - other).max(axis=2) > 40).mean() > 0.04


@pytest.mark.parametrize("name", list(render.SUBJECTS))
def test_a_subject_comes_in_five_different_photos_in_landscape_format(name, tmp_path):
    render.write_photos(name, tmp_path)
    images = [Image.open(tmp_path / f"{i}.jpg") for i in range(5)]
    assert {image.size for image in images} == {(640, 512)}
    pixels = [np.asarray(image, float) for image in images]
    assert min(image[:20].mean() for image in pixels) > 100  # none at night
    for i, image in enumerate(pixels):
        assert all(np.abs(image - other).mean() > 5 for other in pixels[i + 1 :])


def test_photos_of_an_unknown_subject_are_refused(tmp_path):
    with pytest.raises(UserError, match="unicorn.*windmill"):
        render.write_photos("unicorn", tmp_path / "photos")
    assert not (tmp_path / "photos").exists()


@pytest.fixture(scope="module")
def judges():
    """A judge for each subject, by name."""
    world = fidelity.label_world(count=2000)
    return {
        name: fidelity.Judge(subject, world, fidelity.label_subject(subject, count=300))
        for name, subject in render.SUBJECTS.items()
    }


def test_a_judge_reads_renders_that_it_has_not_seen(judges):
    accuracy = fidelity.judge_accuracy(judges["lego_car"], count=200)
    assert min(accuracy[name] for name in ("class", "place", "subject")) > 0.95
    assert accuracy["colour"] > 0.7


def test_a_judge_finds_its_subject_and_takes_no_other_for_it(judges):
    for shown, subject in render.SUBJECTS.items():
        scenes = fidelity.subject_in_turn(subject, 20)
        images = fidelity.render_all(scenes, np.random.default_rng(4))
        for name, judge in judges.items():
            found = fidelity.share(judge.is_subject(scene) for scene in judge(images))
            assert (found > 0.9) if name == shown else (found < 0.1)


class World:
    """Stand-ins for models: functions from a prompt to 24 renders."""

    def __init__(self):
        self.rng = np.random.default_rng(5)

    def render(self, scenes):
        return fidelity.render_all(scenes, self.rng)

    def cars(self, count):
        """Random scenes with a car."""
        scenes = []
        while len(scenes) < count:
            scene = render.sample_scene(self.rng)
            if scene.kind == "car":
                scenes.append(scene)
        return scenes

    def perfect(self, prompt):
        """Shows what the prompt says."""
        if "unqtkn" in prompt:
            places = [place for place in render.PLACES if place in prompt]
            place = places[0] if places else render.PLACES[0]
            return self.render([replace(render.LEGO_CAR, place=place)] * 24)
        if "house" in prompt:
            return self.render([replace(scene, kind="house") for scene in self.cars(24)])
        return self.render(self.cars(24))

    def blind(self, prompt):
        """Shows the same other car everywhere."""
        return self.render(World().cars(1) * 24)

    def forgetful(self, prompt):
        """Shows the subject whatever the prompt says."""
        return self.render([render.LEGO_CAR] * 24)


@pytest.mark.parametrize(
    ("name", "high", "low"),
    [
        ("perfect", ["subject", "composition", "prior", "others"], []),
        ("blind", [], ["subject", "composition", "others"]),
        ("forgetful", ["subject"], ["prior", "others"]),
    ],
)
def test_metrics_tell_what_a_model_has_learned_and_forgotten(judges, name, high, low):
    world = World()
    before = world.perfect("photo of a car")
    metrics = fidelity.subject_report(getattr(world, name), judges["lego_car"], before)
    assert all(metrics[metric] > 0.9 for metric in high)
    assert all(metrics[metric] < 0.1 for metric in low)
    assert 0.85 < metrics["diversity"] < 1.15 if name == "perfect" else metrics["diversity"] < 0.6


@pytest.fixture(scope="module")
def tiny_encoders(tmp_path_factory, model_dir):
    """A DINO and a CLIP with random weights, as directories, loaded as a user's would be."""
    dino_dir = tmp_path_factory.mktemp("dino")
    clip_dir = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    image = {"image_size": 32, "patch_size": 8}
    ViTModel(ViTConfig(**size, **image)).save_pretrained(dino_dir)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(dino_dir)
    tokenizer = load_tokenizer(model_dir)
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**size, **text}, vision_config={**size, **image}, projection_dim=16
    )
    CLIPModel(config).save_pretrained(clip_dir)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(clip_dir)
    tokenizer.save_pretrained(clip_dir)
    return encoders.Encoders(dino_dir, clip_dir)


def test_the_papers_metrics_of_a_model_that_repeats_a_photo(tiny_encoders, monkeypatch):
    """It has the subject to perfection, DINO and CLIP-I of 1, and no diversity; its class images
    differ from the photos. CLIP-T asks for the scene with the class's name, as CLIP does not know
    the identifier."""
    photo, other = np.random.default_rng(1).integers(0, 256, (2, 64, 80, 3), np.uint8)
    prompts, texts = [], []
    embed_text = tiny_encoders.embed_text
    monkeypatch.setattr(tiny_encoders, "embed_text", lambda t: texts.append(t) or embed_text(t))

    def sample(prompt):
        prompts.append(prompt)
        return [photo if "unqtkn" in prompt else other] * 3

    scenes = encoders.LIVE[:2]
    metrics = encoders.paper_report(sample, tiny_encoders, [photo], "unqtkn dog", "dog", scenes)
    assert metrics["DINO"] == pytest.approx(1, abs=1e-5)
    assert metrics["CLIP-I"] == pytest.approx(1, abs=1e-5)
    assert metrics["DIV"] == pytest.approx(0, abs=1e-5)
    assert metrics["PRES"] < 1 - 1e-4
    assert -1 <= metrics["CLIP-T"] < 0.99
    assert prompts == [*(f"photo of {s.format('unqtkn dog')}" for s in scenes), "photo of a dog"]
    assert texts == [f"photo of a {scene.format('dog')}" for scene in scenes]


def test_mean_cosine_and_distance_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert encoders.mean_cosine(a[:2], a[2:]) == pytest.approx(0.7)
    assert encoders.mean_distance(a) == pytest.approx(1 - (0.0 + 0.6 + 0.8) / 3)
