"""The judges of tests/benchmarks: they must be right before what they say of a model means anything."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTImageProcessor, ViTModel

from dreambooth import files
from dreambooth.pocket import render
from tests.benchmarks import encoders, fidelity


@pytest.fixture(scope="module")
def judge():
    return fidelity.Judge(num_world=4000, num_subject=500)


def test_judge_reads_renders_that_it_has_not_seen(judge):
    accuracy = fidelity.judge_accuracy(judge, count=200)
    assert accuracy["class"] > 0.95
    assert accuracy["place"] > 0.95
    assert accuracy["subject"] > 0.95
    assert accuracy["colour"] > 0.7


def test_report_of_a_perfect_a_blind_and_a_forgetful_model(judge):
    """The figures can fail: a model that draws what it is told, one that draws the same other car
    everywhere, and one that draws the subject whatever it is told."""
    rng = np.random.default_rng(5)
    subject = render.LEGO_CAR

    def cars(count):
        scenes = (render.sample_scene(rng) for _ in iter(int, 1))
        return [s for s, _ in zip((s for s in scenes if s.kind == "car"), range(count), strict=False)]

    def draw(scenes):
        return np.stack([np.asarray(render.render(scene, rng)) for scene in scenes])

    def perfect(prompt):
        place = next((p for p in render.PLACES if p in prompt), render.PLACES[0])
        if "unqtkn" in prompt:
            return draw([replace(subject, place=place)] * 24)
        if "house" in prompt:
            return draw([replace(scene, kind="house") for scene in cars(24)])
        return draw(cars(24))

    before = perfect("photo of a car")
    good = fidelity.subject_report(perfect, judge, before)
    assert min(good["subject"], good["composition"], good["prior"], good["others"]) > 0.9
    assert 0.85 < good["diversity"] < 1.15
    other = cars(1)
    blind = fidelity.subject_report(lambda prompt: draw(other * 24), judge, before)
    assert max(blind["subject"], blind["composition"], blind["others"]) < 0.1
    assert blind["diversity"] < 0.5
    forgetful = fidelity.subject_report(lambda prompt: draw([subject] * 24), judge, before)
    assert forgetful["subject"] > 0.9
    assert max(forgetful["prior"], forgetful["others"]) < 0.1


@pytest.fixture(scope="module")
def tiny_encoders(tmp_path_factory, model_dir):
    """A DINO and a CLIP of random weights, as directories, loaded as a user's would be."""
    dino, clip = tmp_path_factory.mktemp("dino"), tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(dino)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(dino)
    tokenizer = files.load_tokenizer(model_dir)
    text = {**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    return encoders.Encoders(dino, clip)


def test_embeddings_have_unit_length_and_tell_pictures_apart(tiny_encoders):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 64, 80, 3), np.uint8)
    seen = tiny_encoders.see(pictures)
    assert {name: tuple(e.shape) for name, e in seen.items()} == {"dino": (3, 32), "clip": (3, 16)}
    for embedding in (*seen.values(), tiny_encoders.read("photo of a car")):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(len(embedding)))
    assert encoders.mean_distance(seen["dino"]) > 1e-4


def test_paper_figures_of_a_model_that_repeats_a_photo(tiny_encoders):
    """It has the subject to perfection, DINO and CLIP-I of 1, and no diversity; its class pictures are
    told from the photos. CLIP-T asks for the scene with the class's name, as CLIP knows no identifier."""
    rng = np.random.default_rng(1)
    photo, other = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    asked, read = [], []

    def draw(prompt):
        asked.append(prompt)
        return [photo if "unqtkn" in prompt else other] * 3

    class Listening:
        see = staticmethod(tiny_encoders.see)

        def read(self, text):
            read.append(text)
            return tiny_encoders.read(text)

    figures = encoders.paper_report(draw, Listening(), [photo], "unqtkn dog", "dog", encoders.LIVE)
    assert figures["DINO"] == pytest.approx(1, abs=1e-5)
    assert figures["CLIP-I"] == pytest.approx(1, abs=1e-5)
    assert figures["DIV"] == pytest.approx(0, abs=1e-5)
    assert figures["PRES"] < 1 - 1e-4
    assert -1 <= figures["CLIP-T"] < 0.99
    assert asked[1] == "photo of unqtkn dog in the snow"
    assert asked[-1] == "photo of a dog"
    assert read[1] == "photo of a dog in the snow"
    assert not any("unqtkn" in text for text in read)


def test_mean_cosine_and_distance_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert encoders.mean_cosine(a[:2], a[2:]) == pytest.approx(0.7)
    assert encoders.mean_distance(a) == pytest.approx(1 - (0.0 + 0.6 + 0.8) / 3)


def test_the_paper_has_25_scenes_for_objects_and_for_animals():
    for scenes in (encoders.OBJECT, encoders.LIVE):
        assert len(set(scenes)) == 25
        assert all(scene.count("{}") == 1 for scene in scenes)
