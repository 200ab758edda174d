"""The judges of tests/benchmarks: they must be right before what they say means anything."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from dreambooth.model_dir import load_tokenizer
from dreambooth.pocket import render
from tests.benchmarks import encoders, fidelity


@pytest.fixture(scope="module")
def judge():
    own = fidelity.label_subject(render.LEGO_CAR, count=500)
    return fidelity.Judge(render.LEGO_CAR, fidelity.label_world(count=4000), own)


def test_the_judge_recognises_renders_that_it_has_not_seen(judge):
    accuracy = fidelity.judge_accuracy(judge, count=200)
    assert accuracy["class"] > 0.95
    assert accuracy["place"] > 0.95
    assert accuracy["subject"] > 0.95
    assert accuracy["colour"] > 0.7


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


@pytest.fixture(scope="module")
def report(judge):
    """The metrics of a stand-in, by its name."""
    world = World()
    before = world.perfect("photo of a car")
    return lambda name: fidelity.subject_report(getattr(world, name), judge, before)


def test_metrics_of_a_perfect_model(report):
    metrics = report("perfect")
    for name in ("subject", "composition", "prior", "others"):
        assert metrics[name] > 0.9
    assert 0.85 < metrics["diversity"] < 1.15


def test_metrics_of_a_model_that_generates_one_other_car(report):
    metrics = report("blind")
    for name in ("subject", "composition", "others"):
        assert metrics[name] < 0.1
    assert metrics["diversity"] < 0.5


def test_metrics_of_a_model_that_has_forgotten_all_but_the_subject(report):
    metrics = report("forgetful")
    assert metrics["subject"] > 0.9
    assert metrics["prior"] < 0.1
    assert metrics["others"] < 0.1


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


def test_embeddings_have_unit_length_and_tell_images_apart(tiny_encoders):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 80, 3), np.uint8)
    embeddings = tiny_encoders.embed_images(images)
    assert embeddings["dino"].shape == (3, 32)
    assert embeddings["clip"].shape == (3, 16)
    text = tiny_encoders.embed_text("photo of a car")
    for embedding in (*embeddings.values(), text):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))
    assert encoders.mean_distance(embeddings["dino"]) > 1e-4


class Listener:
    """The encoders, noting the texts that they embed."""

    def __init__(self, encoders):
        self.encoders = encoders
        self.texts = []

    def embed_images(self, images):
        return self.encoders.embed_images(images)

    def embed_text(self, text):
        self.texts.append(text)
        return self.encoders.embed_text(text)


def test_the_papers_metrics_of_a_model_that_repeats_a_photo(tiny_encoders):
    """It has the subject to perfection, DINO and CLIP-I of 1, and no diversity; its class images
    differ from the photos. CLIP-T asks for the scene with the class's name, as CLIP does not know
    the identifier."""
    photo, other = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), np.uint8)
    prompts = []

    def sample(prompt):
        prompts.append(prompt)
        return [photo if "unqtkn" in prompt else other] * 3

    listener = Listener(tiny_encoders)
    metrics = encoders.paper_report(sample, listener, [photo], "unqtkn dog", "dog", encoders.LIVE)
    assert metrics["DINO"] == pytest.approx(1, abs=1e-5)
    assert metrics["CLIP-I"] == pytest.approx(1, abs=1e-5)
    assert metrics["DIV"] == pytest.approx(0, abs=1e-5)
    assert metrics["PRES"] < 1 - 1e-4
    assert -1 <= metrics["CLIP-T"] < 0.99
    assert prompts[1] == "photo of unqtkn dog in the snow"
    assert prompts[-1] == "photo of a dog"
    assert listener.texts[1] == "photo of a dog in the snow"
    assert not any("unqtkn" in text for text in listener.texts)


def test_mean_cosine_and_distance_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert encoders.mean_cosine(a[:2], a[2:]) == pytest.approx(0.7)
    assert encoders.mean_distance(a) == pytest.approx(1 - (0.0 + 0.6 + 0.8) / 3)


@pytest.mark.parametrize("scenes", [encoders.OBJECT, encoders.LIVE])
def test_the_paper_has_25_scenes_for_objects_and_for_animals(scenes):
    assert len(set(scenes)) == 25
    assert all(scene.count("{}") == 1 for scene in scenes)
