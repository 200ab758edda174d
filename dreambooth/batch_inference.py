"""Batch inference with Ray Data: records into images on every GPU of a cluster."""

import math
from pathlib import Path

import pandas as pd
import ray.data

from dreambooth.cli import UserError, is_full
from dreambooth.image_generator import (
    MAX_BATCH,
    ImageGenerator,
    cpu_batch_size,
    warn_if_images_are_slow,
)
from dreambooth.machines import cluster


def generate_with_ray(args, records):
    """Generate the images of `records` on a pool of actors, one per GPU (one without GPUs); yields
    each record once its image is saved. A row is a record.

    UserError: fewer GPUs than --num_workers, a node that does not see a path, or what an
    `ImageGenerator` raises.
    """
    num_gpus, num_cpus = cluster.start_ray(args.verbose, log_to_driver=args.verbose)
    cluster.check_num_workers(args.num_workers or 1, num_gpus, num_cpus)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    paths = [args.model_dir, args.output_dir, args.lora_weights_dir]
    cluster.check_shared_storage([path for path in paths if path])
    num_workers = args.num_workers or max(1, num_gpus)
    if not num_gpus:
        warn_if_images_are_slow(args)  # what an actor prints is not shown
    max_batch = (args.batch_size or MAX_BATCH) if num_gpus else cpu_batch_size(args.resolution)
    num_batches = count_batches(len(records), num_workers, num_gpus, max_batch)
    num_workers = min(num_workers, num_batches)
    resources = {"num_gpus": 1, "num_cpus": 0}
    if not num_gpus:  # Ray Data's tasks need the other cores
        resources = {"num_cpus": min(1.0, num_cpus / (2 * num_workers))}
    batch_size = math.ceil(len(records) / num_batches)
    starts = range(0, len(records), batch_size)
    # A block for each batch: Ray Data would join smaller ones.
    blocks = [pd.DataFrame(records[start : start + batch_size]) for start in starts]
    rows = ray.data.from_pandas(blocks)
    rows = rows.map_batches(
        ImageGenerator,
        fn_constructor_args=(args,),
        batch_size=batch_size,
        batch_format="pandas",
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        **resources,
    )
    try:
        yield from rows.iter_rows()
    except ray.exceptions.RayError as error:
        if is_full(error):
            raise UserError(
                f"no space left in {args.output_dir}: make room, run it again"
            ) from None
        raise cluster.user_error_in(error) or error from None


def count_batches(num_records, num_workers, num_gpus, max_batch):
    """Into how many batches of at most `max_batch` to divide the records: on GPUs the same number
    for each worker, so that they finish together; on a CPU, where batches are padded, as few as
    possible."""
    if not num_gpus:
        return math.ceil(num_records / max_batch)
    batches_per_worker = math.ceil(num_records / (num_workers * max_batch))
    return min(num_records, batches_per_worker * num_workers)
