"""What counts as good enough to go on from."""

import pytest

from nfd_env.evaluation.inverse_dynamics import ActionReport
from nfd_env.recipe.gates import (
    action_gates,
    distill_gates,
    reading_gates,
    recording_gates,
    student_steps,
)
from nfd_env.recipe.measure import GameMeasures

MEASURES = GameMeasures(
    frame_size=[64, 64],
    small=3.0,
    moved=0.02,
    frozen_moving_psnr=10.0,
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


TEACHER = {"texture": 0.0066, "frechet": 125.0, "error_8": 0.26}


def distilled(**steps: tuple[float, float, float]) -> dict[str, float]:
    """Texture, distance and error of steps1, steps2 and steps4, which else are the teacher's."""
    metrics = {f"teacher_{name}": value for name, value in TEACHER.items()}
    for who in ("steps1", "steps2", "steps4"):
        values = steps.get(who, tuple(TEACHER.values()))
        metrics |= {f"{who}_{n}": v for n, v in zip(TEACHER, values, strict=True)}
    return metrics


@pytest.mark.parametrize(
    ("metrics", "steps"),
    [
        (distilled(), 1),
        # As measured on BigFish after a short distillation.
        (distilled(steps1=(0.0326, 170, 0.256), steps2=(0.0185, 144, 0.283)), 4),
        (distilled(steps1=(0.0066, 190, 0.26)), 2),
        (distilled(steps1=(0.0066, 125, 0.5)), 2),
        (distilled(steps1=(9, 9, 9), steps2=(9, 9, 9), steps4=(9, 9, 9)), 0),
    ],
)
def test_a_student_is_taken_where_its_gates_pass(metrics: dict[str, float], steps: int) -> None:
    assert student_steps(metrics) == steps
    gates = distill_gates(metrics, steps)
    assert all(gate.passed for gate in gates) == bool(steps) and len(gates) == 3


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
