"""The subjects that DreamBooth learns on pocket, and the benchmark that learns them all."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreambooth import cluster, saving
from dreambooth.pocket import render, subjects
from tests.benchmarks import fidelity
from tests.benchmarks import subjects as benchmark

NAMES = list(render.SUBJECTS)


def test_pretraining_cannot_show_a_subject():
    """Neither a random scene nor a named design has the body of a subject, by whatever seed."""
    world = {body for bodies in render.BODIES.values() for body in bodies}
    bodies = {scene.body for scene in render.SUBJECTS.values()}
    assert not bodies & world
    assert not bodies & {design.body for design in render.DESIGNS}
    rng = np.random.default_rng(3)
    assert not bodies & {render.sample_scene(rng).body for _ in range(3000)}
    assert {*subjects.BODY_RENDERERS, "lego"} == bodies


def test_each_subject_is_of_another_class():
    kinds = [scene.kind for scene in render.SUBJECTS.values()]
    assert len(set(kinds)) == len(kinds) == 4
    assert set(kinds) <= set(render.CLASSES)


@pytest.mark.parametrize("name", NAMES)
def test_a_subject_looks_unlike_every_member_of_its_class(name):
    """Also unlike one that has its colours: it differs by its parts."""
    subject = render.SUBJECTS[name]
    image = np.asarray(render.render(subject, np.random.default_rng(0)), float)
    again = np.asarray(render.render(subject, np.random.default_rng(0)), float)
    assert np.array_equal(image, again)
    for body in render.BODIES.get(subject.kind, ("",)):
        member = replace(subject, body=body)
        other = np.asarray(render.render(member, np.random.default_rng(0)), float)
        changed = np.abs(image - other).max(axis=2) > 40
        assert changed.mean() > 0.04


@pytest.mark.parametrize("name", NAMES)
def test_a_subject_comes_in_five_different_photos_in_landscape_format(name, tmp_path):
    render.write_photos(name, tmp_path / "photos")
    files = sorted((tmp_path / "photos").iterdir())
    assert [file.name for file in files] == [f"{i}.jpg" for i in range(5)]
    assert {Image.open(file).size for file in files} == {(640, 512)}
    images = [np.asarray(Image.open(file), float) for file in files]
    assert min(image[:20].mean() for image in images) > 100  # none at night
    for i, image in enumerate(images):
        assert all(np.abs(image - other).mean() > 5 for other in images[i + 1 :])


def test_photos_of_an_unknown_subject_are_refused(run_script, assert_one_line, tmp_path):
    result = run_script("-m", "dreambooth.pocket.render", "--subject", "unicorn", tmp_path / "x")
    assert_one_line(result, "unicorn", "windmill")
    assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def world():
    return fidelity.label_world(count=2000)


@pytest.mark.parametrize("name", NAMES)
def test_the_judge_of_each_subject_reads_renders_that_it_has_not_seen(world, name):
    own = fidelity.label_subject(render.SUBJECTS[name], count=300)
    judge = fidelity.Judge(render.SUBJECTS[name], world, own)
    accuracy = fidelity.judge_accuracy(judge, count=100)
    assert accuracy["subject"] > 0.95
    assert accuracy["class"] > 0.9


def test_a_judge_does_not_take_one_subject_for_another(world):
    own = fidelity.label_subject(render.SUBJECTS["tugboat"], count=300)
    judge = fidelity.Judge(render.SUBJECTS["tugboat"], world, own)
    for name in NAMES:
        scenes = fidelity.subject_in_turn(render.SUBJECTS[name], 20)
        judged = judge(fidelity.render_all(scenes, np.random.default_rng(4)))
        found = fidelity.share(judge.is_subject(scene) for scene in judged)
        assert (found > 0.9) if name == "tugboat" else (found < 0.1)


def test_the_recipes_are_those_of_run_sh(root):
    """For one worker, with 200 class images."""
    script = (root / "run.sh").read_text()
    pairs, steps = map(int, re.search(r"PAIRS:-(\d+)\} STEPS=\${STEPS:-(\d+)\}", script).groups())
    assert (
        f"--train_batch_size {pairs} --num_epochs {math.ceil(pairs * steps / 200)}"
        f" --max_train_steps {steps}"
    ) == benchmark.STEPS
    assert f"{{TRAIN_FLAGS:-{benchmark.FULL}}}" in script
    assert f"{{LORA_FLAGS:-{benchmark.LORA}}}" in script


def test_training_in_this_process_gives_the_weights_of_train_py(
    run_script, train_argv, train_args, tmp_path
):
    """To the last bit: so what the benchmark says of the recipe holds for train.py."""
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "lr": 1e-3}
    command = train_argv(tmp_path / "command", **changes)
    result = run_script("train.py", *command)
    assert result.returncode == 0, result.stderr
    args = train_args(tmp_path / "here", **changes)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cluster.num_cores()))
    steps = []
    saving.save(benchmark.train_here(args, lambda step, denoiser: steps.append(step)), args)
    torch.set_num_threads(threads)
    assert steps == [0, 1, 2]
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        by_command = load_file(tmp_path / "command" / f"{part}.safetensors")
        here = load_file(tmp_path / "here" / f"{part}.safetensors")
        assert by_command.keys() == here.keys()
        assert all(torch.equal(by_command[key], here[key]) for key in here)
    original = load_file(Path(args.model_dir) / "unet/diffusion_pytorch_model.safetensors")
    trained = load_file(tmp_path / "here/unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(original[key].float(), trained[key]) for key in trained)


def test_the_worst_of_each_column_ends_the_table(capsys):
    row = {"subject_name": "mug", "prior": 1.0, "diversity": 1.0, "others": 1.0}
    results = [
        {**row, "seed": 0, "subject": 0.5, "composition": 0.9},
        {**row, "seed": 1, "subject": 0.7, "composition": 0.4},
    ]
    benchmark.print_table(results)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "worst" in lines[2] and "subject 0.50" in lines[2] and "composition 0.40" in lines[2]
