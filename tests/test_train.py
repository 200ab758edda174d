"""train.py: real runs against a training loop written out by hand, and what they leave behind."""

import errno
import json
import os
import re
import shutil
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
import transformers
from diffusers import StableDiffusionPipeline

import generate
import train
from dreambooth import models
from dreambooth.cli import Diverged, UserError
from dreambooth.files import pipeline_dir
from dreambooth.files.atomic import append_line
from dreambooth.machines import cluster, device
from dreambooth.run import checkpoints, export
from dreambooth.run.training_log import METRICS, read_metrics, read_run_record, report_dir
from tests.by_hand import ByHand
from tests.without_ray import Rows, call_train_fn

# Every flag of the recipe at another value than its default. AdamW's large epsilon makes its
# updates smooth in the gradients, so that rounding does not grow.
RECIPE = {
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 3,
    "lr": 2e-3,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 1,
    "prior_loss_weight": 0.3,
    "max_instance_noise": 0.6,
    "snr_gamma": 2.0,
    "max_grad_norm": 0.5,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_weight_decay": 0.5,
    "adam_epsilon": 1e-3,
    "seed": 3,
}
WITHOUT_CLASS = {"prior_loss_weight": 0, "class_images_dir": False, "class_prompt": False}


@pytest.fixture(scope="module")
def train_alone(train_args, tmp_path_factory):
    """The training of train.py without Ray and without what its main does before and after:
    train_alone(lr=1e-3) returns a namespace of its output_dir, stdout and metrics."""

    def run(output_dir=None, worker=None, **changes):
        output_dir = output_dir or tmp_path_factory.mktemp("alone") / "out"
        args = train_args(output_dir, **{"log_every": 1, **changes})
        done = call_train_fn(args, **(worker or {}))
        return SimpleNamespace(output_dir=output_dir, changes=changes, **vars(done))

    return run


@pytest.fixture(scope="module")
def default_run(train_alone):
    return train_alone()


@pytest.fixture(scope="module")
def recipe_run(train_alone):
    return train_alone(**RECIPE)


@pytest.fixture(scope="module")
def by_hand(train_args, load_models):
    """The run of train.py, written out: by_hand(run)."""
    return lambda run: ByHand(train_args("out", **run.changes), load_models)


def logged(run, name):
    """A metric of each step."""
    return [row[name] for row in read_metrics(report_dir(run.output_dir))]


def relative_distance(update, expected):
    return ((update - expected).norm() / expected.norm()).item()


def weights_of(folder):
    """The content of each file of weights, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


def test_every_flag_of_the_recipe_does_what_it_says(recipe_run, update, by_hand):
    """Three real steps against the same steps by hand: the same weights, to float32 rounding. So
    gradients start from zero in each step, are averaged over the forward passes, and clipped
    (fault 2 of the published example: it clipped unet.parameters(), a generator that the optimizer
    had used up, so nothing); noise and timesteps follow from the seed and the positions; the
    learning rate follows its schedule; and every number of the recipe arrives where it belongs."""
    expected = by_hand(recipe_run)
    assert logged(recipe_run, "loss") == pytest.approx(expected.losses, abs=1e-4)
    assert logged(recipe_run, "grad_norm") == pytest.approx(expected.grad_norms, abs=1e-3)
    assert min(expected.grad_norms) > RECIPE["max_grad_norm"]
    assert logged(recipe_run, "lr") == pytest.approx([0, 2e-3, 1e-3])
    assert expected.learning_rates == pytest.approx([0, 2e-3, 1e-3])
    assert relative_distance(update(recipe_run), expected.update()) < 1e-3


def test_two_workers_make_the_updates_of_one_process(two_workers, update, by_hand):
    """They take turns with the pairs, and average their gradients once per step: also if each
    accumulates two forward passes."""
    expected = by_hand(two_workers)
    assert logged(two_workers, "loss") == pytest.approx(expected.losses, abs=1e-4)  # of all pairs
    assert logged(two_workers, "grad_norm") == pytest.approx(expected.grad_norms, abs=1e-3)
    assert relative_distance(update(two_workers), expected.update()) < 1e-3


def test_without_class_images_a_run_is_of_the_instance_images_alone(train_alone, update, by_hand):
    """Epochs then count them: one round through five photos, two in each step."""
    run = train_alone(
        **WITHOUT_CLASS, num_epochs=1, train_batch_size=2, max_train_steps=10,
        lr=1e-3, adam_epsilon=1e-2,
    )  # fmt: skip
    expected = by_hand(run)
    assert len(expected.losses) == 3
    assert logged(run, "loss") == logged(run, "instance_loss")
    assert logged(run, "loss") == pytest.approx(expected.losses, abs=1e-4)
    assert relative_distance(update(run), expected.update()) < 1e-3


def test_the_result_is_a_pipeline_that_generates_other_images(
    one_worker, two_workers, generated, generate_args, digests, tmp_path
):
    """Fault 3 of the published example: with one worker it trained to the end and died at saving.
    And on two cores two workers must not reserve both, or Ray Data waits for ever."""
    found = [digests(generated.folder)]
    for number, run in enumerate((one_worker, two_workers)):
        pipeline = StableDiffusionPipeline.from_pretrained(run.output_dir)
        assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
        flags = {"model_dir": run.output_dir, "prompts": generated.prompts[:1]}
        generate.main(generate_args(tmp_path / str(number), **flags))
        found.append(digests(tmp_path / str(number)))
    assert len({images["000-0000-seed0.png"] for images in found}) == 3


def test_the_same_seed_gives_the_same_weights_to_the_last_bit(one_worker, default_run, train_alone):
    """As a command, or here without Ray. Fault 4 of the published example: no seed, and no
    checkpoint."""
    weights = weights_of(one_worker.output_dir)
    assert len(weights) == 3
    assert weights_of(default_run.output_dir) == weights
    other = train_alone(seed=1, cuda_graph=True)  # of which a CPU captures none
    assert weights_of(other.output_dir) != weights


def test_a_worker_logs_its_steps_and_the_seconds_of_its_phases(default_run):
    lines = default_run.stdout.splitlines()
    assert lines[0] == "training 5.65 M parameters in torch.float32: 1 x cpu"
    assert [line.split(" loss")[0] for line in lines[1:]] == ["step 1/3", "step 2/3", "step 3/3"]
    phases = ["start_s", "load_s", "first_step_s", "steps_s", "save_s"]
    assert sorted(default_run.metrics) == sorted(["loss", *phases])
    assert logged(default_run, "step") == [1, 2, 3]
    assert logged(default_run, "lr") == [5e-6] * 3


def test_other_workers_save_and_log_nothing(train_alone, tmp_path, monkeypatch):
    """They keep their gradients, in DDP's buckets."""
    gradients = []

    def look(checkpointer, step, **metrics):
        gradients.extend(p.grad for p in checkpointer.denoiser.unet.parameters())

    monkeypatch.setattr(checkpoints.Checkpointer, "on_step_end", look)
    other = {"rank": 1, "num_workers": 2}
    run = train_alone(tmp_path / "out", worker=other, num_workers=2, max_train_steps=1)
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("device", "num_workers", "hooks"),
    [("cuda", 2, 1), ("cuda", 1, 0), ("cpu", 2, 0), ("cpu", 1, 0)],
)
def test_gpus_exchange_gradients_in_bfloat16(
    train_alone, load_models, monkeypatch, tmp_path, device, num_workers, hooks
):
    """Half the bytes. The run ends here where a GPU would be needed."""

    class Ended(Exception):
        pass

    def end(parameters, args):
        raise Ended

    registered = []
    ddp = SimpleNamespace(register_comm_hook=lambda *args: registered.append(args))
    monkeypatch.setattr(train.memory, "check_device", lambda *args: None)
    loaded = load_models()
    monkeypatch.setattr(models, "load_models", lambda *args: loaded)
    encoded = SimpleNamespace(encode_prompts=lambda *args: None)
    monkeypatch.setattr(models, "family_of", lambda model_dir: encoded)
    monkeypatch.setattr(models, "build_optimizer", end)
    worker = {"num_workers": num_workers, "device": device}
    worker["prepare_model"] = lambda denoiser, **settings: ddp
    with pytest.raises(Ended):
        train_alone(tmp_path / "out", worker=worker, num_workers=num_workers)
    assert registered == [(None, train.bf16_compress_hook)] * hooks


def test_a_run_says_what_it_does_and_leaves_its_result_and_its_report(one_worker):
    run = one_worker
    lines = run.stdout.splitlines()
    plan = "5 instance and 4 class images at 64 px, 3 steps of 1 pair, 1 worker"
    assert re.fullmatch(rf"{re.escape(plan)}; 0 GPUs, \d+ cores", lines[0])
    assert "start " in lines[-2] and ", steps " in lines[-2] and ", save " in lines[-2]
    assert lines[-1].startswith(f"wrote {run.output_dir} (")
    assert "photo of unqtkn car" in (run.output_dir / "README.md").read_text()
    record = read_run_record(report_dir(run.output_dir))
    assert (record["status"], record["num_steps"]) == ("finished", 3)
    assert all(record["metrics"][name] > 0 for name in ("start_s", "first_step_s", "steps_s"))


def test_a_lora_is_a_file_that_diffusers_loads(
    train_here, instance_dir, class_dir, model_dir, generated, generate_args, digests, tmp_path
):
    """Also with fewer instance than class images. Its second matrices are zero before the first
    step; and it changes the original model's images."""
    swapped = {"instance_images_dir": class_dir, "class_images_dir": instance_dir}
    run = train_here(use_lora=True, lr=1e-3, **swapped)
    names = {path.name for path in run.output_dir.iterdir()}
    assert names == {pipeline_dir.LORA_FILE, "README.md"}
    weights, _ = StableDiffusionPipeline.lora_state_dict(run.output_dir)
    for part in ("unet", "text_encoder"):
        second = [
            weight
            for name, weight in weights.items()
            if name.startswith(part) and ("lora_B" in name or name.endswith("up.weight"))
        ]
        assert second
        assert all(weight.abs().max() > 0 for weight in second)
    pipeline = StableDiffusionPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipeline.load_lora_weights(run.output_dir)
    flags = {"prompts": generated.prompts[:1], "lora_weights_dir": run.output_dir}
    generate.main(generate_args(tmp_path / "new", **flags))
    name = "000-0000-seed0.png"
    assert digests(tmp_path / "new")[name] != digests(generated.folder)[name]


def test_a_mistake_is_found_before_anything_starts(train_args, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "start_ray_in_background", None)
    with pytest.raises(UserError, match="--lr is 0"):
        train.main(train_args(tmp_path / "out", lr=0))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_plan_and_starts_nothing(train_args, tmp_path, monkeypatch, capsys):
    """And finds what a run would find."""
    monkeypatch.setattr(train.cluster, "start_ray_in_background", lambda *args: pytest.fail("Ray"))
    train.main(train_args(tmp_path / "out", dry_run=True))
    assert "5 instance and 4 class images at 64 px, 3 steps of 1 pair," in capsys.readouterr().out
    with pytest.raises(UserError, match="prompt too long"):
        train.main(train_args(tmp_path / "out", dry_run=True, class_prompt="a car " * 50))
    assert not [*tmp_path.glob("out*")]
    (tmp_path / "out.checkpoints").mkdir()
    checkpoints.write({"weights": {}}, 1, tmp_path / "out.checkpoints", limit=1)
    (tmp_path / "out.checkpoints" / "fingerprint.json").write_text('{"lr": 0.1}')
    (tmp_path / "out.checkpoints" / "lock").touch()
    with pytest.raises(UserError, match="holds checkpoints of another run .lr was 0.1, is"):
        train.main(train_args(tmp_path / "out", dry_run=True))
    train.main(train_args(tmp_path / "out", dry_run=True, restart=True))
    assert checkpoints.find_newest(tmp_path / "out.checkpoints") == 1


def test_the_learning_rate_is_that_of_what_is_trained(train_argv, tmp_path):
    """At the rate of full fine-tuning, a LoRA would learn next to nothing."""
    for flags, lr in (({}, 5e-6), ({"use_lora": True}, 1e-4), ({"use_lora": True, "lr": 1}, 1)):
        assert train.parse_args(train_argv(tmp_path / "out", **flags)).lr == lr


def test_no_default_of_train_py_changes_unnoticed(train_argv, tmp_path):
    """Users' results depend on them, and what they have read elsewhere says so."""
    args = vars(train.parse_args(train_argv(tmp_path / "out")))
    expected = {
        "adam_beta1": 0.9, "adam_weight_decay": 1e-2, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
        "prior_loss_weight": 1.0, "lr_scheduler": "constant", "lr_warmup_steps": 0, "seed": 0,
        "snr_gamma": None, "gradient_accumulation_steps": 1, "prior_target": "noise",
        "max_instance_noise": 1.0, "lora_rank": 4, "lora_layers": "attention",
        "log_every": 10, "checkpoints_total_limit": 1, "max_failures": 3, "wait_for_gpus": 0,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected


def test_a_run_that_diverges_leaves_its_record_alone(train_here, tmp_path):
    with pytest.raises(Diverged, match="the loss is .* at step 2: lower --lr.*no result was saved"):
        train_here(tmp_path / "out", lr=1e30)
    assert os.listdir(tmp_path) == ["out.report"]
    record = read_run_record(tmp_path / "out.report")
    assert record["status"] == "diverged"
    assert record["message"].startswith("the loss is")


def test_an_image_damaged_during_the_run_is_a_user_error(
    train_here, tmp_path, class_dir, monkeypatch
):
    """After the checks and before the training. It arises in a task of Ray Data: still one line
    with its name."""
    photos = shutil.copytree(class_dir, tmp_path / "photos")
    make_plan = train.make_plan

    def make_plan_and_truncate(args):
        plan = make_plan(args)
        photo = plan.instance_paths[0]
        photo.write_bytes(photo.read_bytes()[:-500])
        return plan

    monkeypatch.setattr(train, "make_plan", make_plan_and_truncate)
    with pytest.raises(UserError, match="0.png: unreadable or truncated image"):
        train_here(tmp_path / "out", instance_images_dir=photos)
    assert sorted(os.listdir(tmp_path)) == ["out.report", "photos"]


def test_a_result_that_is_on_another_node_is_a_user_error(train_here, monkeypatch, tmp_path):
    """Rank 0 has saved it on its own disk: not on storage that all nodes see."""
    monkeypatch.setattr(export, "save", lambda denoiser, args: None)
    with pytest.raises(UserError, match=f"{tmp_path / 'out'} is on another node"):
        train_here(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out.report"]


def test_each_node_must_see_what_training_reads_and_writes(
    train_here, train_args, instance_dir, class_dir, monkeypatch, tmp_path
):
    """Before a model loads on any of them."""
    checked = []

    def refuse(paths):
        checked.extend(str(path) for path in paths)
        raise UserError("node b does not see it")

    monkeypatch.setattr(cluster, "check_shared_storage", refuse)
    with pytest.raises(UserError, match="node b"):
        train_here(tmp_path / "out")
    own = [tmp_path / "out.checkpoints", tmp_path / "out.report"]
    model_dir = train_args("out").model_dir
    assert set(checked) == {str(path) for path in (model_dir, instance_dir, class_dir, *own)}
    assert os.listdir(tmp_path) == ["out.report"]


def test_a_worker_is_quiet_uses_its_cores_and_alone_keeps_no_gradients(
    train_alone, monkeypatch, capsys
):
    """Ray gives it one thread. A large model's step takes minutes there: it says so."""
    seen = []

    def look(checkpointer, step, **metrics):
        no_gradients = all(p.grad is None for p in checkpointer.denoiser.parameters())
        seen.append((torch.get_num_threads(), no_gradients))

    monkeypatch.setattr(checkpoints.Checkpointer, "on_step_end", look)
    monkeypatch.setattr(device, "LARGE", 1e6)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    logs = [library.utils.logging for library in (diffusers, transformers)]
    for log in logs:
        log.enable_progress_bar()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        train_alone(max_train_steps=1)
        assert torch.get_float32_matmul_precision() == "high"  # TF32, on a GPU
    finally:
        torch.set_num_threads(num_threads)
    assert seen == [(device.num_cores(), True)]
    assert "no GPU: a step takes minutes" in capsys.readouterr().err
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert not any(log.is_progress_bar_enabled() for log in logs)  # of models that load


@pytest.mark.parametrize(
    ("in_driver", "num_gpus", "num_cpus", "cores"),
    [(True, 0, 5, 2), (True, 0, 1, 1), (True, 1, 5, float("inf")), (False, 0, 5, float("inf"))],
)
def test_where_this_process_trains_on_a_cpu_half_of_the_cores_read_images(
    train_args, monkeypatch, tmp_path, in_driver, num_gpus, num_cpus, cores
):
    args = train_args(tmp_path / "out")
    monkeypatch.setattr(train.dataset.ray.data, "from_items", Rows.from_items)
    monkeypatch.setattr(cluster, "runs_in_driver", lambda num_workers: in_driver)
    monkeypatch.setattr(Rows, "map_batches", lambda rows, *args, **settings: rows)
    monkeypatch.setattr(Rows, "filter", lambda rows, expr: rows)
    trainer = train.build_trainer(args, train.make_plan(args), num_gpus, num_cpus, started=0.0)
    built = trainer.datasets["train"]()
    assert built.context.execution_options.resource_limits.cpu == cores


@pytest.fixture
def main_until_fit(train_args, tmp_path, monkeypatch, signal_handlers):
    """What train.py does before and after the training, for tmp_path/out, on a cluster of two cores
    that there is not: main_until_fit(fit, num_workers="1:2"), where `fit` takes the place of
    cluster.fit. Returns the arguments of the wait for workers."""
    waits = MagicMock(return_value=(0, 2))
    monkeypatch.setattr(cluster, "start_ray_in_background", MagicMock())
    monkeypatch.setattr(cluster, "wait_for_workers", waits)
    monkeypatch.setattr(cluster, "check_shared_storage", lambda paths: None)

    def run(fit, **changes):
        monkeypatch.setattr(cluster, "fit", fit)
        with pytest.raises(UserError, match="a worker failed"):
            train.main(train_args(tmp_path / "out", **changes))
        return waits.call_args.args

    return run


def test_a_resumed_run_keeps_what_it_has_logged(main_until_fit, tmp_path):
    """Up to its checkpoint: here of step 2, and it failed after step 3."""
    seen = []
    report = tmp_path / "out.report"

    def fit(trainer):
        seen.append([row["step"] for row in read_metrics(report)])
        for step in (1, 2, 3):
            append_line(report / METRICS, json.dumps({"step": step}))
        checkpoints.write({"weights": {}}, 2, tmp_path / "out.checkpoints", limit=1)
        raise UserError("a worker failed")

    for flags in ({}, {}, {"restart": True}):
        main_until_fit(fit, **flags)
    assert seen == [[], [1, 2], []]


def test_an_elastic_run_starts_with_its_fewest_workers(main_until_fit, tmp_path):
    """It does not wait for the most. Where it fails before its first checkpoint, its record alone
    is left."""
    fit = MagicMock(side_effect=UserError("a worker failed"))
    assert main_until_fit(fit, num_workers="1:2", wait_for_gpus=5) == (1, 5)
    assert os.listdir(tmp_path) == ["out.report"]


def test_the_hardware_on_record_is_what_the_run_may_use(
    main_until_fit, train_args, tmp_path, monkeypatch
):
    """Two of the cluster's four GPUs."""
    fit = MagicMock(side_effect=UserError("a worker failed"))
    main_until_fit(fit, num_workers="1:2")
    monkeypatch.setattr(cluster, "wait_for_workers", lambda *asked: (4, 8))
    with pytest.raises(UserError, match="a worker failed"):
        train.main(train_args(tmp_path / "out", num_workers="1:2"))
    record = json.loads((tmp_path / "out.report" / "run.json").read_text())
    assert record["hardware"] == "2 GPUs of a cluster"


@pytest.fixture
def interrupted(train_alone, tmp_path):
    """The folder of the checkpoints after steps 1 and 2 of a run whose saving fails after step 3;
    tmp_path/out would be its result."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "save", lambda denoiser, args: 1 / 0)
        with pytest.raises(UserError, match="could not be saved .division by zero"):
            train_alone(tmp_path / "out", checkpointing_steps=1, checkpoints_total_limit=3)
    folder = tmp_path / "out.checkpoints"
    shutil.rmtree(folder / "step_000003")
    assert [path.name for path in sorted(folder.glob("step_*"))] == ["step_000001", "step_000002"]
    return folder


def change_after_the_dataset_is_built(monkeypatch, change):
    build_dataset = train.dataset.build_dataset

    def build_and_change(*args):
        rows = build_dataset(*args)
        change()
        return rows

    monkeypatch.setattr(train.dataset, "build_dataset", build_and_change)


def test_workers_restore_the_checkpoint_that_the_data_begin_with(
    default_run, interrupted, train_alone, tmp_path, monkeypatch
):
    """Not the newest that they see, which on shared storage may appear in between."""
    newest = interrupted / "step_000002"
    hidden = newest.rename(tmp_path / "hidden")
    change_after_the_dataset_is_built(monkeypatch, lambda: hidden.rename(newest))
    run = train_alone(tmp_path / "out")
    assert weights_of(run.output_dir) == weights_of(default_run.output_dir)
    assert logged(run, "loss") == logged(default_run, "loss")
    assert "step 1/3" not in run.stdout


def test_a_checkpoint_that_a_worker_does_not_see_is_no_user_error(
    interrupted, train_alone, tmp_path, monkeypatch
):
    """Ray Train tries again: it may appear there later. Nothing is lost meanwhile."""
    state = interrupted / "step_000002" / "state.pt"
    change_after_the_dataset_is_built(monkeypatch, lambda: state.rename(tmp_path / "state.pt"))
    with pytest.raises(FileNotFoundError) as error:
        train_alone(tmp_path / "out")
    assert cluster.training_error(error.value) is None
    assert (interrupted / "step_000001" / "state.pt").exists()


@pytest.fixture(scope="module")
def step(load_models):
    """Losses and gradient of one step by `forward_backward`, for four pairs that come in batches of
    the given sizes: step([2, 2])."""
    generator = torch.Generator().manual_seed(0)
    posteriors = torch.randn(8, 2, 4, 16, 16, generator=generator).abs()
    input_ids = torch.randint(0, 500, (2, 48), generator=generator)
    _, denoiser, scheduler = load_models()

    def take(sizes, wrapped=denoiser):
        batches = []
        start = 0
        for size in sizes:
            positions = list(range(start, start + size))
            rows = positions + [4 + i for i in positions]  # instance half first
            conditions = {"input_ids": input_ids, "counts": [size] * 2}
            batch = {"posteriors": posteriors[rows], "positions": positions}
            batches.append({**batch, "conditions": conditions, "predict_original": None})
            start += size
        args = SimpleNamespace(seed=3, prior_loss_weight=0.7, snr_gamma=5.0, max_instance_noise=0.9)
        denoiser.zero_grad()
        losses = train.forward_backward(wrapped, scheduler, iter(batches), len(sizes), args)
        gradients = [p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]
        return losses, torch.cat(gradients)

    take.denoiser = denoiser
    return take


def test_accumulated_gradients_are_those_of_the_larger_batch(step):
    """One pair in each of four passes, or four pairs in one: equal to float32 rounding. Each of
    the four passes alone has another gradient."""
    small_losses, small = step([1, 1, 1, 1])
    large_losses, large = step([4])
    _, first = step([1])
    torch.testing.assert_close(small_losses, large_losses, rtol=1e-6, atol=0)
    assert not small_losses.requires_grad
    loss, instance_loss, class_loss = large_losses.tolist()
    assert loss == pytest.approx(instance_loss + 0.7 * class_loss)
    assert (small - large).norm() < 1e-5 * large.norm()
    assert (first - large).norm() > 0.1 * large.norm()


class Wrapped:
    """A denoiser as DDP wraps it, noting which forward passes do not exchange gradients."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.alone = False
        self.passes = []

    @contextmanager
    def no_sync(self):
        self.alone = True
        yield
        self.alone = False

    def __call__(self, *inputs):
        self.passes.append("alone" if self.alone else "exchange")
        return self.denoiser(*inputs)


def test_gradients_are_exchanged_once_per_step(step):
    wrapped = Wrapped(step.denoiser)
    step([1, 1, 2], wrapped=wrapped)
    assert wrapped.passes == ["alone", "alone", "exchange"]


def test_a_result_that_cannot_be_saved_is_not_lost(one_worker, train_here, tmp_path, monkeypatch):
    """Whatever fails, the state of the last step is kept, and Ray does not train again: the same
    command then only saves, the weights of a run to which nothing happened."""

    def fail(denoiser, args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(train.export, "save", fail)
        with pytest.raises(UserError, match=r"saved .*Input/output error.*again to save it"):
            train_here(tmp_path / "out")
    assert read_run_record(tmp_path / "out.report")["status"] == "failed"
    again = train_here(tmp_path / "out")
    assert "resuming after step 3" in again.stdout
    assert "step 1/3" not in again.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.report"]
    assert weights_of(tmp_path / "out") == weights_of(one_worker.output_dir)


def test_workers_share_the_cores_of_their_own_machine_alone(train_alone, monkeypatch):
    """Of four workers, two on each of two machines with eight cores."""
    seen = []

    def look(checkpointer, step, **metrics):
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(checkpoints.Checkpointer, "on_step_end", look)
    monkeypatch.setattr(device, "num_cores", lambda: 8)
    train_alone(worker={"num_workers": 4, "workers_here": 2}, num_workers=4, max_train_steps=1)
    assert seen == [4]


def test_workers_are_replaced_as_often_as_asked_for_and_not_after_the_users_mistake(
    train_args, tmp_path
):
    for given, expected in (({}, 3), ({"max_failures": 0}, 0), ({"max_failures": 7}, 7)):
        args = train_args(tmp_path / "out", num_workers=2, train_batch_size=2, **given)
        trainer = train.build_trainer(args, train.make_plan(args), 0, num_cpus=4, started=0.0)
        assert trainer.run_config.failure_config.max_failures == expected
        (callback,) = trainer.run_config.callbacks
        assert isinstance(callback, cluster.NoRetryForUserErrors)
