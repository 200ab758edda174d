"""The result of a training run: a complete pipeline directory or the file of a LoRA, with its model
card, the README.md that the Hugging Face Hub shows. As commands: upload it, or convert a LoRA for
other programs.

    python -m dreambooth.run.export card $TUNED_MODEL_DIR --push YOUR-NAME/YOUR-MODEL
    python -m dreambooth.run.export kohya $LORA_DIR --output subject.safetensors

The result is uploaded to a private repository, unless you pass --public. Log in first: hf auth
login. ComfyUI and AUTOMATIC1111 read a LoRA in kohya's layout, and so does diffusers.
"""

import json
import shutil
from functools import partial
from pathlib import Path

from dreambooth.cli import ArgumentParser, UserError, absolute_path, run_main, warn
from dreambooth.files import atomic, pipeline_dir
from dreambooth.files.pipeline_dir import CARD_FILES, LORA_FILE
from dreambooth.run import training_log
from dreambooth.run.training_log import report_dir

# The licences of the base models that these scripts are used with most, by the Hub's names.
LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
}
CARD, IMAGE = CARD_FILES
OPTIONAL_PARTS = {"safety_checker", "feature_extractor", "image_encoder"}  # not in the result

TEXT = """
# {name}

{kind} that knows one subject as "{prompt}", made with DreamBooth{loss} ([Ruiz et al.
2022](https://arxiv.org/abs/2208.12242)) from {num_photos} photo{s}.
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
LOAD_PIPELINE = """from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{name}")
pipeline({prompt}).images[0]"""
LOAD_LORA = """from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{base}")
pipeline.load_lora_weights("{name}")
pipeline({prompt}).images[0]"""


def save(denoiser, args):
    """Write the result of a run to `args.output_dir`, whole or not at all."""
    write = partial(save_pipeline, denoiser, args.model_dir)
    if args.use_lora:
        write = partial(save_lora, denoiser)
    atomic.replace_dir(args.output_dir, write)


def save_pipeline(denoiser, model_dir, folder):
    """Write a complete pipeline directory: the denoiser's models, which move to the CPU, the rest
    as in `model_dir`. All weights in float32: loaders that are told no precision would mix several.

    Tokenizers and scheduler are copied byte for byte, so that older versions of the libraries load
    the result if they load the original.
    """
    import torch
    from safetensors.torch import load_file, save_file

    denoiser.to("cpu", torch.float32)
    model_dir, folder = Path(model_dir), Path(folder)
    facts = pipeline_dir.read_facts(model_dir)
    index = pipeline_dir.read_config(model_dir / pipeline_dir.INDEX, "--model_dir")
    for part in (*facts.tokenizers, "scheduler"):
        atomic.copy_files(model_dir / part, folder / part)
    for part in facts.models:
        model = getattr(denoiser, part, None)
        if model is None:
            model = pipeline_dir.load_part(model_dir, part, dtype=torch.float32)
        model.save_pretrained(folder / part)
    for part in facts.text_encoders:
        if index[part][1].startswith("CLIP"):
            for file in (folder / part).glob("*.safetensors"):
                save_file(_with_hub_names(load_file(file)), file, metadata={"format": "pt"})
    absent = {name: [None, None] for name in index if name in OPTIONAL_PARTS}
    kept = {name: value for name, value in index.items() if name not in OPTIONAL_PARTS}
    if "requires_safety_checker" in index or "safety_checker" in index:
        absent["requires_safety_checker"] = False
    text = json.dumps({**kept, **absent}, indent=2) + "\n"
    (folder / pipeline_dir.INDEX).write_text(text, encoding="utf-8")


def save_lora(denoiser, folder):
    """Write the LoRA matrices as diffusers' `load_lora_weights` reads them."""
    import diffusers
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = {}
    for part in (denoiser.family.facts.backbone, "text_encoder"):
        model = getattr(denoiser, part)
        if getattr(model, "peft_config", None):
            matrices = get_peft_model_state_dict(model)
            if denoiser.family.old_lora_names:
                matrices = convert_state_dict_to_diffusers(matrices)
                matrices = {_with_one_layout(name): m for name, m in matrices.items()}
            if part == "text_encoder":
                matrices = _with_hub_names(matrices)
            layers[f"{part}_lora_layers"] = matrices
    getattr(diffusers, denoiser.family.facts.class_name).save_lora_weights(folder, **layers)


def _with_one_layout(name):
    """diffusers renames the matrices of attention alone; of a file with both kinds of names it
    would load one kind, and say nothing."""
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def _with_hub_names(text_encoder_weights):
    """CLIP's weights under the names that the Hub's files have and every loader knows: transformers
    5 leaves out their first part, and older versions would silently start from random weights."""
    known = ("text_model.", "text_projection.")
    return {
        name if name.startswith(known) else f"text_model.{name}": weight
        for name, weight in text_encoder_weights.items()
    }


def write_card(output_dir, record, image=None, repo=None):
    """Write the card of the result in `output_dir`, which the run in `record` (training_log.py) has
    made; with the file `image` if one is given, and with the name that the result has on the Hub,
    if it has one. UserError: there is no result here."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise UserError(f"{output_dir} is on another node: it must be on shared storage")
    if image:
        atomic.replace_file(output_dir / IMAGE, lambda file: shutil.copyfile(image, file))
    card = build_card(repo or output_dir.name, record, (output_dir / IMAGE).exists())
    atomic.replace_text(output_dir / CARD, str(card))


def may_write_card(output_dir, record):
    """Whether `write_card` would replace nothing but the card that it wrote for the run in
    `record`: not another run's, and not one that the user has changed."""
    output_dir = Path(output_dir)
    if not (output_dir / CARD).exists():
        return output_dir.is_dir()
    text = (output_dir / CARD).read_text(encoding="utf-8", errors="replace")
    return text in [str(build_card(output_dir.name, record, image)) for image in (False, True)]


def has_made(output_dir, image):
    """Whether the result in `output_dir` made the image whose record is `image`, as far as the
    record tells."""
    if "model" not in image:
        return True
    if (Path(output_dir) / LORA_FILE).exists():
        return image.get("lora") == pipeline_dir.lora_fingerprint(output_dir)
    if not (Path(output_dir) / pipeline_dir.INDEX).exists():  # it may have been moved
        return True
    return not image.get("lora") and image["model"] == pipeline_dir.fingerprint(output_dir)


def build_card(name, record, has_image):
    """The card, a ModelCard, of the run in `record` (training_log.py)."""
    from huggingface_hub import ModelCard, ModelCardData  # here: train.py may need neither

    flags = record["flags"]
    prompt = flags["instance_prompt"]
    class_prompt = flags["class_prompt"] if flags["prior_loss_weight"] else None
    lora = flags["use_lora"]
    base = record["model"]
    on_hub = "/" in base
    pipeline = record["pipeline"]
    facts = pipeline_dir.facts_of({"_class_name": pipeline}, base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        license=LICENCES.get(base),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", *facts.tags, "dreambooth"] + (["lora"] if lora else []),
        instance_prompt=prompt,
        widget=[{"text": prompt, "output": {"url": IMAGE}}] if has_image else None,
    )
    code = LOAD_LORA if lora else LOAD_PIPELINE
    text = TEXT.format(
        name=name,
        kind="A LoRA" if lora else f"A {facts.name.partition(' 1.x')[0]} model",
        prompt=prompt,
        loss="'s prior-preserving loss" if flags["prior_loss_weight"] else "",
        class_prompt=f"- class prompt: {class_prompt}\n" if class_prompt else "",
        num_photos=len(record["instance_paths"]),
        s="" if len(record["instance_paths"]) == 1 else "s",
        image=f"\n![before, above, and after]({IMAGE})\n" if has_image else "",
        code=code.format(
            pipeline=pipeline,
            name=name,
            prompt=json.dumps(prompt, ensure_ascii=False),
            base=base if on_hub else flags["model_dir"],
        ),
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
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
    )

    api = HfApi()
    try:
        api.whoami(token=True)
        ModelCard.load(Path(output_dir) / CARD).validate()
        url = api.create_repo(repo, private=private, exist_ok=True)
        is_private = api.repo_info(url.repo_id).private  # one that was there stays what it was
        if private and not is_private:
            raise UserError(
                f"--push {repo}: that repository is public; add --public, or choose another"
            )
        if is_private and not private:
            warn(f"--push {repo}: that repository stays private: its settings can change that")
        api.upload_folder(repo_id=url.repo_id, folder_path=output_dir)
    except LocalTokenNotFoundError:
        raise UserError("not logged in to the Hub: run `hf auth login` first") from None
    except HFValidationError:
        raise UserError(f"--push {repo}: write the repository as NAME/MODEL") from None
    except HfHubHTTPError as error:
        if error.response is None:
            raise UserError(f"--push {repo}: the Hub did not answer") from None
        status = error.response.status_code
        raise UserError(f"--push {repo}: the Hub answered {status}; is it yours?") from None
    except (OSError, HTTPError) as error:
        raise UserError(f"the Hub cannot be reached ({type(error).__name__})") from None
    return str(url)


def to_kohya(weights):
    """The LoRA's tensors by name, as diffusers saves them, under kohya's names for Stable Diffusion
    1.x and 2.x, with the alpha of each layer: its rank, which stands for a scale of 1."""
    from diffusers.utils import convert_state_dict_to_kohya

    converted = convert_state_dict_to_kohya(_to_peft(weights))
    # lora_te1 is the first of SDXL's two text encoders; these models have one.
    return {name.replace("lora_te1_", "lora_te_"): tensor for name, tensor in converted.items()}


def _to_peft(weights):
    """The tensors under PEFT's names; U-Net and text encoder have conversions of their own."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    unet = {name: tensor for name, tensor in weights.items() if name.startswith("unet.")}
    text_encoder = {name: tensor for name, tensor in weights.items() if name not in unet}
    converted = convert_unet_state_dict_to_peft(unet)
    if text_encoder:
        converted.update(convert_state_dict_to_peft(text_encoder))
    return converted


def export_card(args):
    """Write the card of `args.output_dir` anew, and upload the result if asked to. UserError: it is
    no result of train.py."""
    folder = Path(args.output_dir)
    if args.push and "/" not in args.push:
        raise UserError(f"--push {args.push}: write the repository as NAME/MODEL")
    if not ((folder / pipeline_dir.INDEX).exists() or (folder / LORA_FILE).exists()):
        raise UserError(f"{folder} holds no result of train.py")
    record = training_log.read_run_record(report_dir(folder))
    if not record:
        raise UserError(f"{report_dir(folder)} is missing: it says how the model was made")
    if record["status"] != "finished":
        remedy = "run the training command again"
        if (earlier := training_log.previous(report_dir(folder))).exists():
            remedy = f"put {earlier} in its place"
        raise UserError(
            f"{report_dir(folder)} is of a later run ({record['status']}), not of the one that made"
            f" this result: {remedy} first"
        )
    write_card(folder, record, repo=args.push)
    print(f"wrote {folder / CARD}")
    if args.push:
        print(f"uploaded to {push(folder, args.push, private=not args.public)}")


def export_kohya(args):
    """Write the LoRA of `args.lora_dir` to `args.output`. UserError: there is none, or one that
    train.py did not write."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: must end with .safetensors")
    atomic.check_writable(output.parent, "the directory of --output")
    file = pipeline_dir.lora_file(args.lora_dir, "LORA_DIR")
    if output.resolve() == file.resolve():
        raise UserError(f"--output {output} is the LoRA itself: choose another file")
    with pipeline_dir.loading(f"LORA_DIR {file}"):
        with safe_open(file, "pt") as opened:
            if "lora_adapter_metadata" in (opened.metadata() or {}):
                raise UserError(
                    f"{file} has alphas of its own: only train.py's LoRAs are converted"
                )
        weights = load_file(file)
        if any(name.startswith("transformer.") for name in weights):
            raise UserError(f"{file} is a transformer's LoRA, which ComfyUI reads as it is")
        if not all(name.startswith(("unet.", "text_encoder.")) for name in weights):
            raise UserError(f"{file} is not named as train.py does, which alone is converted")
        weights = to_kohya(weights)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    atomic.replace_file(output, lambda file: save_file(weights, file, metadata={"format": "pt"}))
    print(f"wrote {output}")


def parse_args(argv=None):
    """The flags of both commands; `command` is "card" or "kohya"."""
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="card|kohya")
    text = "write the model card of a result anew, and with --push upload the result to the Hub"
    add = commands.add_parser("card", help=text, description=text).add_argument
    add("output_dir", type=absolute_path, help="a result of train.py")
    add("--push", metavar="REPO", help="upload to this repository of the Hub")
    add("--public", action="store_true", help="let anybody see it")
    text = "write a LoRA in kohya's layout, for ComfyUI and AUTOMATIC1111"
    add = commands.add_parser("kohya", help=text, description=text).add_argument
    add("lora_dir", type=absolute_path, help=f"a result of train.py: {LORA_FILE}")
    add("--output", type=absolute_path, required=True, help="the file to write")
    return parser.parse_args(argv)


def main(args):
    """Run the command that was given; what is wrong is a UserError."""
    {"card": export_card, "kohya": export_kohya}[args.command](args)


if __name__ == "__main__":
    run_main(main, parse_args())
