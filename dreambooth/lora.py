"""Put the file of a LoRA on the models of a pipeline: train.py's own, or another program's.

diffusers reads the layouts of most; what it would read wrong, or in part without a word, is put
right or refused here.
"""

import re
import warnings
from collections import Counter
from copy import copy

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dreambooth.cli import UserError, warn
from dreambooth.files import pipeline_dir

PEFT = "base_model.model."  # how the names of PEFT's own files begin
# By a text that only their tensors' names contain. PEFT's own DoRAs have other names, and load.
OTHER_ADAPTERS = {
    "dora_scale": "DoRA (kohya's)",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon (Tucker decomposition)",
    ".diff_b": "LyCORIS (whole weights)",
    "w_norm": "LyCORIS (norms)",
}
# The up (B) and the down (A) matrix of a layer, as several programs name them.
MATRICES = ((".lora_up.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_A.weight"))
MATRIX = re.compile(r"[._](A|B|up|down)\.weight$")  # the ends of these names


def apply_lora(pipeline, lora_weights_dir, lora_scale):
    """Put the LoRA of `lora_weights_dir` on the models of `pipeline`, and say which file that is.
    UserError: it is another model's."""
    file = pipeline_dir.lora_file(lora_weights_dir)
    flag = f"--lora_weights_dir {file}"
    print(f"with the LoRA of {file}", flush=True)
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
    check_plain(names, flag)
    source, options = layout(file, names, flag)
    with pipeline_dir.loading(flag), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = matrices(pipeline, source, options, flag)
        try:
            pipeline.load_lora_weights(copy(source), adapter_name="subject", **options)
        except RuntimeError as error:  # the words of transformers name an option of theirs
            if "mismatch" not in str(error):
                raise
            raise UserError(
                f"{flag} is no LoRA for --model_dir: its matrices have other sizes than the layers"
            ) from error
    # Check that every matrix found its layer.
    models = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    loaded = [n for model in models for n, _ in model.named_parameters() if ".subject." in n]
    if not loaded:
        needs = ""
        if names[0].startswith(PEFT) and not (file.parent / pipeline_dir.PEFT_CONFIG).exists():
            needs = f"; PEFT's own file needs {pipeline_dir.PEFT_CONFIG} beside it"
        raise UserError(
            f"{flag} is no LoRA for --model_dir, which has no layer for {names[0]}{needs}"
        )
    partly = any("additional target modules" in str(warning.message) for warning in caught)
    if partly or len(loaded) < len(given):
        count = f"{len(loaded)} of {len(given)}"
        warn(f"{flag}: some of its matrices were not loaded, as they fit no layer ({count} were)")
    pipeline.set_adapters("subject", lora_scale)


def check_plain(names, flag):
    """UserError: the tensors with these `names` are none, or those of another kind of adapter."""
    if not names:
        raise UserError(f"{flag} is empty")
    for sign, kind in OTHER_ADAPTERS.items():
        if any(sign in name for name in names):
            raise UserError(
                f"{flag} is of the kind {kind}, which is not supported: use a plain LoRA"
            )


def layout(file, names, flag):
    """What diffusers is to load, and with which options: the folder of `file`, as its header may
    hold alphas that its tensors lack; of layouts that diffusers would read wrong, the tensors."""
    config = file.parent / pipeline_dir.PEFT_CONFIG
    if any(name.startswith(PEFT) for name in names) and config.exists():
        return from_peft(load_file(file), config, flag), {}
    if any(name.endswith(".alpha") for name in names):
        return with_alphas(load_file(file)), {}
    return file.parent, {"weight_name": file.name}


def matrices(pipeline, source, options, flag):
    """The names of the matrices that diffusers finds in `source`. UserError: one is without its
    other half."""
    given = pipeline.lora_state_dict(copy(source), **options)  # a copy: it changes the dict
    given = given[0] if isinstance(given, tuple) else given  # some return alphas as well
    given = [name for name in given if not name.endswith("alpha")]
    layers = Counter(MATRIX.sub("", name) for name in given if MATRIX.search(name))
    if alone := [layer for layer, count in layers.items() if count % 2]:
        raise UserError(f"{flag} is damaged: it has one matrix of {alone[0]}, and no other")
    return given


def with_alphas(weights):
    """The tensors of a LoRA whose layers have alphas, each up matrix multiplied by alpha / rank in
    place of the alpha. (diffusers gives the wrong alphas to layers that differ.)"""
    weights = dict(weights)
    for name in [name for name in weights if name.endswith(".alpha")]:
        layer = name.removesuffix(".alpha")
        for up, down in MATRICES:
            if layer + up in weights and layer + down in weights:
                scale = weights.pop(name).item() / len(weights[layer + down])  # alpha / rank
                weights[layer + up] = weights[layer + up].float() * scale
    return weights


def from_peft(weights, config_file, flag):
    """The tensors of a PEFT adapter under diffusers' names; its scale goes into the matrices."""
    from peft.utils.other import get_pattern_key  # here: takes seconds, and few LoRAs need it

    config = pipeline_dir.read_config(config_file, flag)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        raise UserError(f"{flag}: {config_file.name} has no r and lora_alpha")
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        raise UserError(f"{flag} has biases, which are not supported: use a plain LoRA")
    alphas = config.get("alpha_pattern") or {}  # of layers that have another; ranks show in shapes

    def scale(name, matrix):
        layer = name.removeprefix(PEFT).partition(".lora_B.")[0]
        own = alphas.get(get_pattern_key(alphas, layer), alpha)
        return own / (matrix.shape[1] ** 0.5 if config.get("use_rslora") else matrix.shape[1])

    parts = dict.fromkeys(("down_blocks.", "mid_block.", "up_blocks."), "unet")
    parts |= dict.fromkeys(("transformer_blocks.", "single_transformer_blocks."), "transformer")
    layers = [name.removeprefix(PEFT) for name in weights]
    found = [parts[start] for start in parts if any(layer.startswith(start) for layer in layers)]
    part = found[0] if found else "text_encoder"
    return {
        f"{part}.{name.removeprefix(PEFT)}": matrix * scale(name, matrix)
        if ".lora_B." in name
        else matrix
        for name, matrix in weights.items()
    }
