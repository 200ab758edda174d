#!/usr/bin/env bash
# From photos of a subject to images of it in new places.
#
#   ./run.sh          all of it: with Stable Diffusion 1.4 on GPUs, else with the pocket model
#   LORA=1 ./run.sh   the same with LoRA
#   MODEL=sdxl ./run.sh   with Stable Diffusion XL; with FLUX.2-klein: MODEL=klein ORIG_MODEL_HASH=COMMIT ./run.sh
#   ./run.sh test     the tests
#
# Variables set what it does: CLASS_NAME=cat INSTANCE_DIR=~/photos/tom ./run.sh
# MODEL LORA CLASS_NAME INSTANCE_DIR UNIQUE_TOKEN CLASS_PROMPT INSTANCE_PROMPT OTHER_PROMPT SCENES STEPS PAIRS
# NUM_CLASS_IMAGES TRAIN_FLAGS LORA_FLAGS MORE_FLAGS CLASS_FLAGS SAMPLE_FLAGS PREVIEW_EVERY DATA_PREFIX SUBJECT_DIR
# ORIG_MODEL_NAME ORIG_MODEL_HASH ORIG_MODEL_PATH PYTHON
# TRAIN_FLAGS replaces the recipe, MORE_FLAGS is added to it: MORE_FLAGS=--restart ./run.sh
# SCENES is a list: SCENES="in the snow|at night" ./run.sh
set -euo pipefail
unset CDPATH PYTHONSAFEPATH  # with them, cd prints, and Python does not find dreambooth/

# The recipes: what is learned, and how.
use_pocket() {
  ORIG_MODEL_HASH=${ORIG_MODEL_HASH:-embedded}
  CLASS_NAME=${CLASS_NAME:-car}
  INSTANCE_DIR=${INSTANCE_DIR:-images/lego-car}
  SCENES=${SCENES:-in the snow|at night|on the beach|on the grass|on the road}
  local shared="--lr_scheduler cosine --prior_loss_weight 3 --prior_target original"
  TRAIN_FLAGS=${TRAIN_FLAGS:---lr 3e-4 $shared --max_instance_noise 0.85}
  LORA_FLAGS=${LORA_FLAGS:---lora_layers all --lora_rank 16 --lr 1.5e-3 $shared --max_instance_noise 0.75}
  PAIRS=${PAIRS:-8} STEPS=${STEPS:-300} NUM_CLASS_IMAGES=${NUM_CLASS_IMAGES:-100}
  CLASS_FLAGS=${CLASS_FLAGS:---guidance_scale 1}  # with more, its class images would look alike
  SAMPLE_FLAGS=${SAMPLE_FLAGS:---guidance_scale 3 --seed 1}
}

use_stable_diffusion() {
  if [[ "$ORIG_MODEL_NAME" == CompVis/stable-diffusion-v1-4 ]]; then
    ORIG_MODEL_HASH=${ORIG_MODEL_HASH:-b95be7d6f134c3a9e62ee616f310733567f069ce}
  fi
  CLASS_NAME=${CLASS_NAME:-dog}
  INSTANCE_DIR=${INSTANCE_DIR:-images/dog}
  SCENES=${SCENES:-in a bucket|in the snow|on the beach|in the jungle|in front of the Eiffel Tower}
  TRAIN_FLAGS=${TRAIN_FLAGS:---lr 5e-6}
  LORA_FLAGS=${LORA_FLAGS:---lora_rank 4 --lr 1e-4}
  PAIRS=${PAIRS:-2} STEPS=${STEPS:-200}
  CLASS_FLAGS=${CLASS_FLAGS:-}
  SAMPLE_FLAGS=${SAMPLE_FLAGS:-}
}

use_stable_diffusion_xl() {
  if [[ "$ORIG_MODEL_NAME" == stabilityai/stable-diffusion-xl-base-1.0 ]]; then
    ORIG_MODEL_HASH=${ORIG_MODEL_HASH:-462165984030d82259a11f4367a4eed129e94a7b}
  fi
  TRAIN_FLAGS=${TRAIN_FLAGS:---lr 2e-6}
  LORA_FLAGS=${LORA_FLAGS:---lora_rank 16 --lr 1e-4}
  PAIRS=${PAIRS:-1} STEPS=${STEPS:-500}
  use_stable_diffusion
}

# Full fine-tuning takes more than 40 GB. A class image takes 50 steps with guidance, about a minute
# on a card of 80 TFLOP/s: so there are fewer.
use_klein() {
  if [[ -z "$OWN_TRAIN_FLAGS" ]]; then LORA=${LORA:-1}; fi
  LORA_FLAGS=${LORA_FLAGS:---lora_rank 16 --lr 1e-4}
  TRAIN_FLAGS=${TRAIN_FLAGS:---lr 1e-5}
  PAIRS=${PAIRS:-1} STEPS=${STEPS:-500}
  NUM_CLASS_IMAGES=${NUM_CLASS_IMAGES:-48}
  use_stable_diffusion
}

# The steps.
main() {
  local scenes prompts=() all_scenes
  choose_settings
  echo "$ORIG_MODEL_NAME learns the $CLASS_NAME of $INSTANCE_DIR on $NUM_GPUS GPU(s)"
  echo "results go to $SUBJECT_DIR and replace earlier ones there; class images to $IMAGES_REG_DIR"

  step 1 "cache the original model (pocket: seconds; others: a download, 4 GB for Stable Diffusion 1.4)"
  if [[ -z "$OWN_MODEL" ]]; then
    run "$PYTHON" cache_model.py --model_dir "$ORIG_MODEL_DIR" --model_name "$ORIG_MODEL_NAME" --revision "$ORIG_MODEL_HASH"
  fi
  # A mistake of step 5 is found now, and not after the training.
  "$PYTHON" generate.py --model_dir "$ORIG_MODEL_PATH" --output_dir "$IMAGES_NEW_DIR" --prompts "${prompts[@]}" \
    --overwrite --dry_run $SAMPLE_FLAGS
  choose_train_flags

  step 2 "get the photos of the subject (seconds)"
  if is_example; then "$PYTHON" download_example_dataset.py images/dog; fi
  # A mistake of step 4 is found now, except in class images: there are none yet, so epochs do not count.
  "$PYTHON" train.py --model_dir "$ORIG_MODEL_PATH" --output_dir "$RESULT_DIR" \
    --instance_images_dir "$INSTANCE_DIR" --instance_prompt "$INSTANCE_PROMPT" --num_workers "$NUM_WORKERS" \
    $TRAIN_FLAGS --prior_loss_weight 0 --num_epochs 1000000 --restart --dry_run >/dev/null
  "$PYTHON" -m dreambooth.files.photos "$INSTANCE_DIR" "$IMAGES_OWN_DIR"

  step 3 "generate class images with the original model (minutes; only what is missing)"
  local ray_data=--use_ray_data  # on all GPUs; for one, or none, Ray would only take time to start
  if ((NUM_GPUS <= 1)) && [[ -z "${RAY_ADDRESS:-}" ]]; then ray_data=; fi
  local class_images=()
  if ((NUM_CLASS_IMAGES > 0)); then
    run "$PYTHON" generate.py --model_dir "$ORIG_MODEL_PATH" --output_dir "$IMAGES_REG_DIR" --prompts "$CLASS_PROMPT" \
      --num_samples_per_prompt "$NUM_CLASS_IMAGES" --overwrite $ray_data $CLASS_FLAGS
    class_images=("$CLASS_PROMPT, by the original model=$IMAGES_REG_DIR")
  fi

  step 4 "fine-tune (minutes)"
  local previews=(--preview_prompts "${prompts[0]}" "$CLASS_PROMPT" --preview_every "$PREVIEW_EVERY")
  if ((PREVIEW_EVERY == 0)); then previews=(); fi
  run "$PYTHON" train.py --model_dir "$ORIG_MODEL_PATH" --output_dir "$RESULT_DIR" \
    --instance_images_dir "$IMAGES_OWN_DIR" --instance_prompt "$INSTANCE_PROMPT" \
    --class_images_dir "$IMAGES_REG_DIR" --class_prompt "$CLASS_PROMPT" --num_workers "$NUM_WORKERS" $TRAIN_FLAGS \
    ${previews[@]+"${previews[@]}"}

  step 5 "generate the subject in new places, and what must not change; the original model, too (seconds to minutes)"
  run "$PYTHON" generate.py "${RESULT[@]}" --output_dir "$IMAGES_NEW_DIR" --prompts "${prompts[@]}" \
    --compare_to "$ORIG_MODEL_PATH" --overwrite ${RAY_ADDRESS:+--use_ray_data} $SAMPLE_FLAGS

  step 6 "put photos, class images and new images on one sheet, and the run on a page"
  "$PYTHON" -m dreambooth.files.generated_images --output "$SUBJECT_DIR/dreambooth.png" \
    "photos of the subject=$IMAGES_OWN_DIR" ${class_images[@]+"${class_images[@]}"} \
    "$INSTANCE_PROMPT ${all_scenes//|/, }; $CLASS_PROMPT; $OTHER_PROMPT, ${scenes[${#scenes[@]}-1]}=$IMAGES_NEW_DIR"
  echo "done: $SUBJECT_DIR/dreambooth.png, and the page ($SECONDS s in all)"
  "$PYTHON" -m dreambooth.report.page "$RESULT_DIR.report" --images_dir "$IMAGES_NEW_DIR"
}

# MODEL is a short name for ORIG_MODEL_NAME.
choose_model() {
  local name
  case "${MODEL:-}" in
    "") return ;;
    pocket) name=pocket ;;
    sd) name=CompVis/stable-diffusion-v1-4 ;;
    sdxl) name=stabilityai/stable-diffusion-xl-base-1.0 ;;
    klein) name=black-forest-labs/FLUX.2-klein-base-4B ;;
    *) refuse "MODEL=$MODEL: must be pocket, sd, sdxl or klein" ;;
  esac
  [[ "${ORIG_MODEL_NAME:-$name}" == "$name" ]] ||
    refuse "MODEL=$MODEL and ORIG_MODEL_NAME=$ORIG_MODEL_NAME disagree: set one of them"
  ORIG_MODEL_NAME=$name
}

# Where everything goes. On several nodes, DATA_PREFIX is on shared storage. Each subject has a folder,
# named like that of its photos; they share original models and class images.
set_paths() {
  local class
  DATA_PREFIX=${DATA_PREFIX:-/tmp}
  SUBJECT_DIR=${SUBJECT_DIR:-$DATA_PREFIX/subjects/$(basename "$INSTANCE_DIR")}
  ORIG_MODEL_DIR=${ORIG_MODEL_DIR:-$DATA_PREFIX/model-orig}
  ORIG_MODEL_PATH=${ORIG_MODEL_PATH:-$ORIG_MODEL_DIR/models--${ORIG_MODEL_NAME//\//--}/snapshots/$ORIG_MODEL_HASH}
  class=${CLASS_PROMPT:-$CLASS_NAME}
  IMAGES_REG_DIR=${IMAGES_REG_DIR:-$DATA_PREFIX/images-reg/${ORIG_MODEL_NAME##*/}-${class//[\/ ]/-}}
  TUNED_MODEL_DIR=${TUNED_MODEL_DIR:-$SUBJECT_DIR/model-tuned}
  LORA_DIR=${LORA_DIR:-$SUBJECT_DIR/lora}
  IMAGES_OWN_DIR=${IMAGES_OWN_DIR:-$SUBJECT_DIR/images-own}
  IMAGES_NEW_DIR=${IMAGES_NEW_DIR:-$SUBJECT_DIR/images-new}
}

# TRAIN_FLAGS, and where the result goes. Needs the model on disk.
choose_train_flags() {
  [[ -n "$OWN_TRAIN_FLAGS" ]] || complete_recipe
  if [[ "${LORA:-0}" == 1 && "$TRAIN_FLAGS" != *--use_lora* ]]; then TRAIN_FLAGS+=" --use_lora"; fi
  if ((NUM_CLASS_IMAGES == 0)); then TRAIN_FLAGS+=" --prior_loss_weight 0"; fi
  TRAIN_FLAGS+=" ${MORE_FLAGS:-}"
  RESULT_DIR=$TUNED_MODEL_DIR
  RESULT=(--model_dir "$TUNED_MODEL_DIR")
  if [[ "$TRAIN_FLAGS" == *--use_lora* ]]; then
    RESULT_DIR=$LORA_DIR
    RESULT=(--model_dir "$ORIG_MODEL_PATH" --lora_weights_dir "$LORA_DIR")
  fi
}

# Complete TRAIN_FLAGS (not called if it is set from outside): the recipe, LoRA's if LORA is set; batch size and
# steps; and flags that make it fit the GPUs' memory. Several GPUs share the pairs of a step, rounded up to as many
# on each. The number of steps stays the same: in far fewer, the subject is learned worse at any learning rate.
complete_recipe() {
  local added= full= pairs=$(((PAIRS + NUM_WORKERS - 1) / NUM_WORKERS))
  if [[ "${LORA:-0}" == 1 ]]; then added=--use_lora; fi
  if [[ "${LORA:-}" == 0 ]]; then full=--full; fi
  if [[ "$ORIG_MODEL_NAME" != pocket ]]; then
    added=$("$PYTHON" -m dreambooth.machines.memory --model_dir "$ORIG_MODEL_PATH" --num_workers "$NUM_WORKERS" \
      --pairs "$pairs" $added $full ${MORE_FLAGS:-})
  fi
  if [[ "$added" == *--use_lora* ]]; then TRAIN_FLAGS=$LORA_FLAGS; fi
  TRAIN_FLAGS="--train_batch_size $pairs --max_train_steps $STEPS $TRAIN_FLAGS $added"
}

# All variables that are not set from outside, and the caller's prompts, scenes and all_scenes; refuses what
# cannot work.
choose_settings() {
  # Look for GPUs, on this machine or in the cluster at RAY_ADDRESS, and choose the model.
  NUM_GPUS=${NUM_GPUS:-$("$PYTHON" -m dreambooth.machines.gpus)}
  check_number 0 NUM_GPUS
  NUM_WORKERS=${NUM_WORKERS:-$((NUM_GPUS > 0 ? NUM_GPUS : 1))}
  OWN_TRAIN_FLAGS=${TRAIN_FLAGS:-}
  local flags last_weight='.* --prior_loss_weight[ =]([^ ]*)'
  flags=" $(tr -s '[:space:]' ' ' <<<"$OWN_TRAIN_FLAGS ${MORE_FLAGS:-}") "
  if [[ "$flags" == *" --use_lora "* ]]; then LORA=1; fi
  if [[ "$flags" =~ $last_weight && "${BASH_REMATCH[1]}" =~ ^[0.]+$ ]]; then NUM_CLASS_IMAGES=0; fi
  [[ "${LORA:-0}" == [01] ]] || refuse "LORA=$LORA: must be 0 or 1"
  # Refuse flags of which this script has a variable.
  local own
  for own in model_dir=ORIG_MODEL_PATH output_dir=TUNED_MODEL_DIR instance_images_dir=INSTANCE_DIR \
    instance_prompt=INSTANCE_PROMPT class_images_dir=IMAGES_REG_DIR class_prompt=CLASS_PROMPT \
    preview_every=PREVIEW_EVERY; do
    [[ "$flags" != *" --${own%=*}"[\ =]* ]] ||
      refuse "--${own%=*} in TRAIN_FLAGS or MORE_FLAGS: set ${own#*=} instead"
  done
  if [[ -n "$OWN_TRAIN_FLAGS" ]]; then
    for own in PAIRS STEPS LORA_FLAGS; do
      [[ -z "${!own:-}" ]] || refuse "$own is part of the recipe, which TRAIN_FLAGS replaces: set one of them"
    done
  fi
  [[ "$flags" != *" --dry_run "* ]] || refuse "--dry_run is for train.py itself: step 5 needs the result of step 4"
  choose_model
  OWN_MODEL=
  local cache=${ORIG_MODEL_DIR:-${DATA_PREFIX:-/tmp}/model-orig}
  if [[ -n "${ORIG_MODEL_PATH:-}" && "$ORIG_MODEL_PATH" != "$cache"/* ]]; then
    # A directory of the user's own: nothing is downloaded. (In the cache a download may be half done.)
    OWN_MODEL=1 ORIG_MODEL_HASH=${ORIG_MODEL_HASH:-local}
    ORIG_MODEL_NAME=${ORIG_MODEL_NAME:-$(basename "$ORIG_MODEL_PATH")}
  fi
  if ((NUM_GPUS == 0)) && [[ -z "${ORIG_MODEL_NAME:-}" ]]; then
    echo "no CUDA GPU here: using the embedded pocket model (MODEL names another)"
    ORIG_MODEL_NAME=pocket
  fi
  ORIG_MODEL_NAME=${ORIG_MODEL_NAME:-CompVis/stable-diffusion-v1-4}
  # The recipe goes by the name, and for a directory of the user's own by the class of its pipeline.
  local kind=$ORIG_MODEL_NAME
  if [[ -n "$OWN_MODEL" && "$kind" != pocket ]]; then
    kind=$(grep -o '[A-Za-z0-9]*Pipeline' "$ORIG_MODEL_PATH/model_index.json" 2>/dev/null) || kind=$ORIG_MODEL_NAME
  fi
  case "$kind" in
    pocket) use_pocket ;;
    *[kK]lein*) use_klein ;;
    *xl* | *XL*) use_stable_diffusion_xl ;;
    *) use_stable_diffusion ;;
  esac
  [[ -n "${ORIG_MODEL_HASH:-}" ]] || refuse "set ORIG_MODEL_HASH to the commit of $ORIG_MODEL_NAME to use"
  [[ -n "$OWN_MODEL" || "$kind" == pocket || "$ORIG_MODEL_HASH" =~ ^[0-9a-f]{40}$ ]] ||
    refuse "ORIG_MODEL_HASH=$ORIG_MODEL_HASH: must be a commit, 40 digits and letters from a to f"
  NUM_CLASS_IMAGES=${NUM_CLASS_IMAGES:-200}
  PREVIEW_EVERY=${PREVIEW_EVERY:-100}
  check_number 1 PAIRS STEPS NUM_WORKERS
  check_number 0 NUM_CLASS_IMAGES PREVIEW_EVERY
  set_paths
  [[ "$(absolute "$SUBJECT_DIR")" != "$(absolute "$INSTANCE_DIR")" ]] ||
    refuse "results would go among the photos in $INSTANCE_DIR: set SUBJECT_DIR"
  UNIQUE_TOKEN=${UNIQUE_TOKEN:-unqtkn}
  CLASS_PROMPT=${CLASS_PROMPT:-photo of a $CLASS_NAME}
  INSTANCE_PROMPT=${INSTANCE_PROMPT:-photo of $UNIQUE_TOKEN $CLASS_NAME}
  OTHER_PROMPT=${OTHER_PROMPT:-photo of a house}  # what must not change, beside the class
  if [[ "$OTHER_PROMPT" == "$CLASS_PROMPT" ]]; then OTHER_PROMPT="photo of a car"; fi
  local scene
  all_scenes=${SCENES//$'\n'/|}
  IFS='|' read -ra scenes <<<"$all_scenes"
  for scene in "${scenes[@]}"; do prompts+=("$INSTANCE_PROMPT $scene"); done
  prompts+=("$CLASS_PROMPT" "$OTHER_PROMPT" "$OTHER_PROMPT ${scenes[${#scenes[@]}-1]}")
  if [[ "$ORIG_MODEL_NAME" != pocket && -z "$OWN_MODEL" ]]; then check_cheaply; fi
}

# Before gigabytes are downloaded: the flags and the photos.
check_cheaply() {
  "$PYTHON" -c 'import sys, train; train.parse_args(sys.argv[1:])' --model_dir "$ORIG_MODEL_DIR" \
    --output_dir "$TUNED_MODEL_DIR" --instance_images_dir "$INSTANCE_DIR" --instance_prompt "$INSTANCE_PROMPT" \
    --class_prompt "$CLASS_PROMPT" $OWN_TRAIN_FLAGS ${MORE_FLAGS:-}
  is_example || "$PYTHON" -m dreambooth.files.photos "$INSTANCE_DIR"
}

is_example() { [[ "$(absolute "$INSTANCE_DIR")" == "$(absolute images/dog)" ]]; }

# Each of the named variables must be a whole number of at least $1.
check_number() {
  local least=$1 name
  shift
  for name in "$@"; do
    [[ "${!name}" =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((${!name} >= least)) ||
      refuse "$name=${!name}: must be a whole number of at least $least, with at most 9 digits"
  done
}

# Run a long command and pass a scheduler's TERM on to it, so that training writes a checkpoint. (A terminal sends
# Ctrl-C to both.)
run() {
  local code child
  (trap - INT; exec "$@") &  # else Ctrl-C would not reach a background command
  child=$!
  trap 'kill -TERM "$child"' TERM
  trap : INT HUP  # which a terminal sends to both
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do :; done
  trap - TERM INT HUP
  return "$code"
}

refuse() { echo "error: $1" >&2; exit 2; }

step() { echo "--- $SECONDS s, step $1: $2"; }

# Use the running Python if it has the pinned packages, else .venv, made on first use (5.4 GB, minutes).
find_python() {
  PYTHON=${PYTHON:-python3}
  "$PYTHON" -m dreambooth.installed 2>/dev/null && return
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    refuse "Python 3.11 or newer is needed; name it: PYTHON=python3.12 ./run.sh"
  if ! .venv/bin/python -m dreambooth.installed 2>/dev/null; then
    echo "installing requirements.txt into .venv"
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  fi
  PYTHON=$PWD/.venv/bin/python
}

# A path without links and "..", whether or not anything is there. macOS's realpath has no -m.
absolute() {
  realpath -m "$1" 2>/dev/null || python3 -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$1"
}

# Paths are relative to the caller's directory; the scripts are beside this file.
for name in DATA_PREFIX SUBJECT_DIR INSTANCE_DIR ORIG_MODEL_DIR ORIG_MODEL_PATH {TUNED_MODEL,LORA,IMAGES_REG,IMAGES_OWN,IMAGES_NEW}_DIR; do
  [[ ! "${!name:-}" =~ ^[A-Za-z][A-Za-z0-9+.-]*:// ]] || refuse "$name=${!name} is a URL: name a path, mount its storage"
  [[ -z "${!name:-}" ]] || declare "$name=$(absolute "${!name}")"
done
if [[ "${PYTHON:-}" == */* ]]; then PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON"); fi
cd "$(dirname "$(realpath "$0")")"
case "${1:-}" in
  "") find_python; main ;;
  test) find_python; exec "$PYTHON" -m pytest -q ;;
  *) sed -n '2,14s/^# \{0,1\}//p' run.sh; [[ "$1" == --help || "$1" == -h ]] || exit 2 ;;
esac
