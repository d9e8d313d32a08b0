"""What counts as good enough to go on from."""

import math

import pytest

from nfd_env.evaluation.clips import ActionReport
from nfd_env.recipe.gates import (
    FALLBACK,
    Drawn,
    Gate,
    action_gates,
    distill_gates,
    fewest_steps,
    length_gate,
    reading_gates,
    recording_gates,
    tokenizer_gates,
    world_gates,
)
from nfd_env.recipe.measure import GameMeasures

MEASURES = GameMeasures(
    frame_size=[64, 64],
    small=3.0,
    moved=0.02,
    episodes=40,
    median_length=80,
    longest=200,
    ends=20,
    mean_return=1.0,
)


@pytest.mark.parametrize(
    ("shift", "imported", "passes"),
    [(0, False, True), (-1, False, True), (1, False, False)]
    + [(0, True, True), (-1, True, False), (1, True, False)],
)
def test_actions_that_are_shown_late_are_the_games_own_or_a_fault(
    shift: int, imported: bool, passes: bool
) -> None:
    *_, gate = recording_gates(MEASURES, shift, imported=imported)
    assert gate.passed == passes and not gate.stops
    assert ("the game shows it a frame later" in gate.line()) == (not imported)


def test_without_a_visible_effect_there_is_no_such_gate() -> None:
    assert len(recording_gates(MEASURES, None)) == 2


TEACHER = {"texture": 0.0066, "frechet": 110.0, "error_8": 0.26, "standing_32": 3.28}
FAR = (9.0, 999.0, 9.0, 99.0)


def distilled(**few: tuple[float, ...]) -> dict[str, float]:
    """What ``TEACHER`` names, of few steps: the student's the teacher's own, its are far off."""
    metrics = {f"teacher_{name}": value for name, value in TEACHER.items()}
    for steps in (1, 2, 4):
        for who, usual in (("steps", tuple(TEACHER.values())), ("teacher", FAR)):
            values = few.get(f"{who}{steps}", usual)
            metrics |= {f"{who}{steps}_{n}": v for n, v in zip(TEACHER, values, strict=True)}
    return metrics


@pytest.mark.parametrize(
    ("metrics", "drawn"),
    [
        (distilled(), Drawn("student", 1)),
        # As measured on BigFish: the student drifts, the teacher's one step is blurred.
        (
            distilled(
                steps1=(0.0284, 125, 0.268, 5.11),
                steps2=(0.0163, 128, 0.279, 4.81),
                teacher1=(0.0509, 137, 0.175, 2.92),
                teacher2=(0.0257, 110, 0.190, 1.75),
            ),
            Drawn("teacher", 2),
        ),
        (distilled(steps1=(0.0066, 170, 0.26, 3)), Drawn("student", 2)),
        (distilled(steps1=(0.0066, 110, 0.5, 3)), Drawn("student", 2)),
        (distilled(steps1=(0.04, 110, 0.26, 3)), Drawn("student", 2)),
        # Fading is drift too.
        (distilled(steps1=(0.0066, 110, 0.26, 0.2)), Drawn("student", 2)),
        (distilled(steps1=FAR, steps2=FAR, steps4=FAR), FALLBACK),
        # The teacher's own few steps, where the student's are further off or not near.
        (distilled(teacher1=(0.0066, 105, 0.2, 2)), Drawn("teacher", 1)),
        (distilled(teacher1=(0.0066, 115, 0.2, 2)), Drawn("student", 1)),
    ],
)
def test_what_is_near_with_the_fewest_steps_is_taken(
    metrics: dict[str, float], drawn: Drawn
) -> None:
    assert fewest_steps(metrics) == drawn
    gates = distill_gates(metrics, drawn)
    assert all(gate.passed for gate in gates) == drawn.near and len(gates) == 4


def test_where_nothing_stands_out_drift_is_not_judged() -> None:
    metrics = {name: v for name, v in distilled().items() if "standing" not in name}
    assert len(distill_gates(metrics, fewest_steps(metrics))) == 3
    assert fewest_steps(metrics) == Drawn("student", 1)


@pytest.mark.parametrize(
    ("generated", "reencoded", "shuffled", "passed"),
    [
        (0.86, 0.9, 0.12, [True, True, True]),
        (0.5, 0.9, 0.12, [False, True, True]),
        (0.5, 0.5, 0.12, [True, False, True]),
        (0.9, 0.9, 0.4, [True, True, False]),
        (-0.2, -0.1, -0.9, [False, False, True]),  # R² may be less than nothing
    ],
)
def test_keys_do_what_they_say(
    generated: float, reencoded: float, shuffled: float, passed: list[bool]
) -> None:
    relative = generated / reencoded if reencoded > 0 else float("nan")
    report = ActionReport("F1", generated, 0.95, reencoded, shuffled, 0.11, relative, 9, 32, [])
    gates = action_gates(report)
    assert [gate.passed for gate in gates] == passed
    assert not any(gate.stops for gate in gates)


def test_actions_that_do_not_show_are_told_before_anything_is_trained() -> None:
    (shown,), (hidden,) = reading_gates({"f1": 0.8}), reading_gates({"r2": 0.1})
    assert shown.passed and not hidden.passed and hidden.line().startswith("warning R²")


@pytest.mark.parametrize(
    ("energy", "passes"),
    [(0.75, True), (1.2, True), (5.6, False), (0.2, False), (math.inf, False), (math.nan, False)],
)
def test_a_world_whose_pictures_do_not_last_is_told(energy: float, passes: bool) -> None:
    gate, *others = world_gates(1.0, math.nan, 512, energy)
    assert gate.passed == passes and all(other.passed for other in others)
    assert ("energy of the latents after 512 frames" in gate.line()) and not gate.stops
    assert ("give more minutes" in gate.line()) == (not passes)


def test_episodes_that_were_all_cut_off_early_are_told_of() -> None:
    assert length_gate(0.0, 300).passed
    assert "300 steps" in length_gate(0.9, 300).line() and not length_gate(0.9, 300).passed


def test_a_tokenizer_that_shows_the_frame_before_does_not_pass() -> None:
    def gate(moving: float) -> Gate:
        metrics = {"psnr": 40.0, "moving_psnr": moving, "moving_psnr_frozen": 17.0}
        return tokenizer_gates(metrics)[0]

    assert not gate(17.0).passed and gate(17.0).stops and gate(24.0).passed
    (only,) = tokenizer_gates({"psnr": 40.0})  # nothing moved in the held-out frames
    assert only.passed
