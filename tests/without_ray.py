"""The training of train.py in this process, without Ray: the rows are a table here, and a worker is
called like any function. For tests of numbers."""

import copy
import io
import time
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import ray.data
import ray.train
import torch

import train
from dreambooth.machines import cluster
from dreambooth.run import checkpoints


class Rows:
    """What the code asks of a Ray Dataset and of its iterators; `columns` are numpy arrays."""

    def __init__(self, columns, override_num_blocks=None):
        self.columns = columns
        self.num_blocks = override_num_blocks
        self.context = copy.deepcopy(ray.data.DataContext())

    @classmethod
    def from_items(cls, items, override_num_blocks):
        return cls({k: np.array([i[k] for i in items]) for k in items[0]}, override_num_blocks)

    def filter(self, expr):
        rows = np.arange(len(self.columns["position"]))
        table = pyarrow.table({"row": rows, "position": self.columns["position"]})
        rows = table.filter(expr.to_pyarrow())["row"].to_numpy()
        return Rows({name: column[rows] for name, column in self.columns.items()})

    def map_batches(self, function, batch_size, fn_kwargs):
        columns = function(self.columns, **fn_kwargs)
        # As they come out of Ray: in other strides, the VAE's last bits would differ.
        return Rows({name: np.ascontiguousarray(column) for name, column in columns.items()})

    def iterator(self):
        return self

    def iter_torch_batches(self, batch_size, collate_fn, prefetch_batches):
        for start in range(0, len(self.columns["position"]), batch_size):
            end = start + batch_size
            yield collate_fn({name: column[start:end] for name, column in self.columns.items()})


def call_train_fn(args, rank=0, num_workers=1, device="cpu", prepare_model=None, workers_here=None):
    """Run train.py's worker number `rank` of `num_workers`, which exchanges nothing with others;
    returns what it prints and returns."""
    context = SimpleNamespace(
        get_world_rank=lambda: rank,
        get_world_size=lambda: num_workers,
        get_local_world_size=lambda: workers_here or num_workers,
    )
    num_threads = torch.get_num_threads()
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout):
        patch.setattr(ray.data, "from_items", Rows.from_items)
        patch.setattr(cluster, "runs_in_driver", lambda number: num_workers == 1)
        trainer = train.build_trainer(
            args, train.make_plan(args), 0, num_cpus=2, started=time.time()
        )
        rows = trainer.datasets["train"]()
        if num_workers > 1:
            shards = trainer.data_config.configure({"train": rows}, num_workers, None, None)
            rows = shards[rank]["train"]
        patch.setattr(ray.train, "get_context", lambda: context)
        patch.setattr(ray.train, "report", lambda *args, **kwargs: None)
        patch.setattr(checkpoints, "broadcast_from_rank_zero", lambda value: value)
        patch.setattr(ray.train, "get_dataset_shard", lambda name: {"train": rows}[name])
        patch.setattr(train, "get_device", lambda: torch.device(device))
        patch.setattr(train, "prepare_model", prepare_model or (lambda model, **settings: model))
        try:
            metrics = train.train_fn(trainer.train_loop_config)
        finally:
            torch.set_num_threads(num_threads)
    return SimpleNamespace(stdout=stdout.getvalue(), metrics=metrics)
