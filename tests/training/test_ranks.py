"""Several processes train what one would: gloo on the CPU."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nfd_env import config, parts
from nfd_env.flow.consistency import sample_angles, sample_grid_steps
from nfd_env.flow.path import sample_levels
from nfd_env.parts import WHOLE, Part
from nfd_env.training.history import HistoryLevels
from nfd_env.training.loop import TrainConfig, train
from nfd_env.training.ranks import Ranks

pytest.importorskip("tensorboard")

from tests.training.rank_command import STAGES, ended, started  # noqa: E402
from tests.training.test_kill import FILES, SIZES, made  # noqa: E402

__all__ = ["made"]  # a fixture

STEPS = 5
FLOW = {**SIZES["flow"], "ending_share": 0.3, "history_levels": {"draft_share": 0.2}}
FLOW["own_errors"] = 0.5
DISTILL = {
    **SIZES["distill"],
    "discrete_steps": 2,
    "adversarial": {"weight": 0.1, "start": 4, "layers": [0]},
}


def settings(stage: str, made: Path, folder: Path, **train: Any) -> dict[str, Any]:
    recordings, tokenizer, latents = (str(made / name) for name in FILES)
    values: dict = {
        "recordings": recordings,
        "train": {
            "folder": str(folder),
            "steps": STEPS,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 1,
            "precision": "fp32",
            "validate_every": STEPS,
            **train,
        },
    }
    if stage != "tokenizer":
        values |= {"tokenizer": tokenizer, "latents": latents}
    if stage == "distill":
        values["teacher"] = str(made / "teacher" / "model.safetensors")
    return {"stage": stage, "settings": values | {**SIZES, "flow": FLOW, "distill": DISTILL}[stage]}


def alone(job: dict) -> None:
    stage, kind = STAGES[job["stage"]]
    values = config.from_mapping(kind, job["settings"], job["stage"])
    train(stage(values), values.train, False)


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "state.pt", weights_only=True)


def assert_alike(one: Path, other: Path) -> None:
    """The loss at every step, and the finished weights."""
    mine, its = state(one)["watch"]["losses"], state(other)["watch"]["losses"]
    assert len(mine) == len(its)
    np.testing.assert_allclose(its, mine, rtol=2e-5)
    left, right = (load_file(f / "model.safetensors") for f in (one, other))
    assert left.keys() == right.keys()
    # As a whole: Adam makes steps of one size of gradients that are nothing but rounding.
    off = sum(float((right[k].double() - v.double()).square().sum()) for k, v in left.items())
    size = sum(float(v.double().square().sum()) for v in left.values())
    assert off < 1e-5 * size


CASES = {
    "tokenizer": {},
    "flow": {"accumulate": 2},
    "flow-shares": {"shard_above": 0, "optimiser": "muon"},
    "distill-shares": {"shard_above": 0, "accumulate": 2},
}


def test_two_processes_train_what_one_would(made: Path, tmp_path: Path) -> None:
    jobs = [settings(n.split("-")[0], made, tmp_path / f"{n}-2", **v) for n, v in CASES.items()]
    processes = started(2, jobs, tmp_path / "errors")
    for name, values in CASES.items():
        of_one = {k: v for k, v in values.items() if k == "optimiser"}
        alone(settings(name.split("-")[0], made, tmp_path / name, **of_one))
    assert ended(processes) == [0, 0], [p.read_text() for p in tmp_path.glob("errors-*")]
    for name in CASES:
        assert_alike(tmp_path / name, tmp_path / f"{name}-2")


def test_a_lost_process_ends_the_run_and_one_goes_on(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = settings("flow", made, folder, checkpoint_seconds=0.0)
    processes = started(2, [{**job, "dies_at": 3}], tmp_path / "errors")
    assert ended(processes) == [1, -signal.SIGKILL]
    told = (tmp_path / "errors-0").read_text()
    assert "another of the 2 processes of this training has ended" in told
    assert "Traceback" not in told
    assert 2 <= state(folder)["step"] <= 3
    alone(job)
    alone(settings("flow", made, tmp_path / "whole"))
    assert_alike(tmp_path / "whole", folder)


@pytest.mark.parametrize("stage", ["tokenizer", "flow", "distill"])
def test_parts_of_a_batch_are_disjoint_and_together_the_whole(
    made: Path, tmp_path: Path, stage: str
) -> None:
    make, kind = STAGES[stage]
    values = settings(stage, made, tmp_path)["settings"]
    built: Any = make(config.from_mapping(kind, values, stage))

    def rows(part: Part) -> torch.Tensor:
        batch = built.batch(np.random.default_rng(3), 8, part)
        return batch if stage == "tokenizer" else batch[0]

    whole = rows(WHOLE)
    parts = [rows(Part(i, 4, 2)) for i in range(4)]
    assert [len(part) for part in parts] == [2, 2, 2, 2]  # no more is read than that
    assert torch.equal(torch.cat(parts), whole)


def test_random_rows_are_those_of_the_whole() -> None:
    rows = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    draws = [
        lambda n: parts.rand((n, 3)),
        lambda n: parts.randn((n, 1)),
        lambda n: parts.randn_like(torch.cat([rows] * (n // 2))),
        lambda n: sample_levels((n, 4), 3.0, None, 0.1),
        lambda n: HistoryLevels(draft_share=0.5).sample((n, 4), 3.0),
        lambda n: sample_grid_steps((n, 4), 8)[0],
        lambda n: sample_angles((n, 4), 0.2, 1.6),
    ]
    for draw in draws:
        torch.manual_seed(5)
        whole = draw(6)
        for index in range(3):
            torch.manual_seed(5)
            with parts.working_on(Part(index, 3, 3)):
                assert torch.equal(draw(2), whole[2 * index : 2 * index + 2])


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    config = TrainConfig("x", 1, 6, 1e-3, accumulate=3)
    with pytest.raises(ValueError, match=r"a multiple of 12 \(4 processes.*got 6: give 12"):
        config.check_parts(Ranks(0, 4))
    with pytest.raises(ValueError, match="a multiple of 4"):
        TrainConfig("x", 1, 6, 1e-3, accumulate=4)
