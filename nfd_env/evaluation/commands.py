"""``nfd demo``, ``bench``, ``eval``, ``eval-agent`` and ``rank``."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from nfd_env.evaluation.agents import AgentEvaluation, Scoring, evaluate_agent
from nfd_env.evaluation.held_out import EvaluationConfig
from nfd_env.evaluation.tables import check_markers, replace_between_markers, report_json
from nfd_env.files import check_writable, make_folder
from nfd_env.worlds.load import load_world, shipped_worlds
from nfd_env.worlds.rivals import RIVALS

_BATCHES = (1, 8, 32)  # environments that nfd bench times


@dataclass(frozen=True)
class Chosen:
    """A world, and how it computes.

    Attributes:
        world: world folder or shipped world; default: the first shipped one.
        dynamics: student or teacher, of a distilled world that comes with both; autoregressive or
            autoregressive_parallel, where nfd train-baseline made them; default: the world's own.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32 or bf16.
    """

    world: Positional[str] = ""
    dynamics: str | None = None
    device: str = "auto"
    precision: str = "auto"

    def values(self) -> dict[str, Any]:
        """Arguments of ``load_world``."""
        return {**vars(self), "world": self.world or shipped_worlds()[0]}


@dataclass(frozen=True)
class Output:
    """How a table is told.

    Attributes:
        json: print JSON instead of text.
        markdown_into: also put the table into this file, between its lines <!-- begin NAME --> and
            <!-- end NAME -->.
        markdown_name: NAME; default: the command's and what it compares, e.g. bench-compare or
            eval-steps.
    """

    json: bool = False
    markdown_into: str | None = None
    markdown_name: str | None = None

    def tell(self, name: str, measure: Callable[[], Any], text: Callable[[Any], str]) -> int:
        """Measure, print, and put the text into a document, under ``name`` by default."""
        name = self.markdown_name or name
        into = os.path.expanduser(self.markdown_into) if self.markdown_into else None
        if into:  # find out about missing markers before anything is measured
            check_markers(into, name)
            check_writable(into)
        report = measure()
        if into:
            replace_between_markers(into, name, text(report))
        return _show(report, text(report), self.json)


def _show(report: Any, text: str, as_json: bool) -> int:
    print(report_json(report) if as_json else text)
    return 0


def demo(
    chosen: Chosen,
    seconds: float = 20.0,
    out: str = "outputs/demo",
    seed: int = 0,
    sampling_steps: int | None = None,
    gif: str | None = None,
    json: bool = False,
) -> int:
    """Play a world with a scripted player; write a video and a strip.

    Args:
        chosen: the world.
        seconds: playing time.
        out: folder to write to.
        seed: of the episodes.
        sampling_steps: denoising steps a frame; default: the world's own.
        gif: also write the beginning as this GIF.
        json: print JSON instead of text.
    """
    from nfd_env.evaluation.demo import demo as play
    from nfd_env.evaluation.demo import format_report

    _check_seconds(seconds)
    report = play(
        folder=out,
        seconds=seconds,
        seed=seed,
        sampling_steps=sampling_steps,
        gif=gif,
        **chosen.values(),
    )
    return _show(report, format_report(report), json)


def bench(
    chosen: Chosen,
    output: Output,
    seconds: float = 5.0,
    batches: tuple[int, ...] = _BATCHES,
    long_frames: int = 10_000,
    compare: bool = False,
    frame_skip: int | None = None,
    untrained: str | None = None,
    num_envs: int = 1,
    obs_type: Literal["rgb", "latent"] = "rgb",
    agent: str | None = None,
    trust: bool = False,
    speculative_frames: int = 1,
    sampling_steps: int | None = None,
) -> int:
    """Measure how fast a world steps.

    Args:
        chosen: the world.
        output: how it is told.
        seconds: time spent on each figure.
        batches: numbers of environments.
        long_frames: frame number whose cost is compared with frame 10; 0 skips it.
        compare: refilled cache, ring, fewer steps and speculation, measured in turn.
        frame_skip: frames of a repeated action: one by one against jointly.
        untrained: instead of a world, random weights of the sizes in e.g. configs/paper/310m.yaml.
        num_envs: of --compare and --frame-skip.
        obs_type: of the same.
        agent: that --compare takes actions from, named as for nfd eval-agent.
        trust: the agent may be a .zip, which runs code of whoever made it.
        speculative_frames: frames drawn jointly.
        sampling_steps: denoising steps a frame; default: the world's own.
    """
    from nfd_env.evaluation import benchmark
    from nfd_env.evaluation import compare as comparing
    from nfd_env.evaluation.untrained import write_untrained

    _check_seconds(seconds)
    if long_frames < 0:
        raise ValueError(f"--long-frames must be at least 0, got {long_frames}")
    kinds = {"--compare": compare, "--frame-skip": frame_skip, "--untrained": untrained}
    given = [name for name, value in kinds.items() if value]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(kinds)}, not {' and '.join(given)}")
    if untrained and chosen.world:
        raise ValueError("give a world or --untrained, not both")
    if agent is not None and not compare:
        raise ValueError("--agent gives the actions of --compare, which was not given")
    one_by_one = compare or frame_skip is not None
    if not one_by_one and (num_envs != 1 or obs_type != "rgb"):
        raise ValueError(
            "--num-envs and --obs-type are of --compare and --frame-skip; without, --batches says "
            "how many environments there are"
        )
    if one_by_one and (speculative_frames != 1 or batches != _BATCHES):
        raise ValueError(
            "--compare and --frame-skip say themselves what is drawn jointly, and --num-envs how "
            "many environments there are: leave out --speculative-frames and --batches"
        )
    if compare and sampling_steps is not None:
        raise ValueError("--compare says which steps are compared: leave out --sampling-steps")

    def measure() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            values = chosen.values()
            if untrained:
                values["world"] = Path(folder) / "world"
                write_untrained(values["world"], untrained)
            world = load_world(**values)
            if world.dynamics in RIVALS:
                raise ValueError(
                    f"bench looks into a world's own dynamics; how fast {world.dynamics} ones are "
                    "is told by nfd eval --against"
                )
            if compare:
                return comparing.compare(
                    world,
                    num_envs=num_envs,
                    seconds=seconds,
                    obs_type=obs_type,
                    agent=agent,
                    trust=trust,
                )
            if frame_skip is not None:
                return comparing.compare_frame_skip(
                    world, frame_skip, sampling_steps, num_envs, seconds, obs_type
                )
            return benchmark.benchmark(
                world, sampling_steps, batches, seconds, long_frames, speculative_frames
            )

    if compare:
        return output.tell("bench-compare", measure, comparing.format_comparison)
    if frame_skip is not None:
        return output.tell("bench-frame-skip", measure, comparing.format_frame_skip)
    return output.tell("bench", measure, benchmark.format_report)


def evaluate(
    chosen: Chosen,
    settings: EvaluationConfig,
    output: Output,
    recordings: str = "",
    steps: tuple[int, ...] = (),
    long_steps: tuple[int, ...] = (),
    compare_drafts: tuple[int, ...] = (),
    inverse_dynamics: str = "",
    ood_signals: bool = False,
    against: bool = False,
    seconds: float = 5.0,
    save_clips: str = "",
) -> int:
    """Measure how good a world is on held-out recordings.

    Args:
        chosen: the world.
        settings: how it is judged.
        output: how it is told.
        recordings: data set with a validation split; default: the one that the world remembers.
        steps: compare several numbers of sampling steps, student against teacher.
        long_steps: which of --steps have long rollouts, as those of many steps take long;
            default: all.
        compare_drafts: compare several numbers of jointly drawn frames.
        inverse_dynamics: net that reads actions back; default: the run's own, where it has one.
        ood_signals: measure instead whether the world can tell which of its frames are wrong.
        against: compare 18, 4, 2 and 1 steps with and without speculation, and the baselines of nfd
            train-baseline: speed, quality, actions, drift.
        seconds: that --against times each for.
        save_clips: also write clips of the world and the game into this folder, for measures of
            others such as FVD and LPIPS.
    """
    from nfd_env.data.shards import RecordedDataset
    from nfd_env.evaluation import against as comparing
    from nfd_env.evaluation import evaluate as evaluating
    from nfd_env.evaluation import ood_signals as signals
    from nfd_env.evaluation import reports
    from nfd_env.evaluation.clips import CLIP_FILES, draw_clips, judge_clips
    from nfd_env.evaluation.inverse_dynamics import find_inverse_dynamics, load_inverse_dynamics

    if long_steps and not steps:
        raise ValueError("--long-steps chooses among --steps, which was not given")
    if steps and settings.sampling_steps is not None:
        raise ValueError("--steps says which steps are compared: leave out --sampling-steps")
    if steps and compare_drafts:
        raise ValueError("give --steps or --compare-drafts, not both")
    if compare_drafts and settings.speculative_frames != 1:
        raise ValueError("--compare-drafts says itself how many --speculative-frames there are")
    chosen_here = steps or compare_drafts or settings.speculative_frames != 1
    if against and (chosen_here or ood_signals or settings.sampling_steps or chosen.dynamics):
        raise ValueError(
            "--against says itself what is compared: leave out --dynamics, --steps, "
            "--sampling-steps, --compare-drafts, --speculative-frames and --ood-signals"
        )
    _check_seconds(seconds)
    if ood_signals and chosen_here:
        raise ValueError(
            "--ood-signals judges frames drawn one by one: leave out --steps, --compare-drafts and "
            "--speculative-frames"
        )

    if (save_clips or inverse_dynamics) and settings.speculative_frames != 1:
        raise ValueError(
            "clips and the actions in them are of frames drawn one by one: leave out "
            "--speculative-frames"
        )
    if save_clips and (against or steps or compare_drafts or ood_signals):
        raise ValueError("--save-clips writes those of one way of drawing: leave comparisons out")
    if inverse_dynamics and (steps or compare_drafts or ood_signals):
        raise ValueError("--inverse-dynamics reads no actions in this comparison: leave it out")
    clips = make_folder(save_clips) if save_clips else None
    if clips is not None:
        check_writable(*(clips / name for name in CLIP_FILES))

    def measure() -> Any:
        world = load_world(**chosen.values())
        folder = recordings or world.spec.recordings
        if not folder:
            raise ValueError(
                f"{world.spec.name} does not remember its recordings: name them by --recordings"
            )
        held_out = RecordedDataset(folder)
        if ood_signals:
            return signals.measure_signals(world, held_out, settings)
        if compare_drafts:
            return evaluating.evaluate_drafts(world, held_out, compare_drafts, settings)
        if steps:
            return evaluating.evaluate_steps(world, held_out, steps, settings, long_steps or None)
        # Actions are read from frames drawn one by one, and not told beside others.
        alone = settings.speculative_frames == 1
        reader = inverse_dynamics or (find_inverse_dynamics(world) if alone else None)
        network = load_inverse_dynamics(reader, world) if reader else None
        if against:
            return comparing.measure_against(world, held_out, settings, network, seconds)
        report = evaluating.evaluate(world, held_out, settings)
        if network is not None or clips is not None:
            least = 1 if network is None else network.config.window
            shown = world  # drawn as the figures above it are
            if settings.sampling_steps is not None:
                shown = evaluating.with_steps(world, settings.sampling_steps)
            drawn = draw_clips(shown, held_out, least, max(2, settings.windows), seed=settings.seed)
            if clips is not None:
                drawn.write(clips)
            if network is not None:
                report = replace(report, actions=judge_clips(drawn, network, settings.seed))
        return report

    if steps or compare_drafts:
        name = "eval-steps" if steps else "eval-drafts"
        return output.tell(name, measure, reports.format_rows)
    if against:
        return output.tell("eval-against", measure, comparing.format_against)
    if ood_signals:
        return output.tell("eval-ood-signals", measure, signals.format_signals)
    return output.tell("eval", measure, reports.format_report)


def eval_agent(
    settings: AgentEvaluation,
    out: str = "outputs/eval_agent",
    json: bool = False,
) -> int:
    """Score an agent in a world and in the real game.

    Args:
        settings: whom, where and for how long.
        out: folder for the film.
        json: print JSON instead of text.
    """
    from nfd_env.evaluation.agents import format_report

    report = evaluate_agent(settings, out)
    return _show(report, format_report(report), json)


def rank(
    agents: Positional[tuple[str, ...]],
    settings: Scoring,
    out: str = "outputs/rank",
    json: bool = False,
) -> int:
    """Ask whether a world ranks policies as the real game does.

    Args:
        agents: three or more, better eight, policies from poor to good, each named as for nfd
            eval-agent: agents that one training kept, random, scripted ones.
        settings: how each is scored.
        out: folder for ranking.json and the plot ranking.png.
        json: print JSON instead of text.
    """
    from nfd_env.evaluation.ranking import PLOT, format_ranking, rank_policies, write_ranking

    folder = Path(out).expanduser()
    check_writable(folder / "ranking.json", folder / "ranking.png")  # before anything is played
    world = settings.world or shipped_worlds()[0]
    ranking = rank_policies(
        agents, replace(settings, world=world), known=lambda made: write_ranking(made, folder)
    )
    plot = folder / PLOT
    return _show(ranking, f"{format_ranking(ranking)}\n\nplot: {plot}", json)


def _check_seconds(seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds must be above 0 and finite, got {seconds:g}")
