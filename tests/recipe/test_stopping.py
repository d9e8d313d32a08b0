"""``nfd train`` as a process: stopped in its stages, started twice, run again."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.recipe.tiny import game

ROOT = Path(__file__).parents[2]
PATIENCE = 600  # seconds; a machine may be busy


def start(file: Path, *arguments: str) -> subprocess.Popen[str]:
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "nfd_env", "train", str(file), "--keep-going", *arguments],
        cwd=ROOT,
        env={**os.environ, **threads, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stop_in(process: subprocess.Popen[str], stage: str, number: int) -> str:
    """Send a signal when the stage begins; returns what was printed after that."""
    assert process.stdout is not None
    for line in process.stdout:
        if f"] {stage}" in line:
            break
    process.send_signal(number)
    said, _ = process.communicate(timeout=PATIENCE)
    return said


def weights(folder: Path) -> dict[str, str]:
    """Of the tensors alone: the order of what the files say of themselves is arbitrary."""
    digests = {}
    for name in ("tokenizer", "flow", "heads", "distill"):
        digest = hashlib.sha256()
        for key, tensor in sorted(load_file(folder / name / "model.safetensors").items()):
            digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
        digests[name] = digest.hexdigest()
    return digests


def test_a_run_that_is_stopped_in_its_stages_ends_as_one_that_was_not(
    made: Path, tmp_path: Path
) -> None:
    folder, file = tmp_path / "dots", tmp_path / "dots.yaml"
    file.write_text(yaml.safe_dump(asdict(game(folder))))
    for stage, number, status in (
        ("record", signal.SIGTERM, 143),
        ("tokenizer", signal.SIGTERM, 143),
        ("flow", signal.SIGINT, 130),
    ):
        process = start(file)
        said = stop_in(process, stage, number)
        assert process.returncode == status, said
        assert f"stopped in the stage {stage}" in said and "Traceback" not in said, said
    process = start(file)
    second = start(file)  # while the first one is at work
    said, _ = second.communicate(timeout=PATIENCE)
    # Whichever came first; the other one says who has the folder.
    refused, other = (second, process) if second.returncode else (process, second)
    if refused is process:
        said, _ = process.communicate(timeout=PATIENCE)
    else:
        other.communicate(timeout=PATIENCE)
    assert refused.returncode == 1 and "is being written by" in said, said
    assert other.returncode == 0
    assert weights(folder) == weights(made)
