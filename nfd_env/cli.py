"""The ``nfd`` command."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nfd_env


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Errors that a user can mend are one line on stderr and status 1.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not have every character
        sys.stdout.reconfigure(errors="replace")
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"nfd: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nfd", description="Game recordings -> a learned world that steps as a Gymnasium env."
    )
    parser.add_argument("--version", action="version", version=f"nfd {nfd_env.__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    command("worlds", _worlds, "list the shipped worlds")

    sub = command("demo", _demo, "play a world with a scripted player; write a video and a strip")
    _world(sub)
    _sampling(sub)
    sub.add_argument("--seconds", type=float, default=20.0, help="playing time (default 20)")
    sub.add_argument("--out", default="outputs/demo", help="folder to write to")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--gif", help="also write the beginning as a GIF")
    _json(sub)

    sub = command("bench", _bench, "measure how fast a world steps")
    _world(sub)
    _sampling(sub)
    _dynamics(sub)
    sub.add_argument("--seconds", type=float, default=5.0, help="time spent on each figure")
    sub.add_argument(
        "--long-frames",
        type=int,
        default=10_000,
        help="frame number whose cost is compared with frame 10; 0 skips it (default 10000)",
    )
    sub.add_argument(
        "--speculative-frames", type=int, default=1, help="frames drawn jointly (default 1)"
    )
    kinds = sub.add_mutually_exclusive_group()
    kinds.add_argument(
        "--compare",
        action="store_true",
        help="refilled cache, ring, fewer steps and speculation, measured in turn",
    )
    kinds.add_argument(
        "--frame-skip", type=int, help="frames of a repeated action: one by one against jointly"
    )
    kinds.add_argument(
        "--untrained",
        metavar="FILE",
        help="instead of a world, random weights of the sizes in e.g. configs/paper/310m.yaml",
    )
    sub.add_argument(
        "--batches",
        type=_numbers,
        default=[1, 8, 32],
        metavar="N,N",
        help="numbers of environments (default 1,8,32), without --compare and --frame-skip",
    )
    sub.add_argument(
        "--num-envs", type=int, default=1, help="of --compare and --frame-skip (default 1)"
    )
    sub.add_argument(
        "--obs-type", choices=("rgb", "latent"), default="rgb", help="of the same (default rgb)"
    )
    sub.add_argument(
        "--agent", help="agent that --compare takes actions from, named as for nfd eval-agent"
    )
    _json(sub)
    _markdown(sub, "bench, bench-compare or bench-frame-skip")

    sub = command("eval", _eval, "measure how good a world is on held-out recordings")
    _world(sub)
    _sampling(sub)
    _dynamics(sub)
    sub.add_argument(
        "--speculative-frames", type=int, default=1, help="frames drawn jointly (default 1)"
    )
    kinds = sub.add_mutually_exclusive_group()
    kinds.add_argument(
        "--steps",
        type=_numbers,
        help="compare several numbers of sampling steps, student against teacher, e.g. 1,2,4,18",
    )
    kinds.add_argument(
        "--compare-drafts",
        type=_numbers,
        metavar="N,N",
        help="compare several numbers of jointly drawn frames, e.g. 1,2,4",
    )
    sub.add_argument(
        "--recordings",
        default="runs/doom_take_cover/recordings",
        help="data set with a validation split, as nfd collect writes it",
    )
    sub.add_argument(
        "--inverse-dynamics",
        metavar="FILE",
        help="net that reads actions back (nfd train inverse-dynamics); default: the run's own",
    )
    sub.add_argument("--windows", type=int, default=64, help="rollouts of 128 frames (default 64)")
    sub.add_argument(
        "--long-rollouts", type=int, default=16, help="rollouts of 2000 frames (default 16)"
    )
    sub.add_argument(
        "--long-steps",
        type=_numbers,
        help="which of --steps have long rollouts, as those of many steps take long; default: all",
    )
    sub.add_argument("--seed", type=int, default=0)
    _json(sub)
    _markdown(sub, "eval, eval-steps or eval-drafts")

    sub = command("eval-agent", _eval_agent, "score an agent in a world and in the real game")
    sub.add_argument(
        "agent",
        help="random, an agent file (.safetensors, or .zip of Stable-Baselines3; DQN:agent.zip "
        "where it is not PPO), the name of an agent that comes with a world, or module:Class of a "
        "behaviour policy",
    )
    sub.add_argument(
        "--world", default="", help="world folder or shipped world; default: the agent's own"
    )
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    sub.add_argument("--precision", default="auto", help="auto, fp32 or bf16")
    _sampling(sub)
    _dynamics(sub)
    for name in ("history-level", "temperature"):
        sub.add_argument(f"--{name}", type=float, help="of the learned world; default: its own")
    sub.add_argument("--episodes", type=int, default=100, help="on each side (default 100)")
    sub.add_argument("--seed", type=int, default=0, help="of the first episode")
    sub.add_argument("--num-envs", type=int, default=25, help="worlds stepped together")
    sub.add_argument("--real-envs", type=int, default=8, help="real games beside each other")
    sub.add_argument(
        "--max-frames",
        type=int,
        default=0,
        help="longest episode in frames; default: the world's own limit, or a minute",
    )
    sub.add_argument("--threshold", type=float, help="report the share of scores above it")
    sub.add_argument(
        "--obs-type", choices=("rgb", "latent", "features"), help="default: the agent's own"
    )
    sub.add_argument("--frame-skip", type=int, help="default: the agent's own, or 1")
    sub.add_argument("--greedy", action="store_true", help="take the most probable actions")
    sub.add_argument(
        "--through-tokenizer",
        action="store_true",
        help="show the agent real frames as the world's tokenizer renders them",
    )
    sub.add_argument(
        "--real-only", action="store_true", help="for policies that need the real game's internals"
    )
    sub.add_argument(
        "--agent-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="argument of a behaviour policy, e.g. caution=30; may be repeated",
    )
    sub.add_argument("--trust", action="store_true", help="a .zip may run its author's code")
    sub.add_argument("--out", default="outputs/eval_agent", help="folder for the film")
    _json(sub)

    sub = command("collect", _collect, "record a Gymnasium environment")
    _config(sub)

    sub = command("train", _train, "train a stage; run it again to go on after a stop")
    stages = ("tokenizer", "encode", "flow", "heads", "distill", "inverse-dynamics")
    sub.add_argument("stage", choices=stages)
    _config(sub)

    sub = command("export", _export, "put trained stages together as a world folder")
    _config(sub)

    for name, text in (
        ("play", "play a world in a window with the keyboard"),
        ("serve", "play a world in a browser"),
    ):
        sub = command(name, _play_or_serve(name), text)
        _player_arguments(name, sub)
    return parser


def _world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "world",
        nargs="?",
        default="DoomTakeCover",
        help="world folder or shipped world (default DoomTakeCover)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--precision", default="auto", help="auto, fp32 or bf16")


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sampling-steps", type=int, help="default: the world's own")


def _dynamics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dynamics",
        choices=("student", "teacher"),
        help="of a distilled world that comes with both; default: the world's own",
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas, got {text!r}"
        ) from None


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _markdown(parser: argparse.ArgumentParser, names: str) -> None:
    parser.add_argument(
        "--markdown-into",
        metavar="FILE",
        help="also put the tables into this file, in place of what stands between its lines "
        "<!-- begin NAME --> and <!-- end NAME -->",
    )
    parser.add_argument("--markdown-name", metavar="NAME", help=f"default: {names}")


def _config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, over the file")


def _show(args: argparse.Namespace, report: dict[str, Any], text: str) -> int:
    print(json.dumps(report, indent=2) if args.json else text)
    return 0


def _show_tables(
    args: argparse.Namespace, name: str, measure: Callable[[], Any], text: Callable[[Any], str]
) -> int:
    """Measure, print, and put the text where ``--markdown-into`` says."""
    from nfd_env.evaluation.tables import check_markers, replace_between_markers

    if args.markdown_into:  # find out about missing markers before anything is measured
        check_markers(args.markdown_into, args.markdown_name or name)
    report = measure()
    if args.markdown_into:
        replace_between_markers(args.markdown_into, args.markdown_name or name, text(report))
    return _show(args, report, text(report))


def _worlds(args: argparse.Namespace) -> int:
    from nfd_env.worlds.format import read_spec
    from nfd_env.worlds.load import find_world, shipped_worlds

    for name in shipped_worlds():
        spec = read_spec(find_world(name))
        height, width = spec.frame_size
        print(
            f"{spec.name:20} {height}x{width} at {spec.fps:g} frames/s, "
            f"{spec.action_space['type']} actions, from {spec.source.env_id}"
        )
    return 0


def _demo(args: argparse.Namespace) -> int:
    from nfd_env.evaluation.demo import demo, format_report

    report = demo(
        args.world,
        args.out,
        args.seconds,
        args.device,
        args.seed,
        args.sampling_steps,
        args.precision,
        args.gif,
    )
    return _show(args, report, format_report(report))


def _bench(args: argparse.Namespace) -> int:
    from nfd_env.evaluation import benchmark, compare
    from nfd_env.evaluation.untrained import write_untrained
    from nfd_env.worlds.load import load_world

    def run(world: Any) -> dict[str, Any]:
        return benchmark.benchmark(
            world,
            args.sampling_steps,
            tuple(args.batches),
            seconds=args.seconds,
            long_frames=args.long_frames,
            speculative_frames=args.speculative_frames,
        )

    def measure() -> dict[str, Any]:
        if args.untrained is not None:
            if args.world != "DoomTakeCover":
                raise ValueError("give a world or --untrained, not both")
            with tempfile.TemporaryDirectory() as folder:
                made = Path(folder) / "world"
                write_untrained(made, args.untrained)
                return run(load_world(made, args.device, args.precision, args.dynamics))
        world = load_world(args.world, args.device, args.precision, args.dynamics)
        if args.compare:
            return compare.compare(
                world,
                num_envs=args.num_envs,
                seconds=args.seconds,
                obs_type=args.obs_type,
                agent=args.agent,
            )
        if args.frame_skip is not None:
            return compare.compare_frame_skip(
                world,
                args.frame_skip,
                args.sampling_steps,
                args.num_envs,
                args.seconds,
                args.obs_type,
            )
        return run(world)

    if args.compare:
        return _show_tables(args, "bench-compare", measure, compare.format_comparison)
    if args.frame_skip is not None:
        return _show_tables(args, "bench-frame-skip", measure, compare.format_frame_skip)
    return _show_tables(args, "bench", measure, benchmark.format_report)


def _eval(args: argparse.Namespace) -> int:
    from nfd_env.data.shards import RecordedDataset
    from nfd_env.evaluation import evaluate, reports
    from nfd_env.evaluation.inverse_dynamics import (
        find_inverse_dynamics,
        load_inverse_dynamics,
        measure_actions,
    )
    from nfd_env.worlds.load import load_world

    if args.long_steps and args.steps is None:
        raise ValueError("--long-steps chooses among --steps, which was not given")
    if args.compare_drafts and args.speculative_frames != 1:
        raise ValueError("--compare-drafts says itself how many --speculative-frames there are")

    def measure() -> dict[str, Any]:
        world = load_world(args.world, args.device, args.precision, args.dynamics)
        recordings = RecordedDataset(args.recordings)
        common = {
            "windows": args.windows,
            "long_rollouts": args.long_rollouts,
            "seed": args.seed,
        }
        if args.compare_drafts is not None:
            return evaluate.evaluate_drafts(
                world, recordings, args.compare_drafts, args.sampling_steps, **common
            )
        common["speculative_frames"] = args.speculative_frames
        if args.steps is not None:
            return evaluate.evaluate_steps(
                world, recordings, args.steps, long_steps=args.long_steps, **common
            )
        report = evaluate.evaluate(world, recordings, args.sampling_steps, **common)
        reader = args.inverse_dynamics or find_inverse_dynamics(world)
        if reader:
            network = load_inverse_dynamics(reader, world)
            made = measure_actions(world, recordings, network, args.windows, seed=args.seed)
            report["actions"] = asdict(made)
        return report

    if args.steps is not None:
        return _show_tables(args, "eval-steps", measure, reports.format_rows)
    if args.compare_drafts is not None:
        return _show_tables(args, "eval-drafts", measure, reports.format_rows)
    return _show_tables(args, "eval", measure, reports.format_report)


def _eval_agent(args: argparse.Namespace) -> int:
    import yaml

    from nfd_env.evaluation.agents import AgentEvaluation, evaluate_agent, format_report

    kwargs = {}
    for given in args.agent_arg:
        key, equals, value = given.partition("=")
        if not (key and equals):
            raise ValueError(f"--agent-arg takes KEY=VALUE, got {given!r}")
        kwargs[key] = yaml.safe_load(value)
    named = set(AgentEvaluation.__dataclass_fields__) - {"agent_kwargs"}
    settings = {name: value for name, value in vars(args).items() if name in named}
    report = evaluate_agent(AgentEvaluation(agent_kwargs=kwargs, **settings), args.out)
    return _show(args, asdict(report), format_report(report))


def _collect(args: argparse.Namespace) -> int:
    from nfd_env import config
    from nfd_env.data.collect import CollectConfig, collect

    dataset = collect(config.load(CollectConfig, args.config, args.overrides))
    print(f"{dataset.folder}: {len(dataset)} episodes, {dataset.frame_count:,} frames")
    return 0


def _train(args: argparse.Namespace) -> int:
    from nfd_env import config
    from nfd_env.training.loop import Stage, train

    stage: Stage
    if args.stage == "tokenizer":
        from nfd_env.training.tokenizer import TokenizerStage, TokenizerTrainingConfig

        settings = config.load(TokenizerTrainingConfig, args.config, args.overrides)
        stage = TokenizerStage(settings)
    elif args.stage == "encode":  # with the flow's config
        from nfd_env.training.encode import EncodeConfig, encode
        from nfd_env.training.flow import FlowTrainingConfig

        s = config.load(FlowTrainingConfig, args.config, args.overrides)
        encode(EncodeConfig(s.recordings, s.tokenizer, s.latents, s.train.device))
        return 0
    elif args.stage == "flow":
        from nfd_env.training.flow import FlowStage, FlowTrainingConfig

        settings = config.load(FlowTrainingConfig, args.config, args.overrides)
        stage = FlowStage(settings)
    elif args.stage == "inverse-dynamics":
        from nfd_env.evaluation.inverse_dynamics import (
            InverseDynamicsStage,
            InverseDynamicsTrainingConfig,
        )

        settings = config.load(InverseDynamicsTrainingConfig, args.config, args.overrides)
        stage = InverseDynamicsStage(settings)
    elif args.stage == "heads":
        from nfd_env.training.heads import HeadsStage, HeadsTrainingConfig

        settings = config.load(HeadsTrainingConfig, args.config, args.overrides)
        stage = HeadsStage(settings)
    else:
        from nfd_env.training.distill import DistillStage, DistillTrainingConfig

        settings = config.load(DistillTrainingConfig, args.config, args.overrides)
        stage = DistillStage(settings)
    metrics = train(stage, settings.train)
    print(json.dumps(metrics))
    return 0


def _export(args: argparse.Namespace) -> int:
    from nfd_env import config
    from nfd_env.training.export import ExportConfig, export
    from nfd_env.worlds.format import folder_bytes

    folder = export(config.load(ExportConfig, args.config, args.overrides))
    print(f"{folder}: {folder_bytes(folder) / 1e6:.1f} MB")
    return 0


def _play_or_serve(name: str) -> Any:
    def run(args: argparse.Namespace) -> int:
        from nfd_env.play import commands

        return commands.run(name, args)

    return run


def _player_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    from nfd_env.play import commands

    commands.add_arguments(name, parser)


if __name__ == "__main__":
    sys.exit(main())
