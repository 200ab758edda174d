"""Train the pocket model, a tiny Stable Diffusion for the world of render.py, on a laptop's CPU.

    python -m dreambooth.pocket.pretrain --work_dir /tmp/pocket

Three stages, about an hour and a half on two cores: a tokenizer for the world's words, the
autoencoder, then U-Net and text encoder together (Rombach et al. 2022, arXiv 2112.10752). Each
saves its state every few minutes and goes on from there when the same command is run again. The
result, a diffusers directory in float16, is written to --output_dir, with a sheet of samples.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dreambooth.pocket import render

SIZE = 64  # pixels; the autoencoder makes 16 x 16 latents of them
MAX_TOKENS = 48
SHEET_PROMPTS = (
    "photo of a red car on the beach",
    "photo of a house in the snow",
    "photo of a boat at night",
    "photo of a car",
)


def _printable_bytes():
    """The 256 characters that stand for the bytes in byte-level BPE (GPT-2, CLIP)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in kept]
    return [chr(b) for b in kept] + [chr(256 + i) for i in range(len(rest))]


def build_tokenizer(folder):
    """Write a byte-level CLIP vocabulary: 256 bytes, 256 bytes that end a word, one token for each
    of the world's words and its beginnings. Any other word falls into shorter pieces, down to
    letters."""
    words = [
        "photo",
        "of",
        "a",
        "an",
        "with",
        "and",
        "on",
        "in",
        "the",
        "at",
        "beach",
        "snow",
        "grass",
        "road",
        "night",
    ]
    words += [*render.CLASSES, *render.COLOURS, *{part: 0 for parts in render.PARTS.values() for part in parts}]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merge(pieces, merges[-1])
    characters = _printable_bytes()
    tokens = [*characters, *(c + "</w>" for c in characters), *dict.fromkeys(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)
    for word in words:
        assert len(tokenizer(word).input_ids) == 3, f"{word!r} is not one token"
    return tokenizer


def _merge(pieces, pair):
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def new_models(vocab_size):
    """Autoencoder (0.65 M), text encoder (0.4 M parameters) and U-Net (5.2 M), at random weights."""
    vae = AutoencoderKL(
        sample_size=SIZE, latent_channels=4, layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=1.0,
    )  # fmt: skip
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS, bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4, block_out_channels=(48, 96, 128), layers_per_block=1, cross_attention_dim=96,
        attention_head_dim=4, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return vae, text_encoder, unet


def new_scheduler():
    """The noise schedule and sampler of Stable Diffusion 1.4."""
    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )


def draw_world(count, seed):
    """`count` pictures, uint8 (count, 64, 64, 3), and two captions for each."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, SIZE, SIZE, 3), np.uint8)
    captions = []
    for i in range(count):
        scene = render.sample_scene(rng)
        pictures[i] = np.asarray(render.render(scene, rng, SIZE))
        captions.append((render.caption(scene, rng), render.caption(scene, rng)))
    return pictures, captions


def to_batch(pictures):
    """uint8 (B, H, W, 3) to float (B, 3, H, W) in [-1, 1]."""
    batch = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return batch.contiguous(memory_format=torch.channels_last)


class Run:
    """A resumable training loop: AdamW, linear warm-up, cosine decay, a moving average of the weights."""

    def __init__(self, name, module, work_dir, steps, lr, ema):
        self.name, self.module, self.steps, self.lr, self.decay = name, module, steps, lr, ema
        self.file = work_dir / f"{name}.pt"
        self.optimizer = torch.optim.AdamW(module.parameters(), lr, weight_decay=1e-2)
        self.average = {k: v.clone() for k, v in module.state_dict().items()}
        self.step = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step = state["average"], state["step"]
            print(f"{name}: goes on at step {self.step}")

    def save(self):
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "average": self.average, "step": self.step}, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def train(self, loss_of_step):
        """Minimise `loss_of_step(step, rng)`, a scalar, to the last step; end with the average."""
        start, first, shown = time.time(), self.step, []
        while self.step < self.steps:
            rng = np.random.default_rng((self.steps, self.step))
            torch.manual_seed(self.step)
            progress = self.step / self.steps
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min((self.step + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * progress) + 1e-3)
            loss = loss_of_step(self.step, rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            keep = min(self.decay, self.step / (self.step + 10))
            for name, value in self.module.state_dict().items():
                self.average[name].lerp_(value, 1 - keep) if value.is_floating_point() else self.average[name].copy_(
                    value
                )
            shown.append(loss.item())
            if self.step % 100 == 0:
                pace = (time.time() - start) / (self.step - first)
                left = pace * (self.steps - self.step) / 60
                progress = f"{self.name} {self.step}/{self.steps} loss {np.mean(shown):.4f}"
                print(f"{progress} {pace:.3f} s a step, {left:.0f} min left", flush=True)
                shown = []
            if self.step % 500 == 0:
                self.save()
        self.save()
        self.module.load_state_dict(self.average)


def train_vae(vae, pictures, work_dir, steps):
    """L1 on pixels and on their differences, and a small KL term on the posterior."""

    def loss_of_step(step, rng):
        x = to_batch(pictures[rng.integers(len(pictures), size=16)])
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        return error.abs().mean() + edges + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()

    Run("vae", vae.to(memory_format=torch.channels_last), work_dir, steps, lr=2e-3, ema=0.995).train(loss_of_step)


@torch.no_grad()
def encode(vae, pictures):
    """Mean and standard deviation of each picture's posterior, two (N, 4, 16, 16) tensors."""
    parts = [vae.encode(to_batch(pictures[i : i + 64])).latent_dist for i in range(0, len(pictures), 64)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


@torch.no_grad()
def balance_latents(vae, pictures):
    """Give each latent channel mean 0 and variance 1 without changing what the autoencoder does.

    The 1x1 convolutions around the latents absorb the change: z' = (z - m) / s on the way in,
    z = s z' + m on the way out. The scaling factor of the pipeline is then 1.
    """
    mean, _ = encode(vae, pictures)
    m, s = mean.mean((0, 2, 3)), mean.std((0, 2, 3))
    enter, leave = vae.quant_conv, vae.post_quant_conv
    leave.bias += (leave.weight[:, :, 0, 0] * m).sum(1)
    leave.weight *= s.view(1, 4, 1, 1)
    enter.bias[:4] = (enter.bias[:4] - m) / s
    enter.weight[:4] /= s.view(4, 1, 1, 1)
    enter.bias[4:] -= 2 * s.log()  # the other half is the posterior's log variance


def train_unet(text_encoder, unet, tokenizer, latents, captions, work_dir, steps):
    """Epsilon prediction on latents drawn anew from each posterior; U-Net and text encoder learn together."""
    mean, std = latents
    ids = [tokenizer(list(c), padding="max_length", truncation=True).input_ids for c in zip(*captions, strict=True)]
    ids = torch.tensor(ids).transpose(0, 1)  # (N, 2, L)
    scheduler = new_scheduler()

    def loss_of_step(step, rng):
        rows = torch.from_numpy(rng.integers(len(mean), size=32))
        x = mean[rows] + std[rows] * torch.randn(32, 4, 16, 16)
        noise, t = torch.randn_like(x), torch.randint(0, 1000, (32,))
        noisy = scheduler.add_noise(x, noise, t).contiguous(memory_format=torch.channels_last)
        words = text_encoder(ids[rows, torch.from_numpy(rng.integers(2, size=32))])[0]
        return F.mse_loss(unet(noisy, t, words).sample, noise)

    both = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet.to(memory_format=torch.channels_last)})
    Run("unet", both, work_dir, steps, lr=8e-4, ema=0.999).train(loss_of_step)


def export(tokenizer, vae, text_encoder, unet, output_dir):
    """Write the pipeline directory, float16 safetensors, as Stable Diffusion on the Hub has it."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(output_dir)
    return pipeline.to(torch.float32)


def sample_sheet(pipeline, file, count=16):
    """One row of `count` pictures for each of SHEET_PROMPTS."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    sheet = Image.new("RGB", (count * (SIZE + 2), len(SHEET_PROMPTS) * (SIZE + 2)))
    for row, prompt in enumerate(SHEET_PROMPTS):
        noise = torch.Generator().manual_seed(row)
        pictures = pipeline(
            prompt,
            num_images_per_prompt=count,
            num_inference_steps=25,
            guidance_scale=5.0,
            generator=noise,
            output_type="pt",
        )
        for column, picture in enumerate(pictures.images):
            sheet.paste(to_pil_image(picture), (column * (SIZE + 2), row * (SIZE + 2)))
    sheet.save(file)


def main(args):
    """The three stages, each from where its last run stopped; then the directory and the samples."""
    torch.set_num_threads(os.cpu_count())
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(args.work_dir / "tokenizer")
    torch.manual_seed(0)
    vae, text_encoder, unet = new_models(len(tokenizer))

    pictures, captions = draw_world(args.pictures, seed=0)
    print(f"drew {len(pictures)} pictures, for example {captions[0][0]!r}")
    train_vae(vae, pictures, args.work_dir, args.vae_steps)
    balance_latents(vae, pictures[:4096])
    error = (vae(to_batch(pictures[:64])).sample.detach() - to_batch(pictures[:64])).abs().mean().item()
    print(f"autoencoder: mean absolute error {error * 127.5:.2f} of 255")
    latents = encode(vae, pictures)
    print(f"latents: standard deviation {latents[0].std((0, 2, 3)).tolist()}, of a posterior {latents[1].mean():.3f}")
    train_unet(text_encoder, unet, tokenizer, latents, captions, args.work_dir, args.unet_steps)
    pipeline = export(tokenizer, vae.eval(), text_encoder.eval(), unet.eval(), args.output_dir)
    sample_sheet(pipeline, args.work_dir / "samples.png")
    print(f"wrote {args.output_dir}; look at {args.work_dir / 'samples.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="for the state of an unfinished training")
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent / "model", help="where the pipeline directory goes"
    )
    parser.add_argument("--pictures", type=int, default=40_000, help="pictures of the world to train on")
    parser.add_argument("--vae_steps", type=int, default=4_000, help="of 16 pictures each")
    parser.add_argument("--unet_steps", type=int, default=12_000, help="of 32 pictures each")
    main(parser.parse_args())
