"""A diffusers pipeline directory into the models of a training run, and back.

What is frozen and what is trained, and in which precision, is decided here:

                     full                 LoRA
    VAE              frozen               frozen
    text encoder     trained              frozen + trained LoRA matrices
    U-Net            trained              frozen + trained LoRA matrices

Trained weights are float32, and so is the optimizer's state; on a GPU the forward pass runs under bfloat16
autocast. A bfloat16 weight would hardly learn: at a learning rate of 5e-6 most of its updates are
smaller than half its last digit and round to nothing. With `--precision bf16`, for cards with little
memory, Kahan summation keeps what is rounded off and adds it later.
"""

import diffusers
import optimi
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from dreambooth.checks import UserError
from dreambooth.files import replace_dir

LORA_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


class Denoiser(torch.nn.Module):
    """Text encoder and U-Net as one module, so that DDP sees one forward pass and one set of gradients.

    With `autocast` their matrix products and convolutions run in bfloat16.
    """

    def __init__(self, text_encoder, unet, autocast):
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        self.autocast = autocast

    def forward(self, noisy_latents, timesteps, prompt_ids):
        """What the U-Net predicts. A prompt is encoded once, however many images in a row it belongs to.

        Shapes: noisy_latents (2B, C, h, w), timesteps (2B,), prompt_ids (P, L) of 2B / P images each. Returns
        (2B, C, h, w).
        """
        with torch.autocast(noisy_latents.device.type, torch.bfloat16, enabled=self.autocast):
            words = self.text_encoder(prompt_ids)[0]  # (P, L, width)
            words = words.repeat_interleave(len(noisy_latents) // len(prompt_ids), 0)  # (2B, L, width)
            return self.unet(noisy_latents, timesteps, words).sample


def load_models(args, device, autocast=None):
    """The frozen VAE, the denoiser (U-Net and text encoder) and the noise schedule of `args.model_dir`.

    All on `device`, straight from the file; what `args` says is trained requires gradients. safetensors are
    read; a pickle only with weights-only loading, which is what torch does for diffusers and transformers.

    `autocast`: whether the forward pass is in bfloat16; by default on a GPU, and for bfloat16 weights. On a CPU
    it gains nothing: its bfloat16 attention takes five times as long to go backward as float32's.
    """
    quiet()
    autocast = device.type == "cuda" or args.precision == "bf16" if autocast is None else autocast

    def load(cls, part, dtype=torch.float32):
        return cls.from_pretrained(args.model_dir, subfolder=part, dtype=dtype, device_map=device)

    vae = load(AutoencoderKL, "vae").eval().requires_grad_(False)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    text_encoder = load(CLIPTextModel, "text_encoder", dtype if args.train_text_encoder else torch.float32)
    denoiser = Denoiser(text_encoder, load(UNet2DConditionModel, "unet", dtype), autocast).train()
    if device.type == "cuda":  # on a CPU it costs a few per cent
        denoiser.unet.to(memory_format=torch.channels_last)
    if args.use_lora:
        torch.manual_seed(args.seed)
        add_lora(denoiser, args.lora_rank, LORA_TARGETS if args.train_text_encoder else ["unet"])
        if autocast:
            halve_frozen_layers(denoiser)
    elif not args.train_text_encoder:
        denoiser.text_encoder.requires_grad_(False)
    if args.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
        denoiser.text_encoder.activation_checkpointing_enable()
    if args.compile:
        denoiser.unet.compile_repeated_blocks()
    scheduler = DDPMScheduler.from_pretrained(args.model_dir, subfolder="scheduler")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    return vae, denoiser, scheduler


def build_optimizer(parameters, args):
    """AdamW for `parameters`; for bfloat16 ones with Kahan summation, so that no step is lost to rounding.

    Two things bfloat16 still loses: weight decay below 0.2 % a step, and a second moment's slow decay. With
    beta2 = 0.999 that is 0.1 % a step, which rounds to nothing: after a few hundred steps the moment stays where
    its largest gradients put it. Hence 0.99, unless `args.adam_beta2` says otherwise.
    """
    low = args.precision == "bf16"
    beta2 = (0.99 if low else 0.999) if args.adam_beta2 is None else args.adam_beta2
    settings = {
        "lr": args.lr, "betas": (args.adam_beta1, beta2), "eps": args.adam_epsilon,
        "weight_decay": args.adam_weight_decay,
    }  # fmt: skip
    if low:
        return optimi.AdamW(parameters, **settings, kahan_sum=True)
    return torch.optim.AdamW(parameters, **settings, fused=True)


def load_pipeline(model_dir, lora_weights_dir, lora_scale, device):
    """The pipeline to sample from: float16 on a GPU, float32 on a CPU, with a LoRA if one is given.

    Without the safety checker, whose black pictures would be trained on as class images.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(
        model_dir,
        dtype=torch.float16 if device == "cuda" else torch.float32,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if lora_weights_dir:
        try:
            pipeline.load_lora_weights(lora_weights_dir, adapter_name="subject")
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--lora_weights_dir {lora_weights_dir} does not fit --model_dir: {reason}") from error
        pipeline.set_adapters("subject", lora_scale)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def quiet():
    """No progress bars and hints from the libraries while models load and save."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def add_lora(denoiser, rank, parts=tuple(LORA_TARGETS)):
    """Freeze the denoiser and add trained LoRA matrices of `rank` to the attention projections of `parts`
    (Hu et al. 2021, arXiv 2106.09685)."""
    denoiser.requires_grad_(False)
    for part in parts:
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS[part])
        getattr(denoiser, part).add_adapter(config)


def halve_frozen_layers(module):
    """Keep the weights of frozen linear and convolution layers in bfloat16, to which autocast would round them
    at every step: half the memory for the same results."""
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and not layer.weight.requires_grad:
            layer.to(torch.bfloat16)


def save(denoiser, args):
    """Write the result of a run to `args.output_dir`."""
    if args.use_lora:
        save_lora(denoiser, args.output_dir)
    else:
        save_pipeline(denoiser, args.model_dir, args.output_dir)


def save_pipeline(denoiser, model_dir, output_dir):
    """Write a whole pipeline directory: the trained modules, all else as in `model_dir`."""

    def write(folder):
        pipeline = StableDiffusionPipeline.from_pretrained(
            model_dir,
            text_encoder=denoiser.text_encoder,
            unet=denoiser.unet,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
        weights = folder / "text_encoder" / "model.safetensors"
        save_file(_with_hub_names(load_file(weights)), weights, metadata={"format": "pt"})

    replace_dir(output_dir, write)


def _with_hub_names(text_encoder_weights):
    """The names that the Hub's files have and every loader knows: transformers 5 leaves out their first part,
    and older ones would silently start from random weights."""
    return {f"text_model.{name.removeprefix('text_model.')}": w for name, w in text_encoder_weights.items()}


def save_lora(denoiser, output_dir):
    """Write the LoRA matrices as diffusers' `load_lora_weights` reads them."""

    def write(folder):
        trained = [part for part in LORA_TARGETS if hasattr(getattr(denoiser, part), "peft_config")]
        layers = {
            part: convert_state_dict_to_diffusers(get_peft_model_state_dict(getattr(denoiser, part)))
            for part in trained
        }
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers["unet"],
            text_encoder_lora_layers=_with_hub_names(layers.get("text_encoder", {})),
        )

    replace_dir(output_dir, write)
