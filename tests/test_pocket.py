"""The embedded model's parts: its tokenizer, its balanced latents, resumed training, its world."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreambooth.files.pipeline_dir import load_tokenizer
from dreambooth.pocket import POCKET_DIR, pretrain, render, training_run
from dreambooth.pocket.caption_tokenizer import CAPTION_TERMS, MAX_TOKENS, build_tokenizer
from dreambooth.pocket.training_run import Run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tokenize(tokenizer, text):
    """Token ids without the two that mark beginning and end."""
    return tokenizer(text).input_ids[1:-1]


def test_each_word_of_the_world_is_one_token(tokenizer):
    nouns = ["beach", "snow", "grass", "road", "night"]
    parts = [part for parts in render.PARTS.values() for part in parts]
    for word in [*CAPTION_TERMS, *nouns, *render.CLASSES, *render.COLOURS, *parts]:
        assert len(tokenize(tokenizer, word)) == 1, word


def test_captions_are_one_token_per_word_and_decode_to_themselves(tokenizer):
    caption = "photo of a red car with a white roof on the beach"
    ids = tokenize(tokenizer, caption)
    assert len(ids) == len(caption.split())
    assert tokenizer.decode(ids).strip() == caption


def test_an_identifier_falls_into_letters_as_in_the_real_model(tokenizer):
    """So do the names of the designs: the model has learned to expect words that it does not
    know."""
    for name in ["unqtkn", *(design.name for design in render.DESIGNS)]:
        ids = tokenize(tokenizer, name)
        assert 3 <= len(ids) <= len(name)
        assert tokenizer.decode(ids).strip() == name
    assert len(tokenize(tokenizer, "unqtkn")) == 6


@pytest.mark.parametrize(
    "prompt", ["", "Ünïcode straße", "写真 кот", "🚗🚗", "a, b; c!", "\t\n", "x" * 40, "5 € ¬ ®"]
)
def test_any_prompt_is_tokenized(tokenizer, prompt):
    ids = tokenize(tokenizer, prompt)
    assert all(0 <= i < len(tokenizer) - 2 for i in ids)
    assert bool(ids) == bool(prompt.strip())
    assert tokenizer.decode(ids).replace(" ", "") == "".join(prompt.lower().split())


def test_the_tokenizer_survives_the_pipeline_directory(tokenizer, model_dir):
    loaded = load_tokenizer(model_dir)
    assert loaded.model_max_length == MAX_TOKENS
    for prompt in ("photo of unqtkn car in the snow", "🚗 straße"):
        assert tokenize(loaded, prompt) == tokenize(tokenizer, prompt)


@torch.no_grad()
def reconstruct(vae, images):
    """Images through the VAE: by the mean of the posterior, and by a sample of it."""
    posterior = vae.encode(pretrain.to_batch(images)).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    sample = posterior.mean + posterior.std * noise
    return vae.decode(posterior.mean).sample, vae.decode(sample).sample


def test_balanced_latents_have_unit_variance_and_decode_to_the_same_images():
    torch.manual_seed(0)
    vae, _, _ = pretrain.new_models(600)
    vae.eval()
    with torch.no_grad():  # as unequal as a trained one's
        vae.quant_conv.weight[:4] *= torch.tensor([0.3, 1, 2, 3]).view(4, 1, 1, 1)
    images, _ = pretrain.render_world(32, seed=0)
    before = reconstruct(vae, images)
    mean, _ = pretrain.encode(vae, images)
    assert mean.std((0, 2, 3)).sub(1).abs().max() > 0.1
    pretrain.balance_latents(vae, images)
    mean, _ = pretrain.encode(vae, images)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(mean.std((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-3)
    after = reconstruct(vae, images)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-4)


def train_toy(work_dir, stop_after=None):
    """Four steps of a linear model, or an interruption after fewer; returns the model."""
    work_dir.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2)
    run = Run("toy", module, work_dir, steps=4, lr=0.1, ema=0.5)

    def loss_of_step(rng):
        if run.step == stop_after:
            run.save()
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.normal(size=(8, 3))).float() + torch.randn(8, 3)
        return (module(x) - 1).square().mean()

    run.train(loss_of_step)
    return module


def test_interrupted_pretraining_resumes_as_if_nothing_had_happened(tmp_path):
    expected = train_toy(tmp_path / "uninterrupted").state_dict()
    with pytest.raises(KeyboardInterrupt):
        train_toy(tmp_path / "interrupted", stop_after=2)
    resumed = train_toy(tmp_path / "interrupted").state_dict()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value)
    torch.manual_seed(0)
    untrained = torch.nn.Linear(3, 2)
    assert not torch.equal(expected["weight"], untrained.weight)


def render_random_scene(seed):
    """A caption and an image."""
    rng = np.random.default_rng(seed)
    scene = render.sample_scene(rng)
    return render.caption(scene, rng), np.asarray(render.render(scene, rng))


def test_renders_follow_from_the_random_numbers():
    for seed in range(6):
        caption, image = render_random_scene(seed)
        assert image.shape == (64, 64, 3)
        assert image.std() > 5
        caption_again, image_again = render_random_scene(seed)
        assert caption_again == caption
        assert np.array_equal(image_again, image)
    _, first = render_random_scene(0)
    _, second = render_random_scene(1)
    assert not np.array_equal(first, second)


def test_captions_name_what_is_shown():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = render.sample_scene(rng)
        caption = render.caption(scene, rng)
        if not caption:
            continue
        assert f" {scene.kind}" in caption
        for place in render.PLACES:
            assert f" {place}" not in caption or place == scene.place
        if scene.name:
            assert f"photo of {scene.name} {scene.kind}" in caption


def test_one_caption_in_ten_is_empty():
    """Of 500: guidance needs a prediction without a prompt."""
    rng = np.random.default_rng(0)
    captions = [render.caption(render.sample_scene(rng), rng) for _ in range(500)]
    assert 30 <= captions.count("") <= 70


def test_pretraining_ends_with_the_mean_of_its_weights_at_a_falling_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "WARM_UP", 1)
    module = torch.nn.Linear(3, 2)
    run = Run("toy", module, tmp_path, steps=50, lr=0.1, ema=0.5)
    rates = []

    def loss_of_step(rng):
        rates.append(run.optimizer.param_groups[0]["lr"])
        return module(torch.ones(1, 3)).square().sum()

    run.train(loss_of_step)
    assert rates[:40] == [0.1] * 40
    assert rates[40:] == pytest.approx([0.1 * n / 10 for n in range(10, 0, -1)])
    for name, value in module.state_dict().items():
        assert torch.equal(value, run.average[name])


def test_an_orange_car_has_its_article():
    captions = {
        render.caption(render.Scene("car", colour, "at night"), np.random.default_rng(seed))
        for colour in ("orange", "red") for seed in range(200)
    }  # fmt: skip
    found = {re.match(r"photo of (an? \w+)", c)[1] for c in captions if c}
    assert found == {"an orange", "a red", "a car"}


def test_each_part_of_a_scene_shows_in_its_colour():
    """A subject's and a class's: another colour of that part alone is another image."""

    def pixels(scene):
        return np.asarray(render.render(scene, np.random.default_rng(0)))

    classes = [
        render.Scene(kind, "red", "on the road", body, dict.fromkeys(parts, "blue"))
        for kind, parts in render.PARTS.items()
        for body in render.BODIES.get(kind, ("",))
    ]
    for scene in [*classes, *render.SUBJECTS.values()]:
        for part, colour in scene.parts.items():
            other = "pink" if colour != "pink" else "green"
            changed = dataclasses.replace(scene, parts={**scene.parts, part: other})
            assert (pixels(changed) != pixels(scene)).any(), (scene.kind, scene.body, part)


def test_edges_count_alike_in_both_directions():
    """Of the pixels' loss: upright ones and those that lie."""
    error = torch.zeros(1, 1, 8, 8)
    error[..., 4:] = 1.0  # eight pixels side by side differ by 1, of 56 neighbours
    for turned in (error, error.transpose(2, 3)):
        assert pretrain.pixel_loss(turned).item() == pytest.approx(0.5 + 8 / 56)


def test_pretraining_writes_the_noise_schedule_of_the_embedded_model(model_dir):
    """For which it was trained, and with which it is sampled."""
    written, embedded = (
        json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        for folder in (model_dir, POCKET_DIR)
    )
    assert written == embedded


def test_pretraining_writes_what_it_has_loaded_under_the_same_names(tmp_path):
    """An earlier result that it goes on from, as those of new models."""
    *models, output_dir = *pretrain.load_models(POCKET_DIR), tmp_path / "new"
    pretrain.export(*models, output_dir)
    for part in ("text_encoder/model", "unet/diffusion_pytorch_model"):
        before, after = (
            load_file(f"{folder}/{part}.safetensors") for folder in (POCKET_DIR, output_dir)
        )
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_step_of_pretraining_follows_no_gradient_above_1_and_ends_in_a_file(tmp_path):
    """The mean of the weights is that of few steps at first: 1/11 old and 10/11 new after one."""
    module = torch.nn.Linear(1, 1, bias=False)
    before = module.weight.item()
    run = Run("toy", module, tmp_path, steps=1, lr=0.1, ema=0.999)
    run.train(lambda rng: 1000 * module(torch.ones(1, 1)).sum())
    (state,) = run.optimizer.state.values()
    assert state["exp_avg"].item() == pytest.approx(0.1)  # a tenth of the gradient
    saved = torch.load(tmp_path / "toy.pt", weights_only=True)
    assert saved["step"] == 1
    last = saved["module"]["weight"].item()
    assert module.weight.item() == pytest.approx((before + 10 * last) / 11, abs=1e-6)


WORLD = [  # seed, caption, brightness, and how much neighbours differ
    (2, "photo of a yellow car on the road", 158.3, 3.49),
    (3, "photo of nqwrkq car in the snow", 198.6, 3.85),
    (8, "photo of a black house with a purple roof in the snow", 184.7, 5.11),
    (9, "photo of a yellow car", 50.4, 4.97),  # at night
    (10, "photo of an orange house", 171.5, 5.48),
    (11, "photo of a blue tree on the grass", 149.1, 2.24),
]


def test_the_world_is_the_one_that_the_embedded_model_has_learned():
    """Pretraining that goes on from it would teach it another."""
    for seed, expected, brightness, edges in WORLD:
        caption, image = render_random_scene(seed)
        image = image.astype(float)
        assert caption == expected
        assert image.mean() == pytest.approx(brightness, abs=0.1)
        assert np.abs(np.diff(image, axis=1)).mean() == pytest.approx(edges, abs=0.02)


def test_the_examples_photos_are_those_that_the_module_writes(root, tmp_path):
    render.write_photos("lego_car", tmp_path)
    for number in range(5):
        written, given = (
            np.asarray(Image.open(folder / f"{number}.jpg")).astype(float)
            for folder in (tmp_path, root / "images" / "lego-car")
        )
        assert np.abs(written - given).mean() < 0.05  # another CPU may round in another way
