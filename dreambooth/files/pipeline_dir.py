"""A diffusers pipeline directory: its files, what is checked before anything costly starts, loading
it, and its fingerprint."""

import hashlib
import json
import math
import re
import types
import typing
import warnings
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from dreambooth.cli import STORAGE_FAILED, UserError, first_line, warn
from dreambooth.files.pipelines import DISTILLED_SAMPLER, OTHER_MODELS, PIPELINES
from dreambooth.pocket import POCKET_DIR, render

INDEX = "model_index.json"
SCHEDULER = "scheduler/scheduler_config.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_CONFIG = "adapter_config.json"  # beside the file of a PEFT adapter
CARD_FILES = ["README.md", "before-after.png"]  # the model card
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
CONDITIONS = {"addition_embed_type", "class_embed_type", "num_class_embeds"}  # of U-Nets

# What the result of a training run may hold, whatever its pipeline.
PIPELINE_NAMES = [INDEX, *sorted({part for facts in PIPELINES.values() for part in facts.parts})]


def snapshot_dir(cache_dir, model_name, revision):
    """Where the Hub's cache layout keeps a revision of a model: its pipeline directory."""
    return Path(cache_dir) / f"models--{model_name.replace('/', '--')}" / "snapshots" / revision


def name_and_revision(model_dir):
    """The Hub's name of a model in its cache layout, and the revision; of another directory its
    own name, and ""."""
    folder = Path(model_dir)
    parent = folder.parent.parent.name
    if folder.parent.name == "snapshots" and parent.startswith("models--"):
        return parent.removeprefix("models--").replace("--", "/"), folder.name
    return folder.name, ""


def facts_of(index, where):
    """The `PipelineFacts` of the parsed model_index.json `index`. UserError, beginning with
    `where`: these scripts do not take its pipeline."""
    known = "; ".join(facts.name for facts in PIPELINES.values())
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise UserError(f"{where}: {INDEX} names no pipeline class; these scripts take {known}")
    if pipeline not in PIPELINES:
        model = next((m for start, m in OTHER_MODELS.items() if pipeline.startswith(start)), None)
        model = f"{model} ({pipeline})" if model else f"a {pipeline}"
        raise UserError(f"{where} is {model}; these scripts take {known}")
    if index.get("is_distilled"):
        return PIPELINES[pipeline]._replace(is_distilled=True, sampler=DISTILLED_SAMPLER)
    return PIPELINES[pipeline]


def read_facts(model_dir):
    """The `PipelineFacts` of a pipeline directory."""
    return facts_of(read_config(Path(model_dir) / INDEX, "--model_dir"), model_dir)


class Weights(NamedTuple):
    """The files to load a model's weights from; a directory may hold several copies of them."""

    variant: str | None  # "fp16" where there are none in full precision
    files: list  # names, or paths; of shards with that of their index


def choose_weights(part, names):
    """The `Weights` of `part`, such as "unet", among the file `names` of a directory or of a
    revision on the Hub; None if there are none. Full precision goes before half, safetensors before
    pickles; each may be one file, or an index and shards."""
    stem = _stem(part)
    pickle = "pytorch_model" if stem == "model" else stem
    files = {name.partition("/")[2] for name in names if name.startswith(f"{part}/")}
    for variant in (None, "fp16"):
        infix = f".{variant}" if variant else ""
        for base, suffix in ((stem, "safetensors"), (pickle, "bin")):
            found = {f"{base}{infix}.{suffix}"} & files
            if not found:  # libraries and versions put the variant in different places
                number = r"-\d+-of-\d+"
                shard = re.compile(rf"{base}({infix}{number}|{number}{infix})\.{suffix}")
                found = {name for name in files if shard.fullmatch(name)}
                index = {f"{base}.{suffix}.index{infix}.json", f"{base}{infix}.{suffix}.index.json"}
                found |= index & files if found else set()
            if found:
                return Weights(variant, sorted(f"{part}/{name}" for name in found))
    return None


def _stem(part):
    """The name of a part's weights, without its ending: transformers' and diffusers' differ."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def weights(model_dir, part):
    """The `Weights` of a model in a directory, their files as paths and without the index; None if
    there are none."""
    folder = Path(model_dir)
    found = choose_weights(part, _names(folder, part))
    if found is None:
        return None
    return found._replace(files=[folder / n for n in found.files if not n.endswith(".json")])


def _names(folder, part):
    return [f"{part}/{file.name}" for file in (folder / part).glob("*") if file.exists()]


SHARD = re.compile(r"-(\d+)-of-(\d+)")


def missing_file(model_dir):
    """The first file of a pipeline that `model_dir` lacks; None if it is complete. UserError: its
    index is damaged."""
    folder = Path(model_dir)
    if not (folder / INDEX).exists():
        return INDEX
    facts = read_facts(folder)
    needed = [SCHEDULER]
    for part in facts.tokenizers:  # tokenizer.json, or two other files in its place
        if not all((folder / part / name).exists() for name in ("merges.txt", "vocab.json")):
            needed.append(f"{part}/tokenizer.json")
    needed += [f"{part}/config.json" for part in facts.models]
    for name in needed:
        if not (folder / name).exists():
            return name
    for part in facts.models:
        found = choose_weights(part, _names(folder, part))
        if found is None:
            return f"{part}/{_stem(part)}.safetensors"
        first = next(name for name in found.files if not name.endswith(".json"))
        shards = _all_shards(first)
        absent = [name for name in shards if name not in found.files]
        if absent:
            return absent[0]
        if shards and found.files == shards:
            return f"{SHARD.sub('', first)}.index.json"
    return None


def _all_shards(name):
    """The names of all shards of the weights of which the file `name` is one; of none if it is not
    a shard."""
    found = SHARD.search(name)
    if not found:
        return []
    start, end = name[: found.start()], name[found.end() :]
    return [f"{start}-{i:0{len(found[1])}}-of-{found[2]}{end}" for i in range(1, int(found[2]) + 1)]


def refuse_single_file(path, flag):
    """`path` must not be a model in one file, as other tools write it."""
    if path.is_file() and path.suffix.lower() in SINGLE_FILES:
        raise UserError(
            f"{flag} {path} is a single file, and these scripts take a diffusers directory:"
            " StableDiffusionPipeline.from_single_file(FILE).save_pretrained(DIRECTORY) writes one"
        )


def check_model_dir(model_dir, flag="--model_dir"):
    """`model_dir` must be a complete pipeline directory of one of PIPELINES, whose parts fit
    each other."""
    folder = Path(model_dir)
    refuse_single_file(folder, flag)
    if not folder.is_dir():
        reason = "a file, not a directory" if folder.is_file() else "no such directory"
        raise UserError(
            f"{flag} {folder}: {reason}; a model of the Hub is downloaded with"
            " cache_model.py, which prints the directory to use"
        )
    where = f"{flag} {folder}"
    if (folder / INDEX).exists():
        index = read_config(folder / INDEX, flag)
        facts = facts_of(index, where)
    elif (folder / LORA_FILE).exists() or (folder / PEFT_CONFIG).exists():
        raise UserError(
            f"{where} is a LoRA: pass it as --lora_weights_dir, and its base model as {flag}"
        )
    missing = missing_file(folder)
    if missing:
        if missing == INDEX and (folder.parent / INDEX).exists():
            raise UserError(f"{where} is a part of a pipeline: pass {folder.parent}")
        for file in folder.iterdir() if missing == INDEX else ():
            refuse_single_file(file, flag)
        others = [file.name for file in (folder / missing).parent.glob("*.safetensors")]
        others = [name for name in others if "-of-" not in name]  # shards are read
        variant = f" (only full precision and fp16 are read, not {others[0]})" if others else ""
        raise UserError(
            f"{where} is not a diffusers pipeline directory: {missing} is missing{variant}"
            " (cache_model.py prints the directory to use)"
        )
    check_index(facts, index, where)
    for part in facts.tokenizers:
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
            if (folder / part / name).exists():
                read_config(folder / part / name, flag)
    for part in facts.models:
        for file in weights(folder, part).files:
            check_not_damaged(file, flag)
    check_noise_schedule(facts, read_config(folder / SCHEDULER, flag), where)
    configs = {part: read_config(folder / part / "config.json", flag) for part in facts.models}
    check_parts(facts, index, configs, where)


def check_index(facts, index, where):
    """The parsed model_index.json `index` must name a class of the libraries for each part."""
    for part in facts.parts:
        entry = index.get(part)
        library, name = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if library not in ("diffusers", "transformers") or not isinstance(name, str):
            entry = json.dumps(entry)
            reason = f"{INDEX} has {part}: {entry}, no class of the libraries"
            raise UserError(f"{where}: {reason}; fetch or copy it again")


def check_noise_schedule(facts, scheduler, where):
    """The configuration `scheduler` must be of a noise schedule for which the pipeline trains."""
    name = str(scheduler.get("_class_name"))
    if name.startswith("EDM"):
        raise UserError(f"{where} has an EDM noise schedule, which is not supported")
    if name.startswith("FlowMatch") != facts.is_flow:
        raise UserError(f"{where}: a {name} is not the noise schedule of {facts.name}")
    if name in ("LCMScheduler", "TCDScheduler"):
        warn(
            f"{where} was made to sample in few steps (generate.py: --scheduler model"
            " --num_inference_steps 4 --guidance_scale 1): train the model that it was made from"
        )
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{where} predicts {prediction_type}; these scripts take epsilon and v_prediction"
        )


def check_parts(facts, index, configs, where):
    """The parts must be of the pipeline's classes, and the backbone made for the VAE, for the text
    encoders, side by side, and for no condition that the pipeline does not use."""
    for part, name in facts.classes.items():
        own = configs[part].get("_class_name", name)  # of diffusers' models
        for found in (index[part][1], own):
            if found != name:
                raise UserError(f"{where}: {part} is a {found}; {facts.name} takes a {name}")
    backbone, vae = configs[facts.backbone], configs["vae"]
    if not isinstance(vae.get("scaling_factor", 1.0), int | float):
        raise UserError(f"{where}: vae/config.json has scaling_factor: {vae['scaling_factor']}")
    blocks = vae.get("block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        raise UserError(f"{where}: vae/config.json has no block_out_channels")
    for name in CONDITIONS - facts.extra_conditions:
        if backbone.get(name) is not None:
            raise UserError(
                f"{where}: {facts.backbone} has {name}, which {facts.name} does not use"
            )
    widths = [configs[part].get("hidden_size") for part in facts.text_encoders]
    channels = vae.get("latent_channels", 4)
    pairs = [
        ("text_encoder", widths * facts.text_layers, facts.text_field),
        ("vae", [channels] * facts.patch**2, "in_channels"),
        ("vae", [channels] * facts.patch**2, "out_channels"),
    ]
    for part, widths, name in pairs:
        expected = backbone.get(name)
        if isinstance(expected, list):
            expected = expected[0] if len(set(map(str, expected))) == 1 else None
        known = all(isinstance(width, int) for width in [*widths, expected])
        if known and sum(widths) != expected:
            raise UserError(
                f"{where}: {part} and {facts.backbone} do not belong together"
                f" ({sum(widths)} and {expected} wide)"
            )


def read_config(file, flag):
    """The object in a JSON file. UserError: it is damaged, or no object."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        reason = "byte order mark" if "BOM" in str(error) else first_line(error)
        remedy = "save it as UTF-8 without" if "BOM" in str(error) else _fetch_again(file)
        raise UserError(f"{flag}: {file} is damaged ({reason}); {remedy}") from None
    if not isinstance(config, dict):
        raise UserError(f"{flag}: {file} is damaged (no JSON object); {_fetch_again(file)}")
    return config


def _fetch_again(file):
    """The remedy. In the Hub's cache a file is a link, and only what it leads to is fetched."""
    with suppress(OSError), open(file, "rb") as opened:
        if opened.read(23) == b"version https://git-lfs":
            return f"it is a pointer of Git LFS: `git lfs pull` in {Path(file).parent}"
    return f"delete {Path(file).resolve()} and fetch or copy it again"


def check_not_damaged(file, flag):
    """`file` must be a safetensors file whose length matches its header, or a complete pickle of
    weights alone. No code in a pickle is run, here or later."""
    if file.suffix == ".bin":
        _check_pickle(file, flag)
        return
    try:
        with safe_open(file, "np"):
            pass
    except (OSError, SafetensorError) as error:
        remedy = _fetch_again(file)
        raise UserError(f"{flag}: {file} is damaged ({error}); {remedy}") from None


def _check_pickle(file, flag):
    import torch  # here: only older models have pickles

    try:
        with warnings.catch_warnings(action="ignore"):
            # Memory-mapped, no weight is read; pickles of before torch 1.6 cannot be.
            torch.load(file, "cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # damaged bytes can end in any
        raise UserError(
            f"{flag}: {file} is damaged, or holds code, which was not run"
            f" ({type(error).__name__}); {_fetch_again(file)}, or take a model with safetensors"
        ) from None


def num_parameters(model_dir):
    """The number of parameters of each model, such as "unet": from the headers of its safetensors;
    of pickles from their size, as if in float32, which they are on the Hub."""
    numbers = {}
    for part in read_facts(model_dir).models:
        numbers[part] = 0
        for file in weights(model_dir, part).files:
            if file.suffix == ".safetensors":
                with safe_open(file, "np") as opened:
                    slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118
                    numbers[part] += sum(math.prod(tensor.get_shape()) for tensor in slices)
            else:
                numbers[part] += file.stat().st_size // 4
    return numbers


def trains_text_encoder(args):
    """Whether a run trains the text encoder: as --train_text_encoder says, else wherever it can."""
    given = args.train_text_encoder
    return read_facts(args.model_dir).can_train_text_encoder if given is None else given


def num_trained(model_dir, sizes, train_text_encoder):
    """Of the numbers of parameters `sizes`, as `num_parameters` gives them, those that full
    fine-tuning trains."""
    text_encoder = sizes["text_encoder"] if train_text_encoder else 0
    return sizes[read_facts(model_dir).backbone] + text_encoder


def resolution(model_dir):
    """The side of the model's images in pixels, and the pixels per latent. The former is the
    backbone's sample_size (of two, the smaller), else the VAE's, else the pipeline's default."""
    facts = read_facts(model_dir)
    backbone, vae = (part_config(model_dir, part) for part in (facts.backbone, "vae"))
    pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1) * facts.patch
    latents = _side(backbone.get("sample_size"))
    if latents is None:
        pixels = _side(vae.get("sample_size")) or facts.pixels
        latents = max(1, pixels // pixels_per_latent)
    return latents * pixels_per_latent, pixels_per_latent


def check_resolution(model_dir, given, multiple_of=1):
    """The side of images in pixels: --resolution as `given`, or if that is None the model's own. It
    must be whole latents, and for a pipeline `multiple_of` so many pixels."""
    side, pixels_per_latent = resolution(model_dir)
    side = side if given is None else given
    step = math.lcm(pixels_per_latent, multiple_of)
    if side < step or side % step:
        raise UserError(f"--resolution {side}: this model takes multiples of {step}")
    return side


def _side(size):
    """A positive whole number, or the smaller of two; None of anything else."""
    sides = size if isinstance(size, list) and size else [size]
    if all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return min(sides)
    return None


@contextmanager
def loading(what):
    """Turn what fails in the body, which loads `what`, into a UserError: damaged or odd files can
    end in any exception. Memory or storage that fails is raised as it is: that may pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if "OutOfMemory" in type(error).__name__ or getattr(error, "errno", None) in STORAGE_FAILED:
            raise
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from error


def part_config(model_dir, part):
    """The configuration of the model `part` of `model_dir`."""
    return read_config(Path(model_dir) / part / "config.json", "--model_dir")


def _text_encoder_config(model_dir, tokenizer):
    """The configuration of the text encoder that the part `tokenizer` belongs to."""
    return part_config(model_dir, tokenizer.replace("tokenizer", "text_encoder"))


def load_tokenizer(model_dir, part="tokenizer"):
    """A model's tokenizer, whose `model_max_length` is the number of tokens that the text encoder
    takes: the tokenizer's own files need not know it. UserError: its files are damaged."""
    from transformers import AutoTokenizer  # here: takes seconds, and not every script needs it

    with loading(f"{model_dir}/{part}"):
        tokenizer = AutoTokenizer.from_pretrained(model_dir, subfolder=part)
    config = _text_encoder_config(model_dir, part)
    limit = read_facts(model_dir).max_tokens or config.get("max_position_embeddings")
    if isinstance(limit, int) and limit > 0:
        own = tokenizer.model_max_length
        tokenizer.model_max_length = min(own, limit) if type(own) is int and own > 0 else limit
    return tokenizer


def check_fields(cls, file):
    """The fields of a configuration must be of the types that the class `cls`, which is built from
    it, says that it takes, or null, which stands for its default. UserError: one is not; the class
    itself would fail later, or not at all."""
    hints = typing.get_type_hints(cls.__init__)
    for name, value in read_config(file, "--model_dir").items():
        if name == "sample_size" and _side(value):  # the VAE's loader takes two sides as well
            continue
        if value is not None and name in hints and not _fits(value, hints[name]):
            value = json.dumps(value)
            raise UserError(f"--model_dir: {file} has {name}: {value[:40]}, not {hints[name]}")


def _fits(value, hint):
    """Whether a value of JSON is of the type that `hint` names, as far as that is understood."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if hint in (tuple, list) or origin in (tuple, list):
        return isinstance(value, list) and all(_fits(v, parts[0]) for v in value if parts)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint in (int, str, bool, type(None)):
        return type(value) is hint
    return True


def load_part(model_dir, part, **settings):
    """The model `part` of `model_dir`, of the class that its index names; `settings` are for that
    class's `from_pretrained`. UserError: it cannot be loaded, or a weight is missing, in whose
    place the libraries would draw random numbers."""
    import diffusers  # here: takes seconds
    import transformers

    index = read_config(Path(model_dir) / INDEX, "--model_dir")
    with loading(f"{model_dir}/{INDEX}"):
        library, name = index[part]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    if hasattr(cls, "load_config"):  # one of diffusers' classes; transformers' check themselves
        check_fields(cls, Path(model_dir) / part / "config.json")
    settings = {"variant": weights(model_dir, part).variant, **settings}
    with loading(f"{model_dir}/{part}"):
        try:
            model, found = cls.from_pretrained(
                model_dir, subfolder=part, output_loading_info=True, **settings
            )
            missing = sorted(found["missing_keys"])
        except NotImplementedError:  # diffusers moves what it has no values for, and does not say
            missing = ["some of its layers"]
    if missing:
        reason = f"has no weights for {missing[0]}"
        raise UserError(f"{model_dir}/{part} {reason}: fetch or copy it again")
    return model


def load_pipeline(model_dir, dtype=None, **parts):
    """The pipeline in `model_dir`; `parts`, models by name, take the place of those in the
    directory. Without the safety checker, whose black images would be trained on as class images,
    and without a watermark, which would be trained on as well. UserError: a part cannot be loaded.
    """
    import diffusers  # here: takes seconds

    facts = read_facts(model_dir)
    for part in facts.models:
        if part not in parts:
            parts[part] = load_part(model_dir, part, dtype=dtype)
    tokenizers = {part: load_tokenizer(model_dir, part) for part in facts.tokenizers}
    with loading(model_dir):
        return getattr(diffusers, facts.class_name).from_pretrained(
            model_dir, dtype=dtype, **{**tokenizers, **facts.extras, **parts}
        )


def check_prompts(model_dir, prompts):
    """Each of `prompts` must fit the model's tokenizers, else a UserError quotes what would be cut
    off; and for pocket it must name a class that it knows."""
    facts = read_facts(model_dir)
    for part in facts.tokenizers:
        tokenizer = load_tokenizer(model_dir, part)
        limit = tokenizer.model_max_length
        with loading(f"{model_dir}/{part}"):
            if facts.has_chat_template:
                limit -= num_template_tokens(tokenizer)
            ids_of_prompts = tokenizer(prompts, verbose=False).input_ids
        vocab_size = _text_encoder_config(model_dir, part).get("vocab_size", math.inf)
        for prompt, ids in zip(prompts, ids_of_prompts, strict=True):
            if max(ids) >= vocab_size:
                token = tokenizer.convert_ids_to_tokens(max(ids))
                raise UserError(f"{prompt!r}: the text encoder has no embedding of {token!r}")
            if len(ids) > limit:
                end = None if facts.has_chat_template else -1  # CLIP's end of text
                lost = tokenizer.decode(ids[limit + (end or 0) : end]).strip()
                raise UserError(
                    f"prompt too long: {prompt!r} has {len(ids)} tokens, the model takes {limit};"
                    f" {lost!r} would be cut off"
                )
    if fingerprint(model_dir) == fingerprint(POCKET_DIR):
        render.check_classes(prompts)


def num_template_tokens(tokenizer):
    """The number of tokens that a chat template adds to a prompt."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False,
    )  # fmt: skip
    return len(tokenizer(text).input_ids)


def lora_file(path, flag="--lora_weights_dir"):
    """The file of a LoRA: `path` itself if it is a file; of a directory LORA_FILE, else the only
    .safetensors there. UserError: none, several, or a damaged one."""
    path = Path(path)
    file = path
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        own = [file for file in files if file.name == LORA_FILE]
        if len(own or files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{flag} {path} holds several LoRAs ({names}): pass one file's path")
        file = (own or files or [None])[0]
    if file is None and (path / INDEX).exists():
        raise UserError(f"{flag} {path} is a whole model (--model_dir), no LoRA")
    if file is None or not file.is_file():
        raise UserError(f"{flag} {path}: no {LORA_FILE} there")
    if file.suffix != ".safetensors":
        raise UserError(f"{flag} {file} is no .safetensors file; convert it")
    check_not_damaged(file, flag)
    return file


def fingerprint(folder):
    """A digest that tells one model from another: names, sizes and 64 samples of each weight file
    in `folder`, so that it takes no time on large ones, and the configurations of its parts."""
    facts = read_facts(folder)
    files = [file for part in facts.models for file in weights(folder, part).files]
    configs = [file for part in facts.parts for file in (Path(folder) / part).glob("*.json")]
    return _digest(sorted(files) + sorted(configs), folder)


def lora_fingerprint(path):
    """A digest that tells one LoRA from another, as `fingerprint` does for a model; `path` is its
    file or directory."""
    file = lora_file(path)
    config = file.parent / PEFT_CONFIG  # which holds the scale of a PEFT adapter
    return _digest([file, config] if config.exists() else [file], file.parent)


def _digest(files, folder):
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with open(file, "rb") as opened:
            for i in range(64):
                opened.seek(size * i // 64)
                digest.update(opened.read(4096))
    return digest.hexdigest()[:12]
