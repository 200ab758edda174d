"""What DistributedDataParallel does with gradients and with compiled blocks, in a group of one
process: choices of train.py follow from it."""

import pytest
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from dreambooth import models


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def bytes_outside_the_buckets(set_to_none):
    """Of the gradients, when the first of two forward passes of a later step is done."""
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    ddp = DistributedDataParallel(layers, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(ddp.parameters())
    for _ in range(3):
        with ddp.no_sync():
            ddp(torch.ones(1, 8)).sum().backward()
        gradients = [p.grad for p in ddp.parameters()]
        outside = [g.nbytes for g in gradients if g.untyped_storage().nbytes() == g.nbytes]
        ddp(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return sum(outside)


def test_gradients_accumulate_in_the_buckets_if_they_are_not_set_to_none(process_group):
    """Else DDP has them twice: 3.7 GiB more for Stable Diffusion 1.4."""
    assert bytes_outside_the_buckets(set_to_none=False) == 0
    assert bytes_outside_the_buckets(set_to_none=True) == 2 * (8 * 8 + 8) * 4


def test_with_several_workers_a_block_is_compiled_as_one_graph(
    load_models, process_group, monkeypatch
):
    """DDP's optimizer would split it where a bucket of gradients ends."""
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph

    def compile_blocks(unet):
        for block in unet.down_blocks:
            block.compile(backend=note)

    monkeypatch.setattr(models.UNet2DConditionModel, "compile_repeated_blocks", compile_blocks)
    _, denoiser, _ = load_models(compile=True)
    ddp = DistributedDataParallel(denoiser, bucket_cap_mb=0.5)
    ddp(torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 48, dtype=torch.long))
    assert len(graphs) == 3
    torch._dynamo.reset()
