"""Arithmetic and memory of a training step, counted on fake tensors: they have sizes and no
numbers, so that neither a GPU nor memory for the weights is needed.

    python tests/benchmarks/throughput.py --model sd14 --count
"""

import weakref
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from dreambooth import models
from dreambooth.files import pipeline_dir

GIB = 2**30
META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, and their peak."""

    def __init__(self, tensors):
        super().__init__()
        self.now = 0
        self.peak = 0
        self.known = set()
        self.add(tensors)

    def add(self, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self.add_storage(tensor.untyped_storage())

    def add_storage(self, storage):
        key = id(storage)
        if key in self.known:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.add(output)
        return output


def in_float32(function):
    """`function` as CUDA's autocast runs it, which computes norms and interpolation in float32; a
    CPU's autocast does not."""

    def run(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return function(*args, **kwargs)

    return run


@contextmanager
def without_weights(new_models):
    """Within, what loads a VAE, a text encoder or a U-Net gets `new_models()` on the meta device:
    tensors without contents."""
    with torch.device(META):
        built = new_models()

    def load_part(model_dir, part, dtype, device_map):
        return built[part].to(dtype)

    with patch.object(pipeline_dir, "load_part", load_part):
        yield


def fake(tensor):
    """A fake tensor on the CPU like `tensor`."""
    like = {"dtype": tensor.dtype, "requires_grad": tensor.requires_grad, "device": "cpu"}
    return torch.empty_strided(tensor.shape, tensor.stride(), **like)


@contextmanager
def on_fake_tensors(side):
    """Replace the tensors of a side that was built on the meta device by fake ones, and let it
    compute as on CUDA. Yields the tensors of its models."""
    functions = ("group_norm", "layer_norm", "rms_norm", "interpolate")
    as_on_cuda = {}
    if side.denoiser.autocast:
        as_on_cuda = {name: in_float32(getattr(F, name)) for name in functions}
    both = torch.nn.ModuleList([side.vae, side.denoiser])
    with FakeTensorMode(), patch.multiple(F, **as_on_cuda):
        for module in both.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = tensor if tensor is None else fake(tensor)
        side.parameters = [p for p in side.denoiser.parameters() if p.requires_grad]
        if side.scheduler.alphas_cumprod is not None:
            side.scheduler.alphas_cumprod = fake(side.scheduler.alphas_cumprod)
        side.conditions = tree_map_only(torch.Tensor, fake, side.conditions)
        side.posteriors = fake(side.posteriors)
        side.pixels = fake(side.pixels)
        side.optimizer = models.build_optimizer(side.parameters, side.settings)
        yield [*both.parameters(), *both.buffers()]


def count_gib(side, keep_gradients):
    """The peak of the memory of weights, gradients, optimizer and activations in a step of a side
    that was built on the meta device: on a single GPU, or with `keep_gradients` on each of several,
    where DDP's buckets keep the gradients' memory.

    What a GPU's libraries take for themselves comes on top.
    """
    side.keep_gradients = keep_gradients
    with on_fake_tensors(side) as tensors, LiveBytes(tensors) as counter:
        side.step()  # creates the optimizer's state
        counter.peak = counter.now
        side.step()
    return counter.peak / GIB


def count_tflop(side):
    """The TFLOP of a step of a side that was built on the meta device."""
    with on_fake_tensors(side), FlopCounterMode(display=False) as flops:
        side.step()
    return flops.get_total_flops() / 1e12
