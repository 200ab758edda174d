"""The model card of a result, its README.md, as the Hugging Face Hub reads it; and to the Hub.

    python -m dreambooth.model_card $TUNED_MODEL_DIR --push YOUR-NAME/YOUR-MODEL

train.py writes the card, report_page.py adds images from before and after. The result is uploaded
to a private repository, unless you give --public. Log in first: hf auth login.
"""

import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from dreambooth import atomic, metrics, run_record
from dreambooth.cli import ArgumentParser, UserError, absolute_path, run_main
from dreambooth.model_dir import CARD_FILES, LORA_FILE

# The licences of the base models that these scripts are used with most, by the Hub's names.
LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
}
CARD, IMAGE = CARD_FILES

TEXT = """
# {name}

{kind} that knows one subject as "{prompt}", made with DreamBooth's prior-preserving loss
([Ruiz et al. 2022](https://arxiv.org/abs/2208.12242)) from {num_photos} photos.
{image}
```python
{code}
```

- base model: {base}{revision}
- instance prompt: {prompt}
{class_prompt}- {plan}
- learning rate {lr}, prior loss weight {weight}, seed {seed}

The base model's licence holds for this model as well. The photos' subject may have rights of its
own: mind what you publish.
"""
LOAD_PIPELINE = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{name}")
pipeline("{prompt}").images[0]"""
LOAD_LORA = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{name}")
pipeline("{prompt}").images[0]"""


def write(output_dir, image=None, repo=None):
    """Write the card of the result in `output_dir`, with the file `image` if one is given, and with
    the name that the result has on the Hub, if it has one."""
    output_dir = Path(output_dir)
    record = run_record.read(metrics.report_dir(output_dir))
    if image:
        atomic.replace_file(output_dir / IMAGE, lambda file: shutil.copyfile(image, file))
    card = build(repo or output_dir.name, record, (output_dir / IMAGE).exists())
    atomic.replace_file(output_dir / CARD, lambda file: file.write_text(str(card)))


def build(name, record, has_image):
    """The card, a ModelCard, of the run in `record` (run_record.py)."""
    flags = record["flags"]
    prompt = flags["instance_prompt"]
    class_prompt = flags["class_prompt"]
    lora = flags["use_lora"]
    base = record["model"]
    on_hub = "/" in base
    data = ModelCardData(
        base_model=base if on_hub else None,
        license=LICENCES.get(base),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "stable-diffusion", "dreambooth"]
        + (["lora"] if lora else []),
        instance_prompt=prompt,
        widget=[{"text": prompt, "output": {"url": IMAGE}}] if has_image else None,
    )
    code = LOAD_LORA if lora else LOAD_PIPELINE
    text = TEXT.format(
        name=name,
        kind="A LoRA" if lora else "A Stable Diffusion model",
        prompt=prompt,
        class_prompt=f"- class prompt: {class_prompt}\n" if class_prompt else "",
        num_photos=len(record["instance_paths"]),
        image=f"\n![before, above, and after]({IMAGE})\n" if has_image else "",
        code=code.format(name=name, base=base, prompt=prompt),
        base=base,
        revision=f", revision {record['revision']}" if record["revision"] else "",
        plan=record["plan"],
        lr=flags["lr"],
        weight=flags["prior_loss_weight"],
        seed=flags["seed"],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def push(output_dir, repo, private):
    """Upload the result in `output_dir` to the Hub; returns the repository's address. UserError:
    not logged in, or the Hub says no."""
    api = HfApi()
    try:
        api.whoami(token=True)
        ModelCard.load(Path(output_dir) / CARD).validate()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=output_dir)
    except LocalTokenNotFoundError:
        raise UserError("not logged in to the Hub: run `hf auth login` first") from None
    except HFValidationError:
        raise UserError(f"--push {repo}: give the repository as NAME/MODEL") from None
    except HfHubHTTPError as error:
        response = error.response
        status = response.status_code if response is not None else "no answer"
        raise UserError(f"--push {repo}: the Hub answered {status}; is it yours?") from None
    except OSError as error:
        raise UserError(f"the Hub cannot be reached ({type(error).__name__})") from None
    return str(url)


def main(args):
    folder = Path(args.output_dir)
    if not ((folder / "model_index.json").exists() or (folder / LORA_FILE).exists()):
        raise UserError(f"{folder} holds no result of train.py")
    if not run_record.read(metrics.report_dir(folder)):
        raise UserError(f"{metrics.report_dir(folder)} is missing: it says how the model was made")
    write(folder, repo=args.push)
    print(f"wrote {folder / CARD}")
    if args.push:
        print(f"uploaded to {push(folder, args.push, private=not args.public)}")


if __name__ == "__main__":
    parser = ArgumentParser(__doc__)
    parser.add_argument("output_dir", type=absolute_path, help="a result of train.py")
    parser.add_argument("--push", metavar="REPO", help="upload to this repository of the Hub")
    parser.add_argument("--public", action="store_true", help="let anybody see it")
    run_main(main, parser.parse_args())
