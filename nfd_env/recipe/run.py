"""``nfd train``: recordings, a net that reads actions, a world's parts, world and report.

Every stage leaves its weights in a folder of its own and a line in ``run.yaml`` that says what it
was made from. A stage that is finished and whose inputs are the same is skipped; one whose inputs
have changed is made again; one that was stopped goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nfd_env import config
from nfd_env.data.alignment import measure_alignment
from nfd_env.data.collect import collect
from nfd_env.data.shards import RecordedDataset
from nfd_env.devices import resolve_device
from nfd_env.evaluation.inverse_dynamics import (
    ActionReport,
    InverseDynamicsStage,
    load_inverse_dynamics,
    measure_actions,
)
from nfd_env.files import owned_folder
from nfd_env.inference.sampling import CONSISTENCY
from nfd_env.models.weights import fingerprint_of, fingerprint_values
from nfd_env.recipe import door, gates
from nfd_env.recipe import plan as planning
from nfd_env.recipe.calibration import calibrate
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.gates import Gate, GateError
from nfd_env.recipe.measure import GameMeasures, measure
from nfd_env.recipe.plan import Plan
from nfd_env.recipe.progress import Progress
from nfd_env.recipe.records import (
    StageRecord,
    latent_statistics,
    read_records,
    recordings_digest,
    write_records,
    write_yaml,
)
from nfd_env.recipe.timing import timed
from nfd_env.sources.spec import PRESENTATION, is_imported
from nfd_env.stopping import stopping
from nfd_env.training.distill import DistillStage
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.export import export
from nfd_env.training.flow import FlowStage
from nfd_env.training.heads import HeadsStage
from nfd_env.training.loop import train
from nfd_env.training.ranks import ALONE, Ranks
from nfd_env.training.tokenizer import TokenizerStage
from nfd_env.worlds.load import load_world

STAGES = (
    "record",
    "inverse_dynamics",
    "tokenizer",
    "encode",
    "flow",
    "heads",
    "distill",
    "world",
    "report",
)

Metrics = Mapping[str, float]

_SHORT = 20.0  # seconds of a stage that nobody plans

# What may change without making a stage's result another one.
_WITHOUT_EFFECT = (
    "steps",
    "warmup_steps",
    "validate_every",
    "device",
    "threads",
    "checkpoint_seconds",
    "folder",
    "precision",
    "accumulate",
    "shard_above",
)


class Recipe:
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
        device = str(resolve_device(game.device))
        self.game, self.device = game, device
        self.folder = game.run_folder
        self._keep_going, self._say, self._shown = keep_going, say, progress
        self._ranks = ranks
        self._progress = Progress(STAGES, say, progress)
        self._seen: door.Look | None = None
        self._encoding = 0.0  # seconds a frame
        self.records: dict[str, StageRecord] = {}

    def run(self, only: str | None = None) -> Path:
        """Make the world; or one stage of it.

        INT, TERM and HUP stop it; what was made stays, and another run goes on.

        Args:
            only: one of ``STAGES``, whose inputs must be there and up to date.

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
        if only is not None and only not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {only!r}")
        made = not self.folder.exists()
        with stopping() as stop, stop.at_once(), owned_folder(self.folder):
            self.records = read_records(self.folder)
            try:
                self._pass_door()
            except BaseException:
                if made:  # nothing was begun, so nothing is left behind
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise
            name = STAGES[0]
            try:
                for name in STAGES:
                    if only is not None and STAGES.index(only) < STAGES.index(name):
                        break
                    if only is not None and name != only:
                        # The report alone asks the net that reads actions.
                        if name != "inverse_dynamics" or only == "report":
                            self._require(name)
                        continue
                    self._progress.stage(name, self._expected())
                    getattr(self, f"_{name}")()
            except (KeyboardInterrupt, SystemExit):
                self._say(f"stopped in the stage {name}; run it again to go on")
                raise
            finally:
                self._progress.close()
        return self.game.world_folder

    def _pass_door(self) -> None:
        """Refuse at once what can be known before anything is made."""
        recorded = self.records.get("record")
        if recorded is None or not recorded.finished:
            self._seen = door.look(self.game)
            self._encoding = door.check(self.game, self.device, self._seen, self._ranks)
        else:
            built = door.check_settings(self._plan(), door.look_at_recordings(self.game))
            finished = {name for name, record in self.records.items() if record.finished}
            door.check_parts(built, self._ranks, finished)

    # Stages, in their order.

    def _record(self) -> None:
        record = self._begin("record")
        if self.game.recordings:
            recordings = RecordedDataset(self.game.recordings_place)
        elif is_imported(self.game.source.env_id):
            with self._timed(record):
                recordings = collect(self.game.collect_config(1), self._shown)
        else:
            if not record.extra:  # decided once: more frames later would make everything anew
                assert self._seen is not None
                frames = self.game.frames or planning.frames_to_record(
                    self.game, self._seen.rate, self._encoding
                )
                record.extra = {"frames": frames}
                self._save()
            frames = self.game.frames or int(record.extra["frames"])
            with self._timed(record):
                game = door.with_short_episodes(self.game, frames)
                recordings = collect(game.collect_config(frames), self._shown)
        measures = measure(recordings)
        record.metrics = {
            name: float(value)
            for name, value in asdict(measures).items()
            if not isinstance(value, list)
        }
        skipped = len(recordings.skipped())
        failed = skipped / (skipped + len(recordings))
        shift = measure_alignment(recordings).best
        imported = bool(self.game.recordings) or is_imported(self.game.source.env_id)
        found = gates.recording_gates(measures, shift, failed, imported)
        self._finish("record", record, found)

    def _inverse_dynamics(self) -> None:
        self._train("inverse_dynamics", InverseDynamicsStage, gates.reading_gates)

    def _tokenizer(self) -> None:
        self._train(
            "tokenizer", TokenizerStage, lambda m: gates.tokenizer_gates(m, self._measures())
        )

    def _encode(self) -> None:
        plan = self._plan()
        record = self._begin("encode")
        latents = plan.flow["latents"]
        settings = EncodeConfig(
            plan.flow["recordings"], plan.flow["tokenizer"], latents, self.device
        )
        with self._timed(record):
            self._ranks.tell({"stage": "encode", "settings": asdict(settings)})
            encode(settings, False, self._progress, self._ranks)
        mean, deviation = latent_statistics(Path(latents))
        record.metrics = {"mean": mean, "deviation": deviation}
        self._finish("encode", record, gates.latent_gates(mean, deviation))

    def _flow(self) -> None:
        self._train("flow", FlowStage, gates.flow_gates)

    def _heads(self) -> None:
        self._train("heads", HeadsStage, lambda m: gates.heads_gates(m, self._measures()))

    def _distill(self) -> None:
        def judged(metrics: Metrics) -> list[Gate]:
            drawn = gates.fewest_steps(metrics)
            self.records["distill"].extra = {"drawn": asdict(drawn)}
            return gates.distill_gates(metrics, drawn)

        self._train("distill", DistillStage, judged)

    def _world(self) -> None:
        plan = self._plan()
        record = self._begin("world")
        if record.finished and (self.game.world_folder / "world.yaml").is_file():
            return
        with self._timed(record):
            values = {**plan.export, **self._sampling(plan)}
            values["configs"] = [str(self.folder / "plan.yaml"), *values.get("configs", [])]
            if not values["teacher"]:  # shipped itself where the student is not near it
                values["int8"] = [n for n in values.get("int8", []) if n != "teacher"]
            made = export(door.built_from("export", values))
            recordings = RecordedDataset(self.game.recordings_place)
            world = load_world(made, self.device, "fp32")
            windows = int(min(192, 32 + 4 * self.game.minutes))
            found = calibrate(world, recordings, windows, seed=self.game.seed)
            if "hazard_odds" not in plan.export and found.hazard_odds != 1.0:
                values["hazard_odds"] = found.hazard_odds
                export(door.built_from("export", values))
        record.metrics = {name: float(value) for name, value in asdict(found).items()}
        self._finish("world", record, gates.world_gates(found.reward, found.ends))

    def _report(self) -> None:
        from nfd_env.recipe.report import write_report

        record = self._begin("report")
        with self._timed(record):
            record.extra = record.extra or asdict(self._read_actions())
            found = gates.action_gates(ActionReport(**record.extra))
            record.gates = [gate.line() for gate in found]
            path = write_report(self)
        self._finish("report", record, found)
        self._say(f"report: {path}")
        self._say(f"play it:  nfd play {self.game.world_folder}")

    def _read_actions(self) -> ActionReport:
        world = load_world(self.game.world_folder, self.device)
        network = load_inverse_dynamics(self._weights("inverse_dynamics"), world)
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
        done = record.finished and (folder / "model.safetensors").is_file()
        if decided and done and record.steps >= values["train"]["steps"]:
            return
        record.finished = False
        with self._timed(record):
            stage = make(door.built_from(name, values))
            if not decided:
                values = getattr(self._decide(plan, name, stage), name)
                stage.settings = door.built_from(name, values)
            self._progress.expect(name, self._expected())
            settings = stage.settings.train
            ranks = self._ranks_of(name)
            ranks.tell({"stage": name, "settings": values})
            metrics = train(stage, settings, False, self._progress, ranks)
        record.steps = settings.steps
        record.metrics = {key: float(value) for key, value in metrics.items()}
        self._finish(name, record, judged(record.metrics))

    def _ranks_of(self, name: str) -> Ranks:
        """The processes that train a stage."""
        return self._ranks if name in planning.SHARED else ALONE

    def _decide(self, plan: Plan, name: str, stage: Any) -> Plan:
        """How many steps a stage gets, from its speed and the time that is left."""
        left = 60 * self.game.minutes
        if name != "inverse_dynamics":  # which is to judge all worlds alike
            left = max(1.0, left - sum(record.seconds for record in self.records.values()))
        plan = timed(plan, self.game, name, stage, left, self._ranks_of(name).count)
        self._store(plan)
        steps = getattr(plan, name)["train"]["steps"]
        self._say(f"  {steps} steps, about {plan.seconds[name] / 60:.1f} min")
        return plan

    def _begin(self, name: str) -> StageRecord:
        """The record of a stage; what was made from something else is taken away."""
        record, made_from = self.records.get(name), self._made_from(name)
        if record is not None and record.made_from != made_from:
            self._say(f"  {name} is made anew: its settings or what it is made from have changed")
            record = None
        if record is None:
            # What lies there was made from something else, or from what nobody knows.
            if name not in ("record", "world", "report"):
                folder = self.folder / ("latents" if name == "encode" else name)
                shutil.rmtree(folder, ignore_errors=True)
            record = self.records[name] = StageRecord(made_from)
            self._save()
        return record

    def _finish(self, name: str, record: StageRecord, found: list[Gate]) -> None:
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
                f"{name}: {failed[0].name} is {failed[0].value:.3g}, wanted {failed[0].bounds()}: "
                f"{failed[0].advice} (--keep-going goes on regardless)"
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

    def _save(self) -> None:
        write_records(self.folder, self.records)

    def _require(self, name: str) -> None:
        record = self.records.get(name)
        if record is None or not record.finished:
            raise ValueError(f"stage {name} has not been finished: run it first")
        if record.made_from != self._made_from(name):
            raise ValueError(
                f"stage {name} is stale: its settings or what it is made from have changed; run "
                "nfd train without --stage, or that stage first"
            )

    def _expected(self) -> dict[str, float]:
        """Seconds of the stages that are not finished, as far as they are known."""
        path = self.folder / "plan.yaml"
        if not path.exists():
            return {}
        known = config.read(path)["seconds"]
        return {
            name: known.get(name, _SHORT)
            for name in STAGES
            if not getattr(self.records.get(name), "finished", False)
        }

    # What stages are made from.

    def _made_from(self, name: str) -> str:
        """The fingerprint of a stage's settings and inputs; inputs count by content, not by path.

        Names, keys and frame rate are presentation: they change the world alone.
        """
        game = self.game
        if name == "record":
            source = {k: v for k, v in asdict(game.source).items() if k not in PRESENTATION}
            return fingerprint_values({"source": source, "recordings": game.recordings})
        if name == "report":
            made = self.records["world"].made_from
            return fingerprint_values({"world": made, "reader": self._digest("inverse_dynamics")})
        inputs = {"recordings": recordings_digest(RecordedDataset(game.recordings_place))}
        if name not in ("inverse_dynamics", "tokenizer"):
            inputs["tokenizer"] = self._digest("tokenizer")
        if name == "encode":
            return fingerprint_values(inputs)
        if name in ("distill", "world"):
            inputs["teacher"] = self._digest("flow")
        values = getattr(self._plan(), "export" if name == "world" else name)
        content = {
            key: value
            for key, value in values.items()
            if key not in (*planning.PATHS, "discrete_steps")
        }
        if name == "world":
            inputs |= {part: self._digest(part) for part in ("heads", "distill")}
        else:
            trained = values["train"].items()
            content["train"] = {key: value for key, value in trained if key not in _WITHOUT_EFFECT}
        return fingerprint_values({"settings": content, "inputs": inputs})

    def _digest(self, name: str) -> str:
        path = self._weights(name)
        if not path.is_file():
            raise ValueError(f"{path}: no such weights; run stage {name} first")
        return fingerprint_of(path)  # not of the file: equal weights may differ in its header

    def _weights(self, name: str) -> Path:
        return self.folder / name / "model.safetensors"

    def _measures(self) -> GameMeasures:
        return measure(RecordedDataset(self.game.recordings_place))

    def _plan(self) -> Plan:
        """The stored plan; made and stored where there is none for this game and budget."""
        path = self.folder / "plan.yaml"
        measures = self._measures()
        made_for = {
            "minutes": self.game.minutes,
            "device": self.device,
            "game": {
                key: value
                for key, value in asdict(self.game).items()
                if key not in ("source", "policies", "workers")
            },
            "presentation": {key: getattr(self.game.source, key) for key in PRESENTATION},
            "frame_size": measures.frame_size,
        }
        old = None
        if path.exists():
            old = config.from_mapping(Plan, config.read(path), str(path))
            if old.made_for == made_for:
                return old
        recordings = RecordedDataset(self.game.recordings_place)
        codec = recordings.spec.codec
        plan = planning.settings(self.game, measures, self.device, codec.width, self._ranks.count)
        plan = replace(plan, made_for=made_for)
        if old is not None and all(
            old.made_for[key] == made_for[key] for key in ("minutes", "device")
        ):
            plan = planning.with_decisions(plan, old, self.game)
        self._store(plan)
        return plan

    def _store(self, plan: Plan) -> None:
        write_yaml(self.folder / "plan.yaml", asdict(plan))

    def _sampling(self, plan: Plan) -> dict[str, Any]:
        """How the world draws its frames: what distillation was judged to be best."""
        level = plan.flow["history_level"]
        extra = self.records["distill"].extra or {}
        drawn = gates.Drawn(**extra["drawn"]) if "drawn" in extra else gates.FALLBACK
        solved = {"sampler": "dpm_solver_pp", "history_level": level}
        if drawn.by == "student":
            student = {
                "steps": drawn.steps,
                "sampler": CONSISTENCY,
                "shift": plan.distill["shift"],
                "history_level": level,
            }
            values = {"sampling": student, "teacher_sampling": {**solved, "steps": 18}}
        else:
            values = {
                "dynamics": str(self.folder / "flow"),
                "teacher": "",
                "sampling": {**solved, "steps": drawn.steps},
            }
        own = {name: given for name, given in self.game.export.items() if name in values}
        return planning.merged(values, own)
