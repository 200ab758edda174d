"""From a diffusers pipeline directory to the models of a training run.

What is frozen, what is trained, and in which precision:

                     full                 LoRA
    VAE              frozen               frozen
    text encoder     trained              frozen + trained LoRA matrices
    U-Net            trained              frozen + trained LoRA matrices

The text encoders of Stable Diffusion XL and FLUX.2-klein are frozen, and encode each prompt once.

Trained weights are float32, and so is the optimizer's state; on a GPU the U-Net runs under bfloat16
autocast, the VAE under float16 (where `Family.vae_in_float16`). bfloat16 weights would hardly
learn: at a learning rate of 5e-6 most updates are smaller than half their last digit and round to
nothing. With `--param_dtype bf16`, for GPUs with little memory, Kahan summation keeps what is
rounded off and adds it later.
"""

from functools import partial

import optimi
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._pytree import tree_map

from dreambooth.families import family_of
from dreambooth.files import pipeline_dir
from dreambooth.schedules import DiffusionSchedule, FlowSchedule
from dreambooth.seeds import seed_for


class Denoiser(torch.nn.Module):
    """Text encoder and U-Net as one module, so that DDP sees one forward pass and one set of
    gradients; without the text encoder where a family encodes its prompts once. With `autocast`,
    matrix products and convolutions run in bfloat16; a float32 text encoder's do not."""

    def __init__(self, family, text_encoder, backbone, autocast):
        super().__init__()
        self.family = family
        self.text_encoder = text_encoder
        self.add_module(family.facts.backbone, backbone)
        self.autocast = autocast

    @property
    def backbone(self):
        """The U-Net, or the transformer in its place."""
        return getattr(self, self.family.facts.backbone)

    def forward(self, noisy_latents, timesteps, conditions):
        """The U-Net's prediction, (2B, C, h, w).

        Shapes: noisy_latents (2B, C, h, w), timesteps (2B,); `conditions`: what the
        family's `conditions` returns.
        """
        with torch.autocast(noisy_latents.device.type, torch.bfloat16, enabled=self.autocast):
            return self.family.predict(self, noisy_latents, timesteps, conditions)


class Captured(torch.nn.Module):
    """A denoiser whose forward and backward pass are each captured as a CUDA graph at the first
    call and replayed from then on. Otherwise Python launches the 6,000 kernels of a step one by
    one, and a fast GPU waits for Python.

    Each batch must be as large as the first. The gradients are in the graph's memory, which the
    next call overwrites: they cannot be accumulated.
    """

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.is_captured = False

    def __call__(self, noisy_latents, timesteps, conditions):
        conditions = self.denoiser.family.one_per_image(conditions)
        batch = noisy_latents, timesteps, conditions
        if not self.is_captured:
            self.is_captured = True
            # "thread_local": the threads that read images may use the GPU meanwhile.
            settings = {"allow_unused_input": True, "capture_error_mode": "thread_local"}
            # This calls the module to warm up, and then replaces its `forward` by the graphs.
            torch.cuda.make_graphed_callables(self, tree_map(torch.clone, batch), **settings)
        return super().__call__(*batch)

    def forward(self, noisy_latents, timesteps, conditions):
        return self.denoiser(noisy_latents, timesteps, conditions)


def load_models(args, device, autocast=None):
    """The frozen VAE, the denoiser (U-Net and text encoder) and the noise schedule of
    `args.model_dir`.

    All on `device`, straight from the file: safetensors, or pickles with weights-only loading. What
    `args` says is trained requires gradients.

    `autocast`: whether the forward pass is in bfloat16; by default on a GPU, and for bfloat16
    weights. On a CPU it gains nothing: the backward pass of attention takes five times as long as
    in float32.
    """
    if autocast is None:
        autocast = device.type == "cuda" or args.param_dtype == "bf16"
    denoiser = load_denoiser(args, device, autocast).train()
    backbone, text_encoder = denoiser.backbone, denoiser.text_encoder
    vae = pipeline_dir.load_part(args.model_dir, "vae", dtype=torch.float32, device_map=device)
    vae.eval().requires_grad_(False)
    if device.type == "cuda":  # in training on a CPU it costs a few per cent
        backbone.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)

    # Choose what is trained.
    trains_text_encoder = pipeline_dir.trains_text_encoder(args)
    if args.use_lora:
        torch.manual_seed(seed_for("lora", args.seed))
        add_lora(denoiser, args)
        if autocast:
            cast_frozen_to_bf16(denoiser)
    elif text_encoder and not trains_text_encoder:
        text_encoder.requires_grad_(False)

    # Trade time for memory, and compile.
    if args.gradient_checkpointing:
        backbone.enable_gradient_checkpointing()
        if trains_text_encoder:  # else it has no backward pass, and this would give it one
            text_encoder.activation_checkpointing_enable()
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # would split the blocks where DDP's buckets end
        torch._dynamo.config.recompile_limit = 32  # blocks of each width, in training and previews
        backbone.compile_repeated_blocks()

    with pipeline_dir.loading(f"{args.model_dir}/scheduler"):
        schedule_class = FlowSchedule if denoiser.family.facts.is_flow else DiffusionSchedule
        scheduler = schedule_class.from_pretrained(args.model_dir, subfolder="scheduler").to(device)
    return vae, denoiser, scheduler


def load_denoiser(args, device, autocast):
    """U-Net and text encoder of `args.model_dir`, before anything is trained or frozen."""
    family = family_of(args.model_dir)
    load_part = partial(pipeline_dir.load_part, args.model_dir, device_map=device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.param_dtype]
    text_encoder = None
    if family.facts.can_train_text_encoder:
        text_dtype = dtype if pipeline_dir.trains_text_encoder(args) else torch.float32
        text_encoder = load_part("text_encoder", dtype=text_dtype)
    if args.use_lora and family.lora_base_in_bf16 and autocast:
        dtype = torch.bfloat16  # at once: in float32 it would be twice as large for a moment
    backbone = load_part(family.facts.backbone, dtype=dtype)
    return Denoiser(family, text_encoder, backbone, autocast)


def load_original(args, denoiser, device):
    """The model as it was before training: a function of noisy latents, timesteps and conditions
    that returns what it predicts, as the denoiser does, without gradients. None unless
    `args.prior_target` is "original" and there is a class half.

    With LoRA that is the denoiser with its matrices switched off; else a frozen model of its own,
    the backbone's linear and convolution layers in bfloat16 where autocast computes in it.
    """
    if args.prior_target == "noise" or not args.prior_loss_weight:
        return None
    if args.use_lora:
        layers = [layer for layer in denoiser.modules() if isinstance(layer, BaseTunerLayer)]
        return partial(predict_original, denoiser, layers)
    original = load_denoiser(args, device, denoiser.autocast).requires_grad_(False)
    if denoiser.autocast:
        cast_frozen_to_bf16(original.backbone)
    return partial(predict_original, original, [])


@torch.no_grad()
def predict_original(denoiser, lora_layers, noisy_latents, timesteps, conditions):
    """The prediction of a denoiser with its `lora_layers`, if any, switched off; they are on
    afterwards, and their matrices require gradients as before."""
    try:
        for layer in lora_layers:
            layer.enable_adapters(False)
        return denoiser(noisy_latents, timesteps, conditions)
    finally:
        for layer in lora_layers:
            layer.enable_adapters(True)


def add_lora(denoiser, args):
    """Freeze the denoiser and add trainable LoRA matrices of `args.lora_rank` (Hu et al. 2021,
    arXiv 2106.09685), with a scale of 1 (`lora_alpha` is the rank)."""
    rank, family = args.lora_rank, denoiser.family
    denoiser.requires_grad_(False)
    both = pipeline_dir.trains_text_encoder(args)
    parts = family.lora_targets if both else [family.facts.backbone]
    for part in parts:
        model = getattr(denoiser, part)
        targets = family.lora_targets_of(part, model, args.lora_layers == "all")
        settings = {"lora_alpha": rank, "init_lora_weights": "gaussian", "target_modules": targets}
        model.add_adapter(LoraConfig(r=rank, **settings))
    cast_training_params(denoiser, torch.float32)


def cast_frozen_to_bf16(module):
    """Keep the weights of frozen linear and convolution layers in bfloat16, to which autocast would
    round them at every step: half the memory for the same results."""
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and not layer.weight.requires_grad:
            layer.to(torch.bfloat16)


def ddp_settings(accumulation_steps):
    """For DistributedDataParallel around a denoiser that takes `accumulation_steps` per step."""
    return {
        "gradient_as_bucket_view": True,  # gradients are not copied
        "static_graph": accumulation_steps == 1,
        "forward_sync_buffers": False,  # no buffer changes
    }


def build_optimizer(parameters, args):
    """AdamW for `parameters`; for bfloat16 ones with Kahan summation, so that no update is lost to
    rounding.

    bfloat16 still loses two things: weight decay below 0.2 % per step, and a second moment's slow
    decay. With beta2 = 0.999 that is 0.1 % per step, which rounds to nothing: after a few hundred
    steps the moment stays where its largest gradients put it. Hence 0.99, unless `args.adam_beta2`
    says otherwise.
    """
    in_bf16 = args.param_dtype == "bf16"
    beta2 = args.adam_beta2
    if beta2 is None:
        beta2 = 0.99 if in_bf16 else 0.999
    settings = {
        "lr": args.lr,
        "betas": (args.adam_beta1, beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.adam_weight_decay,
    }
    if in_bf16:
        return optimi.AdamW(parameters, **settings, kahan_sum=True)
    return torch.optim.AdamW(parameters, **settings, fused=True)


def build_lr_schedule(optimizer, num_steps, args):
    """A torch LR scheduler for `num_steps` steps: it scales `args.lr`, the peak learning rate. Its
    state must be plain Python values or tensors: checkpoints are read with `weights_only`."""
    return get_scheduler(
        args.lr_scheduler, optimizer,
        num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_steps,
    )  # fmt: skip
