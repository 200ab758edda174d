"""The model card, as the Hub reads it; and what is said where the Hub cannot be used."""

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.repocard import metadata_load

from dreambooth import metrics, model_card, model_dir, run_record, training_checks
from dreambooth.cli import UserError
from tests.test_report_page import record_of

SD14 = {"model": "CompVis/stable-diffusion-v1-4", "revision": "b95be7d6"}


@pytest.fixture
def result(tmp_path):
    """A result's directory with a run's record beside it: result(model=...)."""

    def make(use_lora=False, **changes):
        folder = metrics.report_dir(tmp_path / "tuned")
        folder.mkdir(exist_ok=True)
        (tmp_path / "tuned").mkdir(exist_ok=True)
        record = record_of(tmp_path, ["a.png"] * 5, **changes)
        record["flags"]["use_lora"] = use_lora
        run_record.write(folder, record)
        return tmp_path / "tuned"

    return make


def test_metadata_is_what_the_hub_reads(result):
    folder = result(**SD14)
    model_card.write(folder)
    data = metadata_load(folder / "README.md")
    assert data["base_model"] == "CompVis/stable-diffusion-v1-4"
    assert data["license"] == "creativeml-openrail-m"
    assert data["library_name"] == "diffusers"
    assert data["instance_prompt"] == "photo of unqtkn car"
    assert {"dreambooth", "stable-diffusion", "text-to-image"} <= set(data["tags"])
    assert "lora" not in data["tags"]
    card = ModelCard.load(folder / "README.md")  # checks the block of metadata
    assert card.data.to_dict() == data
    assert "revision b95be7d6" in card.text


def test_a_lora_says_so(result):
    folder = result(use_lora=True, **SD14)
    model_card.write(folder)
    card = ModelCard.load(folder / "README.md")
    assert "lora" in card.data.tags
    assert "load_lora_weights" in card.text
    assert 'from_pretrained("CompVis/stable-diffusion-v1-4")' in card.text


def test_a_model_that_is_not_on_the_hub_is_no_base_model(result):
    """The Hub refuses a card whose base_model is not a repository's name."""
    folder = result()
    model_card.write(folder)
    data = metadata_load(folder / "README.md")
    assert "base_model" not in data
    assert "license" not in data


def test_prompts_with_quotes_and_colons_survive(result):
    folder = result()
    record = run_record.read(metrics.report_dir(folder))
    record["flags"]["instance_prompt"] = 'photo: of "unqtkn" #car'
    card = model_card.build("tuned", record, has_image=True)
    read = ModelCard(str(card)).data.to_dict()
    assert read["instance_prompt"] == 'photo: of "unqtkn" #car'


def test_image_goes_beside_the_card(result, flat_image):
    folder = result()
    model_card.write(folder, flat_image("sheet.png", (9, 9, 9)))
    assert "](before-after.png)" in (folder / "README.md").read_text()
    assert (folder / "before-after.png").exists()
    data = metadata_load(folder / "README.md")
    assert data["widget"][0]["output"]["url"] == "before-after.png"
    model_card.write(folder)  # written again without one, it keeps the image
    assert "](before-after.png)" in (folder / "README.md").read_text()


def test_a_card_is_replaced_with_the_result_that_it_belongs_to(result, train_args):
    """Training again into the same directory is no mistake."""
    folder = result()
    model_card.write(folder)
    (folder / "unet").mkdir()
    training_checks.check_output_dir(train_args(folder))
    (folder / "LICENSE.md").touch()  # no file of ours
    with pytest.raises(UserError, match="LICENSE.md"):
        training_checks.check_output_dir(train_args(folder))


def test_without_a_class_there_is_no_class_prompt_on_the_card(result):
    record = run_record.read(metrics.report_dir(result()))
    record["flags"]["class_prompt"] = None
    assert "class prompt" not in str(model_card.build("tuned", record, has_image=False))


def test_whoever_is_not_logged_in_is_told_so(result, monkeypatch):
    folder = result()
    model_card.write(folder)

    def whoami(self, token=None):
        raise LocalTokenNotFoundError("no token")

    monkeypatch.setattr(model_card.HfApi, "whoami", whoami)
    with pytest.raises(UserError, match="not logged in to the Hub: run `hf auth login` first"):
        model_card.push(folder, "me/model", private=True)


def test_the_card_on_the_hub_loads_the_model_from_there(result):
    """And not from a folder of the machine that made it."""
    folder = result(use_lora=True)
    model_card.write(folder)
    assert 'load_lora_weights("tuned")' in (folder / "README.md").read_text()
    model_card.write(folder, repo="me/model")
    assert 'load_lora_weights("me/model")' in (folder / "README.md").read_text()


@pytest.mark.parametrize("private", [True, False])
def test_private_unless_public_and_the_card_is_validated(result, monkeypatch, private):
    folder = result()
    model_card.write(folder)
    calls = []
    monkeypatch.setattr(model_card.HfApi, "whoami", lambda self, token=None: {"name": "me"})
    monkeypatch.setattr(model_card.ModelCard, "validate", lambda self: calls.append("validate"))

    class Url(str):
        repo_id = "me/model"

    def create_repo(self, repo, private, exist_ok):
        calls.append(("create", repo, private))
        return Url("https://example.org/me/model")

    def upload_folder(self, repo_id, folder_path):
        calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(model_card.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(model_card.HfApi, "upload_folder", upload_folder)
    model_card.push(folder, "me/model", private)
    assert calls == ["validate", ("create", "me/model", private), ("upload", "me/model", folder)]


def test_names_and_revisions_are_those_of_the_hubs_cache():
    cached = "/data/models--CompVis--stable-diffusion-v1-4/snapshots/b95be7d6"
    found = model_dir.name_and_revision(cached)
    assert found == ("CompVis/stable-diffusion-v1-4", "b95be7d6")
    assert model_dir.name_and_revision("/data/my-model") == ("my-model", "")
