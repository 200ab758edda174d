"""What differs between model families in computation: a class for each pipeline class of diffusers.
Their parts, limits and defaults are in files/pipelines.py.

Letters: P prompts of a run; G groups of consecutive images with the same prompt; 2B images in a
batch; R their resolution; L tokens in a prompt; D width of its embedding; N images; C, h, w
channels, height and width of latents.
"""

import itertools

import torch
from torch.nn.functional import pixel_unshuffle

from dreambooth.files import pipeline_dir
from dreambooth.files.pipelines import PIPELINES, PipelineFacts


class Family:
    """What a family must define, and defaults, which suit Stable Diffusion's U-Net and VAE."""

    facts: PipelineFacts
    dtype_on_gpu = torch.float16  # of sampling
    lora_base_in_bf16 = False  # whether a GPU loads the backbone of a LoRA in bfloat16
    old_lora_names = True  # those of diffusers' own layers, from before PEFT
    lora_targets = {  # the projections of attention
        "unet": ["to_q", "to_k", "to_v", "to_out.0"],
        "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
    }
    lora_more_targets = [  # of the U-Net: its feed-forward layers and convolutions
        "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut",
        "conv",
    ]  # fmt: skip

    def lora_targets_of(self, part, model, all_layers):
        """The layers of `part`, the model `model`, that a LoRA adapts."""
        more = self.lora_more_targets if all_layers and part == self.facts.backbone else []
        return self.lora_targets[part] + more

    def vae_in_float16(self, vae):
        """Whether a GPU encodes images in float16, where that does not overflow."""
        return True

    def scale(self, vae, posteriors):
        """Scale means and standard deviations (N, 2, C, h, w) of the VAE's posteriors so that
        latents have about unit variance."""
        return posteriors * vae.config.scaling_factor

    def encode_prompts(self, args, prompts, device):
        """What `conditions` needs of a run's P `prompts`, strings, by name; where they are encoded
        once also "previews": for each of `args.preview_prompts` what `sampler_inputs` returns."""
        raise NotImplementedError

    def conditions(self, encoded_prompts, batch):
        """What `predict` needs beside the noisy latents of a batch, by name.

        `encoded_prompts`: what `encode_prompts` has returned. `batch`: as `dataset.collate` returns
        it, or one half of it; a family may use "prompt_numbers" (2B rows of the prompts), "sizes"
        (2B, 4) and the shape of "images" (2B, 3, R, R).
        """
        raise NotImplementedError

    def one_per_image(self, conditions):
        """The same conditions as nothing but tensors (2B, ...): a CUDA graph needs fixed shapes."""
        return conditions

    def predict(self, denoiser, noisy_latents, timesteps, conditions):
        """What the denoiser predicts (2B, C, h, w) of noisy_latents (2B, C, h, w), at timesteps
        (2B,)."""
        raise NotImplementedError

    def sampler_inputs(self, pipeline, prompt, device):
        """The arguments with which `pipeline` generates one image of `prompt`, tensors (1, ...)."""
        raise NotImplementedError


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x: the text encoder is part of every step, trained or not."""

    facts = PIPELINES["StableDiffusionPipeline"]

    def encode_prompts(self, args, prompts, device):
        """The token ids of the prompts."""
        tokenizer = pipeline_dir.load_tokenizer(args.model_dir)
        length = {"padding": "max_length", "max_length": tokenizer.model_max_length}
        ids = tokenizer(prompts, **length).input_ids
        return {"input_ids": torch.tensor(ids, device=device)}  # (P, L)

    def conditions(self, encoded_prompts, batch):
        """Consecutive images with one prompt are a group: the token ids (G, L) of each group, and
        the groups' sizes."""
        numbers = batch["prompt_numbers"]
        groups = [(number, len(list(images))) for number, images in itertools.groupby(numbers)]
        ids = select(encoded_prompts["input_ids"], [number for number, _ in groups])  # (G, L)
        return {"input_ids": ids, "counts": [count for _, count in groups]}

    def one_per_image(self, conditions):
        if "counts" not in conditions:  # they are
            return conditions
        return {"input_ids": repeat(conditions["input_ids"], conditions["counts"])}

    def predict(self, denoiser, noisy_latents, timesteps, conditions):
        hidden_states = self.encode_ids(denoiser, conditions["input_ids"])  # (G, L, D)
        if "counts" in conditions:
            hidden_states = repeat(hidden_states, conditions["counts"])  # (2B, L, D)
        return denoiser.unet(noisy_latents, timesteps, hidden_states).sample

    def encode_ids(self, denoiser, input_ids):
        """Hidden states (G, L, D) of token ids (G, L). In float32 if the text encoder's weights
        are: that is 1 % of a step's arithmetic, and bfloat16 can blur the gradients of its first
        layers beyond use (RESULTS.md)."""
        text_encoder, device = denoiser.text_encoder, input_ids.device.type
        in_bf16 = any(p.dtype == torch.bfloat16 for p in text_encoder.parameters())
        with torch.autocast(device, torch.bfloat16, enabled=denoiser.autocast and in_bf16):
            return text_encoder(input_ids)[0]

    def sampler_inputs(self, pipeline, prompt, device):
        embeds, negative = pipeline.encode_prompt(
            prompt, device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


class StableDiffusionXL(Family):
    """Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two frozen text encoders, whose
    embeddings are computed once, and the size and the crop of each image as a condition."""

    facts = PIPELINES["StableDiffusionXLPipeline"]

    def vae_in_float16(self, vae):
        return not vae.config.force_upcast

    def scale(self, vae, posteriors):
        mean, std = vae.config.latents_mean, vae.config.latents_std
        if mean is not None and std is not None:
            mean, std = (
                posteriors.new_tensor(values).view(1, 1, -1, 1, 1) for values in (mean, std)
            )
            shift = mean * posteriors.new_tensor([1, 0]).view(1, 2, 1, 1, 1)  # of the mean alone
            posteriors = (posteriors - shift) / std
        return posteriors * vae.config.scaling_factor

    def encode_prompts(self, args, prompts, device):
        """The embeddings of the prompts; and, for previews, all that is sampled with, by prompt.
        The encoders are freed then."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        pipeline = pipeline_dir.load_pipeline(
            args.model_dir, dtype, **{self.facts.backbone: None, "vae": None}
        ).to(device)
        with torch.no_grad():
            inputs = [self.sampler_inputs(pipeline, prompt, device) for prompt in prompts]
            previews = {p: self.sampler_inputs(pipeline, p, device) for p in args.preview_prompts}
        names = "prompt_embeds", "pooled_prompt_embeds"  # (P, L, D), (P, D)
        encoded = {name: torch.cat([i[name] for i in inputs]).float() for name in names}
        return {**encoded, "previews": previews}

    def conditions(self, encoded_prompts, batch):
        """The embeddings, and per image the size conditioning: height and width of the original,
        top and left of the crop, height and width of the crop (section 2.2 of the paper)."""
        numbers = batch["prompt_numbers"]
        prompt_embeds = select(encoded_prompts["prompt_embeds"], numbers)  # (2B, L, D)
        text_embeds = select(encoded_prompts["pooled_prompt_embeds"], numbers)  # (2B, D)
        target = torch.full((len(numbers), 2), batch["images"].shape[-1])
        time_ids = torch.cat([batch["sizes"], target], 1)  # (2B, 6)
        time_ids = time_ids.float().to(prompt_embeds.device, non_blocking=True)
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return {"prompt_embeds": prompt_embeds, "added_cond_kwargs": added}

    def predict(self, denoiser, noisy_latents, timesteps, conditions):
        prompt_embeds, added = conditions["prompt_embeds"], conditions["added_cond_kwargs"]
        predicted = denoiser.unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=added)
        return predicted.sample

    def sampler_inputs(self, pipeline, prompt, device):
        names = ["prompt_embeds", "negative_prompt_embeds"]
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        return dict(zip(names, pipeline.encode_prompt(prompt, device=device), strict=True))


class Flux2Klein(Family):
    """FLUX.2-klein (Black Forest Labs 2026): a transformer that predicts a flow's velocity of 2 by
    2 patches of latents, (N, 128, h, w), from the hidden states of a language model."""

    facts = PIPELINES["Flux2KleinPipeline"]
    dtype_on_gpu = torch.bfloat16
    lora_base_in_bf16 = True
    old_lora_names = False
    lora_targets = {"transformer": ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]}
    lora_more_targets = [  # of the double-stream blocks
        "linear_in", "linear_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    ]  # fmt: skip

    def vae_in_float16(self, vae):
        return False

    def lora_targets_of(self, part, model, all_layers):
        single = [f"single_transformer_blocks.{i}" for i in range(model.config.num_single_layers)]
        targets = super().lora_targets_of(part, model, all_layers)
        return targets + [f"{block}.attn.to_out" for block in single]

    def scale(self, vae, posteriors):
        """Patches of 2 by 2 latents become channels, each of which is then normalized by the VAE's
        running mean and variance: (N, 2, 32, 2h, 2w) to (N, 2, 128, h, w)."""
        flat = pixel_unshuffle(posteriors.flatten(0, 1), 2)  # (2N, 128, h, w)
        mean, std = flat.unflatten(0, (-1, 2)).unbind(1)
        shift = vae.bn.running_mean.float().view(-1, 1, 1)
        scale = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt().view(-1, 1, 1)
        return torch.stack([(mean - shift) / scale, std / scale], 1)

    def encode_prompts(self, args, prompts, device):
        """On the CPU, as one prompt takes 8 MiB: a batch's are moved to the device."""
        dtype = self.dtype_on_gpu if device.type == "cuda" else torch.float32
        parts = {"transformer": None, "vae": None}
        pipeline = pipeline_dir.load_pipeline(args.model_dir, dtype, **parts).to(device)
        with torch.no_grad():
            embeds = [pipeline.encode_prompt(prompt, device)[0].cpu() for prompt in prompts]
            previews = {p: self.sampler_inputs(pipeline, p, device) for p in args.preview_prompts}
        if device.type == "cuda":
            embeds = [one.pin_memory() for one in embeds]
        return {"prompt_embeds": embeds, "previews": previews, "device": device}  # P of (1, L, D)

    def conditions(self, encoded_prompts, batch):
        numbers, device = batch["prompt_numbers"], encoded_prompts["device"]
        embeds = encoded_prompts["prompt_embeds"]
        moved = {n: embeds[n].to(device, non_blocking=True) for n in set(numbers)}
        return {"prompt_embeds": torch.cat([moved[n] for n in numbers])}  # (2B, L, D)

    def predict(self, denoiser, noisy_latents, timesteps, conditions):
        """`timesteps` are sigmas, which the transformer itself multiplies by 1000. Each latent has
        its row and column as its position, each token of the prompt its number; text that pads a
        prompt is attended to as well."""
        height, width = noisy_latents.shape[2:]
        model, prompt_embeds = denoiser.transformer, conditions["prompt_embeds"]
        rows, columns, tokens, zero = (
            torch.arange(n, device=noisy_latents.device)
            for n in (height, width, prompt_embeds.shape[1], 1)
        )
        latent_ids = torch.cartesian_prod(zero, rows, columns, zero)  # (hw, 4)
        text_ids = torch.cartesian_prod(zero, zero, zero, tokens)  # (L, 4)
        velocity = model(
            hidden_states=noisy_latents.flatten(2).transpose(1, 2),  # (2B, hw, C), row by row
            encoder_hidden_states=prompt_embeds,
            timestep=timesteps,
            img_ids=latent_ids[None],
            txt_ids=text_ids[None],
            guidance=None,
        ).sample
        return velocity.transpose(1, 2).unflatten(2, (height, width))

    def sampler_inputs(self, pipeline, prompt, device):
        embeds, negative = (pipeline.encode_prompt(text, device)[0] for text in (prompt, ""))
        return {"prompt_embeds": embeds, "negative_prompt_embeds": negative}


FAMILIES = {
    family.facts.class_name: family for family in (StableDiffusion, StableDiffusionXL, Flux2Klein)
}


def family_of(model_dir):
    """The family of a pipeline directory."""
    return FAMILIES[pipeline_dir.read_facts(model_dir).class_name]()


def select(tensor, rows):
    """The `rows` (numbers) of a tensor; a GPU waits when it is indexed with a list."""
    return torch.stack([tensor[row] for row in rows])


def repeat(rows, counts):
    """Repeat row i of `rows` (G, ...) counts[i] times: (2B, ...)."""
    if len(set(counts)) == 1:
        return rows.repeat_interleave(counts[0], 0)
    repeats = torch.tensor(counts).to(rows.device, non_blocking=True)
    return rows.repeat_interleave(repeats, 0, output_size=sum(counts))  # else a GPU would wait
