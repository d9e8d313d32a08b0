"""What a run has made so far, of what, and by which plan: what is skipped, and what made anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nfd_env import config
from nfd_env.devices import resolve_device
from nfd_env.files import found_file
from nfd_env.inference.sampling import CONSISTENCY
from nfd_env.models.weights import fingerprint_of
from nfd_env.recipe import gates, rounds
from nfd_env.recipe import plan as planning
from nfd_env.recipe.game import GameConfig
from nfd_env.recipe.measure import GameMeasures, measure
from nfd_env.recipe.plan import Plan
from nfd_env.recipe.records import StageRecord, recordings_digest, write_records, write_yaml
from nfd_env.recipe.steps import with_decisions
from nfd_env.sources.spec import PRESENTATION, recorded_part
from nfd_env.training.initial import initial_weights

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


def with_stored_budget(game: GameConfig) -> GameConfig:
    """``game`` with the minutes that its run was planned for, where there is a plan.

    A single stage, or a world put together again, belongs to the run as it was begun.
    """
    round = rounds.Round(game)
    if not found_file(round.plan, config.ConfigError):
        return game
    plan = planning.stored(round.plan)
    then = plan.made_for.get("minutes", round.here.minutes)
    return replace(game, minutes=game.minutes * then / round.here.minutes)


class Ledger:
    """The run folder of a game, seen from one of its rounds.

    Attributes:
        game: the game file.
        device: of everything.
        folder: the run folder.
        stages: names of all stages in their order.
        records: of the stages, by name.
        round: that methods are about.
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
        self.round = rounds.Round(game)
        self.processes = 1  # that share a batch
        self._single = False  # whether one stage is asked for, which decides nothing for the others
        self._measured: dict[str, GameMeasures] = {}

    def record(self, stage: str) -> StageRecord:
        """Of a stage of the round that has begun."""
        return self.records[self.round.key(stage)]

    def _save(self) -> None:
        write_records(self.folder, self.records)

    def _measures(self, round: rounds.Round) -> GameMeasures:
        recordings = round.recordings
        digest = recordings_digest(recordings)
        if digest not in self._measured:
            self._measured[digest] = measure(recordings)
        return self._measured[digest]

    # How long it takes.

    def time_left(self, round: rounds.Round) -> float:
        """Seconds of the budget until ``round`` ends; below 0 where it took longer."""
        numbers = range(1, round.number + 1)
        spent = [
            record.seconds
            for name, record in self.records.items()
            if name in self.stages and rounds.split(name)[1] in numbers
        ]
        return 60 * sum(round.at(n).minutes for n in numbers) - sum(spent)

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
            round, record = self.round.at(number), self.records.get(name)
            if stage == "agent":
                timed = (record.extra or {}).get("seconds") if record else None
            else:
                timed = _planned_seconds(round.plan).get(stage)
            share = planning.ALL_SHARES[stage] * round.minutes
            if timed is not None:
                known[name] = max(0.0, timed - (record.seconds if record else 0.0))
                continue
            shares[name] = share
            own = getattr(self.game, stage, {})
            set_ = "steps" in own.get("train", {}) if isinstance(own, Mapping) else False
            if stage not in planning.SHARES or set_:
                most[name] = 60 * share
        rest = max(0.0, self.time_left(self.round.at(self.game.rounds)) - sum(known.values()))
        total = sum(shares.values())
        for name, share in shares.items():
            least = min(_SHORT, 60 * share)  # also where the budget is spent
            known[name] = max(least, min(rest * share / total, most.get(name, rest)))
        return {name: known[name] for name in unfinished}

    # What stages are made from.

    def _made_from(self, stage: str) -> str:
        """The fingerprint of a stage's settings and inputs; inputs count by content, not by path.

        Names, keys and frame rate are presentation: they change the world alone.
        """
        game, round = self.game, self.round
        source = recorded_part(asdict(game.source))
        if stage == "record":
            if round.number > 1:
                return config.fingerprint({"source": source, "agent": round.digest("agent")})
            return config.fingerprint({"source": source, "recordings": game.recordings})
        if stage == "agent":
            values = self._agent_settings()
            left_out = ("folder", "world", "device", "threads", "checkpoint_seconds", "keep")
            content = {key: value for key, value in values.items() if key not in left_out}
            made_in = rounds.world_identity(round.before.world)
            return config.fingerprint({"settings": content, "world": made_in})
        if stage == "report":
            made = self.records[round.at(game.rounds).key("world")].made_from
            return config.fingerprint({"world": made, "reader": round.digest("inverse_dynamics")})
        inputs = {"recordings": recordings_digest(round.recordings)}
        if stage not in ("inverse_dynamics", "tokenizer"):
            inputs["tokenizer"] = round.digest("tokenizer")
        if stage == "encode":
            return config.fingerprint(inputs)
        if stage in ("distill", "world"):
            inputs["teacher"] = round.digest("flow")
        if round.number > 1 and stage in ("tokenizer", "flow", "distill"):
            inputs["before"] = round.before.digest(stage)
        plan = self._plan()
        values = getattr(plan, "export" if stage == "world" else stage)
        if "before" not in inputs:
            begun = [key for key in planning.BEGUN_FROM if values.get(key)]
            inputs |= {key: fingerprint_of(initial_weights(values[key], stage)) for key in begun}
        left_out = (*planning.PATHS, *planning.JUDGING, *planning.BEGUN_FROM, "discrete_steps")
        content = {key: value for key, value in values.items() if key not in left_out}
        if stage == "world":
            inputs |= {part: round.digest(part) for part in ("heads", "distill")}
            if game.rounds > 1:  # the last one is written elsewhere
                inputs["round"] = str(round.number)
        else:
            trained = values["train"].items()
            content["train"] = {key: value for key, value in trained if key not in _WITHOUT_EFFECT}
            content["train"]["batch_size"] = plan.batch_size(stage)
        return config.fingerprint({"settings": content, "inputs": inputs})

    def _agent_settings(self) -> dict[str, Any]:
        """Those of the round's agent that need no timing."""
        folder, before = self.round.weights("agent").parent, self.round.before
        return rounds.agent_settings(
            self.game, folder, before.world, self.device, before.recordings
        )

    # By which settings.

    def _plan(self, round: rounds.Round | None = None) -> Plan:
        """The stored plan; made and stored where there is none for this game and budget."""
        round = round or self.round
        here, path = round.here, round.plan
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
        before = self._plan(round.before) if round.number > 1 else None
        if before is not None:
            made_for["before"] = config.fingerprint(asdict(before))
        else:
            made_for["frame_size"] = self._measures(round).frame_size
        old = None
        if found_file(path, config.ConfigError):
            old = planning.stored(path)
            if old.made_for == made_for:
                return old
        if before is not None:
            plan = rounds.later_plan(before, round)
        else:
            width = round.recordings.spec.codec.width
            measures = self._measures(round)
            plan = planning.settings(here, measures, self.device, width, self.processes)
        plan = replace(plan, made_for=made_for)
        if old is not None and all(
            old.made_for[key] == made_for[key] for key in ("minutes", "device")
        ):
            plan = with_decisions(plan, old, here)
        if old is None or not self._single:
            write_yaml(path, asdict(plan))
        return plan

    def _sampling(self, plan: Plan) -> dict[str, Any]:
        """How the world draws its frames: what distillation was judged to be best."""
        level = plan.flow["history_level"]
        drawn = gates.Drawn(**(self.record("distill").extra or {})["drawn"])
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
                "dynamics": str(self.round.here.run_folder / "flow"),
                "teacher": "",
                "sampling": {**solved, "steps": drawn.steps},
            }
        own = {name: given for name, given in self.game.export.items() if name in values}
        return planning.merged(values, own)


def _planned_seconds(path: Path) -> dict[str, float]:
    """Of the stages that were timed, by the plan in the file ``path``, if it is there."""
    return config.read(path)["seconds"] if found_file(path, config.ConfigError) else {}
