"""What a run has made so far, of what, and by which plan: what is skipped, and what made anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nfd_env import config
from nfd_env.data.shards import RecordedDataset
from nfd_env.devices import resolve_device
from nfd_env.inference.sampling import CONSISTENCY
from nfd_env.models.weights import fingerprint_of, fingerprint_values
from nfd_env.recipe import gates, rounds
from nfd_env.recipe import plan as planning
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.measure import GameMeasures, measure
from nfd_env.recipe.plan import Plan
from nfd_env.recipe.records import (
    StageRecord,
    recordings_digest,
    write_records,
    write_yaml,
)
from nfd_env.sources.spec import PRESENTATION, recorded_part

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
_SHORT = 20.0  # seconds that a stage takes in any case
_ONCE = ("inverse_dynamics", "report")  # stages that a run has once, however many rounds


class Ledger:
    """The run folder of a game, seen from one of its rounds.

    Attributes:
        game: the game file.
        device: of everything.
        folder: the run folder.
        stages: names of all stages in their order.
        records: of the stages, by name.
        number: of the round that methods are about.
    """

    def __init__(self, game: GameConfig) -> None:
        """Of ``game``, whose folder need not be there.

        Raises:
            DeviceError: when the device is not there.
        """
        self.game, self.device = game, str(resolve_device(game.device))
        self.folder = game.run_folder
        self.stages = rounds.stages(game.rounds)
        self.records: dict[str, StageRecord] = {}
        self.number = 1
        self.processes = 1  # that share a batch
        self._measured: dict[str, GameMeasures] = {}

    @property
    def here(self) -> GameConfig:
        """The game file as the round takes it."""
        return rounds.of_round(self.game, self.number)

    @property
    def world_folder(self) -> Path:
        """Where the round's world goes: that of the last one is the run's."""
        if self.number == self.game.rounds:
            return self.game.world_folder
        return self.folder / f"round_{self.number}" / "world"

    @contextmanager
    def _in_round(self, number: int) -> Iterator[None]:
        before, self.number = self.number, number
        try:
            yield
        finally:
            self.number = before

    def key(self, stage: str) -> str:
        """The name of a stage of the round."""
        return stage if self.number == 1 or stage in _ONCE else f"{stage}_{self.number}"

    def record(self, stage: str) -> StageRecord:
        """Of a stage of the round that has begun."""
        return self.records[self.key(stage)]

    def _save(self) -> None:
        write_records(self.folder, self.records)

    def weights(self, stage: str) -> Path:
        """The file that a stage of the round leaves."""
        folder = self.folder if stage in _ONCE else self.here.run_folder
        return folder / stage / f"{'agent' if stage == 'agent' else 'model'}.safetensors"

    def _digest(self, stage: str) -> str:
        path = self.weights(stage)
        if not path.is_file():
            raise ValueError(f"{path}: no such weights; run stage {self.key(stage)} first")
        return fingerprint_of(path)  # not of the file: equal weights may differ in its header

    def _measures(self) -> GameMeasures:
        recordings = RecordedDataset(self.here.recordings_place)
        digest = recordings_digest(recordings)
        if digest not in self._measured:
            self._measured[digest] = measure(recordings)
        return self._measured[digest]

    # How long it takes.

    def time_left(self) -> float:
        """Seconds of the budget until the round ends; below 0 where it took longer."""
        numbers = range(1, self.number + 1)
        spent = [
            record.seconds
            for name, record in self.records.items()
            if name in self.stages and rounds.split(name)[1] in numbers
        ]
        return 60 * sum(rounds.minutes_of(self.game, n) for n in numbers) - sum(spent)

    def expected(self) -> dict[str, float]:
        """Seconds that each unfinished stage still takes.

        What was timed is known. The others share what that leaves of the budget; of those whose
        time no budget decides, each takes its share of the whole at most.
        """
        unfinished = [
            name for name in self.stages if not getattr(self.records.get(name), "finished", False)
        ]
        known, shares, most = {}, {}, {}
        for name in unfinished:
            stage, number = rounds.split(name)
            with self._in_round(number):
                timed, record = self._timed_seconds(stage), self.records.get(name)
                share = planning.ALL_SHARES[stage] * rounds.minutes_of(self.game, number)
            if timed is not None:
                known[name] = max(0.0, timed - (record.seconds if record else 0.0))
                continue
            shares[name] = share
            own = getattr(self.game, stage, {})
            set_ = "steps" in own.get("train", {}) if isinstance(own, Mapping) else False
            if stage not in planning.SHARES or set_:
                most[name] = 60 * share
        with self._in_round(self.game.rounds):
            rest = max(0.0, self.time_left() - sum(known.values()))
        total = sum(shares.values())
        for name, share in shares.items():
            least = min(_SHORT, 60 * share)  # also where the budget is spent
            known[name] = max(least, min(rest * share / total, most.get(name, rest)))
        return {name: known[name] for name in unfinished}

    def _timed_seconds(self, stage: str) -> float | None:
        """Of a stage of the round, where its plan knows them."""
        record = self.records.get(self.key(stage))
        if stage == "agent":
            return record.extra["seconds"] if record and record.extra else None
        path = self.here.run_folder / "plan.yaml"
        return config.read(path)["seconds"].get(stage) if path.exists() else None

    # What stages are made from.

    def _made_from(self, stage: str) -> str:
        """The fingerprint of a stage's settings and inputs; inputs count by content, not by path.

        Names, keys and frame rate are presentation: they change the world alone.
        """
        game = self.game
        source = recorded_part(asdict(game.source))
        if stage == "record":
            if self.number > 1:
                return fingerprint_values({"source": source, "agent": self._digest("agent")})
            return fingerprint_values({"source": source, "recordings": game.recordings})
        if stage == "agent":
            values = self._agent_settings()
            left_out = ("folder", "world", "device", "threads", "checkpoint_seconds")
            content = {key: value for key, value in values.items() if key not in left_out}
            with self._in_round(self.number - 1):
                made_in = rounds.world_identity(self.world_folder)
            return fingerprint_values({"settings": content, "world": made_in})
        if stage == "report":
            with self._in_round(game.rounds):
                made = self.record("world").made_from
            return fingerprint_values({"world": made, "reader": self._digest("inverse_dynamics")})
        inputs = {"recordings": recordings_digest(RecordedDataset(self.here.recordings_place))}
        if stage not in ("inverse_dynamics", "tokenizer"):
            inputs["tokenizer"] = self._digest("tokenizer")
        if stage == "encode":
            return fingerprint_values(inputs)
        if stage in ("distill", "world"):
            inputs["teacher"] = self._digest("flow")
        if self.number > 1 and stage in ("tokenizer", "flow", "distill"):
            with self._in_round(self.number - 1):
                inputs["before"] = self._digest(stage)
        values = getattr(self._plan(), "export" if stage == "world" else stage)
        left_out = (*planning.PATHS, "discrete_steps", *planning.BEGUN_FROM * (self.number > 1))
        content = {key: value for key, value in values.items() if key not in left_out}
        if stage == "world":
            inputs |= {part: self._digest(part) for part in ("heads", "distill")}
            if game.rounds > 1:  # the last one is written elsewhere
                inputs["round"] = str(self.number)
        else:
            trained = values["train"].items()
            content["train"] = {key: value for key, value in trained if key not in _WITHOUT_EFFECT}
        return fingerprint_values({"settings": content, "inputs": inputs})

    def _agent_settings(self) -> dict[str, Any]:
        """Those of the round's agent that need no timing."""
        folder = self.here.run_folder / "agent"
        with self._in_round(self.number - 1):
            world, recordings = self.world_folder, RecordedDataset(self.here.recordings_place)
        return rounds.agent_settings(self.game, folder, world, self.device, recordings)

    # By which settings.

    def _plan(self) -> Plan:
        """The stored plan; made and stored where there is none for this game and budget."""
        here = self.here
        path = here.run_folder / "plan.yaml"
        made_for: dict[str, Any] = {
            "minutes": here.minutes,
            "device": self.device,
            "game": {
                key: value
                for key, value in asdict(here).items()
                if key not in ("source", "policies", "workers", "rounds", "agent")
            },
            "presentation": {key: getattr(here.source, key) for key in PRESENTATION},
        }
        before = measures = None
        if self.number > 1:
            with self._in_round(self.number - 1):
                before = self._plan()
            made_for["before"] = fingerprint_values(asdict(before))
        else:
            measures = self._measures()
            made_for["frame_size"] = measures.frame_size
        old = None
        if path.exists():
            old = config.from_mapping(Plan, config.read(path), str(path))
            if old.made_for == made_for:
                return old
        if before is not None:
            plan = rounds.later_plan(before, self.game, here, self.number, self.world_folder)
        else:
            assert measures is not None
            width = RecordedDataset(here.recordings_place).spec.codec.width
            plan = planning.settings(here, measures, self.device, width, self.processes)
        plan = replace(plan, made_for=made_for)
        if old is not None and all(
            old.made_for[key] == made_for[key] for key in ("minutes", "device")
        ):
            plan = planning.with_decisions(plan, old, here)
        self._store(plan)
        return plan

    def _store(self, plan: Plan) -> None:
        write_yaml(self.here.run_folder / "plan.yaml", asdict(plan))

    def _sampling(self, plan: Plan) -> dict[str, Any]:
        """How the world draws its frames: what distillation was judged to be best."""
        level = plan.flow["history_level"]
        extra = self.record("distill").extra or {}
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
                "dynamics": str(self.here.run_folder / "flow"),
                "teacher": "",
                "sampling": {**solved, "steps": drawn.steps},
            }
        own = {name: given for name, given in self.game.export.items() if name in values}
        return planning.merged(values, own)
