"""A step on a GPU, with tensors that have a device and no values: no GPU is needed, and mixing
devices is an error."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth import latents
from dreambooth.families import StableDiffusion
from dreambooth.loss import training_loss


@pytest.fixture
def bfloat16_gpu(monkeypatch):
    """Let torch assume that there is a GPU, and that it computes in bfloat16; and what has no
    values, that they are finite."""
    monkeypatch.setattr(latents, "all_finite", lambda tensors: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)


def move_to_gpu(module, mode):
    """Replace the weights of a module by tensors without values on a GPU that need not exist."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = mode.from_tensor(tensor).to("cuda")


class Operations(TorchDispatchMode):
    """Notes device and precision of what each operation returns, by its name."""

    def __init__(self):
        super().__init__()
        self.results = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            name = function.overloadpacket.__name__
            self.results.setdefault(name, set()).add((result.device.type, result.dtype))
        return result


@pytest.mark.parametrize("changes", [{}, {"use_lora": True, "gradient_checkpointing": True}])
def test_all_is_on_the_gpu_and_products_are_bfloat16(load_models, bfloat16_gpu, changes):
    """From pixels to loss; but those of a text encoder whose weights are float32."""
    vae, denoiser, scheduler = load_models(autocast=True, **changes)
    scheduler.register_to_config(prediction_type="v_prediction")
    images = {
        "images": torch.rand(4, 3, 64, 64),
        "keys": ["i", "i", "c", "d"],
        "prompt_numbers": [0, 0, 1, 1],
        "positions": [0, 1],
    }
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Operations() as operations:
        move_to_gpu(vae, mode)
        move_to_gpu(denoiser, mode)
        scheduler.alphas_cumprod = mode.from_tensor(scheduler.alphas_cumprod).to("cuda")
        device = torch.device("cuda")
        prompts = {"input_ids": torch.zeros(2, 48, dtype=torch.long, device=device)}
        (batch,) = latents.encode_batches(vae, [images], denoiser.family, prompts, device)
        assert batch["posteriors"].device.type == "cuda"
        assert batch["posteriors"].dtype == torch.float32
        assert operations.results["convolution"] == {("cuda", torch.float16)}
        noise = torch.randn(4, 4, 16, 16, device=device)
        timesteps = (latents.sample_fractions(0, batch["positions"]) * 1000).long().to(device)
        operations.results.clear()
        loss, _ = training_loss(
            denoiser, scheduler, batch["posteriors"], batch["conditions"], noise, noise, timesteps,
            prior_loss_weight=1.0, snr_gamma=5.0,
        )  # fmt: skip
    assert loss.device.type == "cuda"
    assert loss.dtype == torch.float32
    assert loss.requires_grad
    for product in ("convolution", "mm"):
        assert operations.results[product] == {("cuda", torch.bfloat16)}
    of_text_encoder = torch.bfloat16 if changes else torch.float32
    both = {("cuda", torch.bfloat16), ("cuda", of_text_encoder)}
    assert operations.results["addmm"] == both  # linear layers with a bias
    # 1 - alpha, of the noise schedule:
    assert operations.results["rsub"] == {("cuda", torch.float32)}


def test_where_float16_is_not_finite_the_vae_runs_again_in_float32(
    load_models, bfloat16_gpu, monkeypatch
):
    vae, _, _ = load_models()
    monkeypatch.setattr(latents, "all_finite", lambda tensors: False)
    with FakeTensorMode() as mode, Operations() as operations:
        move_to_gpu(vae, mode)
        posteriors = latents.encode(vae, torch.rand(1, 3, 64, 64, device="cuda"), StableDiffusion())
    assert posteriors.dtype == torch.float32
    both = {("cuda", torch.float16), ("cuda", torch.float32)}
    assert operations.results["convolution"] == both


def test_the_vae_takes_few_pixels_per_pass(load_models, bfloat16_gpu, monkeypatch):
    """So that encoding needs no more memory than training."""
    vae, _, _ = load_models()
    sizes = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with FakeTensorMode() as mode:
        move_to_gpu(vae, mode)
        images = torch.rand(5, 3, 64, 64, device="cuda")
        for pixels_per_pass, passes in ((3 * 64 * 64 - 1, [2, 2, 1]), (1, [1] * 5)):
            sizes.clear()
            monkeypatch.setattr(latents, "PIXELS_PER_PASS", pixels_per_pass)
            assert latents.encode(vae, images, StableDiffusion()).shape == (5, 2, 4, 16, 16)
            assert sizes == passes
