"""What a run's figures say, and what to change: a table of rules, each with a name.

A rule speaks only where its figure is off. Its figure comes from the run's record and metrics, from
the images, or from tests/benchmarks/fidelity.py: with the pocket model's judge (subject,
composition, prior, diversity: shares, where 1 is best) or with the paper's encoders (DINO, CLIP-T,
PRES, DIV: compared with the original model's).
"""

import math
from collections import namedtuple
from statistics import mean, stdev

Rule = namedtuple("Rule", "name is_off finding remedy")
# `rows`: the lines of metrics.jsonl. `status`: how the run ended. `tuned`, `original`: figures by
# name, {} if there are none. `contrast`: of the images after, relative to before; None without.
Facts = namedtuple("Facts", "rows status tuned original contrast", defaults=({}, {}, None))

MIN_ROWS = 6  # of metrics: fewer do not show a trend
MIN_RISE = 1.1  # of the loss on class images, last third against first third
MIN_SHARE = 0.6  # of images that show what they should
MIN_CLASS_SHARE = 0.8
MIN_DIVERSITY = 0.7  # relative to the original model
MIN_DINO_GAIN = 0.1
MIN_CLIP_T = 0.9  # relative to the original model
MAX_PRES_GAIN = 0.15
MIN_CONTRAST = 0.6


def loss_not_finite(facts):
    """The run stopped for it, or its metrics show it."""
    values = [row.get(name, 0.0) for row in facts.rows for name in ("loss", "grad_norm")]
    stopped = "the loss is" in facts.status or "not finite" in facts.status
    return stopped or not all(map(math.isfinite, values))


def out_of_memory(facts):
    return "out of GPU memory" in facts.status


def class_loss_rises(facts):
    """Its mean over the last third of the run is above the first third's: by a tenth, and by more
    than twice the standard error."""
    losses = [row["class_loss"] for row in facts.rows if "class_loss" in row]
    if len(losses) < MIN_ROWS or not all(map(math.isfinite, losses)):
        return False
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    error = math.hypot(stdev(first), stdev(last)) / math.sqrt(third)
    rise = mean(last) - mean(first)
    return mean(last) > MIN_RISE * mean(first) and rise > 2 * error


def subject_missing(facts):
    """Few images of the instance prompt show the subject."""
    if "DINO" in facts.tuned and "DINO" in facts.original:
        return facts.tuned["DINO"] < facts.original["DINO"] + MIN_DINO_GAIN
    return facts.tuned.get("subject", 1.0) < MIN_SHARE


def photos_copied(facts):
    """The subject is there, but not in the places that the prompts name."""
    if subject_missing(facts):
        return False
    if "CLIP-T" in facts.tuned and "CLIP-T" in facts.original:
        return facts.tuned["CLIP-T"] < MIN_CLIP_T * facts.original["CLIP-T"]
    return facts.tuned.get("composition", 1.0) < MIN_SHARE


def class_lost(facts):
    """Images of the class prompt show the subject, or look alike."""
    tuned, original = facts.tuned, facts.original
    if "PRES" in tuned and "PRES" in original:
        gain = tuned["PRES"] - original["PRES"]
        return gain > MAX_PRES_GAIN or tuned["DIV"] < MIN_DIVERSITY * original["DIV"]
    alike = tuned.get("diversity", 1.0) < MIN_DIVERSITY
    return alike or tuned.get("prior", 1.0) < MIN_CLASS_SHARE


def black(facts):
    return facts.contrast is not None and facts.contrast < 0.05


def washed_out(facts):
    return facts.contrast is not None and not black(facts) and facts.contrast < MIN_CONTRAST


RULES = [
    Rule(
        "loss not finite",
        loss_not_finite,
        "The loss or the gradients stopped being finite numbers.",
        "Lower --lr to a tenth; with --param_dtype bf16 try fp32.",
    ),
    Rule(
        "out of memory",
        out_of_memory,
        "The GPU's memory did not suffice.",
        "Give --gradient_checkpointing, then --param_dtype bf16 or --use_lora.",
    ),
    Rule(
        "class loss rises",
        class_loss_rises,
        "The loss on class images rises: the model is forgetting the class.",
        "Raise --prior_loss_weight, or train for fewer steps.",
    ),
    Rule(
        "class lost",
        class_lost,
        "Images of the class show the subject, or all look alike.",
        "Raise --prior_loss_weight (usual: 1.0), add class images, or train for fewer steps.",
    ),
    Rule(
        "photos copied",
        photos_copied,
        "The subject is there, but the prompt's place is not: the photos are repeated.",
        "Train for fewer steps (--max_train_steps) or lower --lr; give photos in more places.",
    ),
    Rule(
        "subject not there",
        subject_missing,
        "The model has not learned the subject yet.",
        "Train for more steps (--max_train_steps, --num_epochs) or raise --lr.",
    ),
    Rule(
        "black images",
        black,
        "The images are black or of one colour.",
        "Lower --lr to a tenth; check the class images for black ones.",
    ),
    Rule(
        "washed-out images",
        washed_out,
        "The images have far less contrast than the original model's.",
        "Lower --lr or train for fewer steps; sample with a lower --guidance_scale.",
    ),
]


def advice(facts):
    """The rules whose figure is off, in the order of the table."""
    return [rule for rule in RULES if rule.is_off(facts)]
