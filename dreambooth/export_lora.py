"""A LoRA of train.py in the layout that ComfyUI and AUTOMATIC1111 read: that of kohya's scripts.

    python -m dreambooth.export_lora $LORA_DIR --lora_format kohya --output subject.safetensors

diffusers reads both: load_lora_weights("subject.safetensors").
"""

from pathlib import Path

from dreambooth import atomic, model_dir
from dreambooth.cli import ArgumentParser, UserError, absolute_path, run_main


def to_kohya(weights):
    """The LoRA's tensors by name, as diffusers saves them, under kohya's names for Stable Diffusion
    1.x and 2.x, with the alpha of each layer: its rank, which stands for a scale of 1."""
    from diffusers.utils import convert_state_dict_to_kohya

    converted = convert_state_dict_to_kohya(to_peft(weights))
    # lora_te1 is the first of SDXL's two text encoders; these models have one.
    return {name.replace("lora_te1_", "lora_te_"): tensor for name, tensor in converted.items()}


def to_peft(weights):
    """The same tensors under PEFT's names; U-Net and text encoder have conversions of their own."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    unet = {name: tensor for name, tensor in weights.items() if name.startswith("unet.")}
    text_encoder = {name: tensor for name, tensor in weights.items() if name not in unet}
    converted = convert_unet_state_dict_to_peft(unet)
    if text_encoder:
        converted.update(convert_state_dict_to_peft(text_encoder))
    return converted


def main(args):
    """Write the LoRA of `args.lora_dir` to `args.output`. UserError: there is none."""
    from safetensors.torch import load_file, save_file  # here: --help needs neither

    model_dir.check_lora_dir(args.lora_dir, "LORA_DIR")
    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: must end with .safetensors")
    atomic.check_writable(output.parent, "the directory of --output,")
    file = Path(args.lora_dir) / model_dir.LORA_FILE
    if not file.is_file():
        raise UserError(f"LORA_DIR {args.lora_dir}: no {file.name} there")
    weights = load_file(file)
    if args.lora_format == "kohya":
        weights = to_kohya(weights)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    atomic.replace_file(output, lambda file: save_file(weights, file, metadata={"format": "pt"}))
    print(f"wrote {output}")


if __name__ == "__main__":
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("lora_dir", type=absolute_path, help=f"a result of train.py: {model_dir.LORA_FILE}")
    add("--lora_format", choices=["kohya", "diffusers"], default="kohya", help="names of tensors")
    add("--output", type=absolute_path, required=True, help="the file to write")
    run_main(main, parser.parse_args())
