"""What run.sh runs: with a stand-in for Python that notes the commands and says which GPUs there
are. Where a test says how much memory they have, the choice of flags is real."""

import shlex
import subprocess
import sys
import time

import pytest

import cache_model
import download_example_dataset
import generate
import train
from dreambooth.machines import memory

STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *dreambooth.installed) ;;
  *dreambooth.machines.gpus) echo "$NUM_GPUS_FOUND" ;;
  *) printf '%q ' "$@" >> "{log}"; echo >> "{log}" ;;&
  *dreambooth.machines.memory*) if [[ "$GIB" ]]; then
    exec "{python}" "$@" --gib "$GIB" --model_dir "{model_dir}"
  elif [[ "$*" == *--use_lora ]]; then echo --use_lora; fi ;;
esac
"""
COMMIT = "c0ffee" * 6 + "beef"
PARSERS = {
    "cache_model.py": cache_model.parse_args,
    "download_example_dataset.py": download_example_dataset.parse_args,
    "generate.py": generate.parse_args,
    "train.py": train.parse_args,
    "dreambooth.machines.memory": memory.parse_args,
}


def write_executable(file, text):
    file.write_text(text)
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def run_story(root, tmp_path, sd14_dir):
    """Run run.sh: run_story(num_gpus, gib, CLASS_NAME="cat") returns its result and its commands,
    by script, each of which the script's own parser accepts. Stable Diffusion 1.4 stands in for
    what it would download."""

    def run(num_gpus, gib="", **variables):
        log = tmp_path / "commands"
        text = STAND_IN.format(python=sys.executable, log=log, model_dir=sd14_dir)
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHON": write_executable(tmp_path / "python", text),
            "NUM_GPUS_FOUND": str(num_gpus),
            "GIB": str(gib),
            "DATA_PREFIX": "/data",
            **variables,
        }
        done = subprocess.run([root / "run.sh"], env=environment, capture_output=True, text=True)
        commands = {}
        for line in log.read_text().splitlines() if log.exists() else []:
            script, *argv = shlex.split(line.removeprefix("-m "))
            PARSERS.get(script, list)(argv)
            command = " ".join(argv).partition(" --preview_prompts ")[0]  # they cost no memory
            name = f"{script} --dry_run" if "--dry_run" in argv else script
            commands.setdefault(name, []).append(command)
        return done, commands

    return run


@pytest.fixture
def run_sh(root, tmp_path):
    """Run run.sh in tmp_path, for pocket, where Python is a script with the given text:
    run_sh("#!/bin/sh\\n", STEPS="9")."""

    def run(text, script=root / "run.sh", **variables):
        python = write_executable(tmp_path / "python", text)
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": python, "MODEL": "pocket"}
        environment |= {"NUM_GPUS": "0", "DATA_PREFIX": str(tmp_path), **variables}
        return subprocess.Popen(
            [script], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return run


def test_two_gpus_need_gradient_checkpointing_with_21_gib_free_and_nothing_with_22(run_story):
    """Each takes one of the step's two pairs. One line says so, and why."""
    for gib, flag in ((21, "--gradient_checkpointing"), (22, "--lr 5e-6")):
        done, commands = run_story(2, gib)
        train = commands["train.py"][-1]
        assert train.endswith(f" {flag}")
        (line,) = done.stderr.splitlines()
        assert f"2 x {gib}.0 GiB" in line and ("--gradient_checkpointing" in line) == (gib == 21)


def test_where_lora_is_chosen_its_recipe_is_used_and_its_result(run_story):
    """At the learning rate of full fine-tuning a LoRA would learn next to nothing; and its folder
    is no model."""
    _, commands = run_story(1, 7.5)
    (train,) = commands["train.py"]
    assert "--lr 1e-4" in train and "--lr 5e-6" not in train
    assert train.endswith(" --gradient_checkpointing --use_lora")
    assert "--output_dir /data/subjects/dog/lora " in train
    class_images, sample = commands["generate.py"]
    assert "/snapshots/b95be7d6f134c3a9e62ee616f310733567f069ce " in class_images
    assert "/snapshots/b95be7d6f134c3a9e62ee616f310733567f069ce " in sample
    assert "--lora_weights_dir /data/subjects/dog/lora " in sample


def test_a_flag_that_needs_memory_is_counted_wherever_it_stands(run_story):
    done, commands = run_story(1, 21, MORE_FLAGS="--gradient_accumulation_steps 2")
    (train,) = commands["train.py"]
    assert train.endswith(" --lr 5e-6 --gradient_checkpointing --gradient_accumulation_steps 2")
    assert "training needs 24.1" in done.stderr


def test_lora_is_not_chosen_where_it_is_ruled_out(run_story):
    """What needs least without it may not fit: the need is counted, not measured."""
    done, commands = run_story(1, 7.5, LORA="0")
    (train,) = commands["train.py"]
    assert train.endswith("--lr 5e-6 --gradient_checkpointing --param_dtype bf16")
    assert "--output_dir /data/subjects/dog/model-tuned " in train
    assert done.stderr.startswith("warning: 1 x 7.5 GiB of GPU memory free, training needs 20.1")
    _, commands = run_story(0, LORA="0")
    assert "lora" not in commands["train.py"][-1]


def test_gpus_that_are_too_small_get_the_flags_that_save_most_and_a_warning(run_story):
    """The need is counted, not measured: it may fit all the same."""
    done, commands = run_story(1, 2)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: 1 x 2.0 GiB")
    (choice,) = commands["dreambooth.machines.memory"]
    assert "/models--CompVis--stable-diffusion-v1-4/snapshots/b95be7d6f134" in choice
    assert commands["train.py"][0].endswith(" --gradient_checkpointing --use_lora")


def test_train_flags_from_outside_stay_as_they_are(run_story):
    """Also on GPUs that are too small for them, as far as run.sh knows, and of a model whose recipe
    is a LoRA's."""
    flags = {"TRAIN_FLAGS": "--lr 1e-5 --train_batch_size 1"}
    done, commands = run_story(1, 2, MODEL="klein", ORIG_MODEL_HASH=COMMIT, **flags)
    (train,) = commands["train.py"]
    assert train.endswith(" --num_workers 1 --lr 1e-5 --train_batch_size 1")
    assert "GiB" not in done.stderr


POCKET_LORA = (
    "--train_batch_size 8 --max_train_steps 300"
    " --lora_layers all --lora_rank 16 --lr 1.5e-3 --lr_scheduler cosine --prior_loss_weight 3"
    " --prior_target original --max_instance_noise 0.75 --use_lora"
)


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({"LORA": "1"}, POCKET_LORA),
        ({"LORA": "1", "TRAIN_FLAGS": "--lr 1e-3"}, "--lr 1e-3 --use_lora"),
        ({"TRAIN_FLAGS": "--use_lora --lr 1e-3"}, "--use_lora --lr 1e-3"),
        ({"MORE_FLAGS": "--use_lora"}, f"{POCKET_LORA} --use_lora"),
    ],
)
def test_however_lora_is_asked_for_the_result_is_one(run_story, variables, flags):
    _, commands = run_story(0, **variables)
    (train,) = commands["train.py"]
    assert train.endswith(f" --num_workers 1 {flags}")
    assert "--output_dir /data/subjects/lego-car/lora " in train
    _, sample = commands["generate.py"]
    assert "--model_dir /data/model-orig/models--pocket/snapshots/embedded " in sample
    assert "--lora_weights_dir /data/subjects/lego-car/lora " in sample


@pytest.mark.parametrize(
    ("num_gpus", "of_all", "pairs"),
    [(1, 2, 2), (2, 2, 1), (8, 2, 1), (3, 8, 3), (8, 8, 1)],
)
def test_several_gpus_make_as_many_steps_as_one(run_story, num_gpus, of_all, pairs):
    """RESULTS.md has what fewer steps lose. They share the pairs of a step, rounded up to as many
    on each."""
    _, commands = run_story(num_gpus, PAIRS=str(of_all))
    numbers = f"--train_batch_size {pairs} --max_train_steps 200"
    assert commands["train.py"][0].endswith(f" --num_workers {num_gpus} {numbers} --lr 5e-6")


def test_more_flags_follow_the_recipe(run_story):
    """The last of a flag counts."""
    _, commands = run_story(1, STEPS="500", MORE_FLAGS="--lr 1e-5 --restart")
    (train,) = commands["train.py"]
    assert "--train_batch_size 2 --max_train_steps 500 " in train
    assert train.endswith(" --lr 5e-6 --lr 1e-5 --restart")


@pytest.mark.parametrize(
    ("num_gpus", "address", "class_images_by_ray", "new_images_by_ray"),
    [
        (0, "", False, False),
        (1, "", False, False),
        (2, "", True, False),
        (0, "auto", True, True),
        (1, "auto", True, True),
    ],  # fmt: skip
)
def test_images_are_generated_by_ray_where_that_is_faster(
    run_story, num_gpus, address, class_images_by_ray, new_images_by_ray
):
    """Class images on all GPUs, all images on a cluster: the node of the command may have no GPU.
    With one GPU or on a laptop, Ray would only take time to start."""
    _, commands = run_story(num_gpus, RAY_ADDRESS=address)
    class_images, sample = commands["generate.py"]
    assert ("--use_ray_data" in class_images) == class_images_by_ray
    assert ("--use_ray_data" in sample) == new_images_by_ray


def test_each_variable_can_be_set_from_outside(run_story):
    """And the last subject's photos do not stay in the folder of own images, as in fault 11 of the
    published example: run.sh fills it with dreambooth.files.photos, which replaces it whole."""
    names = ["ORIG_MODEL_DIR", "TUNED_MODEL_DIR", "INSTANCE_DIR"]
    names += ["IMAGES_REG_DIR", "IMAGES_OWN_DIR", "IMAGES_NEW_DIR"]
    paths = {name: f"/given/{name}" for name in names}
    paths["ORIG_MODEL_PATH"] = "/given/ORIG_MODEL_DIR/its/snapshot"
    others = {"ORIG_MODEL_NAME": "own/model", "ORIG_MODEL_HASH": COMMIT, "CLASS_NAME": "owl"}
    others |= {"UNIQUE_TOKEN": "zwx", "CLASS_PROMPT": "photo of an owl", "SCENES": "in a barn"}
    others |= {"NUM_WORKERS": "3", "PAIRS": "6", "STEPS": "70", "NUM_CLASS_IMAGES": "50"}
    _, commands = run_story(0, **paths, **others)
    (cache,) = commands["cache_model.py"]
    assert cache == f"--model_dir /given/ORIG_MODEL_DIR --model_name own/model --revision {COMMIT}"
    assert commands["dreambooth.files.photos"] == [
        "/given/INSTANCE_DIR",  # looked at before anything costly starts
        "/given/INSTANCE_DIR /given/IMAGES_OWN_DIR",
    ]
    (train,) = commands["train.py"]
    assert train.startswith(
        "--model_dir /given/ORIG_MODEL_DIR/its/snapshot --output_dir /given/TUNED_MODEL_DIR"
        " --instance_images_dir /given/IMAGES_OWN_DIR --instance_prompt photo of zwx owl"
        " --class_images_dir /given/IMAGES_REG_DIR --class_prompt photo of an owl --num_workers 3"
        " --train_batch_size 2 --max_train_steps 70 "
    )
    class_images, sample = commands["generate.py"]
    assert "--num_samples_per_prompt 50 " in class_images
    assert sample.startswith(
        "--model_dir /given/TUNED_MODEL_DIR --output_dir /given/IMAGES_NEW_DIR"
    )
    assert " --prompts photo of zwx owl in a barn " in sample
    assert "--lora" not in sample


def test_run_sh_explains_itself(root):
    done = subprocess.run([root / "run.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "./run.sh test" in done.stdout
    refused = subprocess.run([root / "run.sh", "tset"], capture_output=True, text=True)
    assert refused.returncode == 2


NUMBERS = ["NUM_CLASS_IMAGES", "PREVIEW_EVERY", "STEPS", "PAIRS", "NUM_WORKERS", "NUM_GPUS"]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_none_is_refused_at_once(run_story, name):
    """Nor does bash compute with one of twenty digits."""
    for value in ("many", "-1", "08", "1.5", "9" * 20):
        done, commands = run_story(1, **{name: value})
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {name}={value}: must be a whole number")
        assert len(done.stderr.splitlines()) == 1
        assert commands == {}


def test_what_can_only_go_wrong_is_refused_at_once(run_story, tmp_path):
    """A dry run has no result for step 5; a sheet among the photos would be trained on; LORA=true
    would train the whole model without a word."""
    photos = tmp_path / "data" / "subjects" / "tom"
    for variables, line in (
        ({"MORE_FLAGS": "--dry_run"}, "error: --dry_run is for train.py itself: step 5 needs"),
        ({"TRAIN_FLAGS": "--lr 1e-5", "STEPS": "9"}, "error: STEPS is part of the recipe, which"),
        ({"DATA_PREFIX": "s3://bucket"}, "error: DATA_PREFIX=s3://bucket is a URL: name a path"),
        ({"LORA": "true"}, "error: LORA=true: must be 0 or 1"),
        ({"MODEL": "dalle"}, "error: MODEL=dalle: must be "),
        ({"MODEL": "sdxl", "ORIG_MODEL_NAME": "pocket"}, "error: MODEL=sdxl and ORIG_"),
        ({"ORIG_MODEL_HASH": "main"}, "error: ORIG_MODEL_HASH=main: must be a commit, 40"),
        ({"MODEL": "klein"}, "error: set ORIG_MODEL_HASH to the commit of black-forest-labs/"),
        ({"INSTANCE_DIR": photos, "SUBJECT_DIR": f"{photos}/"}, "error: results would go among"),
    ):
        done, commands = run_story(1, **variables)
        assert done.returncode == 2
        assert done.stderr.startswith(line)
        assert len(done.stderr.splitlines()) == 1
        assert commands == {}


def test_without_class_images_there_is_no_prior(run_story):
    _, commands = run_story(0, NUM_CLASS_IMAGES="0")
    (sample,) = commands["generate.py"]
    assert "images-new" in sample
    assert commands["train.py"][0].endswith(" --prior_loss_weight 0")


def test_what_must_not_change_is_generated_too(run_story):
    """The class and another class, beside the subject."""
    _, commands = run_story(0)
    assert (
        " photo of a car photo of a house photo of a house on the road"
        in (commands["generate.py"][-1])
    )


def test_cheap_checks_come_before_dear_steps(run_story):
    """The photos are looked at, and the flags of train.py parsed, before anything is downloaded;
    then steps 4 and 5 are tried dry before class images are generated and photos replaced."""
    flags = {"INSTANCE_DIR": "images/lego-car", "MORE_FLAGS": "--seed 3"}
    _, commands = run_story(1, **flags, SAMPLE_FLAGS="--seed 5")
    names = list(commands)
    assert names.index("dreambooth.files.photos") < names.index("cache_model.py")
    assert names.index("-c") < names.index("cache_model.py")
    assert commands["-c"][0].endswith("--class_prompt photo of a dog --seed 3")
    assert names[names.index("cache_model.py") + 1] == "generate.py --dry_run"
    assert commands["generate.py --dry_run"][0].endswith(" --overwrite --dry_run --seed 5")
    assert names.index("train.py --dry_run") < names.index("generate.py")
    (trial,) = commands["train.py --dry_run"]
    assert "/images/lego-car --instance_prompt photo of unqtkn dog " in trial
    assert trial.endswith(
        " --lr 5e-6 --seed 3 --prior_loss_weight 0 --num_epochs 1000000 --restart --dry_run"
    )


def test_a_local_model_is_used_as_it_is(run_story, sd14_dir, tmp_path):
    """Nothing is downloaded; on a GPU with the recipe of its family."""
    done, commands = run_story(1, ORIG_MODEL_PATH=str(sd14_dir))
    assert done.returncode == 0, done.stderr
    assert "cache_model.py" not in commands
    (train,) = commands["train.py"]
    assert train.startswith(f"--model_dir {sd14_dir} ")
    index = (sd14_dir / "model_index.json").read_text()
    for pipeline, flags in (
        ("StableDiffusionXLPipeline", "--max_train_steps 500 --lr 2e-6"),
        ("Flux2KleinPipeline", "--max_train_steps 500 --lora_rank 16"),
    ):
        other = tmp_path / "of-unknown-name"
        other.mkdir(exist_ok=True)
        text = index.replace("StableDiffusionPipeline", pipeline)
        (other / "model_index.json").write_text(text)
        _, commands = run_story(1, ORIG_MODEL_PATH=str(other))
        assert flags in commands["train.py"][-1]
    _, commands = run_story(1, ORIG_MODEL_PATH="/no/model", MODEL="sd")
    assert "cache_model.py" not in commands  # the dry run says that there is none
    assert " --lr 5e-6" in train


def test_a_model_in_the_cache_is_completed_though_its_path_is_given(run_story, sd14_dir):
    """README exports both; an interrupted download may have left the index alone."""
    cache = {"ORIG_MODEL_PATH": str(sd14_dir), "ORIG_MODEL_DIR": str(sd14_dir.parent)}
    _, commands = run_story(1, **cache)
    assert "cache_model.py" in commands


def test_scenes_may_stand_on_lines_and_are_checked_before_the_training(run_story):
    _, commands = run_story(1, SCENES="in the snow\nat night")
    _, sample = commands["generate.py"]
    assert "photo of unqtkn dog in the snow photo of unqtkn dog at night photo of a dog" in sample
    (check,) = commands["generate.py --dry_run"]
    assert "photo of unqtkn dog in the snow photo of unqtkn dog at night photo of a dog" in check
    names = list(commands)
    assert names.index("generate.py --dry_run") < names.index("train.py")


def test_own_photos_are_not_taken_for_the_example_by_macos(run_story, tmp_path):
    """Whose realpath has no -m; and whose bash takes an empty array for an unset variable."""
    (tmp_path / "bin").mkdir()
    write_executable(
        tmp_path / "bin" / "realpath",
        '#!/bin/bash\n[[ "$1" == -* ]] && { echo "illegal option -- m" >&2; exit 1; }\necho "$1"\n',
    )
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    _, commands = run_story(0, PATH=path, INSTANCE_DIR="./images/lego-car", PREVIEW_EVERY="0")
    assert "download_example_dataset.py" not in commands
    (copy,) = commands["dreambooth.files.photos"]
    assert "/images/lego-car " in copy and "/./" not in copy
    assert "train.py" in commands


def test_run_sh_works_through_a_link_and_with_a_relative_python(root, run_sh, tmp_path):
    """Also where CDPATH makes `cd` print."""
    link = tmp_path / "story"
    link.symlink_to(root / "run.sh")
    text = f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'
    process = run_sh(text, link, PYTHON="./python", STEPS="0", CDPATH=str(tmp_path))
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("error: STEPS=0: must be a whole number of at least 1")


def test_class_images_have_less_guidance_than_results(run_story):
    """pocket's look alike with more guidance."""
    for variables in ({}, {"LORA": "1"}):
        _, commands = run_story(0, **variables)
        class_images, sample = commands["generate.py"][-2:]
        assert class_images.endswith(" --overwrite --guidance_scale 1")
        assert sample.endswith(" --guidance_scale 3 --seed 1")


def test_a_class_has_its_folder_of_class_images(run_story):
    """Of each model one folder and none in another, whatever the class's name; a prompt of its own
    has its own, as in one folder two subjects' runs would replace each other's. No prompt is given
    twice if the class is what must not change: for a house that is a car."""
    _, commands = run_story(0, CLASS_NAME="tea house/2")
    assert " --output_dir /data/images-reg/pocket-tea-house-2 " in commands["generate.py"][-2]
    _, commands = run_story(0, CLASS_NAME="tea house/2", CLASS_PROMPT="photo of a house")
    class_images, sample = commands["generate.py"][-2:]
    folder = "/data/images-reg/pocket-photo-of-a-house"
    assert f" --output_dir {folder} " in class_images
    assert f"--class_images_dir {folder} " in commands["train.py"][-1]
    assert "photo of a house photo of a car photo of a car on the road " in sample


def test_each_subject_has_its_folder_and_shares_class_images(run_story):
    """It says where: what lies there is replaced."""
    done, commands = run_story(0, INSTANCE_DIR="/photos/red car")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("results go"))
    assert line.startswith("results go to /data/subjects/red car and replace earlier ones there")
    assert line.endswith("class images to /data/images-reg/pocket-car")
    (copied,) = commands["dreambooth.files.photos"]
    assert copied == "/photos/red car /data/subjects/red car/images-own"


def test_without_previews_none_is_asked_for(run_story, tmp_path):
    run_story(0, PREVIEW_EVERY="0")
    assert "--preview" not in (tmp_path / "commands").read_text()
    run_story(0, PREVIEW_EVERY="400", STEPS="300")  # the first and the last
    assert "--preview_every 400" in (tmp_path / "commands").read_text()


def test_each_model_has_a_short_name_and_its_recipe(run_story):
    """A LoRA of FLUX.2-klein, with few class images."""
    xl = "stabilityai/stable-diffusion-xl-base-1.0 --revision 46216598403"
    klein = f"black-forest-labs/FLUX.2-klein-base-4B --revision {COMMIT}"
    lora = "--max_train_steps 500 --lora_rank 16 --lr 1e-4 --use_lora"
    for variables, name, count, flags in (
        ({"MODEL": "sdxl"}, xl, 200, "--max_train_steps 500 --lr 2e-6"),
        ({"MODEL": "sdxl", "LORA": "1"}, xl, 200, lora),
        ({"MODEL": "klein", "ORIG_MODEL_HASH": COMMIT}, klein, 48, lora),
    ):
        _, commands = run_story(1, **variables)
        assert f"--model_name {name}" in commands["cache_model.py"][-1]
        assert f"--num_samples_per_prompt {count} " in commands["generate.py"][-2]
        assert commands["train.py"][-1].endswith(f"--train_batch_size 1 {flags}")


def test_results_stand_beside_the_original_models(run_story, tmp_path):
    """Images from the same noise, a sheet with photos and class images, the page of the run."""
    _, commands = run_story(0, LORA="1")
    original = "/data/model-orig/models--pocket/snapshots/embedded"
    assert f" --compare_to {original} --overwrite " in commands["generate.py"][-1]
    own = "/data/subjects/lego-car"
    (page,) = commands["dreambooth.report.page"]
    assert page == f"{own}/lora.report --images_dir {own}/images-new"
    (sheet,) = commands["dreambooth.files.generated_images"]
    assert sheet.startswith(
        f"--output {own}/dreambooth.png photos of the subject={own}/images-own"
        " photo of a car, by the original model=/data/images-reg/pocket-car photo of unqtkn car in"
    )
    log = (tmp_path / "commands").read_text().replace("\\", "")
    prompts = "photo of unqtkn car in the snow photo of a car"
    assert f"--preview_prompts {prompts} --preview_every 100 " in log


def test_the_example_photos_are_downloaded_for_the_example_alone(run_story):
    _, commands = run_story(1)
    assert commands["download_example_dataset.py"] == ["images/dog"]
    names = list(commands)
    first = names.index("download_example_dataset.py")
    assert first < names.index("train.py --dry_run")


def test_paths_are_those_of_the_callers_directory(run_sh, tmp_path):
    for name in ("SUBJECT_DIR", "IMAGES_REG_DIR"):
        out, err = run_sh("#!/bin/sh\n", **{name: "mine"}).communicate()
        assert f" to {tmp_path}/mine" in out, err


def test_what_run_sh_sets_itself_is_refused_with_the_variable_to_set(run_story):
    """It trained elsewhere, and showed an earlier result as the new one."""
    for name in ("MORE_FLAGS", "TRAIN_FLAGS"):
        for flags in ("--lr 1 --output_dir /elsewhere", "--output_dir=/elsewhere"):
            done, commands = run_story(0, **{name: flags})
            assert done.returncode == 2 and not commands
            assert "--output_dir in TRAIN_FLAGS or MORE_FLAGS: set TUNED_MODEL_DIR" in done.stderr
    done, _ = run_story(0, MORE_FLAGS="--preview_every 5")
    assert "--preview_every in TRAIN_FLAGS or MORE_FLAGS: set PREVIEW_EVERY instead" in done.stderr


def test_without_the_class_loss_no_class_image_is_generated(run_story):
    """However its weight of 0 is written; the last one counts."""
    weight = "--prior_loss_weight"
    for variables, is_generated in (
        ({}, True),
        ({"NUM_CLASS_IMAGES": "0"}, False),
        ({"MORE_FLAGS": f"--seed 1 {weight}  0"}, False),
        ({"MORE_FLAGS": f"\n{weight}=0.0"}, False),
        ({"TRAIN_FLAGS": f"{weight} 0", "MORE_FLAGS": f"{weight} 1"}, True),
        ({"TRAIN_FLAGS": f"{weight} 1", "MORE_FLAGS": f"{weight} 0"}, False),
        ({"MORE_FLAGS": f"{weight} 0.5"}, True),
    ):
        _, commands = run_story(0, **variables)
        assert ("images-reg" in commands["generate.py"][-2]) == is_generated, variables


@pytest.mark.parametrize("script", ["cache_model.py", "generate.py", "train.py"])
def test_a_schedulers_signal_reaches_what_takes_long(run_sh, tmp_path, script):
    """TERM of run.sh, as for the first process of a container; its exit code is the script's."""
    process = run_sh(
        f"""#!/usr/bin/env bash
        case "$*" in
          *--dry_run*) ;;
          {script}*) trap 'echo stopping; sleep 0.2; echo stopped; exit 143' TERM
            touch {tmp_path}/began; while :; do sleep 0.05; done ;;
        esac
        """
    )
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert out.endswith("stopping\nstopped\n") and process.returncode == 143


def test_an_old_python_is_refused(run_sh):
    """With another the packages do not install."""
    process = run_sh("#!/bin/sh\nexit 1\n")
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("error: Python 3.11 or newer is needed")
