"""The memory that training needs, and the flags that make it fit a GPU."""

import json
import os
import re
import shutil

import pytest
import torch

from dreambooth import hardware, memory
from dreambooth.cli import UserError
from dreambooth.memory import BF16, CHECKPOINTING, COUNTED, LORA, Job, check_memory, choose, needed
from dreambooth.training_plan import TrainingPlan
from tests.benchmarks.counting import count_gib
from tests.benchmarks.throughput import sd14_side

CUDA = torch.device("cuda", 0)

# GiB that are free on a card of so many GB: less than its name says, as measured by nobody here.
FREE = {80: 78.5, 48: 44, 24: 22, 16: 14.6, 12: 11.3, 8: 7.4, 6: 5.5}
CHOSEN = {  # by GB and number of cards
    (80, 1): (),
    (80, 8): (),
    (48, 1): (),
    (48, 2): (),
    (24, 1): (),
    (24, 2): (CHECKPOINTING,),
    (16, 1): (CHECKPOINTING, BF16),
    (16, 2): (CHECKPOINTING, BF16),
    (12, 1): (LORA,),
    (12, 2): (LORA,),
    (8, 1): (CHECKPOINTING, LORA),
    (8, 4): (CHECKPOINTING, LORA),
    (6, 1): (CHECKPOINTING, LORA),
}


@pytest.mark.parametrize(("gigabytes", "num_gpus"), CHOSEN)
def test_what_fits_which_cards(gigabytes, num_gpus):
    job = Job(keeps_gradients=num_gpus > 1)
    assert choose(FREE[gigabytes], job) == CHOSEN[gigabytes, num_gpus]


def test_the_readme_says_what_fits_which_cards(root):
    """Its table: a row per size of card, with a column for one and one for several."""
    readme = (root / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) GB \| (.*?) \| (.*?) \|$", readme, re.MULTILINE)
    assert {int(gigabytes) for gigabytes, *_ in rows} == set(FREE) - {80, 48, 6}
    for gigabytes, *columns in rows:
        for text, keeps_gradients in zip(columns, (False, True), strict=True):
            named = re.findall(r"`(--[^`]*)`", text)
            flags = choose(FREE[int(gigabytes)], Job(keeps_gradients=keeps_gradients))
            assert named == list(flags), gigabytes


def test_the_readmes_cluster_has_cards_for_its_job(root):
    """An A10G has 24 GB."""
    readme = (root / "README.md").read_text()
    assert "one A10G with 24 GB" in readme
    job = readme.partition("ray job submit")[2].partition("```")[0]
    pairs = int(re.search(r"--train_batch_size (\d+)", job)[1])
    flags = tuple(flag for flag in (CHECKPOINTING, BF16, LORA) if flag in job)
    assert needed(flags, Job(pairs=pairs, keeps_gradients=True)) < FREE[24]


def test_a_card_that_is_too_small_for_everything(capsys):
    assert choose(4, Job()) is None
    with pytest.raises(UserError, match="^4.0 GiB .* even with .*--use_lora.* larger GPU"):
        memory.choose_for_gpus([22, 4], Job(), ())


def test_the_smallest_of_several_cards_decides():
    flags, why = memory.choose_for_gpus([78.0, 22.0, 78.0], Job(keeps_gradients=True), ())
    assert flags == CHECKPOINTING
    assert "3 x 22.0 GiB" in why


def test_flags_that_are_given_stay():
    """LORA=1 ./run.sh on a large card; and nothing is known of GPUs that others use."""
    assert choose(78, Job(), (LORA,)) == (LORA,)
    assert choose(7.4, Job(), (LORA,)) == (CHECKPOINTING, LORA)
    assert memory.choose_for_gpus([None, None], Job(), (LORA,))[0] == LORA
    assert memory.choose_for_gpus([None, None], Job(), ())[0] == ""


def test_more_pairs_or_pixels_or_parameters_need_more():
    for flags in COUNTED:
        base = needed(flags, Job())
        per_pair = needed(flags, Job(pairs=3)) - base
        assert per_pair > 0
        assert needed(flags, Job(pairs=8)) - base == pytest.approx(6 * per_pair)
        assert needed(flags, Job(resolution=1024)) - base == pytest.approx(6 * per_pair)
        assert needed(flags, Job(trained=2)) > base
        assert needed(flags, Job(unet=2)) > base


def plan_for(args, num_workers, resolution):
    """As make_plan would make it."""
    num_prompts = 2 if args.prior_loss_weight else 1
    passes = args.gradient_accumulation_steps
    return TrainingPlan(
        instance_paths=[],
        class_paths=[],
        prompt_ids=[[0]] * num_prompts,
        resolution=resolution,
        pairs_per_step=args.train_batch_size * passes * num_workers,
        num_steps=1,
        max_pairs_per_pass=args.train_batch_size,
        num_workers=(num_workers, num_workers),
    )


@pytest.fixture
def check(monkeypatch, train_args, sd14_dir):
    """`check_memory` for a model as large as Stable Diffusion 1.4 on a GPU with so many GiB free:
    check(22, use_lora=True)."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (8, 0))

    def run(gib, num_workers=1, resolution=512, **flags):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (gib * 2**30, 80 * 2**30))
        args = train_args("out", **{"model_dir": sd14_dir, "train_batch_size": 2, **flags})
        check_memory(args, plan_for(args, num_workers, resolution), num_workers, CUDA)

    return run


@pytest.mark.parametrize(
    ("gib", "flags", "remedy"),
    [
        (19, {}, "add --gradient_checkpointing (17.2 GiB)"),
        (22, {"gradient_accumulation_steps": 2}, "add --gradient_checkpointing"),
        (14.6, {}, "add --gradient_checkpointing --param_dtype bf16"),
        (14.6, {"gradient_checkpointing": True}, "add --param_dtype bf16"),
        (14, {"param_dtype": "bf16"}, "add --gradient_checkpointing"),
        (11.3, {"gradient_checkpointing": True}, "add --use_lora"),
        (7.4, {"use_lora": True}, "add --gradient_checkpointing"),
        (9, {"param_dtype": "bf16"}, "give --use_lora in place of --param_dtype bf16"),
        (9, {"use_lora": True, "gradient_checkpointing": True, "train_batch_size": 32}, "smaller"),
        (3, {}, "larger GPU"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(check, gib, flags, remedy):
    with pytest.raises(UserError, match="^training needs about .* GiB of GPU memory") as error:
        check(gib, **flags)
    assert f"{gib:.1f} are free" in str(error.value)
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)


def test_what_fits_is_not_refused(check):
    check(22)
    check(22, num_workers=2, gradient_checkpointing=True)
    check(14, gradient_checkpointing=True, param_dtype="bf16")
    check(7.4, use_lora=True, gradient_checkpointing=True)
    check(17.3, resolution=256, train_batch_size=8, gradient_checkpointing=True)
    check(18.5, no_train_text_encoder=True)
    check(18.5, prior_loss_weight=0)
    with pytest.raises(UserError):
        check(22, num_workers=2)
    with pytest.raises(UserError):
        check(18.5)


def test_the_pocket_model_is_never_refused(monkeypatch, train_args, sd14_dir):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (8, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (0, 2**30))
    args = train_args("out", train_batch_size=64)
    check_memory(args, plan_for(args, 8, 64), 8, CUDA)
    args.model_dir = sd14_dir
    with pytest.raises(UserError):
        check_memory(args, plan_for(args, 8, 64), 8, CUDA)


def test_without_a_gpu_there_is_nothing_to_refuse(monkeypatch, train_args, sd14_dir):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (8, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (0, 2**30))
    args = train_args("out", model_dir=sd14_dir, train_batch_size=64)
    check_memory(args, plan_for(args, 8, 512), 8, torch.device("cpu"))
    with pytest.raises(UserError):
        check_memory(args, plan_for(args, 8, 512), 8, CUDA)


def test_a_gpu_without_bfloat16_is_refused_whatever_its_memory(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Tesla T4")
    with pytest.raises(UserError, match="^Tesla T4"):
        check(80)


ROWS = {  # of RESULTS.md
    "full fine-tuning": (),
    "with `--gradient_checkpointing`": (CHECKPOINTING,),
    "with `--param_dtype bf16`": (BF16,),
    "with both": (CHECKPOINTING, BF16),
    "with `--use_lora`": (LORA,),
    "with `--use_lora --gradient_checkpointing`": (CHECKPOINTING, LORA),
}


def test_results_md_has_the_same_numbers(root):
    results = (root / "tests" / "benchmarks" / "RESULTS.md").read_text()
    for name, flags in ROWS.items():
        (row,) = re.findall(rf"^\| {re.escape(name)} \| [\d.]+ \| (.*?) \|$", results, re.MULTILINE)
        one_gpu, kept = row.split(" | ")
        assert (float(one_gpu), float(kept)) == COUNTED[flags][:2], name


def test_the_readme_has_the_same_numbers(root):
    """Each number of GiB in the part on memory is one of the table's."""
    readme = (root / "README.md").read_text()
    (part,) = re.findall(r"^## Memory\n(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    counted = {number for row in COUNTED.values() for number in row[:2]}
    numbers = {float(number) for number in re.findall(r"([\d.]+) GiB", part)}
    assert len(numbers) >= 4
    assert numbers <= counted


def test_the_flags_are_those_of_train(train_args):
    """What is printed for run.sh, and named in errors."""
    for flags in COUNTED:
        argv = " ".join(flags).split()
        given = {argv[i].removeprefix("--"): True for i in range(len(argv)) if argv[i][0] == "-"}
        if BF16 in flags:
            given["param_dtype"] = "bf16"
        args = train_args("out", **given)
        assert args.gradient_checkpointing == (CHECKPOINTING in flags)
        assert args.use_lora == (LORA in flags)


@pytest.fixture
def flags_for(capsys):
    """What `python -m dreambooth.memory` prints: its flags, and the lines that say why."""

    def run(model_dir, *flags):
        memory.main(memory.parse_args(["--model_dir", str(model_dir), *flags]))
        out, err = capsys.readouterr()
        return out, err.splitlines()

    return run


def test_flags_for_run_sh_are_all_that_is_printed(flags_for, sd14_dir):
    flags, why = flags_for(sd14_dir, "--num_workers", "1", "--gib", "22")
    assert (flags, len(why)) == ("\n", 1)
    flags, why = flags_for(sd14_dir, "--num_workers", "2", "--gib", "22")
    assert (flags, len(why)) == ("--gradient_checkpointing\n", 1)
    with pytest.raises(UserError, match="use a larger GPU"):
        flags_for(sd14_dir, "--gib", "3")


def test_flags_for_run_sh_follow_the_model(flags_for, sd14_dir, model_dir, tmp_path):
    """Stable Diffusion 2.1 is made for 768 px: more activations than run.sh's own model has."""
    larger = tmp_path / "sd21"
    shutil.copytree(sd14_dir, larger, copy_function=os.symlink)
    config = json.loads((sd14_dir / "unet" / "config.json").read_text())
    (larger / "unet" / "config.json").unlink()
    (larger / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 96}))
    assert flags_for(sd14_dir, "--gib", "21")[0] == "\n"
    assert flags_for(larger, "--gib", "21")[0] == "--gradient_checkpointing\n"
    assert flags_for(model_dir, "--gib", "1") == ("\n", [])  # pocket fits everywhere


def test_without_gpus_only_what_is_given_is_printed(flags_for, sd14_dir, monkeypatch):
    monkeypatch.setattr(hardware, "gpu_memory", lambda: [])
    assert flags_for(sd14_dir, "--use_lora") == (f"{LORA}\n", [])


def test_the_numbers_are_those_that_are_counted():
    """One of them, on fake tensors. (RESULTS.md has the command that counts them all.)"""
    gib = count_gib(sd14_side([]), keep_gradients=True)
    assert round(gib, 1) == COUNTED[()].kept
