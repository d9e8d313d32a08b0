"""Does a world rank policies as the real game does?

Each policy is scored on both sides, as ``nfd eval-agent`` does it; what counts is how the two
columns of mean returns go together, and how far the world flatters its policies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nfd_env.envs.vector_env import NFDVectorEnv
from nfd_env.evaluation.agents import AgentEvaluation, Scores, Scoring, evaluate_agent
from nfd_env.evaluation.tables import report_json, table, told_with_error
from nfd_env.files import atomic_write
from nfd_env.players.load import load_player, read_agent_spec
from nfd_env.sources.source import SourceError
from nfd_env.video import write_png

PLOT = "ranking.png"
_FEWEST = 3  # policies; two always lie on a line
_RESAMPLES = 2000  # of the episodes, for the errors of the correlations
_SIZE, _MARGIN = 480, 60  # pixels of the scatter plot


@dataclass(frozen=True)
class Interval:
    """A figure, NaN where there is none, and how sure it is; see ``Ranking``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranked:
    """One policy, and what it scored in the learned world and in the real game."""

    agent: str
    learned: Scores
    real: Scores


@dataclass(frozen=True)
class Ranking:
    """How a world ranks policies.

    Attributes:
        world: its name.
        policies: as they were given.
        spearman: correlation of ranks, from -1 to 1, with the 2.5th and 97.5th percentile over
            resampled episodes (bootstrap); NaN where one side scores all policies alike.
        pearson: correlation of mean returns, likewise.
        kindness: mean return in the learned world over that in the real game: the median, the least
            and the greatest of the policies that have a real mean above 0. Above 1 the world is too
            kind.
        length_ratio: the same of the lengths of episodes, of all policies.
    """

    world: str
    policies: list[Ranked]
    spearman: Interval
    pearson: Interval
    kindness: Interval
    length_ratio: Interval


def rank_policies(
    agents: Sequence[str],
    settings: Scoring,
    progress: bool = True,
    known: Callable[[Ranking], object] = lambda ranking: None,
) -> Ranking:
    """Score policies in a world and in its real game.

    Args:
        agents: 3 or more, better 8, named as for ``AgentEvaluation``: checkpoints of one training,
            "random", scripted policies.
        settings: how each is scored; ``world`` is needed.
        progress: show progress bars.
        known: called with the ranking of those that have been scored, as soon as there are enough,
            so that a long run that is stopped has told something.

    Raises:
        ValueError: on too few or equal policies, one that cannot be played on both sides, or single
            episodes, of which nothing says how much they vary.
        SourceError: when the real game cannot be made.
    """
    if len(set(agents)) < max(_FEWEST, len(agents)):
        raise ValueError(f"a ranking needs at least {_FEWEST} different policies, got {agents}")
    if not settings.world:
        raise ValueError("a ranking needs a world")
    if settings.episodes < 2:
        raise ValueError(f"a ranking needs 2 episodes or more a policy, got {settings.episodes}")
    for agent in agents:  # all, before any is played for hours
        _check(agent, settings)
    rows, name = [], ""
    for agent in agents:
        report = evaluate_agent(AgentEvaluation(agent, **vars(settings)), progress=progress)
        if report.real is None or report.learned is None:
            raise SourceError(f"a ranking needs the real game: {report.missing}")
        rows.append(Ranked(agent, report.learned, report.real))
        name = report.world
        if len(rows) >= _FEWEST:
            known(rank(name, rows, settings.seed))
    return rank(name, rows, settings.seed)


def _check(agent: str, settings: Scoring) -> None:
    """Raise ValueError for an agent that cannot play the learned world as the settings say."""
    spec = read_agent_spec(agent, settings.world, settings.trust)
    env = NFDVectorEnv(
        str(settings.world),
        1,
        settings.device,
        precision=settings.precision,
        obs_type=spec.obs_type if spec else "rgb",
        frame_skip=spec.frame_skip if spec else 1,
    )
    load_player(agent, env, trust=settings.trust)


def rank(world: str, policies: list[Ranked], seed: int = 0) -> Ranking:
    """Correlate scores that are there; ``seed`` is that of the bootstrap."""
    sides = [[np.array(getattr(p, side).scores) for p in policies] for side in ("learned", "real")]
    means = [np.array([scores.mean() for scores in side]) for side in sides]
    rng = np.random.default_rng(seed)
    drawn = [
        [np.array([rng.choice(scores, len(scores)).mean() for scores in side]) for side in sides]
        for _ in range(_RESAMPLES)
    ]
    correlations: list[Interval] = []
    for of in (spearman, pearson):
        values = np.array([of(*pair) for pair in drawn])
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, (2.5, 97.5)) if len(values) else (np.nan, np.nan)
        correlations.append(Interval(of(*means), float(low), float(high)))
    ranks, linear = correlations
    paid = means[1] > 0
    kindness = _spread(means[0][paid] / means[1][paid])
    lengths = _spread(np.array([p.learned.length / p.real.length for p in policies]))
    return Ranking(world, policies, ranks, linear, kindness, lengths)


def _spread(ratios: np.ndarray) -> Interval:
    found = (np.median, np.min, np.max)
    return Interval(*(float(of(ratios)) if len(ratios) else float("nan") for of in found))


def pearson(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's correlation coefficient; NaN where one of the two does not vary."""
    a, b = left - left.mean(), right - right.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size else float("nan")


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's: Pearson's of the ranks, where equals share the mean of their ranks."""
    return pearson(_ranks(left), _ranks(right))


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) - 1) / 2


def write_ranking(ranking: Ranking, folder: str | Path) -> Path:
    """Write ``ranking.json`` and the scatter plot ``ranking.png``; returns the plot's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "ranking.json") as path:
        path.write_text(report_json(ranking), encoding="utf-8")
    return write_png(folder / PLOT, scatter(ranking))


def scatter(ranking: Ranking) -> np.ndarray:
    """Real (x) against learned (y) mean returns with standard errors, uint8 RGB; line: y = x."""
    from PIL import Image, ImageDraw, ImageFont

    points = np.array([[p.real.mean, p.learned.mean] for p in ranking.policies])
    errors = np.array([[p.real.standard_error, p.learned.standard_error] for p in ranking.policies])
    low, high = float((points - errors).min()), float((points + errors).max())
    room = 0.05 * (high - low) or 1.0
    low, high = low - room, high + room
    picture = Image.new("RGB", (_SIZE, _SIZE), (255, 255, 255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    inner = _SIZE - 2 * _MARGIN

    def at(x: float, y: float) -> tuple[int, int]:
        right, up = ((v - low) / (high - low) * inner for v in (x, y))
        return _MARGIN + round(right), _SIZE - _MARGIN - round(up)

    def write(text: str, place: tuple[int, int]) -> None:
        draw.text(place, text, (40, 40, 40), font, anchor="ls")

    draw.rectangle((*at(low, high), *at(high, low)), outline=(170, 170, 170))
    draw.line((at(low, low), at(high, high)), (200, 200, 200))
    for number, ((x, y), (dx, dy)) in enumerate(zip(points, errors, strict=True), 1):
        draw.line((at(x - dx, y), at(x + dx, y)), (90, 130, 200))
        draw.line((at(x, y - dy), at(x, y + dy)), (90, 130, 200))
        column, row = at(x, y)
        draw.ellipse((column - 4, row - 4, column + 4, row + 4), (30, 80, 170))
        write(str(number), (column + 6, row - 6))
    write(f"{ranking.world}: mean returns, Spearman {ranking.spearman.value:.2f}", (12, 24))
    write("real game", (_SIZE // 2 - 30, _SIZE - 14))
    write("learned", (4, _MARGIN - 10))
    for value in (low + room, high - room):
        write(f"{value:.4g}", (at(value, low)[0] - 14, _SIZE - _MARGIN + 18))
        write(f"{value:.4g}", (6, at(low, value)[1] + 4))
    return np.array(picture)


def format_ranking(ranking: Ranking) -> str:
    """The ranking as Markdown."""
    rows = []
    for number, policy in enumerate(ranking.policies, 1):
        cells = [str(number), policy.agent]
        for row in (policy.real, policy.learned):
            cells.append(told_with_error(row.mean, row.standard_error))
        cells += [f"{policy.real.length:.0f}", f"{policy.learned.length:.0f}"]
        rows.append(cells)
    columns = ["", "policy", "real game", "learned world", "frames, real", "frames, learned"]
    episodes = len(ranking.policies[0].real.scores)
    between = " (95 % of resampled episodes: {:.2f} to {:.2f})"
    s, p, kind, long = ranking.spearman, ranking.pearson, ranking.kindness, ranking.length_ratio
    return "\n".join(
        [
            f"{ranking.world}: mean returns of {len(rows)} policies, {episodes} episodes on each "
            "side, ± standard errors",
            "",
            table(columns, rows),
            "",
            f"Spearman {s.value:.2f}{between.format(s.low, s.high)}, Pearson {p.value:.2f}"
            f"{between.format(p.low, p.high)}: 1 where the world ranks policies as the game does, "
            f"0 where it says nothing. Returns in the world are {kind.value:.2f} times as high as "
            f"in the game (median of the policies; {kind.low:.2f} to {kind.high:.2f}), episodes "
            f"{long.value:.2f} times as long ({long.low:.2f} to {long.high:.2f}): above 1 the "
            "world is too kind.",
        ]
    )
