"""A training run written out by hand, against which train.py is tested."""

import numpy as np
import torch

from dreambooth import dataset, images, latents
from dreambooth.files import pipeline_dir
from dreambooth.run.plan import make_plan


class AdamW:
    """Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, as they wrote it."""

    def __init__(self, parameters, args):
        self.parameters = parameters
        self.beta1 = args.adam_beta1
        self.beta2 = 0.999 if args.adam_beta2 is None else args.adam_beta2
        self.epsilon = args.adam_epsilon
        self.weight_decay = args.adam_weight_decay
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]
        self.step_number = 0

    @torch.no_grad()
    def step(self, gradients, lr):
        self.step_number += 1
        t = self.step_number
        for p, m, v, g in zip(self.parameters, self.first, self.second, gradients, strict=True):
            m.mul_(self.beta1).add_((1 - self.beta1) * g)
            v.mul_(self.beta2).add_((1 - self.beta2) * g * g)
            m_hat = m / (1 - self.beta1**t)
            v_hat = v / (1 - self.beta2**t)
            p.sub_(lr * self.weight_decay * p)
            p.sub_(lr * m_hat / (v_hat.sqrt() + self.epsilon))


def learning_rate(step, num_steps, args):
    """Of `step`, counted from 0."""
    if args.lr_scheduler == "constant":
        return args.lr
    assert args.lr_scheduler == "linear"
    if step < args.lr_warmup_steps:
        return args.lr * step / args.lr_warmup_steps
    return args.lr * (num_steps - step) / (num_steps - args.lr_warmup_steps)


class ByHand:
    """The run of some arguments in one process and in float64, each step in a single forward pass:
    no Ray, no shards, no accumulation, no torch.optim, no code of train.py or loss.py."""

    def __init__(self, args, load_models):
        self.args = args
        self.vae, self.denoiser, self.scheduler = load_models()
        self.vae.double()
        self.denoiser.double()
        self.parameters = list(self.denoiser.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.losses = []
        self.grad_norms = []
        self.learning_rates = []
        plan = make_plan(args)
        self.input_ids = self.tokenize()
        pairs = dataset.pair_images(
            plan.instance_paths, plan.class_paths, plan.num_steps * plan.pairs_per_step, args.seed
        )
        optimizer = AdamW(self.parameters, args)
        for step in range(plan.num_steps):
            start = step * plan.pairs_per_step
            loss = self.loss(pairs[start : start + plan.pairs_per_step], plan.resolution)
            gradients = torch.autograd.grad(loss, self.parameters)
            norm = sum(g.square().sum() for g in gradients).sqrt()
            if norm > args.max_grad_norm:
                gradients = [g * args.max_grad_norm / norm for g in gradients]
            lr = learning_rate(step, plan.num_steps, args)
            optimizer.step(gradients, lr)
            self.losses.append(loss.item())
            self.grad_norms.append(norm.item())
            self.learning_rates.append(lr)

    def tokenize(self):
        """The token ids of the instance and, if there is one, the class prompt."""
        tokenizer = pipeline_dir.load_tokenizer(self.args.model_dir)
        prompts = [self.args.instance_prompt, self.args.class_prompt]
        length = tokenizer.model_max_length
        inputs = tokenizer(
            [prompt for prompt in prompts if prompt],
            padding="max_length",
            max_length=length,
            return_tensors="pt",
        )
        return inputs.input_ids

    def loss(self, pairs, resolution):
        """Of B pairs: instance half first, and the class half if there is one."""
        batch = {name: np.array([pair[name] for pair in pairs]) for name in pairs[0]}
        crops = images.load_crops(batch, resolution, self.args.seed)
        halves = [crops[f"{kind}_image"] for kind in ("instance", "class") if kind in batch]
        pixels = torch.tensor(np.concatenate(halves)).double() / 127.5 - 1
        with torch.no_grad():
            posterior = self.vae.encode(pixels).latent_dist
        positions = batch["position"].tolist()
        posterior_noise, noise = latents.sample_noise(
            self.args.seed, positions, posterior.mean.shape[1:], "cpu"
        )
        of_instance, of_class = latents.sample_fractions(self.args.seed, positions).chunk(2)
        of_instance = of_instance * self.args.max_instance_noise
        timesteps = (torch.cat([of_instance, of_class]) * 1000).long()
        n = len(pixels)
        posterior_noise, noise, timesteps = posterior_noise[:n], noise[:n], timesteps[:n]
        x = posterior.mean + posterior.std * posterior_noise
        x = x * self.vae.config.scaling_factor
        a = self.scheduler.alphas_cumprod.double()[timesteps]
        noisy = a.sqrt().view(-1, 1, 1, 1) * x + (1 - a).sqrt().view(-1, 1, 1, 1) * noise
        hidden_states = self.denoiser.text_encoder(self.input_ids)[0]
        hidden_states = torch.cat(
            [prompt.expand(len(pairs), -1, -1) for prompt in hidden_states.split(1)]
        )
        predicted = self.denoiser.unet(noisy, timesteps, hidden_states).sample
        errors = (predicted - noise).square().mean(dim=(1, 2, 3))
        if self.args.snr_gamma is not None:
            snr = a / (1 - a)
            errors = errors * snr.clamp(max=self.args.snr_gamma) / snr
        instance, *prior = (half.mean() for half in errors.split(len(pairs)))
        return instance + self.args.prior_loss_weight * sum(prior)

    def update(self):
        """What the run has added to all weights, as one vector."""
        pairs = zip(self.parameters, self.start, strict=True)
        return torch.cat([(p.detach() - start).flatten() for p, start in pairs])
