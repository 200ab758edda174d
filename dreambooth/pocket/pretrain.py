"""Train the pocket model, a tiny Stable Diffusion for the world of render.py, on a laptop's CPU.

    python -m dreambooth.pocket.pretrain --work_dir /tmp/pocket
    python -m dreambooth.pocket.pretrain --work_dir /tmp/more --start_from dreambooth/pocket/model

Four stages: a tokenizer for the captions, the autoencoder, its decoder alone, then U-Net and text
encoder together (Rombach et al. 2022, arXiv 2112.10752). Each saves its state every few minutes;
the same command resumes there. The result, a diffusers directory in float16, is written to
--output_dir, with a sheet of samples in --work_dir. --start_from goes on from an earlier result;
its tokenizer and encoder stay.

Letters: N images, B images in a batch, H and W height and width, L tokens in a prompt.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPTextConfig, CLIPTextModel

from dreambooth.cli import ArgumentParser
from dreambooth.loss import min_snr_weights
from dreambooth.pocket import POCKET_DIR, render
from dreambooth.pocket.caption_tokenizer import MAX_TOKENS, build_tokenizer
from dreambooth.pocket.training_run import Run

SIZE = 64  # pixels; the autoencoder turns them into 16 x 16 latents
BATCH = 32  # images in a step of the U-Net
MIN_SNR_GAMMA = 5.0
SHEET_PROMPTS = (
    "photo of a red car on the beach",
    "photo of a house in the snow",
    "photo of a boat at night",
    "photo of a car",
)
SHEET_COLUMNS = 16


def new_models(vocab_size):
    """VAE (0.65 M), text encoder (0.4 M) and U-Net (5.2 M parameters), randomly initialized."""
    vae = AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        scaling_factor=1.0,
    )
    text_config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    text_encoder = CLIPTextModel(text_config)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    return vae, text_encoder, unet


def new_scheduler():
    """The noise schedule of Stable Diffusion 1.4, and a sampler that adds noise at each step (Lu et
    al. 2022, arXiv 2211.01095, SDE-DPM-Solver++): a small model's errors are lost in it, where
    without it they add up to melted wheels."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        algorithm_type="sde-dpmsolver++",
        use_karras_sigmas=True,
    )


def render_world(count, seed):
    """`count` images, uint8 (N, 64, 64, 3), and two captions for each."""
    rng = np.random.default_rng(seed)
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    captions = []
    for i in range(count):
        scene = render.sample_scene(rng)
        images[i] = np.asarray(render.render(scene, rng, SIZE))
        captions.append((render.caption(scene, rng), render.caption(scene, rng)))
    return images, captions


def to_batch(images):
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in [-1, 1]."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


def pixel_loss(error):
    """L1 of pixels and of their differences, which outlines are made of."""
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + edges


def train_vae(vae, images, work_dir, steps):
    """Encoder and decoder together: `pixel_loss`, and a small KL term on the posterior."""

    def loss_of_step(rng):
        x = to_batch(images[rng.integers(len(images), size=16)])
        posterior = vae.encode(x).latent_dist
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return pixel_loss(vae.decode(posterior.sample()).sample - x) + 1e-3 * kl

    vae.to(memory_format=torch.channels_last)
    Run("vae", vae, work_dir, steps, lr=2e-3, ema=0.995).train(loss_of_step)


def train_decoder(vae, images, latents, work_dir, steps):
    """The decoder alone, on samples of the posteriors: the latents stay what they are."""
    mean, std = latents

    def loss_of_step(rng):
        rows = rng.integers(len(images), size=32)
        z = mean[rows] + std[rows] * torch.randn(32, 4, 16, 16)
        return pixel_loss(vae.decode(z).sample - to_batch(images[rows]))

    parts = torch.nn.ModuleDict({"enter": vae.post_quant_conv, "decoder": vae.decoder})
    Run("decoder", parts, work_dir, steps, lr=1e-3, ema=0.998).train(loss_of_step)


@torch.no_grad()
def encode(vae, images):
    """Mean and standard deviation of each image's posterior, two (N, 4, 16, 16) tensors."""
    starts = range(0, len(images), 64)
    posteriors = [vae.encode(to_batch(images[i : i + 64])).latent_dist for i in starts]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def balance_latents(vae, images):
    """Give each latent channel mean 0 and variance 1 without changing what the VAE reconstructs.

    The 1x1 convolutions on both sides of the latents absorb the change: z' = (z - m) / s in the
    encoder, z = s z' + m in the decoder. The scaling factor of the pipeline is then 1.
    """
    means, _ = encode(vae, images)
    m = means.mean((0, 2, 3))
    s = means.std((0, 2, 3))
    enter = vae.quant_conv
    leave = vae.post_quant_conv
    leave.bias += (leave.weight[:, :, 0, 0] * m).sum(1)
    leave.weight *= s.view(1, 4, 1, 1)
    enter.bias[:4] = (enter.bias[:4] - m) / s
    enter.weight[:4] /= s.view(4, 1, 1, 1)
    enter.bias[4:] -= 2 * s.log()  # the other half is the posterior's log variance


def tokenize(tokenizer, captions):
    """Token ids of each image's captions, of which there are two: (N, 2, L)."""
    columns = [list(column) for column in zip(*captions, strict=True)]
    ids = [tokenizer(c, padding="max_length", truncation=True).input_ids for c in columns]
    return torch.tensor(ids).transpose(0, 1)


def train_unet(text_encoder, unet, tokenizer, latents, captions, work_dir, steps):
    """Epsilon prediction with min-SNR weights; U-Net and text encoder learn together.

    `latents`: the mean and the standard deviation of each image's posterior, (N, 4, 16, 16), from
    which they are sampled anew at each step; `captions`: two for each image. The timesteps of a
    batch are spread evenly.
    """
    mean, std = latents
    prompt_ids = tokenize(tokenizer, captions)
    scheduler = DDPMScheduler.from_config(new_scheduler().config)

    def loss_of_step(rng):
        """The loss of BATCH random images, a scalar (Hang et al. 2023, arXiv 2303.09556)."""
        rows = torch.from_numpy(rng.integers(len(mean), size=BATCH))
        x = mean[rows] + std[rows] * torch.randn(BATCH, 4, 16, 16)
        noise = torch.randn_like(x)
        timesteps = ((torch.rand(1) + torch.arange(BATCH) / BATCH) % 1 * 1000).long()
        noisy = scheduler.add_noise(x, noise, timesteps)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        either = torch.from_numpy(rng.integers(2, size=BATCH))  # which of the two captions
        encoder_hidden_states = text_encoder(prompt_ids[rows, either])[0]
        prediction = unet(noisy, timesteps, encoder_hidden_states).sample
        error = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
        weights = min_snr_weights("epsilon", timesteps, scheduler.alphas_cumprod, MIN_SNR_GAMMA)
        return (weights * error).mean()

    unet.to(memory_format=torch.channels_last)
    both = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    Run("unet", both, work_dir, steps, lr=6e-4, ema=0.9995).train(loss_of_step)


def export(tokenizer, vae, text_encoder, unet, output_dir):
    """Write the pipeline directory, float16 safetensors, in the layout that the Hub has.

    Returns the pipeline in float32.
    """
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(output_dir)
    file = Path(output_dir) / "text_encoder" / "model.safetensors"
    # Under the names that the Hub has, which models keep that were loaded with them.
    prefix = "text_model."
    weights = {prefix + name.removeprefix(prefix): w for name, w in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return pipeline.to(torch.float32)


def sample_sheet(pipeline, file):
    """Write one row of SHEET_COLUMNS images for each of SHEET_PROMPTS."""
    pipeline.set_progress_bar_config(disable=True)
    side = SIZE + 2
    sheet = Image.new("RGB", (SHEET_COLUMNS * side, len(SHEET_PROMPTS) * side))
    for row, prompt in enumerate(SHEET_PROMPTS):
        output = pipeline(
            prompt,
            num_images_per_prompt=SHEET_COLUMNS,
            num_inference_steps=25,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(row),
            output_type="pt",
        )
        for column, image in enumerate(output.images):
            sheet.paste(to_pil_image(image), (column * side, row * side))
    sheet.save(file)


def load_models(folder):
    """Tokenizer, VAE, text encoder and U-Net of an earlier result, in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    return pipeline.tokenizer, pipeline.vae, pipeline.text_encoder, pipeline.unet


def main(args):
    """Run the stages, each from where it stopped; then write the pipeline and samples."""
    torch.set_num_threads(os.cpu_count())
    args.work_dir.mkdir(parents=True, exist_ok=True)
    images, captions = render_world(args.num_images, args.seed)
    print(f"rendered {len(images)} images; the first is {captions[0][0]!r}", flush=True)

    torch.manual_seed(0)
    if args.start_from:
        tokenizer, vae, text_encoder, unet = load_models(args.start_from)
    else:
        tokenizer = build_tokenizer(args.work_dir / "tokenizer")
        vae, text_encoder, unet = new_models(len(tokenizer))
        train_vae(vae, images, args.work_dir, args.vae_steps)
        balance_latents(vae, images[:4096])
    vae.to(memory_format=torch.channels_last)

    latents = encode(vae, images)
    mean, std = latents
    print(f"latents: standard deviation of the means {mean.std((0, 2, 3)).tolist()}")
    print(f"latents: mean standard deviation of a posterior {std.mean():.3f}")
    train_decoder(vae, images, latents, args.work_dir, args.decoder_steps)
    x = to_batch(images[:64])
    error = (vae(x).sample.detach() - x).abs().mean().item()
    print(f"VAE: mean absolute error {error * 127.5:.2f} of 255", flush=True)

    text_encoder.train()
    unet.train()
    train_unet(text_encoder, unet, tokenizer, latents, captions, args.work_dir, args.unet_steps)
    pipeline = export(tokenizer, vae.eval(), text_encoder.eval(), unet.eval(), args.output_dir)
    sample_sheet(pipeline, args.work_dir / "samples.png")
    print(f"wrote {args.output_dir}; look at {args.work_dir / 'samples.png'}")


def parse_args(argv=None):
    """The flags: where state and model go, and how long each model trains."""
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="for the state of an unfinished training run"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=POCKET_DIR, help="where the pipeline directory goes"
    )
    parser.add_argument(
        "--num_images", type=int, default=120_000, help="rendered images to train on"
    )
    parser.add_argument("--start_from", type=Path, help="an earlier result to go on from")
    parser.add_argument("--seed", type=int, default=0, help="of the rendered images")
    parser.add_argument("--vae_steps", type=int, default=4_000, help="steps of 16 images each")
    parser.add_argument("--decoder_steps", type=int, default=6_000, help="steps of 32 images each")
    parser.add_argument("--unet_steps", type=int, default=60_000, help="steps of 32 images each")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
