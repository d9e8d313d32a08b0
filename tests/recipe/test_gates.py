"""What counts as good enough to go on from."""

import pytest

from nfd_env.recipe.gates import FALLBACK, Drawn, distill_gates, fewest_steps, recording_gates
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


def distilled(**few: tuple[float, float, float]) -> dict[str, float]:
    """Texture, distance and error of few steps: the student's the teacher's own, its far off."""
    metrics = {f"teacher_{name}": value for name, value in TEACHER.items()}
    for steps in (1, 2, 4):
        for who, usual in (("steps", tuple(TEACHER.values())), ("teacher", (9.0, 999.0, 9.0))):
            values = few.get(f"{who}{steps}", usual)
            metrics |= {f"{who}{steps}_{n}": v for n, v in zip(TEACHER, values, strict=True)}
    return metrics


@pytest.mark.parametrize(
    ("metrics", "drawn"),
    [
        (distilled(), Drawn("student", 1)),
        # As measured on BigFish after a short distillation.
        (
            distilled(steps1=(0.0326, 170, 0.256), steps2=(0.0185, 144, 0.283)),
            Drawn("student", 4),
        ),
        (distilled(steps1=(0.0066, 190, 0.26)), Drawn("student", 2)),
        (distilled(steps1=(0.0066, 125, 0.5)), Drawn("student", 2)),
        (distilled(steps1=(9, 999, 9), steps2=(9, 999, 9), steps4=(9, 999, 9)), FALLBACK),
        # The teacher's own few steps, where the student's are further off or not near.
        (distilled(teacher1=(0.0066, 120, 0.2)), Drawn("teacher", 1)),
        (distilled(teacher1=(0.0066, 130, 0.2)), Drawn("student", 1)),
        (
            distilled(steps1=(9, 999, 9), steps2=(9, 999, 9), teacher2=(0.007, 140, 0.26)),
            Drawn("teacher", 2),
        ),
    ],
)
def test_what_is_near_with_the_fewest_steps_is_taken(
    metrics: dict[str, float], drawn: Drawn
) -> None:
    assert fewest_steps(metrics) == drawn
    gates = distill_gates(metrics, drawn)
    assert all(gate.passed for gate in gates) == drawn.near and len(gates) == 3
