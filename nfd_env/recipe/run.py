"""``nfd train``: recordings, a net that reads actions, a world's parts, world and report.

Every stage leaves its weights in a folder of its own and a line in ``run.yaml`` that says what it
was made from. A stage that is finished and whose inputs are the same is skipped; one whose inputs
have changed is made again; one that was stopped goes on. Longer than other files, so that all
stages stand below each other in their order.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from nfd_env import config
from nfd_env.data.alignment import measure_alignment
from nfd_env.data.collect import collect
from nfd_env.data.shards import RecordedDataset, RecordingError
from nfd_env.evaluation.clips import ActionReport, measure_actions
from nfd_env.evaluation.inverse_dynamics import InverseDynamicsStage, load_inverse_dynamics
from nfd_env.files import atomic_write, found_file, owned_folder, writing
from nfd_env.learning.train import train as learn
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.weights import CheckpointError, load_weights
from nfd_env.recipe import door, gates, rounds
from nfd_env.recipe import plan as planning
from nfd_env.recipe.calibration import calibrate, energy_at_last
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.gates import Gate, GateError
from nfd_env.recipe.ledger import Ledger
from nfd_env.recipe.look import Look, look, look_at_recordings
from nfd_env.recipe.measure import measure
from nfd_env.recipe.plan import Plan
from nfd_env.recipe.progress import Progress
from nfd_env.recipe.records import (
    StageRecord,
    latent_statistics,
    read_records,
    recorded_by,
    write_yaml,
)
from nfd_env.recipe.timing import judge, timed
from nfd_env.sources.spec import is_imported, recorded_part
from nfd_env.stopping import stopping
from nfd_env.training.distill import DistillStage
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.export import ExportConfig, export
from nfd_env.training.flow import FlowStage
from nfd_env.training.heads import HeadsStage
from nfd_env.training.loop import train
from nfd_env.training.ranks import ALONE, Ranks
from nfd_env.training.tokenizer import TokenizerStage
from nfd_env.worlds.checksums import is_whole
from nfd_env.worlds.load import load_world

Metrics = Mapping[str, float]
_NETWORKS: dict[str, tuple[type, type]] = {
    "flow": (Dynamics, DynamicsConfig),
    "heads": (Heads, HeadsConfig),
}


class Recipe(Ledger):
    """One run of the recipe in its folder."""

    def __init__(
        self,
        game: GameConfig,
        keep_going: bool = False,
        say: Callable[[str], None] = print,
        progress: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        """Prepare; ``keep_going`` after a gate that stops, ``say`` lines to the user.

        ``ranks``: this is the first of them, and the others ``follow``.

        Raises:
            DeviceError: when the device is not there.
        """
        super().__init__(game)
        self._keep_going, self._say, self._shown = keep_going, say, progress
        self._ranks, self.processes = ranks, ranks.count
        self._progress = Progress(self.stages, say, progress)
        self._seen: Look | None = None
        self._encoding = 0.0  # seconds a frame

    def run(self, only: str | None = None) -> Path:
        """Make the world; or one stage of it.

        INT, TERM and HUP stop it; what was made stays, and another run goes on.

        Args:
            only: one of ``stages``, whose inputs must be there and up to date.

        Returns:
            The world folder.

        Raises:
            GateError: when a stage's result is not good enough.
            PlanError: when no training can be planned.
            RecordingError: when the game cannot be recorded.
            FolderInUseError: when another process makes a world in the folder.
            FolderError: when the folder cannot be written to.
            KeyboardInterrupt, SystemExit: after INT, and after TERM or HUP.
        """
        if only is not None and only not in self.stages:
            raise ValueError(f"stage must be one of {', '.join(self.stages)}, got {only!r}")
        self.round = rounds.Round(self.game)
        with stopping() as stop, stop.at_once(), owned_folder(self.folder):
            self.records = read_records(self.folder)
            self._single = only is not None
            self._forget_what_was_removed()
            self._pass_door()
            name = self.stages[0]
            try:
                for name in self.stages:
                    stage, number = rounds.split(name)
                    self.round = self.round.at(self.game.rounds if stage == "report" else number)
                    if only is not None and name != only:
                        # The report alone asks the net that reads actions.
                        if name != "inverse_dynamics" or only == "report":
                            self._require(stage)
                        continue
                    self._progress.stage(name, self.expected())
                    getattr(self, f"_{stage}")()
                    if name == only:
                        break
            except (KeyboardInterrupt, SystemExit):
                self._say(f"stopped in the stage {name}; run it again to go on")
                raise
            finally:
                self._progress.close()
        return self.game.world_folder

    def _forget_what_was_removed(self) -> None:
        """Recordings that somebody has taken away are to be made again."""
        for number in range(1, self.game.rounds + 1):
            round = self.round.at(number)
            name = round.key("record")
            if number == 1 and self.game.recordings or name not in self.records:
                continue
            if not (round.own_recordings / "dataset.yaml").exists():
                del self.records[name]

    def _pass_door(self) -> None:
        """Refuse at once what can be known before anything is made."""
        door.check_kinds(self.game)
        last = self.records.get(self.stages[-2])  # the world's
        if self.game.rounds > 1 and (last is None or not last.finished):
            door.check_rounds(self.game, self.device)
        recorded = self.records.get("record")
        if recorded is None or not recorded.finished:
            self._seen = look(self.game)
            self._encoding = door.check(self.game, self.device, self._seen, self._ranks)
        else:
            built = door.check_settings(self._plan(), look_at_recordings(self.game))
            finished = {name for name, record in self.records.items() if record.finished}
            door.check_parts(built, self._ranks, finished)

    # Stages, in their order.

    def _agent(self) -> None:
        record, values = self._begin("agent"), self._agent_settings()
        with self._timed(record):
            if not record.extra:  # decided once, so that going on is exact
                seconds = planning.AGENT_SHARE * max(1.0, self.time_left(self.round))
                decided = rounds.decide_agent(values, self.game.agent, seconds)
                record.extra = {"seconds": seconds, "settings": decided}
                self._save()
            # Where things lie is not what was decided.
            placed = {key: values[key] for key in ("folder", "world", "device")}
            settings = rounds.built_agent({**record.extra["settings"], **placed})
            if not record.finished or not self.round.has_weights("agent"):
                metrics = learn(settings, False, self._progress)
                record.metrics = {name: float(value) for name, value in metrics.items()}
        record.steps = settings.decisions
        self._finish("agent", record, [])

    def _record(self) -> None:
        record = self._begin("record")
        number, imported = self.round.number, is_imported(self.game.source.env_id)
        most = self.game.max_episode_steps
        game = self.round.played_by_agent() if number > 1 else self.round.here
        if game.recordings:
            recordings = RecordedDataset(game.recordings_place)
        elif imported:
            with self._timed(record):
                recordings = collect(game.collect_config(1), self._shown)
        else:
            with self._timed(record):
                by = recorded_by(game) if number == 1 else {}  # later ones follow their agent
                if not record.extra:  # decided once: more later would make everything anew
                    record.extra = {"frames": game.frames or self._frames(game), "by": by}
                    self._save()
                self._say_what_stays(record.extra.get("by", by), by)
                frames = game.frames or int(record.extra["frames"])
                if record.finished and number > 1:  # its players take long to be loaded
                    recordings = RecordedDataset(game.recordings_place)
                else:
                    short = door.with_short_episodes(game, frames)
                    recordings = collect(short.collect_config(frames), self._shown)
                    most = short.max_episode_steps
        measures = measure(recordings)
        # Each stage would find out by itself, later.
        if window := self.game.inverse_dynamics.get("window"):
            recordings.check(window)
        for name in ("flow", "distill"):
            if frames := getattr(self.game, name).get("frames"):
                recordings.check(frames, ("train",))
        own = self.game.export
        margin = own.get("start_margin", planning.start_margin(measures))
        recordings.check(own.get("start_frames", ExportConfig.start_frames) + margin, ("train",))
        record.metrics = {
            name: float(value)
            for name, value in asdict(measures).items()
            if not isinstance(value, list | dict)
        }
        skipped = len(recordings.skipped())
        failed = skipped / (skipped + len(recordings))
        shift = measure_alignment(recordings).best
        found = gates.recording_gates(measures, shift, failed, bool(game.recordings) or imported)
        if most < self.game.max_episode_steps:
            reached = float(np.mean([len(episode) >= most for episode in recordings]))
            found.append(gates.length_gate(reached, most))
        if number > 1:
            # Everything before, as the round before took it, and what was recorded now.
            earlier = [self.round.at(n).own_recordings for n in range(1, number + 1)]
            rounds.join(earlier, Path(self.round.here.recordings_place))
            played = rounds.returns(recordings)
            told = {name: asdict(scored) for name, scored in played.items()}
            record.extra = {**(record.extra or {}), "returns": told}
            found.append(gates.agent_gate(played["agent"].mean, played["random"].mean))
        self._finish("record", record, found)

    def _say_what_stays(self, then: dict[str, str], now: dict[str, str]) -> None:
        """Which settings differ from those that were recorded with, which is not done again."""
        changed = [name for name, value in now.items() if then.get(name, value) != value]
        if changed:
            self._say(
                f"  recordings stay as they are, though {', '.join(changed)} changed: remove "
                f"{self.round.here.recordings_place} to record anew"
            )

    def _frames(self, game: GameConfig) -> int:
        """How many to record, by how fast the game and its players are."""
        if self.round.number == 1:
            assert self._seen is not None
            rate, encoding = self._seen.rate, self._encoding
        else:
            rate = look(game).rate
            encoding = self.records["encode"].seconds / self.round.at(1).recordings.frame_count
        return planning.frames_to_record(game, rate, encoding)

    def _inverse_dynamics(self) -> None:
        self._train("inverse_dynamics", InverseDynamicsStage, gates.reading_gates)

    def _tokenizer(self) -> None:
        if self.round.number > 1 and self._keep_tokenizer():
            return
        self._train("tokenizer", TokenizerStage, gates.tokenizer_gates)

    def _keep_tokenizer(self) -> bool:
        """Take over that of the round before, if it is good enough for where the agent goes."""
        record = self._begin("tokenizer")
        before, here = self.round.before.weights("tokenizer"), self.round.weights("tokenizer")
        if not record.extra:
            own = RecordedDataset(self.round.own_recordings)
            values = {**self._plan().tokenizer, "recordings": str(own.folder)}
            with self._timed(record):
                stage = TokenizerStage(door.built_from("tokenizer", values))
                record.metrics = judge(stage, self.device)
            found = gates.tokenizer_gates(record.metrics)
            record.extra = {"kept": all(gate.passed for gate in found)}
            record.gates = [gate.line() for gate in found]
        if not record.extra["kept"]:
            if not record.finished:
                self._say(
                    "  the tokenizer is not good enough where the agent goes: it is trained on"
                )
            return False
        if record.finished and self.round.has_weights("tokenizer"):
            return True
        for name in ("state.pt", here.name):
            with writing(here.parent):
                here.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(here.with_name(name)) as temporary:
                    shutil.copyfile(before.with_name(name), temporary)
        record.finished = True
        self._save()
        for line in record.gates or []:
            self._say(f"  {line}")
        return True

    def _encode(self) -> None:
        plan = self._plan()
        record = self._begin("encode")
        latents = Path(plan.flow["latents"])
        settings = EncodeConfig(
            plan.flow["recordings"], plan.flow["tokenizer"], str(latents), self.device
        )
        with self._timed(record):
            if self.round.number > 1 and self.record("tokenizer").extra == {"kept": True}:
                rounds.take_over(self.round.before.here.run_folder / "latents", latents)
            self._ranks.tell({"stage": "encode", "settings": asdict(settings)})
            encode(settings, False, self._progress, self._ranks)
        mean, deviation = latent_statistics(latents)
        record.metrics = {"mean": mean, "deviation": deviation}
        found = gates.latent_gates(mean, deviation)
        if (
            self.round.number > 1
        ):  # they may be of a world that the tokenizer's statistics did not see
            found = [replace(gate, stops=False) for gate in found]
        self._finish("encode", record, found)

    def _flow(self) -> None:
        self._train("flow", FlowStage, gates.flow_gates)

    def _heads(self) -> None:
        self._train("heads", HeadsStage, lambda m: gates.heads_gates(m, self._measures(self.round)))

    def _distill(self) -> None:
        def judged(metrics: Metrics) -> list[Gate]:
            drawn = gates.fewest_steps(metrics)
            self.record("distill").extra = {"drawn": asdict(drawn)}
            return gates.distill_gates(metrics, drawn)

        self._train("distill", DistillStage, judged)

    def _world(self) -> None:
        plan = self._plan()
        record = self._begin("world")
        folder = self.round.world
        if record.finished and is_whole(folder):
            return
        with self._timed(record):
            values = {**plan.export, **self._sampling(plan), "folder": str(folder)}
            configs = values.get("configs", [])
            values["configs"] = [str(self.round.plan), *configs]
            if not values["teacher"]:  # shipped itself where the student is not near it
                values["bits"] = {n: b for n, b in values.get("bits", {}).items() if n != "teacher"}
            made = export(door.built_from("export", values))
            world = load_world(made, self.device, "fp32")
            windows = int(min(192, 32 + 4 * self.round.here.minutes))
            found = calibrate(world, self.round.recordings, windows, seed=self.game.seed)
            if "hazard_odds" not in plan.export and found.hazard_odds != 1.0:
                values["hazard_odds"] = found.hazard_odds
                export(door.built_from("export", values))
            ahead, energy = energy_at_last(world, self.round.recordings, seed=self.game.seed)
        record.metrics = {name: float(value) for name, value in asdict(found).items()}
        record.metrics |= {"energy_at_last": energy}
        self._finish("world", record, gates.world_gates(found.reward, found.ends, ahead, energy))

    def _report(self) -> None:
        from nfd_env.recipe.report import write_report

        record = self._begin("report")
        with self._timed(record):
            if not (record.extra and record.finished):
                record.extra = asdict(self._read_actions())
            report = config.from_mapping(
                ActionReport, record.extra, "run.yaml: report", measured=True
            )
            found = gates.action_gates(report)
            record.gates = [gate.line() for gate in found]
            path = write_report(self)
        self._finish("report", record, found)
        self._say(f"report: {path}")
        self._say(f"play it:  nfd play {self.game.world_folder}")

    def _read_actions(self) -> ActionReport:
        world = load_world(self.game.world_folder, self.device)
        network = load_inverse_dynamics(self.round.weights("inverse_dynamics"), world)
        # Those that the net has learned on: agents have habits, by which actions could be guessed.
        recordings = RecordedDataset(self.game.recordings_place)
        rollouts = int(min(32, max(8, self.game.minutes)))
        return measure_actions(
            world, recordings, network, rollouts, seed=self.game.seed, progress=self._shown
        )

    # What stages have in common.

    def _train(
        self, name: str, make: Callable[[Any], Any], judged: Callable[[Metrics], list[Gate]]
    ) -> None:
        """Train a stage to its end, unless it was finished before, and judge it."""
        plan = self._plan()
        values = getattr(plan, name)
        record = self._begin(name)
        folder = Path(values["train"]["folder"])
        decided = name in plan.seconds
        done = record.finished and found_file(folder / "model.safetensors", CheckpointError)
        if decided and done and record.steps >= values["train"]["steps"]:
            return
        record.finished = False
        with self._timed(record):
            stage = make(door.built_from(name, values))
            if not decided:
                values = getattr(self._decide(plan, name, stage), name)
                stage.settings = door.built_from(name, values)
            self._progress.expect(self.round.key(name), self.expected())
            if self.round.number > 1 and name in ("flow", "heads"):
                self._judge_before(name, stage, judged)
            settings = stage.settings.train
            ranks = self._ranks_of(name)
            ranks.tell({"stage": name, "settings": values})
            metrics = train(stage, settings, False, self._progress, ranks)
        record.steps = settings.steps
        record.metrics = {key: float(value) for key, value in metrics.items()}
        found = judged(record.metrics)
        if record.extra and "before" in record.extra:
            record.extra["after"] = {gate.name: gate.value for gate in found}
        self._finish(name, record, found)

    def _ranks_of(self, name: str) -> Ranks:
        """The processes that train a stage."""
        return self._ranks if name in planning.SHARED else ALONE

    def _decide(self, plan: Plan, name: str, stage: Any) -> Plan:
        """How many steps a stage gets, from its speed and the time that is left."""
        here = self.round.here
        left = 60 * here.minutes
        if name != "inverse_dynamics":  # which is to judge all worlds alike
            left = max(1.0, self.time_left(self.round))
        plan = timed(plan, here, name, stage, left, self._ranks_of(name).count)
        write_yaml(self.round.plan, asdict(plan))
        values = getattr(plan, name)
        begun = next((values[key] for key in planning.BEGUN_FROM if values.get(key)), "")
        said = f"{values['train']['steps']} steps, about {plan.seconds[name] / 60:.1f} min"
        self._say(f"  {said}, begun with the weights of {begun}" if begun else f"  {said}")
        return plan

    def _judge_before(self, name: str, stage: Any, judged: Callable[[Metrics], list[Gate]]) -> None:
        """Note how good the weights of the round before are on what was recorded now."""
        record = self.record(name)
        if record.extra and "before" in record.extra:
            return
        if self.record("tokenizer").extra == {"kept": True}:  # else they are for other latents
            network = load_weights(self.round.before.weights(name), *_NETWORKS[name])
            found = judged(judge(stage, self.device, network))
            record.extra = {"before": {gate.name: gate.value for gate in found}}
            self._save()

    def _begin(self, stage: str) -> StageRecord:
        """The record of a stage; what was made from something else is taken away."""
        name = self.round.key(stage)
        record, made_from = self.records.get(name), self._made_from(stage)
        if record is not None and record.made_from != made_from:
            self._keep_recordings(stage)
            self._say(f"  {name} is made anew: its settings or what it is made from have changed")
            record = None
        if record is None:
            # What lies there was made from something else, or from what nobody knows.
            if stage == "record" and self.round.number > 1:
                shutil.rmtree(self.round.own_recordings, ignore_errors=True)
            elif stage not in ("record", "world", "report"):
                folder = self.round.weights(stage).parent
                folder = folder.with_name("latents") if stage == "encode" else folder
                shutil.rmtree(folder, ignore_errors=True)
            record = self.records[name] = StageRecord(made_from)
            self._save()
        return record

    def _keep_recordings(self, stage: str) -> None:
        """Refuse to take away, or to mix up, what was recorded of another game or in another size.

        Raises:
            RecordingError: when such recordings lie in the run folder.
        """
        place = Path(self.round.here.recordings_place)
        own = stage == "record" and self.round.number == 1 and not self.game.recordings
        if own and place.exists() and not self._recorded_so(place):
            raise RecordingError(
                f"{place} was recorded with other settings of source: remove it to record anew, or "
                "set another folder"
            )

    def _recorded_so(self, place: Path) -> bool:
        """Whether what lies in ``place`` is of this source, though the run has used another."""
        if not (place / "dataset.yaml").exists():
            return False
        there, here = RecordedDataset(place).spec.source, asdict(self.game.source)
        return recorded_part(there) == recorded_part(here)

    def _finish(self, stage: str, record: StageRecord, found: list[Gate]) -> None:
        """Write down what came out, and stop where it is not good enough."""
        self._progress.close()
        record.gates = [gate.line() for gate in found]
        failed = [gate for gate in found if not gate.passed and gate.stops]
        record.finished = not failed or self._keep_going
        self._save()
        for line in record.gates:
            self._say(f"  {line}")
        if failed and not self._keep_going:
            raise GateError(
                f"{self.round.key(stage)}: {failed[0].name} is {failed[0].value:.3g}, wanted "
                f"{failed[0].bounds()}: {failed[0].advice} (--keep-going goes on regardless)"
            )

    @contextmanager
    def _timed(self, record: StageRecord) -> Iterator[None]:
        """Count the time of the block, also where it is stopped."""
        begin = time.monotonic()
        try:
            yield
        finally:
            record.seconds += time.monotonic() - begin
            self._save()

    def _require(self, stage: str) -> None:
        name = self.round.key(stage)
        record = self.records.get(name)
        if record is None or not record.finished:
            raise ValueError(f"stage {name} has not been finished: run it first")
        if record.made_from != self._made_from(stage):
            raise ValueError(
                f"stage {name} is stale: its settings or what it is made from have changed; run "
                "nfd train without --stage, or that stage first"
            )
