"""Each rule of advice on facts made to break it, and silence where nothing is off."""

import math

import numpy as np
import pytest

from dreambooth.advice import RULES, Facts, advice


def curve(first, last, count=30, noise=0.1, seed=0):
    """Metrics whose loss on class images goes from `first` to `last`, as noisy as a real run's."""
    rng = np.random.default_rng(seed)
    means = np.linspace(first, last, count)
    return [
        {
            "step": 10 * (i + 1),
            "loss": 0.2 + value,
            "instance_loss": 0.2,
            "class_loss": value,
            "grad_norm": 1.0,
        }
        for i, value in enumerate(means * (1 + noise * rng.standard_normal(count)))
    ]


GOOD = {"subject": 1.0, "composition": 0.85, "prior": 1.0, "diversity": 0.95, "others": 0.9}
ORIGINAL = {"subject": 0.0, "composition": 0.0, "prior": 1.0, "diversity": 1.0, "others": 0.9}
PAPER_ORIGINAL = {"DINO": 0.35, "CLIP-I": 0.7, "CLIP-T": 0.31, "PRES": 0.35, "DIV": 0.6}
PAPER_GOOD = {"DINO": 0.65, "CLIP-I": 0.8, "CLIP-T": 0.30, "PRES": 0.4, "DIV": 0.55}


def facts(rows=None, status="finished", original=ORIGINAL, contrast=1.0, **changes):
    tuned = {**(PAPER_GOOD if original is PAPER_ORIGINAL else GOOD), **changes}
    rows = curve(0.1, 0.1) if rows is None else rows
    return Facts(rows, status, tuned, original, contrast)


def paper(**changes):
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    return facts(original=PAPER_ORIGINAL, **changes)


def nan_rows():
    rows = curve(0.1, 0.1)
    rows[-1] = {**rows[-1], "loss": math.nan}
    return rows


BROKEN = [
    ("loss not finite", facts(rows=nan_rows())),
    ("loss not finite", facts(status="the loss is nan at step 7: lower --lr")),
    ("loss not finite", facts(status="the gradients are not finite at step 7: lower --lr")),
    ("out of memory", facts(status="out of GPU memory: give --gradient_checkpointing")),
    ("class loss rises", facts(rows=curve(0.1, 0.2))),
    ("class lost", facts(prior=0.3)),
    ("class lost", facts(diversity=0.4)),
    ("class lost", paper(PRES=0.6)),
    ("class lost", paper(DIV=0.3)),
    ("photos copied", facts(composition=0.2)),
    ("photos copied", paper(CLIP_T=0.2)),
    ("subject not there", facts(subject=0.1, composition=0.0)),
    ("subject not there", paper(DINO=0.38)),
    ("black images", facts(contrast=0.0)),
    ("washed-out images", facts(contrast=0.4)),
]


@pytest.mark.parametrize(("name", "broken"), BROKEN)
def test_a_rule_speaks_alone_where_its_figure_is_off(name, broken):
    assert [rule.name for rule in advice(broken)] == [name]


def test_each_rule_is_tested():
    assert {name for name, _ in BROKEN} == {rule.name for rule in RULES}


def test_a_good_run_gets_no_advice():
    assert advice(facts()) == []
    assert advice(paper()) == []


def test_a_run_without_figures_and_images_gets_no_advice():
    assert advice(Facts(curve(0.1, 0.1), "finished")) == []
    assert advice(Facts([], "running")) == []


def test_noise_is_not_taken_for_a_rise():
    """Of a loss on class images that stays where it is, in 200 runs."""
    alarms = sum(
        bool(advice(facts(rows=curve(0.1, 0.1, noise=0.3, seed=seed)))) for seed in range(200)
    )
    assert alarms <= 10


def test_a_class_half_that_is_not_there_says_nothing():
    rows = [{"step": row["step"], "loss": row["loss"]} for row in curve(0.1, 0.5)]
    assert advice(facts(rows=rows)) == []


def test_an_overtrained_a_good_and_an_untrained_run_are_told_apart():
    names = {
        "good": [rule.name for rule in advice(facts())],
        "overtrained": [rule.name for rule in advice(facts(composition=0.3, prior=0.0))],
        "untrained": [rule.name for rule in advice(facts(subject=0.2, composition=0.1))],
    }
    assert names["good"] == []
    assert names["overtrained"] == ["class lost", "photos copied"]
    assert names["untrained"] == ["subject not there"]


MEASURED = {  # of real runs on pocket: RESULTS.md
    "run.sh's recipe": ((1.00, 0.98, 1.00, 1.02, 1.00), []),
    "a tenth of its steps": ((0.50, 0.30, 0.84, 1.07, 0.97), ["subject not there"]),
    "ten times its steps without the prior loss": (
        (1.00, 0.39, 0.00, 0.61, 0.47), ["class lost", "photos copied"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("run", MEASURED)
def test_the_figures_of_real_runs_get_their_advice(run):
    figures, expected = MEASURED[run]
    changes = dict(zip(GOOD, figures, strict=True))
    assert [rule.name for rule in advice(facts(**changes))] == expected
