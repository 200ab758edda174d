"""The embedded model's parts: its tokenizer, its autoencoder's balance, its resumable training, its world."""

import numpy as np
import pytest
import torch
from PIL import Image

from dreambooth.pocket import pretrain, render

WORDS = ["photo", "of", "a", "an", "with", "and", "on", "in", "the", "at", "beach", "snow", "grass", "road", "night"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return pretrain.build_tokenizer(tmp_path_factory.mktemp("words"))


def ids(tokenizer, text):
    return tokenizer(text).input_ids[1:-1]


def test_each_word_of_the_world_is_one_token(tokenizer):
    parts = [part for parts in render.PARTS.values() for part in parts]
    for word in [*WORDS, *render.CLASSES, *render.COLOURS, *parts]:
        assert len(ids(tokenizer, word)) == 1, word
    caption = "photo of a red car with a white roof on the beach"
    assert len(ids(tokenizer, caption)) == len(caption.split())
    assert tokenizer.decode(ids(tokenizer, caption)).strip() == caption


def test_identifier_falls_into_letters_as_in_the_real_model(tokenizer):
    """So do the names of the designs: the model has learned to expect words that it does not know."""
    for word in ["unqtkn", *(design.name for design in render.DESIGNS)]:
        pieces = ids(tokenizer, word)
        assert 3 <= len(pieces) <= len(word)
        assert tokenizer.decode(pieces).strip() == word
    assert len(ids(tokenizer, "unqtkn")) == 6


@pytest.mark.parametrize("prompt", ["", "Ünïcode straße", "写真 кот", "🚗🚗", "a, b; c!", "\t\n", "x" * 40])
def test_any_prompt_is_tokenized(tokenizer, prompt):
    found = ids(tokenizer, prompt)
    assert all(0 <= i < len(tokenizer) - 2 for i in found)
    assert bool(found) == bool(prompt.strip())


def test_tokenizer_survives_the_pipeline_directory(tokenizer, model_dir):
    from dreambooth.files import load_tokenizer

    again = load_tokenizer(model_dir)
    assert again.model_max_length == pretrain.MAX_TOKENS
    for prompt in ("photo of unqtkn car in the snow", "🚗 straße"):
        assert ids(again, prompt) == ids(tokenizer, prompt)


def test_balanced_latents_decode_to_the_same_pictures():
    torch.manual_seed(0)
    vae = pretrain.new_models(600)[0].eval()
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= torch.tensor([0.3, 1, 2, 3]).view(4, 1, 1, 1)  # as unequal as a trained one's
    pictures, _ = pretrain.draw_world(32, seed=0)
    x = pretrain.to_batch(pictures)

    def reconstruct():
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
            return vae.decode(posterior.mean).sample, vae.decode(posterior.mean + posterior.std * noise).sample

    before = reconstruct()
    assert pretrain.encode(vae, pictures)[0].std((0, 2, 3)).sub(1).abs().max() > 0.1
    pretrain.balance_latents(vae, pictures)
    mean, _ = pretrain.encode(vae, pictures)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(mean.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-3)
    for old, new in zip(before, reconstruct(), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-4)


def train_toy(work_dir, stop_after=None):
    """Four steps of a linear model, optionally cut off; returns the module."""
    work_dir.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    run = pretrain.Run("toy", module, work_dir, steps=4, lr=0.1, ema=0.5)

    def loss_of_step(step, rng):
        if step == stop_after:
            run.save()
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 3))).float() + torch.randn(8, 3)
        return (module(x) - 1).square().mean()

    run.train(loss_of_step)
    return module


def test_interrupted_pretraining_goes_on_as_if_nothing_had_been(tmp_path):
    whole = train_toy(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "cut", stop_after=2)
    resumed = train_toy(tmp_path / "cut")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    torch.manual_seed(0)
    assert not torch.equal(whole.weight, torch.nn.Linear(3, 2).weight)


def test_drawings_follow_from_the_random_numbers():
    def draw(seed):
        rng = np.random.default_rng(seed)
        scene = render.sample_scene(rng)
        return render.caption(scene, rng), np.asarray(render.render(scene, rng))

    for seed in range(6):
        (caption, picture), (caption_again, picture_again) = draw(seed), draw(seed)
        assert caption == caption_again
        assert np.array_equal(picture, picture_again)
        assert picture.shape == (64, 64, 3)
        assert picture.std() > 5
    assert not np.array_equal(draw(0)[1], draw(1)[1])


def test_captions_name_what_is_shown():
    rng, empty = np.random.default_rng(0), 0
    for _ in range(500):
        scene = render.sample_scene(rng)
        caption = render.caption(scene, rng)
        empty += caption == ""
        if caption:
            assert f" {scene.kind}" in caption
            assert not any(f" {place}" in caption for place in render.PLACES if place != scene.place)
            assert scene.name == "" or f"photo of {scene.name} {scene.kind}" in caption
    assert 30 <= empty <= 70  # one in ten


def test_lego_car_comes_in_five_photos(tmp_path):
    """In three places, so that the snow and the night of the README's prompts are new to it."""
    render.draw_lego_car(tmp_path)
    photos = sorted(tmp_path.iterdir())
    assert [p.name for p in photos] == [f"{i}.jpg" for i in range(5)]
    pictures = [np.asarray(Image.open(p), np.int16) for p in photos]
    assert {p.shape for p in pictures} == {(512, 640, 3)}
    for i, one in enumerate(pictures):
        for other in pictures[i + 1 :]:
            assert np.abs(one - other).mean() > 5
    assert "lego" not in render.BODIES["car"]  # no picture of pretraining shows it
