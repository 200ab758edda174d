"""The loss of a DreamBooth training step. Noise and timesteps are passed in; the functions below
`training_loss` are pure functions of tensors.

Letters: 2B images in a batch, B of the instance first and then B of the class; C latent channels;
h, w height and width of a latent; T timesteps of the noise schedule. Without prior preservation a
batch is B images of the instance.
"""

import torch


def training_loss(
    denoiser, scheduler, posteriors, conditions, posterior_noise, noise, timesteps,
    prior_loss_weight, snr_gamma=None, predict_original=None,
):  # fmt: skip
    """The loss of one batch, a scalar, and its halves, as in `prior_preserving_loss`.

    Shapes: posteriors (2B, 2, C, h, w), mean and standard deviation of each image's latents;
    posterior_noise and noise (2B, C, h, w); timesteps (2B,). `conditions`: what the family's
    `conditions` returns, which only the denoiser looks into.

    `predict_original`: None, or the original model as a function of noisy latents (B, C, h, w) and
    timesteps (B,): its prediction is then the class half's target in place of the usual one.
    """
    # Sample each image's latents from its posterior.
    latents = sample_posterior(posteriors, posterior_noise)  # (2B, C, h, w)

    # Add noise to the latents according to their timesteps (the forward process), in float32.
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)

    # Predict the noise, v or the velocity from noisy latents and prompts; on a GPU in bfloat16.
    model_pred = denoiser(noisy_latents, timesteps, conditions)

    # The instance half learns the subject, the class half preserves the prior.
    prediction_type = scheduler.config.prediction_type
    alphas_cumprod = scheduler.alphas_cumprod
    target = get_target(prediction_type, latents, noise, timesteps, alphas_cumprod)
    if predict_original is not None:
        original_pred = predict_original(noisy_latents.chunk(2)[1], timesteps.chunk(2)[1])
        target = torch.cat([target.chunk(2)[0], original_pred])
    weights = None
    if snr_gamma is not None:
        weights = min_snr_weights(prediction_type, timesteps, alphas_cumprod, snr_gamma)
    return prior_preserving_loss(model_pred, target, prior_loss_weight, weights)


def sample_posterior(posteriors, noise):
    """Latents (2B, C, h, w) from `posteriors` (2B, 2, C, h, w) and standard normal `noise`
    (2B, C, h, w): mean + standard deviation * noise."""
    return posteriors[:, 0] + posteriors[:, 1] * noise


def get_target(prediction_type, latents, noise, timesteps, alphas_cumprod):
    """What the denoiser should predict for `latents` that `noise` was added to.

    "epsilon": the noise itself (Ho et al. 2020, arXiv 2006.11239, eq. 14).
    "v_prediction": sqrt(a) noise - sqrt(1 - a) latents, where a is the timestep's cumulative alpha
    (Salimans and Ho 2022, arXiv 2202.00512, appendix D).
    "flow_prediction": noise - latents, the velocity (Esser et al. 2024, arXiv 2403.03206).

    Shapes: latents and noise (2B, C, h, w); timesteps (2B,), integers below T, and alphas_cumprod
    (T,), float32, neither of which a flow has a use for. Returns (2B, C, h, w). ValueError: there
    is no such prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * latents
    if prediction_type == "flow_prediction":
        return noise - latents
    raise ValueError(f"{prediction_type!r}: must be epsilon, v_prediction or flow_prediction")


def min_snr_weights(prediction_type, timesteps, alphas_cumprod, gamma):
    """A weight for each image's squared error that keeps easy timesteps from dominating
    (Hang et al. 2023, arXiv 2303.09556): min(SNR, gamma) over SNR for epsilon, over SNR + 1 for
    v_prediction, where SNR = a / (1 - a).

    Shapes: timesteps (2B,), alphas_cumprod (T,). Returns (2B,). Any other prediction type is a
    ValueError.
    """
    a = alphas_cumprod[timesteps]
    snr = a / (1 - a)
    weights = {
        "epsilon": (snr.clamp(max=gamma) / snr).nan_to_num(1),  # where SNR is 0
        "v_prediction": snr.clamp(max=gamma) / (snr + 1),
    }
    if prediction_type not in weights:
        raise ValueError(f"prediction type {prediction_type!r}: must be epsilon or v_prediction")
    return weights[prediction_type]


def prior_preserving_loss(model_pred, target, prior_loss_weight, weights=None):
    """Mean squared error of the instance half plus `prior_loss_weight` times that of the class half
    (Ruiz et al. 2022, arXiv 2208.12242, eq. 2), in float32. With a weight of 0 there is no class
    half, and the loss is the mean squared error of all images.

    Shapes: model_pred and target (2B, C, h, w), instance half first; weights (2B,), a factor for
    each image's error. Returns a scalar and, without gradients, the means of the halves (2,),
    without `prior_loss_weight`, or of the one (1,).
    """
    error = (model_pred.float() - target.float()).square().mean(dim=(1, 2, 3))  # (2B,)
    if weights is not None:
        error = error * weights
    if prior_loss_weight == 0:
        loss = error.mean()
        return loss, loss.detach().view(1)
    instance_loss, class_loss = [half.mean() for half in error.chunk(2)]
    loss = instance_loss + prior_loss_weight * class_loss
    return loss, torch.stack([instance_loss, class_loss]).detach()
