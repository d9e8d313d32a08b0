"""``nfd demo``, ``bench``, ``eval``, ``eval-agent`` and ``rank``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional, UseAppendAction

from nfd_env.evaluation.agents import AgentEvaluation, evaluate_agent
from nfd_env.evaluation.tables import check_markers, replace_between_markers
from nfd_env.files import make_folder
from nfd_env.worlds.load import load_world, shipped_worlds

Dynamics = Literal["student", "teacher"]


def demo(
    world: Positional[str] = "",
    seconds: float = 20.0,
    out: str = "outputs/demo",
    seed: int = 0,
    sampling_steps: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    gif: str | None = None,
    json: bool = False,
) -> int:
    """Play a world with a scripted player; write a video and a strip.

    Args:
        world: world folder or shipped world; default: the first shipped one.
        seconds: playing time.
        out: folder to write to.
        seed: of the episodes.
        sampling_steps: denoising steps a frame; default: the world's own.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32 or bf16.
        gif: also write the beginning as this GIF.
        json: print JSON instead of text.
    """
    from nfd_env.evaluation.demo import demo as play
    from nfd_env.evaluation.demo import format_report

    report = play(_chosen(world), out, seconds, device, seed, sampling_steps, precision, gif)
    return _show(report, format_report(report), json)


def bench(
    world: Positional[str] = "",
    seconds: float = 5.0,
    batches: tuple[int, ...] = (1, 8, 32),
    long_frames: int = 10_000,
    compare: bool = False,
    frame_skip: int | None = None,
    untrained: str | None = None,
    num_envs: int = 1,
    obs_type: Literal["rgb", "latent"] = "rgb",
    agent: str | None = None,
    speculative_frames: int = 1,
    sampling_steps: int | None = None,
    dynamics: Dynamics | None = None,
    device: str = "auto",
    precision: str = "auto",
    json: bool = False,
    markdown_into: str | None = None,
    markdown_name: str | None = None,
) -> int:
    """Measure how fast a world steps.

    Args:
        world: world folder or shipped world; default: the first shipped one.
        seconds: time spent on each figure.
        batches: numbers of environments.
        long_frames: frame number whose cost is compared with frame 10; 0 skips it.
        compare: refilled cache, ring, fewer steps and speculation, measured in turn.
        frame_skip: frames of a repeated action: one by one against jointly.
        untrained: instead of a world, random weights of the sizes in e.g. configs/paper/310m.yaml.
        num_envs: of --compare and --frame-skip.
        obs_type: of the same.
        agent: that --compare takes actions from, named as for nfd eval-agent.
        speculative_frames: frames drawn jointly.
        sampling_steps: denoising steps a frame; default: the world's own.
        dynamics: of a distilled world that comes with both; default: the world's own.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32 or bf16.
        json: print JSON instead of text.
        markdown_into: also put the table into this file, between its lines <!-- begin NAME --> and
            <!-- end NAME -->.
        markdown_name: NAME; default: bench, bench-compare or bench-frame-skip.
    """
    from nfd_env.evaluation import benchmark
    from nfd_env.evaluation import compare as comparing
    from nfd_env.evaluation.untrained import write_untrained

    kinds = {"--compare": compare, "--frame-skip": frame_skip, "--untrained": untrained}
    given = [name for name, value in kinds.items() if value]
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(kinds)}, not {' and '.join(given)}")
    if untrained and world:
        raise ValueError("give a world or --untrained, not both")

    def measure() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            made: str | Path = _chosen(world)
            if untrained:
                made = Path(folder) / "world"
                write_untrained(made, untrained)
            loaded = load_world(made, device, precision, dynamics)
            if compare:
                return comparing.compare(
                    loaded, num_envs=num_envs, seconds=seconds, obs_type=obs_type, agent=agent
                )
            if frame_skip is not None:
                return comparing.compare_frame_skip(
                    loaded, frame_skip, sampling_steps, num_envs, seconds, obs_type
                )
            return benchmark.benchmark(
                loaded,
                sampling_steps,
                batches,
                seconds=seconds,
                long_frames=long_frames,
                speculative_frames=speculative_frames,
            )

    name, text = "bench", benchmark.format_report
    if compare:
        name, text = "bench-compare", comparing.format_comparison
    elif frame_skip is not None:
        name, text = "bench-frame-skip", comparing.format_frame_skip
    return _show_tables(markdown_name or name, measure, text, json, markdown_into)


def evaluate(
    world: Positional[str] = "",
    recordings: str = "",
    windows: int = 64,
    long_rollouts: int = 16,
    steps: tuple[int, ...] = (),
    long_steps: tuple[int, ...] = (),
    compare_drafts: tuple[int, ...] = (),
    inverse_dynamics: str = "",
    speculative_frames: int = 1,
    sampling_steps: int | None = None,
    dynamics: Dynamics | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    json: bool = False,
    markdown_into: str | None = None,
    markdown_name: str | None = None,
) -> int:
    """Measure how good a world is on held-out recordings.

    Args:
        world: world folder or shipped world; default: the first shipped one.
        recordings: data set with a validation split; default: the one that the world remembers.
        windows: rollouts of 128 frames.
        long_rollouts: rollouts of 2000 frames.
        steps: compare several numbers of sampling steps, student against teacher.
        long_steps: which of --steps have long rollouts, as those of many steps take long;
            default: all.
        compare_drafts: compare several numbers of jointly drawn frames.
        inverse_dynamics: net that reads actions back; default: the run's own, where it has one.
        speculative_frames: frames drawn jointly.
        sampling_steps: denoising steps a frame; default: the world's own.
        dynamics: of a distilled world that comes with both; default: the world's own.
        seed: of the choice of windows and of the world's noise.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32 or bf16.
        json: print JSON instead of text.
        markdown_into: see nfd bench.
        markdown_name: NAME; default: eval, eval-steps or eval-drafts.
    """
    from nfd_env.data.shards import RecordedDataset
    from nfd_env.evaluation import evaluate as evaluating
    from nfd_env.evaluation import reports
    from nfd_env.evaluation.inverse_dynamics import (
        find_inverse_dynamics,
        load_inverse_dynamics,
        measure_actions,
    )

    if long_steps and not steps:
        raise ValueError("--long-steps chooses among --steps, which was not given")
    if steps and compare_drafts:
        raise ValueError("give --steps or --compare-drafts, not both")
    if compare_drafts and speculative_frames != 1:
        raise ValueError("--compare-drafts says itself how many --speculative-frames there are")

    def measure() -> Any:
        loaded = load_world(_chosen(world), device, precision, dynamics)
        folder = recordings or loaded.spec.recordings
        if not folder:
            raise ValueError(
                f"{loaded.spec.name} does not remember its recordings: name them by --recordings"
            )
        held_out = RecordedDataset(Path(folder).expanduser())
        if compare_drafts:
            return evaluating.evaluate_drafts(
                loaded, held_out, compare_drafts, sampling_steps, windows, long_rollouts, seed
            )
        if steps:
            return evaluating.evaluate_steps(
                loaded,
                held_out,
                steps,
                windows,
                long_rollouts,
                seed,
                speculative_frames=speculative_frames,
                long_steps=long_steps or None,
            )
        report = evaluating.evaluate(
            loaded,
            held_out,
            sampling_steps,
            windows,
            long_rollouts,
            seed,
            speculative_frames=speculative_frames,
        )
        reader = inverse_dynamics or find_inverse_dynamics(loaded)
        if reader:
            network = load_inverse_dynamics(reader, loaded)
            made = measure_actions(loaded, held_out, network, windows, seed=seed)
            report = replace(report, actions=made)
        return report

    name = "eval-steps" if steps else "eval-drafts" if compare_drafts else "eval"
    text = reports.format_report if name == "eval" else reports.format_rows
    return _show_tables(markdown_name or name, measure, text, json, markdown_into)


def eval_agent(
    agent: Positional[str],
    world: str = "",
    episodes: int = 100,
    seed: int = 0,
    max_frames: int = 0,
    threshold: float | None = None,
    obs_type: Literal["rgb", "latent", "features"] | None = None,
    frame_skip: int | None = None,
    greedy: bool = False,
    through_tokenizer: bool = False,
    real_only: bool = False,
    trust: bool = False,
    agent_arg: UseAppendAction[tuple[str, ...]] = (),
    num_envs: int = 25,
    real_envs: int = 8,
    sampling_steps: int | None = None,
    dynamics: Dynamics | None = None,
    history_level: float | None = None,
    temperature: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    out: str = "outputs/eval_agent",
    json: bool = False,
) -> int:
    """Score an agent in a world and in the real game.

    Args:
        agent: random; an agent file (.safetensors, or .zip of Stable-Baselines3, DQN:agent.zip
            where it is not PPO); the name of an agent that comes with a world; or module:Class of a
            behaviour policy.
        world: world folder or shipped world; default: the agent's own.
        episodes: on each side.
        seed: of the first episode.
        max_frames: longest episode in frames; default: the world's own limit, or a minute.
        threshold: report the share of scores above it.
        obs_type: default: the agent's own.
        frame_skip: default: the agent's own, or 1.
        greedy: take the most probable actions.
        through_tokenizer: show the agent real frames as the world's tokenizer renders them.
        real_only: for policies that need the real game's internals.
        trust: a .zip may run code of its author.
        agent_arg: KEY=VALUE argument of a behaviour policy, e.g. caution=30; may be repeated.
        num_envs: worlds stepped together.
        real_envs: real games beside each other.
        sampling_steps: of the learned world; default: its own.
        dynamics: of a distilled world that comes with both; default: the world's own.
        history_level: of the learned world; default: its own.
        temperature: likewise.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32 or bf16.
        out: folder for the film.
        json: print JSON instead of text.
    """
    import yaml

    from nfd_env.evaluation.agents import format_report

    kwargs = {}
    for given in agent_arg:
        key, equals, value = given.partition("=")
        if not (key and equals):
            raise ValueError(f"--agent-arg takes KEY=VALUE, got {given!r}")
        kwargs[key] = yaml.safe_load(value)
    settings = AgentEvaluation(
        agent=agent,
        world=world,
        episodes=episodes,
        seed=seed,
        max_frames=max_frames,
        threshold=threshold,
        obs_type=obs_type,
        frame_skip=frame_skip,
        greedy=greedy,
        through_tokenizer=through_tokenizer,
        real_only=real_only,
        trust=trust,
        agent_kwargs=kwargs,
        num_envs=num_envs,
        real_envs=real_envs,
        device=device,
        precision=precision,
        sampling_steps=sampling_steps,
        dynamics=dynamics,
        history_level=history_level,
        temperature=temperature,
    )
    report = evaluate_agent(settings, out)
    return _show(report, format_report(report), json)


def rank(
    agents: Positional[tuple[str, ...]],
    world: str = "",
    episodes: int = 100,
    seed: int = 0,
    max_frames: int = 0,
    greedy: bool = False,
    trust: bool = False,
    num_envs: int = 25,
    real_envs: int = 8,
    sampling_steps: int | None = None,
    dynamics: Dynamics | None = None,
    device: str = "auto",
    precision: str = "auto",
    out: str = "outputs/rank",
    json: bool = False,
) -> int:
    """Ask whether a world ranks policies as the real game does.

    Args:
        agents: three or more, better eight, policies from poor to good, each named as for nfd
            eval-agent: checkpoints of one training, random, scripted ones.
        world: world folder or shipped world; default: the first shipped one.
        episodes: of each policy, on each side.
        seed: of the first episode.
        max_frames: longest episode in frames; default: the world's own limit, or a minute.
        greedy: take the most probable actions.
        trust: a .zip may run code of its author.
        num_envs: worlds stepped together.
        real_envs: real games beside each other.
        sampling_steps: of the learned world; default: its own.
        dynamics: of a distilled world that comes with both; default: the world's own.
        device: auto, cpu, cuda or cuda:N.
        precision: auto, fp32 or bf16.
        out: folder for ranking.json and the plot ranking.png.
        json: print JSON instead of text.
    """
    from nfd_env.evaluation.ranking import format_ranking, rank_policies, write_ranking

    settings = AgentEvaluation(
        agent="",
        world=_chosen(world),
        episodes=episodes,
        seed=seed,
        max_frames=max_frames,
        greedy=greedy,
        trust=trust,
        num_envs=num_envs,
        real_envs=real_envs,
        sampling_steps=sampling_steps,
        dynamics=dynamics,
        device=device,
        precision=precision,
    )
    folder = make_folder(out)  # find out whether there can be one before anything is played
    ranking = rank_policies(agents, settings)
    plot = write_ranking(ranking, folder)
    return _show(ranking, f"{format_ranking(ranking)}\n\nplot: {plot}", json)


def _chosen(world: str) -> str:
    """``world``, or the first shipped one."""
    return world or shipped_worlds()[0]


def _show(report: Any, text: str, as_json: bool) -> int:
    values = asdict(report) if is_dataclass(report) and not isinstance(report, type) else report
    print(json.dumps(values, indent=2) if as_json else text)
    return 0


def _show_tables(
    name: str,
    measure: Callable[[], Any],
    text: Callable[[Any], str],
    as_json: bool,
    into: str | None,
) -> int:
    """Measure, print, and put the text into a document."""
    if into:  # find out about missing markers before anything is measured
        check_markers(into, name)
    report = measure()
    if into:
        replace_between_markers(into, name, text(report))
    return _show(report, text(report), as_json)
