"""The memory that training needs, and the flags that make it fit a GPU."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import train
from dreambooth.cli import UserError
from dreambooth.files import pipeline_dir
from dreambooth.machines import device, memory
from dreambooth.machines.memory import BF16, CHECKPOINTING, COUNTED, LORA, Job, choose, needed
from dreambooth.run.plan import TrainingPlan
from tests.benchmarks.counting import count_gib
from tests.benchmarks.throughput import counted_side

# GiB that are free on a card of so many GB: less than its name says, as measured by nobody here.
FREE = {80: 78.5, 48: 44, 24: 22, 16: 14.6, 12: 11.3, 8: 7.4, 6: 5.5}


@pytest.fixture(scope="module")
def readme(root):
    """What the README says about memory, as one line."""
    (part,) = re.findall(r"^## Memory\n(.*?)^## ", (root / "README.md").read_text(), re.M | re.S)
    return " ".join(part.split())


def test_what_fits_which_cards_and_that_the_readme_says_it(readme):
    said = dict(re.findall(r"with (\d+) GB ([^;.]*)", readme))
    assert list(said) == ["24", "16", "12", "8"]
    *most, last = (FREE[int(gigabytes)] for gigabytes in said)
    assert f"with, in GiB, {', '.join(map(str, most))} and {last} free" in readme
    assert all(choose(FREE[large], Job(keeps_gradients=True)) == () for large in (80, 48))
    for gigabytes, text in said.items():
        columns = text.split(" and ")  # one card, several; or the same for both
        for part, keeps_gradients in zip((columns[0], columns[-1]), (False, True), strict=True):
            pairs = 1 if keeps_gradients else 2  # of run.sh's recipe, as two GPUs share them
            job = Job(pairs=pairs, keeps_gradients=keeps_gradients)
            flags = choose(FREE[int(gigabytes)], job)
            assert set(re.findall(r"--\w+(?: bf16)?", part)) == set(flags), (gigabytes, part)
    smallest = (CHECKPOINTING, LORA)
    assert choose(FREE[6], Job(keeps_gradients=True)) == smallest
    assert needed(smallest, Job(keeps_gradients=True)) < FREE[6]


def test_the_clusters_file_has_cards_for_its_job(root):
    """An A10G has 24 GB."""
    text = (root / "dreambooth" / "machines" / "cluster.yaml").read_text()
    assert "one A10G with 24 GB" in text
    pairs = int(re.search(r"--train_batch_size (\d+)", text)[1])
    flags = tuple(flag for flag in (CHECKPOINTING, BF16, LORA) if flag in text)
    assert needed(flags, Job(pairs=pairs, keeps_gradients=True)) < FREE[24]


def test_the_documents_have_the_same_numbers(readme, root):
    """The README's are the table's, and RESULTS.md has them all."""
    both = (CHECKPOINTING, BF16)
    text = readme.partition("**SDXL**")[0]
    said = [float(number) for number in re.findall(r"([\d.]+) GiB", text)][:5]
    assert said == [
        round(needed(flags, job), 1)
        for flags, job in [
            ((), Job()), ((), Job(keeps_gradients=True)),
            ((CHECKPOINTING,), Job()), (both, Job()), ((CHECKPOINTING, LORA), Job()),
        ]
    ]  # fmt: skip
    xl = memory.REFERENCES["StableDiffusionXLPipeline"]
    klein = memory.REFERENCES["Flux2KleinPipeline"]
    for name, job in {
        "SDXL": Job(1, resolution=1024, reference=xl),
        "FLUX.2-klein": Job(1, resolution=1024, reference=klein),
        "FLUX.2-klein, `--resolution 512`": Job(1, reference=klein),
    }.items():
        columns = [(), (CHECKPOINTING,), both, (LORA,), (CHECKPOINTING, LORA)]
        cells = [f"{needed(flags, job):.1f} GiB" for flags in columns]
        assert f"| {name} | {' | '.join(cells)} |" in readme
    results = (root / "tests" / "benchmarks" / "RESULTS.md").read_text()
    for name, flags in {
        "full fine-tuning": (),
        "with `--gradient_checkpointing`": (CHECKPOINTING,),
        "with `--param_dtype bf16`": (BF16,),
        "with both": (CHECKPOINTING, BF16),
        "with `--use_lora`": (LORA,),
        "with `--use_lora --gradient_checkpointing`": (CHECKPOINTING, LORA),
    }.items():
        (row,) = re.findall(rf"^\| {re.escape(name)} \| [\d.]+ \| (.*?) \|$", results, re.MULTILINE)
        assert tuple(map(float, row.split(" | "))) == COUNTED[flags][:2], name
        name = name.replace("full fine-tuning", "full fine-tuning of FLUX.2-klein")
        name = name.replace("with ", "klein with ")
        (row,) = re.findall(
            rf"^\| {re.escape(name)} \| [\d.]+ \| (.*?) \| [^|]* \|$", results, re.MULTILINE
        )
        assert tuple(map(float, row.split(" | "))) == memory.COUNTED_KLEIN[flags][:2], name


def test_the_memory_of_each_family_is_known():
    assert memory.REFERENCES.keys() == pipeline_dir.PIPELINES.keys()


def test_the_numbers_are_those_that_are_counted():
    """One of them, on fake tensors. (RESULTS.md has the command that counts them all.)"""
    gib = count_gib(counted_side("sd14", []), keep_gradients=True)
    assert round(gib, 1) == COUNTED[()].kept


def test_the_smallest_card_decides_and_what_is_too_small_for_everything_is_a_warning():
    """The numbers are counted, not measured: it may fit all the same."""
    flags, why = memory.choose_for_gpus([78.0, 22.0, 78.0], Job(keeps_gradients=True), ())
    assert flags == CHECKPOINTING
    assert why.startswith("3 x 22.0 GiB of GPU memory free, training needs 24.1: with --gradient")
    flags, why = memory.choose_for_gpus([22, 3], Job(), ())
    assert flags == f"{CHECKPOINTING} {LORA}"
    assert re.match(r"warning: 2 x 3.0 GiB .*, even with .*--use_lora 4.6: it may fail$", why)


def test_flags_that_are_given_stay():
    """LORA=1 ./run.sh on a large card, and on a small one; and nothing is known of GPUs that others
    use."""
    assert choose(78, Job(), (LORA,)) == (LORA,)
    assert choose(7.4, Job(), (LORA,)) == (CHECKPOINTING, LORA)
    assert memory.choose_for_gpus([None, 78], Job(), (LORA,))[0] == LORA
    assert memory.choose_for_gpus([None, 78], Job(), ())[0] == ""


def test_gpus_without_a_worker_do_not_count(sd14_dir, monkeypatch, capsys):
    """Workers take this machine's first ones; of a cluster, nobody knows which."""
    monkeypatch.setattr(memory.gpus, "free_memory_of_all", lambda: [45.0, 3.0])
    args = memory.parse_args(["--model_dir", str(sd14_dir), "--num_workers", "1"])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    memory.main(args)
    assert capsys.readouterr().out == "\n"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    memory.main(args)
    assert LORA in capsys.readouterr().out


def test_a_transformers_memory_follows_its_tokens():
    """A quarter of the pixels, beside the prompt: a third of the tokens."""
    klein = memory.REFERENCES["Flux2KleinPipeline"]
    at = [needed((), Job(4, resolution=side, reference=klein)) for side in (1024, 512)]
    activations = memory.RESERVE * 4 * klein.counted[()].per_pair
    assert at[0] - at[1] == pytest.approx(activations * 2 / 3)


def test_more_pairs_or_pixels_or_parameters_need_more():
    for flags in COUNTED:
        base = needed(flags, Job(pairs=4))
        per_pair = needed(flags, Job(pairs=5)) - base
        assert per_pair > 0
        assert needed(flags, Job(pairs=8)) - base == pytest.approx(4 * per_pair)
        larger = needed(flags, Job(pairs=4, resolution=1024)) - base
        assert larger == pytest.approx(12 * per_pair)
        assert needed(flags, Job(pairs=4, trained_ratio=2)) > base
        assert needed(flags, Job(pairs=4, backbone_ratio=2)) > base


def test_a_preview_between_two_steps_needs_no_less_than_an_image():
    """One pair with --gradient_checkpointing and --use_lora takes less than the preview's image."""
    flags = (CHECKPOINTING, LORA)
    one, none = needed(flags, Job(pairs=1)), needed(flags, Job(pairs=0))
    assert one == none > memory.RESERVE * memory.PREVIEW * 512**2 + memory.LIBRARIES
    assert needed(flags, Job(pairs=1, has_previews=False)) < one


def test_flags_that_change_the_need_change_what_is_printed(sd14_dir, capsys):
    """20.1 GiB of 19 are needed without them, and a captured step takes more."""

    def line(gib, flags=""):
        main_flags = ["--model_dir", str(sd14_dir), "--gib", str(gib), *flags.split()]
        memory.main(memory.parse_args(main_flags))
        return capsys.readouterr().out.strip()

    assert line(19) == CHECKPOINTING
    assert line(19, "--no-train_text_encoder") == line(19, "--prior_loss_weight 0") == ""
    assert (line(20.8), line(20.8, "--cuda_graph")) == ("", CHECKPOINTING)
    # Where train.py captures no step, nothing more is needed.
    assert line(24.5, "--num_workers 2 --cuda_graph") == line(24.5, "--num_workers 2") == ""
    both = f"--cuda_graph {CHECKPOINTING}"
    assert line(17.6, both) == line(17.6, CHECKPOINTING) == CHECKPOINTING


def test_stable_diffusion_is_as_large_as_counted(sd14_dir):
    assert memory.relative(sd14_dir, pipeline_dir.num_parameters(sd14_dir), True) == {
        "backbone_ratio": pytest.approx(1, rel=0.01),
        "trained_ratio": pytest.approx(1, rel=0.01),
        "reference": memory.SD14,
    }


def plan_for(args, num_workers, resolution):
    """As make_plan would make it."""
    passes = args.gradient_accumulation_steps
    return TrainingPlan(
        instance_paths=[],
        class_paths=["class.png"] if args.prior_loss_weight else [],
        prompts=[],
        captions={},
        resolution=resolution,
        pairs_per_step=args.train_batch_size * passes * num_workers,
        num_steps=1,
        max_pairs_per_pass=args.train_batch_size,
        num_workers=(num_workers, num_workers),
        checkpointing_steps=0,
        run_dir=Path("run"),
        report_dir=Path("report"),
    )


@pytest.fixture
def check(monkeypatch, train_args, sd14_dir, capsys):
    """What `check_device` says of a model as large as Stable Diffusion 1.4 on a GPU with so many
    GiB free: check(22, use_lora=True)."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "Tesla T4")

    def run(gib, num_workers=1, resolution=512, capability=8, torch_device="cuda:0", **flags):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: (capability, 5))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (gib * 2**30, 80 * 2**30))
        args = train_args("out", **{"model_dir": sd14_dir, "train_batch_size": 2, **flags})
        plan = plan_for(args, num_workers, resolution)
        memory.check_device(args, plan, num_workers, torch.device(torch_device))
        return capsys.readouterr().err

    return run


def test_what_may_not_fit_is_a_line_with_the_remedies(check):
    assert check(18.5) == (
        "warning: training may need 20.1 GiB of GPU memory, and 18.5 are free;"
        " --gradient_checkpointing, --param_dtype bf16 and --use_lora need less (README, Memory)\n"
    )
    for gib, flags in [
        (22, {"num_workers": 2}),
        (22, {"gradient_accumulation_steps": 2}),
        (14.6, {"gradient_checkpointing": True}),
        (14, {"param_dtype": "bf16"}),
        (9, {"use_lora": True, "gradient_checkpointing": True, "train_batch_size": 32}),
    ]:
        assert f", and {gib:.1f} are free; " in check(gib, **flags)


def test_of_what_fits_nothing_is_said(check, model_dir):
    """On a GPU with so little memory that anything more would be too much; pocket fits any."""
    for gib, flags in [
        (22, {}),
        (22, {"num_workers": 2, "gradient_checkpointing": True}),
        (14, {"gradient_checkpointing": True, "param_dtype": "bf16"}),
        (7.4, {"use_lora": True, "gradient_checkpointing": True}),
        (17.3, {"resolution": 256, "train_batch_size": 8, "gradient_checkpointing": True}),
        (18.5, {"no_train_text_encoder": True}),
        (18.5, {"prior_loss_weight": 0}),
        (0, {"model_dir": model_dir, "train_batch_size": 64, "num_workers": 8}),
    ]:
        assert check(gib, **flags) == ""


def test_without_a_gpu_time_is_what_is_said_and_without_bfloat16_nothing_trains(check):
    """Whatever its memory."""
    assert check(0, torch_device="cpu").startswith("warning: no GPU: a step takes minutes")
    assert "--cuda_graph is ignored: it is for" in check(0, torch_device="cpu", cuda_graph=True)
    with pytest.raises(UserError, match="^Tesla T4 .* has no bfloat16"):
        check(80, capability=7)


def test_what_the_machine_may_not_hold_when_it_saves_is_a_warning(check, monkeypatch):
    """The result is gathered in the machine's memory: 1,066 M parameters in float32, and 4 GiB."""
    for free, warned in ((7.0, True), (8.1, False), (None, False)):
        monkeypatch.setattr(device, "host_memory", lambda free=free: free)
        line = "7.0 GiB of this machine's memory are free, the run may need 8.0"
        assert (line in check(80)) == warned
        assert line not in check(80, use_lora=True)  # a small file


def test_a_captured_step_needs_what_an_h100_reserved_for_it(check):
    """20.5 and 9.3 GiB, and 0.8 for libraries."""
    for flags, measured in (((), 21.3), ((LORA,), 10.1)):
        job = Job(is_captured=True)
        assert measured < needed(flags, job) < 1.1 * measured
    previews = {"cuda_graph": True, "preview_every": 9, "preview_prompts": ["photo of a car"]}
    assert "training may need" in check(22, **previews)
    assert check(23, **previews) == check(22, cuda_graph=True) == ""


@pytest.mark.parametrize("missing", ["a C compiler", "Python's headers"])
def test_what_triton_compiles_is_refused_before_anything_starts(
    check, flags_for, sd14_dir, monkeypatch, tmp_path, missing
):
    """Without a compiler it failed at the first step of the optimizer, after all class images."""
    monkeypatch.delenv("CC", raising=False)
    if missing == "a C compiler":
        monkeypatch.setattr(device.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(device.sysconfig, "get_path", lambda name: str(tmp_path))
    for flags in ({"param_dtype": "bf16"}, {"compile": True}):
        with pytest.raises(UserError, match=f"^--(param_dtype bf16|compile) needs {missing}"):
            check(80, **flags)
    assert check(80) == ""
    assert flags_for(sd14_dir, "--gib", "22")[0] == "\n"  # where they are not needed
    with pytest.raises(UserError, match=f"^{BF16} needs {missing}.*apt install gcc python3-dev"):
        flags_for(sd14_dir, "--gib", "14")  # for which run.sh would choose it


def test_the_flags_are_those_of_train(train_argv):
    """What is printed for run.sh, and named in warnings."""
    args = train.parse_args([*train_argv("out"), *" ".join((CHECKPOINTING, BF16, LORA)).split()])
    assert args.gradient_checkpointing
    assert args.param_dtype == "bf16"
    assert args.use_lora


@pytest.fixture
def flags_for(capsys):
    """What `python -m dreambooth.machines.memory` prints: its flags, and the lines that say why."""

    def run(model_dir, *flags):
        memory.main(memory.parse_args(["--model_dir", str(model_dir), *flags]))
        out, err = capsys.readouterr()
        return out, err.splitlines()

    return run


def test_flags_for_run_sh_are_all_that_is_printed(flags_for, sd14_dir, monkeypatch):
    """And on stderr one line that says why; none where there are no GPUs."""
    flags, why = flags_for(sd14_dir, "--num_workers", "1", "--gib", "22")
    assert (flags, len(why)) == ("\n", 1)
    flags, why = flags_for(sd14_dir, "--num_workers", "2", "--gib", "22")
    assert (flags, len(why)) == (f"{CHECKPOINTING}\n", 1)
    monkeypatch.setattr(device, "gpu_memory", lambda: [])
    assert flags_for(sd14_dir, "--use_lora") == (f"{LORA}\n", [])


def test_flags_for_run_sh_follow_the_model(flags_for, sd14_dir, model_dir, tmp_path):
    """Stable Diffusion 2.1 is made for 768 px: more activations than run.sh's own model has."""
    larger = tmp_path / "sd21"
    shutil.copytree(sd14_dir, larger, copy_function=os.symlink)
    config = json.loads((sd14_dir / "unet" / "config.json").read_text())
    (larger / "unet" / "config.json").unlink()
    (larger / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 96}))
    assert flags_for(sd14_dir, "--gib", "21")[0] == "\n"
    assert flags_for(larger, "--gib", "21")[0] == f"{CHECKPOINTING}\n"
    assert flags_for(model_dir, "--gib", "1") == ("\n", [])  # pocket fits everywhere


def test_a_frozen_copy_counts_only_where_there_is_a_class_half_to_ask_it_for(check):
    """2.06 GiB more than fit 18.5; a LoRA is its own original."""
    assert check(21, prior_target="original").startswith("warning: training may need 22.3 GiB")
    assert check(18.5, prior_target="original", prior_loss_weight=0) == ""
    flags = {"use_lora": True, "gradient_checkpointing": True, "prior_target": "original"}
    assert check(7.4, **flags) == ""


def test_flags_for_run_sh_follow_its_more_flags(flags_for, sd14_dir):
    """Those of train.py that change what it needs; the others are none of its business."""
    for more, flags in (
        ("--seed 3 --lr 1e-5 --compile", ""),
        ("--gradient_accumulation_steps 2", CHECKPOINTING),  # 24.1 GiB
        ("--prior_target original", CHECKPOINTING),  # 22.3
        ("--prior_target original --use_lora", LORA),  # a LoRA is its own original
        ("--train_batch_size 3", CHECKPOINTING),
        ("--resolution 768", CHECKPOINTING),
        ("--resolution 256", ""),
        ("--gradient_checkpointing", CHECKPOINTING),
        ("--param_dtype bf16", BF16),
        ("--param_dtype bf16 --use_lora", LORA),  # train.py refuses it
    ):
        assert flags_for(sd14_dir, "--gib", "21", *more.split())[0] == f"{flags}\n"


def test_no_memory_is_a_mistake_and_not_a_question(sd14_dir):
    """0 must not ask the GPUs."""
    with pytest.raises(SystemExit):  # of all choices none would be left
        memory.parse_args(["--model_dir", str(sd14_dir), "--use_lora", "--full"])
    args = memory.parse_args(["--model_dir", str(sd14_dir), "--gib", "0"])
    with pytest.raises(UserError, match="^--gib is 0.0: must be above 0$"):
        memory.main(args)
