"""What run.sh runs: with a stand-in for Python that notes the commands and says which GPUs there
are. The choice of flags is real."""

import subprocess
import sys

import pytest

STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *dreambooth.installed) ;;
  *dreambooth.gpus) echo "$NUM_GPUS_FOUND" ;;
  *) echo "$*" >> "{log}" ;;&
  *dreambooth.memory*) exec "{python}" "$@" --gib "$GIB" --model_dir "{model_dir}" ;;
esac
"""


@pytest.fixture
def run_story(root, tmp_path, sd14_dir):
    """Run run.sh: run_story(num_gpus, gib, CLASS_NAME="cat") returns its result and its commands,
    by script. Stable Diffusion 1.4 stands in for what it would download."""

    def run(num_gpus, gib=0, **variables):
        log = tmp_path / "commands"
        stand_in = tmp_path / "python"
        stand_in.write_text(STAND_IN.format(python=sys.executable, log=log, model_dir=sd14_dir))
        stand_in.chmod(0o755)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHON": str(stand_in),
            "NUM_GPUS_FOUND": str(num_gpus),
            "GIB": str(gib),
            "DATA_PREFIX": "/data",
            **variables,
        }
        done = subprocess.run([root / "run.sh"], env=environment, capture_output=True, text=True)
        lines = log.read_text().splitlines() if log.exists() else []
        commands = {}
        for line in lines:
            script = line.removeprefix("-m ").split()[0]
            command = line.partition(" --preview_prompts ")[0].rstrip()  # previews cost no memory
            commands.setdefault(script, []).append(command)
        return done, commands

    return run


def test_one_large_gpu_needs_no_flag(run_story):
    done, commands = run_story(1, 22)
    (train,) = commands["train.py"]
    assert train.endswith(
        "--num_workers 1 --train_batch_size 2 --num_epochs 2 --max_train_steps 200 --lr 5e-6"
    )
    assert "--output_dir /data/subjects/dog/model-tuned " in train
    class_images, sample = commands["generate.py"]
    assert "--use_ray_data" in class_images
    assert "--model_dir /data/subjects/dog/model-tuned " in sample
    assert "--lora_weights_dir" not in sample
    assert "--use_ray_data" not in sample
    assert "22.0 GiB" in done.stderr


def test_two_gpus_of_24_gb_need_gradient_checkpointing(run_story):
    """One line says so, and why."""
    done, commands = run_story(2, 22)
    (train,) = commands["train.py"]
    assert "--num_workers 2 --train_batch_size 1 --num_epochs 2" in train
    assert train.endswith(" --gradient_checkpointing")
    (line,) = done.stderr.splitlines()
    assert "2 x 22.0 GiB" in line
    assert "--gradient_checkpointing" in line


def test_where_lora_is_chosen_its_recipe_is_used_and_its_result(run_story):
    """At the learning rate of full fine-tuning a LoRA would learn next to nothing; and its folder
    is no model."""
    _, commands = run_story(1, 7.5)
    (train,) = commands["train.py"]
    assert "--lr 1e-4" in train
    assert "--lr 5e-6" not in train
    assert train.endswith(" --gradient_checkpointing --use_lora")
    assert "--output_dir /data/subjects/dog/lora " in train
    class_images, sample = commands["generate.py"]
    assert "/snapshots/b95be7d6f134c3a9e62ee616f310733567f069ce " in class_images
    assert "/snapshots/b95be7d6f134c3a9e62ee616f310733567f069ce " in sample
    assert "--lora_weights_dir /data/subjects/dog/lora " in sample


def test_gpus_that_are_too_small_are_refused_before_an_image_is_generated(run_story):
    """The need follows from the model, which is downloaded before."""
    done, commands = run_story(1, 3)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 3.0 GiB")
    assert len(done.stderr.splitlines()) == 1
    assert list(commands) == ["cache_model.py", "dreambooth.memory"]
    (choice,) = commands["dreambooth.memory"]
    assert "/models--CompVis--stable-diffusion-v1-4/snapshots/b95be7d6f134" in choice


def test_train_flags_from_outside_stay_as_they_are(run_story):
    """Also on GPUs that are too small for them, as far as run.sh knows."""
    done, commands = run_story(1, 3, TRAIN_FLAGS="--lr 1e-5 --train_batch_size 1")
    (train,) = commands["train.py"]
    assert train.endswith(" --num_workers 1 --lr 1e-5 --train_batch_size 1")
    assert "GiB" not in done.stderr


def test_lora_from_outside(run_story):
    _, commands = run_story(0, LORA="1")
    (train,) = commands["train.py"]
    assert train.endswith(
        " --num_workers 1 --train_batch_size 8 --num_epochs 12 --max_train_steps 300"
        " --lora_layers all --lora_rank 16 --lr 8e-4 --lr_scheduler cosine --use_lora"
    )
    _, sample = commands["generate.py"]
    assert "--model_dir /data/model-orig/models--pocket/snapshots/embedded " in sample
    assert "--lora_weights_dir /data/subjects/lego-car/lora " in sample
    _, commands = run_story(1, 79, LORA="1")
    assert commands["train.py"][-1].endswith(" --lora_rank 4 --lr 1e-4 --use_lora")


@pytest.mark.parametrize(
    ("num_gpus", "numbers"),
    [
        (1, "--train_batch_size 2 --num_epochs 2 --max_train_steps 200"),
        (2, "--train_batch_size 1 --num_epochs 2 --max_train_steps 200"),
        (4, "--train_batch_size 1 --num_epochs 4 --max_train_steps 200"),
        (8, "--train_batch_size 1 --num_epochs 8 --max_train_steps 200"),
    ],
)
def test_several_gpus_make_as_many_steps_as_one(run_story, num_gpus, numbers):
    """RESULTS.md has what fewer steps lose. They share the pairs of a step, at least one each."""
    _, commands = run_story(num_gpus, 79)
    assert f"--num_workers {num_gpus} {numbers} " in commands["train.py"][0]


def test_lora_in_train_flags_from_outside(run_story):
    """However it comes in, the result is a LoRA."""
    _, commands = run_story(0, TRAIN_FLAGS="--use_lora --lr 1e-3")
    assert "--output_dir /data/subjects/lego-car/lora " in commands["train.py"][0]
    assert "--lora_weights_dir /data/subjects/lego-car/lora " in commands["generate.py"][1]


def test_lora_with_other_flags_of_train_py(run_story):
    """LORA=1 is not lost where TRAIN_FLAGS replaces the recipe."""
    _, commands = run_story(0, LORA="1", TRAIN_FLAGS="--lr 1e-3")
    assert commands["train.py"][0].endswith(" --num_workers 1 --lr 1e-3 --use_lora")
    assert "--lora_weights_dir /data/subjects/lego-car/lora " in commands["generate.py"][1]


def test_another_number_of_steps(run_story):
    """And as many epochs of the 200 class images as they take."""
    _, commands = run_story(1, 79, STEPS="500")
    assert "--train_batch_size 2 --num_epochs 5 --max_train_steps 500 " in commands["train.py"][0]


def test_more_flags_follow_the_recipe(run_story):
    """The last of a flag counts."""
    _, commands = run_story(1, 79, MORE_FLAGS="--lr 1e-5 --restart")
    assert commands["train.py"][0].endswith(" --lr 5e-6 --lr 1e-5 --restart")


@pytest.mark.parametrize("variables", [{"STEPS": "0"}, {"STEPS": "many"}, {"PAIRS": "08"}])
def test_sizes_that_are_no_numbers_are_refused_at_once(run_story, variables):
    done, commands = run_story(1, 79, **variables)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert commands == {}


def test_on_a_cluster_all_images_are_generated_there(run_story):
    """The node of the command may have no GPU."""
    _, commands = run_story(4, 79, RAY_ADDRESS="auto")
    class_images, sample = commands["generate.py"]
    assert "--use_ray_data" in class_images
    assert "--use_ray_data" in sample


@pytest.mark.parametrize(("address", "by_ray"), [("", False), ("auto", True)])
def test_without_a_gpu_ray_is_started_for_images_on_a_cluster_alone(run_story, address, by_ray):
    _, commands = run_story(0, RAY_ADDRESS=address)
    class_images, sample = commands["generate.py"]
    assert "--num_samples_per_prompt 200 --overwrite" in class_images
    assert ("--use_ray_data" in class_images) == by_ray
    assert ("--use_ray_data" in sample) == by_ray
