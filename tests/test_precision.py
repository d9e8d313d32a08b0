"""The number format follows from the processor alone."""

from __future__ import annotations

import pytest
import torch

from nfd_env import precision
from nfd_env.precision import PrecisionError, choose_precision

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> None:
    precision.multiplies_bf16.cache_clear()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "avx512f"}, "fp32"),
        ({"avx512f", "avx512_bf16"}, "bf16"),
        ({"amx_bf16", "amx_tile"}, "bf16"),
        (set(), "fp32"),
    ],
)
def test_auto(flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_processor_flags", lambda: frozenset(flags))
    assert choose_precision("auto", CPU) == expected
    assert choose_precision("fp32", CPU) == "fp32"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_auto_on_a_gpu(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert choose_precision("auto", device) == expected
    if expected == "fp32":
        with pytest.raises(PrecisionError, match="use precision='fp32'"):
            choose_precision("bf16", device)


def test_bf16_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: False)
    with pytest.raises(PrecisionError, match="this machine's cpu processor cannot"):
        choose_precision("bf16", CPU)


@pytest.mark.parametrize("name", ["fp16", "", None, 32])
def test_unknown_names(name: str) -> None:
    with pytest.raises(PrecisionError, match="precision must be one of auto, fp32, bf16"):
        choose_precision(name, CPU)
