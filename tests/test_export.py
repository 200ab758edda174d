"""What a run leaves: a pipeline or a LoRA that loads as what was trained, its model card as the Hub
reads it, and a LoRA in kohya's layout."""

import ast
import json
import os
import shutil
from unittest.mock import MagicMock, call

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
)
from huggingface_hub.repocard import metadata_load
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.run import export, training_log
from dreambooth.run.plan import check_flags, make_plan
from dreambooth.run.training_log import report_dir
from tests.test_pipeline_dir import set_json


def predict(model):
    """What the U-Net and text encoder of a denoiser or pipeline predict for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    noisy_latents = torch.randn(2, 4, 16, 16, generator=generator)
    input_ids = torch.randint(0, 500, (2, 48), generator=generator)
    with torch.no_grad():
        hidden_states = model.text_encoder(input_ids)[0]
        return model.unet(noisy_latents, torch.tensor([10, 900]), hidden_states).sample


def change(denoiser):
    """Add noise to all trained weights, as training would."""
    torch.manual_seed(1)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)


@pytest.fixture(scope="module")
def tuned(load_models, train_args, tmp_path_factory):
    """A trained denoiser, saved as train.py saves it: the denoiser and the directory."""
    _, denoiser, _ = load_models()
    change(denoiser)
    folder = tmp_path_factory.mktemp("saved") / "tuned"
    export.save(denoiser, train_args(folder))
    return denoiser, folder


def test_a_saved_pipeline_is_complete_and_loads_bit_for_bit(tuned, load_models, model_dir):
    """The parts that were not trained are those of the original; all weights are in float32."""
    denoiser, folder = tuned
    assert os.listdir(folder.parent) == ["tuned"]
    pipeline_dir.check_model_dir(folder)
    assert set(os.listdir(folder)) <= set(pipeline_dir.PIPELINE_NAMES)
    for file in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        assert (folder / file).read_bytes().strip() == (model_dir / file).read_bytes().strip()
    vae, original, _ = load_models()
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert pipeline.safety_checker is None
    for name, model in (("vae", vae), ("unet", denoiser.unet)):
        found = getattr(pipeline, name).state_dict()
        expected = model.state_dict()
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            assert found[key].dtype == torch.float32
            assert torch.equal(found[key], weight)
    assert torch.equal(predict(pipeline), predict(denoiser))
    assert not torch.equal(predict(pipeline), predict(original))
    # Older loaders look for these names in the text encoder's file, and would start from random
    # weights without a warning.
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in weights


def test_saved_files_carry_no_trace_of_compilation(tuned, load_models, model_dir, tmp_path):
    """Elsewhere `_orig_mod` is in the names of compiled weights, and no loader finds them."""
    _, denoiser, _ = load_models(compile=True)
    assert any(module._compiled_call_impl is not None for module in denoiser.modules())
    export.save_pipeline(denoiser, model_dir, tmp_path / "compiled")
    file = "unet/diffusion_pytorch_model.safetensors"
    names = [load_file(folder / file).keys() for folder in (tuned[1], tmp_path / "compiled")]
    assert names[0] == names[1]


def lora_layers(file, model_dir):
    """The LoRA of a directory or a file as a fresh pipeline has it, and the pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline.load_lora_weights(file)
    layers = {}
    for part in ("unet", "text_encoder"):
        for name, module in getattr(pipeline, part).named_modules():
            if hasattr(module, "lora_A") and module.lora_A:
                (down,), (up,) = module.lora_A.values(), module.lora_B.values()
                (scale,) = module.scaling.values()
                layers[f"{part}.{name}"] = (down.weight, up.weight, torch.tensor(scale))
    return layers, pipeline


@pytest.mark.parametrize("flags", [{"lora_layers": "all"}, {"no_train_text_encoder": True}])
def test_a_saved_lora_does_in_a_fresh_pipeline_what_it_did_in_training(
    load_models, train_args, model_dir, tmp_path, flags
):
    """Also fault 12 of the published example, whose LoRA was built by hand on private API that no
    longer exists. In kohya's layout it loads as the same matrices, bit for bit."""
    _, denoiser, _ = load_models(use_lora=True, **flags)
    original = predict(denoiser)
    change(denoiser)
    trained = predict(denoiser)
    export.save(denoiser, train_args(tmp_path / "lora", use_lora=True))
    assert os.listdir(tmp_path / "lora") == [pipeline_dir.LORA_FILE]
    layers, pipeline = lora_layers(tmp_path / "lora", model_dir)
    parts = {"unet"} if "no_train_text_encoder" in flags else {"unet", "text_encoder"}
    assert {name.partition(".")[0] for name in layers} == parts
    torch.testing.assert_close(predict(pipeline), trained, rtol=0, atol=1e-5)
    assert (trained - original).abs().max() > 0.01

    file = tmp_path / "subject.safetensors"
    run_export("kohya", tmp_path / "lora", "--output", file)
    back, _ = lora_layers(file, model_dir)
    assert back.keys() == layers.keys()
    assert len(layers) > 20
    for name, tensors in layers.items():
        assert all(map(torch.equal, back[name], tensors)), name


def run_export(*argv):
    """Call the module as a command is called."""
    export.main(export.parse_args([str(arg) for arg in argv]))


def test_an_image_is_of_the_result_that_made_it(model_dir, lora_dir):
    model, lora = pipeline_dir.fingerprint(model_dir), pipeline_dir.lora_fingerprint(lora_dir)
    assert export.has_made(model_dir, {"model": model, "lora": ""})
    assert not export.has_made(model_dir, {"model": model, "lora": lora})
    assert not export.has_made(model_dir, {"model": "0123", "lora": ""})
    assert export.has_made(lora_dir, {"model": "0123", "lora": lora})
    assert not export.has_made(lora_dir, {"model": model, "lora": ""})


def test_kohyas_names_and_the_mode_of_new_files(lora_dir, tmp_path):
    """The names as kohya's scripts write them for models with one text encoder."""
    file = tmp_path / "subject.safetensors"
    run_export("kohya", lora_dir, "--output", file)
    names = load_file(file).keys()
    assert {name.split("_")[1] for name in names} == {"unet", "te"}
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # without it some loaders refuse a file
    endings = {name.partition(".")[2] for name in names}
    assert endings == {"lora_down.weight", "lora_up.weight", "alpha"}
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in (file, tmp_path / "other")}
    modes.add((lora_dir / pipeline_dir.LORA_FILE).stat().st_mode)
    assert len(modes) == 1


def test_what_kohyas_layout_cannot_be_made_of(lora_dir, tmp_path):
    """A LoRA of diffusers' scripts has its alphas in the header; the layers' would be wrong."""
    weights = load_file(lora_dir / pipeline_dir.LORA_FILE)
    other = tmp_path / "other.safetensors"
    save_file(weights, other, metadata={"lora_adapter_metadata": '{"unet.lora_alpha": 2}'})
    for folder, name, message in (
        (other, "subject.safetensors", "alphas of its own: only train.py's LoRAs are converted"),
        (lora_dir, "subject.bin", r"must end with \.safetensors"),
        (tmp_path / "empty", "subject.safetensors", "no pytorch_lora_weights.safetensors there"),
        (other, "other.safetensors", "is the LoRA itself: choose another file"),
    ):
        with pytest.raises(UserError, match=message):
            run_export("kohya", folder, "--output", tmp_path / name)
    save_file(weights, other)  # as other programs may, with nothing in the header
    run_export("kohya", other, "--output", tmp_path / "subject.safetensors")
    klein = {"transformer.x.lora_A.weight": weights[next(iter(weights))]}
    save_file(klein, other)
    with pytest.raises(UserError, match="transformer's LoRA, which ComfyUI reads as it is"):
        run_export("kohya", other, "--output", tmp_path / "subject.safetensors")


@pytest.fixture
def result(train_args, model_dir, tmp_path):
    """A run that has ended: result(use_lora=True) returns its directory, which holds no weights,
    and its record."""

    def make(on_hub=True, **flags):
        folder = tmp_path / "tuned"
        folder.mkdir()
        (folder / (pipeline_dir.LORA_FILE if flags.get("use_lora") else "model_index.json")).touch()
        model = model_dir
        if on_hub:  # a model that cache_model.py has downloaded
            cached = (tmp_path, "CompVis/stable-diffusion-v1-4", "b95be7d6")
            model = pipeline_dir.snapshot_dir(*cached)
            model.parent.mkdir(parents=True)
            model.symlink_to(model_dir)
        args = train_args(folder, model_dir=model, **flags)
        plan = make_plan(args)
        training_log.prepare(plan.report_dir, 0)
        record = training_log.RunRecord(args, plan, "2 cores")
        record.finish({})
        return folder, training_log.read_run_record(plan.report_dir)

    return make


def test_no_card_is_written_of_a_run_that_did_not_make_the_result(result):
    """A later run with other flags, which failed, is what the record is of."""
    folder, _ = result()
    set_json(report_dir(folder) / training_log.RECORD, status="diverged")
    with pytest.raises(UserError, match="is of a later run .diverged., not of the one that made"):
        run_export("card", folder)
    assert not (folder / export.CARD).exists()


def test_a_results_report_is_kept_until_the_result_is_replaced(result, train_args):
    """A later run that fails costs neither model nor report; one that finishes replaces both."""
    folder, record = result()
    report = report_dir(folder)
    earlier = training_log.previous(report)
    (report / "tensorboard").mkdir()
    (report / "tensorboard" / "events").write_text("a curve")
    args = train_args(folder, lr=9)
    plan = make_plan(args)
    for _ in range(2):  # the second follows one that failed, whose report nobody needs
        training_log.prepare(report, 0)
        later = training_log.RunRecord(args, plan, "2 cores")
        with pytest.raises(RuntimeError), later:
            raise RuntimeError
        assert training_log.read_run_record(report)["status"] == "failed"
        assert training_log.read_run_record(earlier) == record
        assert (earlier / "tensorboard" / "events").read_text() == "a curve"
        assert not (report / "tensorboard").exists()
        with pytest.raises(UserError, match=f"put {earlier} in its place first"):
            run_export("card", folder)
    training_log.prepare(report, 0)
    training_log.RunRecord(args, plan, "2 cores").finish({})
    assert not earlier.exists()
    assert training_log.read_run_record(report)["flags"]["lr"] == 9


def card_of(folder):
    """The metadata and the text of a card, as the Hub reads them."""
    card = huggingface_hub.ModelCard.load(folder / "README.md")  # checks the block of metadata
    assert card.data.to_dict() == metadata_load(folder / "README.md")
    return card.data.to_dict(), card.text


def test_the_card_says_what_the_hub_reads_and_how_the_model_was_made(result):
    """And names no image without one: the Hub would show a broken one."""
    folder, record = result(lr=2e-4, prior_loss_weight=0.5, seed=7)
    export.write_card(folder, record)
    data, text = card_of(folder)
    assert data["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert data["license"] == "creativeml-openrail-m"
    assert data["library_name"] == "diffusers"
    assert data["instance_prompt"] == "photo of unqtkn car"
    assert set(data["tags"]) >= {"dreambooth", "stable-diffusion", "text-to-image"}
    assert "lora" not in data["tags"]
    for part in (
        "revision b95be7d6", "- class prompt: photo of a car", "from 5 photos", "3 steps",
        "made with DreamBooth's prior-preserving loss",
        "learning rate 0.0002, prior loss weight 0.5, seed 7",
    ):  # fmt: skip
        assert part in text
    assert "before-after.png" not in text


def test_the_card_of_a_lora(result):
    folder, _ = result(use_lora=True, prior_loss_weight=0)
    run_export("card", folder)
    data, text = card_of(folder)
    assert "lora" in data["tags"]
    assert 'from_pretrained("CompVis/stable-diffusion-v1-4")' in text
    assert 'load_lora_weights("tuned")' in text
    assert "class prompt" not in text and "prior-preserving" not in text


def test_the_card_of_a_model_that_is_not_on_the_hub(result):
    """The Hub refuses a card whose base_model is not a repository's name; a LoRA's code loads the
    model that it was trained on."""
    flags = {"instance_prompt": 'photo: of "unqtkn" #car', "use_lora": True}
    folder, record = result(on_hub=False, **flags)
    export.write_card(folder, record)
    data, text = card_of(folder)
    assert f'from_pretrained("{record["flags"]["model_dir"]}")' in text
    assert not data.keys() & {"base_model", "license"}
    assert data["instance_prompt"] == 'photo: of "unqtkn" #car'


def test_an_image_goes_beside_the_card_and_both_are_replaced_with_the_result(
    result, flat_image, train_args
):
    """Training again into the same directory is no mistake; a file that is not ours is kept."""
    folder, record = result()
    export.write_card(folder, record, flat_image("sheet.png", (9, 9, 9)))
    export.write_card(folder, record)  # written again without one, it keeps the image
    data, text = card_of(folder)
    assert data["widget"][0]["output"]["url"] == "before-after.png"
    assert "](before-after.png)" in text
    assert (folder / "before-after.png").exists()
    check_flags(train_args(folder))
    (folder / "LICENSE.md").touch()
    with pytest.raises(UserError, match="LICENSE.md"):
        check_flags(train_args(folder))


def test_a_card_without_a_result(result, tmp_path):
    """Rank 0 may have saved it on the disk of another node; or a directory is none of train.py."""
    folder, record = result()
    with pytest.raises(UserError, match="is on another node: it must be on shared storage"):
        export.write_card(tmp_path / "nowhere", record)
    with pytest.raises(UserError, match="holds no result of train.py"):
        run_export("card", tmp_path)
    shutil.rmtree(tmp_path / "tuned.report")
    with pytest.raises(UserError, match="tuned.report is missing"):
        run_export("card", folder)


@pytest.fixture
def hub(monkeypatch):
    """The Hub, in place of which this stands."""
    hub = MagicMock()
    hub.create_repo.return_value = huggingface_hub.RepoUrl("https://huggingface.co/me/model")
    hub.repo_info.return_value.private = True
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub.ModelCard, "validate", hub.validate)
    return hub


def test_a_result_is_uploaded_to_a_private_repository_unless_public(result, hub, capsys):
    """Its card is validated first, and loads the model from there, not from this machine."""
    folder, _ = result()
    for flags in ([], ["--public"]):
        hub.reset_mock()
        hub.repo_info.return_value.private = not flags
        run_export("card", folder, "--push", "me/model", *flags)
        assert hub.mock_calls == [
            call.whoami(token=True),
            call.validate(),
            call.create_repo("me/model", private=not flags, exist_ok=True),
            call.repo_info("me/model"),
            call.upload_folder(repo_id="me/model", folder_path=folder),
        ]
        assert "uploaded to https://huggingface.co/me/model" in capsys.readouterr().out
    assert 'from_pretrained("me/model")' in card_of(folder)[1]


def test_the_cards_code_is_python_whatever_the_prompt(result):
    folder, record = result()
    record["flags"]["instance_prompt"] = 'photo of "rex" \\ dog'
    export.write_card(folder, record)
    code = card_of(folder)[1].partition("```python\n")[2].partition("```")[0]
    constants = [n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)]
    assert record["flags"]["instance_prompt"] in constants


def test_a_repository_without_its_owner_is_refused(result, hub):
    """The Hub would take it as one's own; the card's code would not find it."""
    folder, _ = result()
    with pytest.raises(UserError, match="--push model: write the repository as NAME/MODEL"):
        run_export("card", folder, "--push", "model")
    assert hub.mock_calls == []


def test_what_should_be_private_is_not_uploaded_to_a_public_repository(result, hub):
    """Of one that is there already the Hub ignores what it is asked to be."""
    folder, _ = result()
    hub.repo_info.return_value.private = False
    with pytest.raises(UserError, match="me/model: that repository is public; add --public"):
        run_export("card", folder, "--push", "me/model")
    assert not hub.upload_folder.called


def test_a_repository_that_stays_private_is_warned_of(result, hub, capsys):
    folder, _ = result()
    run_export("card", folder, "--push", "me/model", "--public")
    assert "warning: --push me/model: that repository stays private" in capsys.readouterr().err
    assert hub.upload_folder.called


def test_an_upload_that_fails_says_why(result, hub):
    folder, _ = result()
    refused = MagicMock(status_code=403)
    silent = HfHubHTTPError("no", response=refused)
    silent.response = None
    for error, message in (
        (LocalTokenNotFoundError("no token"), "not logged in to the Hub: run `hf auth login`"),
        (HFValidationError("a name"), "--push me/model: write the repository as NAME/MODEL"),
        (HfHubHTTPError("no", response=refused), "the Hub answered 403; is it yours"),
        (silent, "--push me/model: the Hub did not answer$"),
        (ConnectionError("offline"), "the Hub cannot be reached"),
        (HTTPError("no route to host"), "the Hub cannot be reached"),  # no OSError
    ):
        hub.whoami.side_effect = error
        with pytest.raises(UserError, match=message):
            run_export("card", folder, "--push", "me/model")
    assert not hub.upload_folder.called


def test_tokenizer_and_scheduler_are_copied_byte_for_byte(load_models, model_dir, tmp_path):
    """Older versions of the libraries load the result if they load the original: through the links
    of the Hub's cache, with vocab.json and merges.txt in place of tokenizer.json."""
    original = shutil.copytree(model_dir, tmp_path / "original")
    (original / "tokenizer" / "vocab.json").write_text("{}")
    blob = (original / "scheduler" / "scheduler_config.json").rename(tmp_path / "blob")
    (original / "scheduler" / "scheduler_config.json").symlink_to(blob)
    _, denoiser, _ = load_models()
    export.save_pipeline(denoiser, original, tmp_path / "tuned")
    for part in ("tokenizer", "scheduler"):
        names = {file.name for file in (original / part).iterdir()}
        assert {file.name for file in (tmp_path / "tuned" / part).iterdir()} == names
        for name in names:
            copied = tmp_path / "tuned" / part / name
            assert copied.read_bytes() == (original / part / name).read_bytes()
            assert not copied.is_symlink()


def test_the_names_of_a_loras_text_encoder_are_those_that_other_programs_know(lora_dir, tmp_path):
    """transformers 5 leaves their first part out; ComfyUI would load such a file without a word,
    and without the text encoder's matrices."""
    names = [name for name in load_file(lora_dir / pipeline_dir.LORA_FILE) if "text" in name]
    assert names and all(name.startswith("text_encoder.text_model.encoder.") for name in names)
    run_export("kohya", lora_dir, "--output", tmp_path / "subject.safetensors")
    names = [name for name in load_file(tmp_path / "subject.safetensors") if "lora_te" in name]
    assert names and all(name.startswith("lora_te_text_model_encoder_layers_") for name in names)


def test_a_result_has_no_safety_checker_and_asks_for_none(load_models, model_dir, tmp_path):
    """Else its pipeline warns each time that it is loaded."""
    original = shutil.copytree(model_dir, tmp_path / "original")
    checker = {"safety_checker": ["stable_diffusion", "Checker"], "requires_safety_checker": True}
    set_json(original / "model_index.json", **checker)
    _, denoiser, _ = load_models()
    export.save_pipeline(denoiser, original, tmp_path / "tuned")
    saved = json.loads((tmp_path / "tuned" / "model_index.json").read_text())
    assert (saved["safety_checker"], saved["requires_safety_checker"]) == ([None, None], False)
    assert saved["unet"] == ["diffusers", "UNet2DConditionModel"]


@pytest.mark.parametrize(
    ("base", "pipeline", "licence"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline", "openrail++"),
        ("black-forest-labs/FLUX.2-klein-base-4B", "Flux2KleinPipeline", "apache-2.0"),
        ("acme/model", "StableDiffusionPipeline", None),
    ],
)
def test_a_card_names_the_base_models_licence(result, base, pipeline, licence):
    """And none where it is not known."""
    _, record = result()
    card = export.build_card("tuned", {**record, "model": base, "pipeline": pipeline}, False)
    assert card.data.license == licence


def test_the_card_that_a_run_wrote_may_be_written_again_and_no_other(result, flat_image):
    """With an image or without."""
    folder, record = result()
    for image in (None, flat_image("sheet.png", 0)):
        export.write_card(folder, record, image)
        assert export.may_write_card(folder, record)
    assert not export.may_write_card(folder, {**record, "plan": "another run's"})
