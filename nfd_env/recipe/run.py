"""``nfd train``: recordings, tokenizer, latents, flow, heads, student, world and report.

Every stage leaves its weights in a folder of its own and a line in ``run.yaml`` that says what it
was made from. A stage that is finished and whose inputs are the same is skipped; one whose inputs
have changed is made again; one that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from nfd_env import config
from nfd_env.data.alignment import measure_alignment
from nfd_env.data.collect import collect
from nfd_env.data.shards import RecordedDataset
from nfd_env.devices import resolve_device
from nfd_env.files import atomic_write, owned_folder
from nfd_env.inference.sampling import CONSISTENCY
from nfd_env.models.weights import fingerprint_values
from nfd_env.recipe import gates
from nfd_env.recipe import plan as planning
from nfd_env.recipe.calibration import calibrate
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.gates import Gate, GateError
from nfd_env.recipe.measure import GameMeasures, measure
from nfd_env.recipe.plan import Plan
from nfd_env.sources.source import PRESENTATION
from nfd_env.spaces import ActionCodec, space_from_dict
from nfd_env.training.distill import DistillStage, DistillTrainingConfig
from nfd_env.training.encode import EncodeConfig, encode
from nfd_env.training.export import ExportConfig, export
from nfd_env.training.flow import FlowStage, FlowTrainingConfig
from nfd_env.training.heads import HeadsStage, HeadsTrainingConfig
from nfd_env.training.loop import train
from nfd_env.training.tokenizer import TokenizerStage, TokenizerTrainingConfig
from nfd_env.worlds.load import load_world

STAGES = ("record", "tokenizer", "encode", "flow", "heads", "distill", "world", "report")

_RECORDING_SHARE = 0.12  # of the budget, at most
_FEWEST_FRAMES = 2_000
_MOST_FRAMES = 250_000
_FRAMES_A_MINUTE = 2_500  # of the budget; more than a training of that length can look at
_PROBED = 400  # frames after which the game's speed is known

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
)


@dataclass
class StageRecord:
    """What ``run.yaml`` says of a stage.

    Attributes:
        made_from: fingerprint of its settings and inputs.
        finished: whether it is.
        steps: that were trained.
        seconds: that it took, all runs together.
        metrics: of its last validation.
        gates: lines of text.
        extra: other plain values, such as the student's sampling steps.
    """

    made_from: str
    finished: bool = False
    steps: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] | None = None
    gates: list[str] | None = None
    extra: dict[str, Any] | None = None


class Recipe:
    """One run of the recipe in its folder."""

    def __init__(
        self,
        game: GameConfig,
        keep_going: bool = False,
        say: Callable[[str], None] = print,
        progress: bool = True,
    ) -> None:
        """Prepare; nothing is made yet.

        Args:
            game: the game file.
            keep_going: go on after a gate that stops.
            say: takes lines for the user.
            progress: show bars.

        Raises:
            DeviceError: when the device is not there.
        """
        device = str(resolve_device(game.device))
        self.game, self.device = game, device
        self.folder = game.run_folder
        self._keep_going, self._say, self._progress = keep_going, say, progress
        self.records: dict[str, StageRecord] = {}
        path = self.folder / "run.yaml"
        if path.exists():
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            self.records = {
                name: config.from_mapping(StageRecord, value, f"{path}: {name}")
                for name, value in values.items()
            }

    def run(self, only: str | None = None) -> Path:
        """Make the world; or one stage of it.

        Args:
            only: one of ``STAGES``, whose inputs must be there and up to date.

        Returns:
            The world folder.

        Raises:
            GateError: when a stage's result is not good enough.
            PlanError: when no training can be planned.
            RecordingError: when the game cannot be recorded.
        """
        if only is not None and only not in STAGES:
            raise ValueError(f"stage must be one of {', '.join(STAGES)}, got {only!r}")
        with owned_folder(self.folder):
            for number, name in enumerate(STAGES, 1):
                if only is not None and STAGES.index(only) < number - 1:
                    break
                if only is not None and name != only:
                    self._require(name)
                    continue
                self._say(f"[{number}/{len(STAGES)}] {name}{self._forecast(name)}")
                getattr(self, f"_{name}")()
        return self.game.world_folder

    # Stages, in their order.

    def _record(self) -> None:
        record = self._begin("record")
        if self.game.recordings:
            recordings = RecordedDataset(self.game.recordings_folder)
        else:
            frames = self._frames_to_record(record)
            begin = time.monotonic()
            recordings = collect(self.game.collect_config(frames), self._progress)
            record.seconds += time.monotonic() - begin
        measures = measure(recordings)
        record.metrics = {
            name: float(value)
            for name, value in asdict(measures).items()
            if not isinstance(value, list)
        }
        shift = measure_alignment(recordings).best
        self._finish("record", record, gates.recording_gates(measures, shift))

    def _tokenizer(self) -> None:
        record = self._train("tokenizer", TokenizerTrainingConfig, TokenizerStage)
        if record is not None:
            found = gates.tokenizer_gates(record.metrics or {}, self._measures())
            self._finish("tokenizer", record, found)

    def _encode(self) -> None:
        plan = self._plan()
        record = self._begin("encode")
        begin = time.monotonic()
        latents = plan.flow["latents"]
        encode(
            EncodeConfig(plan.flow["recordings"], plan.flow["tokenizer"], latents, self.device),
            self._progress,
        )
        record.seconds += time.monotonic() - begin
        mean, deviation = _latent_statistics(Path(latents))
        record.metrics = {"mean": mean, "deviation": deviation}
        self._finish("encode", record, gates.latent_gates(mean, deviation))

    def _flow(self) -> None:
        record = self._train("flow", FlowTrainingConfig, FlowStage)
        if record is not None:
            self._finish("flow", record, gates.flow_gates(record.metrics or {}))

    def _heads(self) -> None:
        record = self._train("heads", HeadsTrainingConfig, HeadsStage)
        if record is not None:
            found = gates.heads_gates(record.metrics or {}, self._measures())
            self._finish("heads", record, found)

    def _distill(self) -> None:
        record = self._train("distill", DistillTrainingConfig, DistillStage)
        if record is not None:
            steps = gates.student_steps(record.metrics or {})
            record.extra = {"sampling_steps": steps}
            self._finish("distill", record, gates.distill_gates(record.metrics or {}, steps))

    def _world(self) -> None:
        plan = self._plan()
        record = self._begin("world")
        if record.finished and (self.game.world_folder / "world.yaml").is_file():
            return
        begin = time.monotonic()
        values = {**plan.export, **self._sampling(plan)}
        made = export(config.from_mapping(ExportConfig, values, "export"))
        recordings = RecordedDataset(self.game.recordings_folder)
        found = calibrate(load_world(made, self.device, "fp32"), recordings, seed=self.game.seed)
        if "hazard_odds" not in plan.export and found.hazard_odds != 1.0:
            values["hazard_odds"] = found.hazard_odds
            export(config.from_mapping(ExportConfig, values, "export"))
        record.seconds += time.monotonic() - begin
        record.metrics = {name: float(value) for name, value in asdict(found).items()}
        self._finish("world", record, gates.world_gates(found.reward, found.ends))

    def _report(self) -> None:
        from nfd_env.recipe.report import write_report

        begin = time.monotonic()
        path = write_report(self)
        record = self._begin("report")
        record.seconds += time.monotonic() - begin
        self._finish("report", record, [])
        self._say(f"report: {path}")
        self._say(f"play it:  nfd play {self.game.world_folder}")

    # What stages have in common.

    def _train(self, name: str, schema: Any, make: Callable[[Any], Any]) -> StageRecord | None:
        """Train a stage to its end; None where it was finished before."""
        plan = self._plan()
        values = getattr(plan, name)
        record = self._begin(name)
        folder = Path(values["train"]["folder"])
        decided = name in plan.seconds
        done = record.finished and (folder / "model.safetensors").is_file()
        if decided and done and record.steps >= values["train"]["steps"]:
            return None
        begin = time.monotonic()
        try:
            stage = make(config.from_mapping(schema, values, name))
            if not decided:
                values = getattr(self._decide(plan, name, stage), name)
                stage.settings = config.from_mapping(schema, values, name)
            settings = config.from_mapping(schema, values, name)
            record.finished = False
            metrics = train(stage, settings.train, self._progress)
        finally:
            record.seconds += time.monotonic() - begin
            self._save()
        record.steps = settings.train.steps
        record.metrics = {key: float(value) for key, value in metrics.items()}
        return record

    def _decide(self, plan: Plan, name: str, stage: Any) -> Plan:
        """How many steps a stage gets, from its speed and the time that is left."""
        spent = sum(record.seconds for record in self.records.values())
        left = max(1.0, 60 * self.game.minutes - spent)
        per_step = planning.seconds_per_step(stage, getattr(plan, name)["train"])
        seconds = left * planning.share_of(name)
        plan = planning.with_steps(plan, self.game, name, seconds, per_step)
        self._store(plan)
        steps = getattr(plan, name)["train"]["steps"]
        self._say(f"  {steps} steps of {per_step:.3f} s, about {steps * per_step / 60:.1f} min")
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

    def _save(self) -> None:
        values = {name: asdict(record) for name, record in self.records.items()}
        with atomic_write(self.folder / "run.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def _require(self, name: str) -> None:
        record = self.records.get(name)
        if record is None or not record.finished:
            raise ValueError(f"stage {name} has not been finished: run it first")
        if record.made_from != self._made_from(name):
            raise ValueError(
                f"stage {name} is stale: its settings or what it is made from have changed; run "
                "nfd train without --stage, or that stage first"
            )

    def _forecast(self, name: str) -> str:
        path = self.folder / "plan.yaml"
        if not path.exists():
            return ""
        seconds = yaml.safe_load(path.read_text(encoding="utf-8"))["seconds"]
        left = [
            seconds.get(later, 20.0)
            for later in STAGES[STAGES.index(name) :]
            if not getattr(self.records.get(later), "finished", False)
        ]
        return f": about {seconds.get(name, 20.0) / 60:.1f} min; all: {sum(left) / 60:.0f} min left"

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
            return self.records["world"].made_from if "world" in self.records else ""
        inputs = {"recordings": recordings_digest(RecordedDataset(game.recordings_folder))}
        if name != "tokenizer":
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
        path = self.folder / name / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{path}: no such weights; run stage {name} first")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def _measures(self) -> GameMeasures:
        return measure(RecordedDataset(self.game.recordings_folder))

    def _frames_to_record(self, record: StageRecord) -> int:
        """Decided once: more frames later would make everything anew."""
        if self.game.frames:
            return self.game.frames
        if record.extra and "frames" in record.extra:
            return int(record.extra["frames"])
        wanted = int(min(_MOST_FRAMES, max(_FEWEST_FRAMES, _FRAMES_A_MINUTE * self.game.minutes)))
        begin = time.monotonic()
        workers = self.game.collect_config(1).workers
        probed = collect(self.game.collect_config(_PROBED), progress=False).frame_count
        # Starting the processes takes a while that is not part of their speed.
        rate = probed / max(0.1, time.monotonic() - begin)
        most = int(rate * workers * _RECORDING_SHARE * 60 * self.game.minutes)
        frames = max(_FEWEST_FRAMES, probed, min(wanted, most))
        record.extra = {"frames": frames}
        self._save()
        return frames

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
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            old = config.from_mapping(Plan, values, str(path))
            if old.made_for == made_for:
                return old
        recordings = RecordedDataset(self.game.recordings_folder)
        codec = ActionCodec(space_from_dict(recordings.spec.action_space))
        plan = planning.settings(self.game, measures, self.device, codec.width)
        plan = replace(plan, made_for=made_for)
        if old is not None and all(
            old.made_for[key] == made_for[key] for key in ("minutes", "device")
        ):
            plan = planning.with_decisions(plan, old, self.game)
        self._store(plan)
        return plan

    def _store(self, plan: Plan) -> None:
        with atomic_write(self.folder / "plan.yaml") as temporary:
            text = yaml.safe_dump(asdict(plan), sort_keys=False)
            temporary.write_text(text, encoding="utf-8")

    def _sampling(self, plan: Plan) -> dict[str, Any]:
        """How the world draws its frames: by the student, else by the teacher."""
        level = plan.flow["history_level"]
        extra = self.records["distill"].extra or {}
        steps, values = extra.get("sampling_steps", 0), {}
        student = {
            "steps": steps,
            "sampler": CONSISTENCY,
            "shift": plan.distill["shift"],
            "history_level": level,
        }
        teacher = {"steps": 18, "sampler": "dpm_solver_pp", "history_level": level}
        if steps:
            values = {"sampling": student, "teacher_sampling": teacher}
        else:
            values = {
                "dynamics": str(self.folder / "flow"),
                "teacher": "",
                "sampling": {**teacher, "steps": 8},
            }
        own = {name: given for name, given in self.game.export.items() if name in values}
        return planning.merged(values, own)


def recordings_digest(recordings: RecordedDataset) -> str:
    """A hash of which episodes a data set has; not of every frame, which would take minutes."""
    digest = hashlib.sha256()
    for episode in recordings:
        text = f"{episode.key} {len(episode)} {episode.seed} {episode.total_reward} {episode.split}"
        digest.update(text.encode())
    return digest.hexdigest()


def _latent_statistics(folder: Path) -> tuple[float, float]:
    """Largest absolute mean of a channel, and the deviation over all, of encoded recordings."""
    parts = []
    for path in sorted(folder.glob("*.npy")):
        latents = np.load(path, mmap_mode="r")
        parts.append(np.array(latents[:: max(1, len(latents) // 500)], np.float32))
    values = torch.from_numpy(np.concatenate(parts))
    return float(values.mean((0, 2, 3)).abs().max()), float(values.std())
