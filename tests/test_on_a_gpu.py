"""A step on a GPU, on tensors that have a device and no numbers: no GPU is needed, and to mix devices is an error."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreambooth import latents
from dreambooth.loss import training_loss


@pytest.fixture
def bfloat16_gpu(monkeypatch):
    """torch takes it that there is a GPU, and that it computes in bfloat16."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)


def to_gpu(it, mode):
    """A module or tensor without its numbers, on a GPU that need not exist."""
    if isinstance(it, torch.Tensor):
        return mode.from_tensor(it).to("cuda")
    for module in it.modules():
        for own in (module._parameters, module._buffers):
            own.update({name: to_gpu(tensor, mode) for name, tensor in own.items() if tensor is not None})
    return it


class Operations(TorchDispatchMode):
    """Notes the device and the precision of what each operation returns, by its name."""

    def __init__(self):
        super().__init__()
        self.results = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in [out] if isinstance(out, torch.Tensor) else []:
            self.results.setdefault(func.overloadpacket.__name__, set()).add((tensor.device.type, tensor.dtype))
        return out


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}, {"gradient_checkpointing": True}])
def test_from_pixels_to_loss_all_is_on_the_gpu_and_products_are_bfloat16(load_models, bfloat16_gpu, changes):
    vae, denoiser, scheduler = load_models(autocast=True, **changes)
    scheduler.register_to_config(prediction_type="v_prediction")
    with FakeTensorMode() as mode, Operations() as operations:
        to_gpu(vae, mode), to_gpu(denoiser, mode)
        vae.to = lambda device: vae  # tensors without numbers cannot be dropped so
        scheduler.alphas_cumprod = to_gpu(scheduler.alphas_cumprod, mode)
        read = {"images": torch.rand(4, 3, 64, 64), "keys": ["i", "i", "c", "d"], "positions": [0, 1]}
        prompt_ids = torch.zeros(2, 48, dtype=torch.long, device="cuda")
        (batch,) = latents.encode_batches(vae, [read], prompt_ids, torch.device("cuda"))
        noise = torch.randn(4, 4, 16, 16, device="cuda")
        timesteps = latents.spread(0, batch["positions"], 1000).to("cuda")
        draws = {"posterior_noise": noise, "noise": noise, "timesteps": timesteps}
        operations.results.clear()
        loss = training_loss(denoiser, scheduler, batch, draws, 1.0, snr_gamma=5.0)
    assert (loss.device.type, loss.dtype, loss.requires_grad) == ("cuda", torch.float32, True)
    for product in ("convolution", "mm", "addmm"):
        assert operations.results[product] == {("cuda", torch.bfloat16)}
    assert operations.results["rsub"] == {("cuda", torch.float32)}  # 1 - alpha, of the noise schedule
