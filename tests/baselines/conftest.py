"""A tiny world with a token-autoregressive rival whose weights are random."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nfd_env.models.weights import fingerprint_of, save_weights
from nfd_env.worlds.checksums import write_checksums

pytest.importorskip("vector_quantize_pytorch")

from nfd_env.baselines.discrete import DiscreteTokenizer, DiscreteTokenizerConfig
from nfd_env.baselines.model import FOLDER
from nfd_env.baselines.transformer import TokenDynamics, TokenDynamicsConfig

LATENTS = 4, 4, 6  # of the tiny world


def discrete(made_with: str = "") -> DiscreteTokenizer:
    config = DiscreteTokenizerConfig(*LATENTS, 1, [4, 3, 3], 8, 1, made_with)
    return DiscreteTokenizer(config).eval()


def transformer(made_with: str = "", top_p: float = 0.95) -> TokenDynamics:
    config = TokenDynamicsConfig(*LATENTS, 2, 3, 36, 3, 32, 2, 2, 5, top_p, made_with)
    network = TokenDynamics(config).eval()
    torch.nn.init.normal_(network.output.weight, std=0.3)  # starts at zero
    return network


@pytest.fixture(scope="session")
def rival_world(endless_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny flow world whose episodes never end, with both rivals. Do not write into it."""
    folder = tmp_path_factory.mktemp("rivals") / "world"
    shutil.copytree(endless_world, folder)
    torch.manual_seed(1)
    tokenizer = discrete(fingerprint_of(folder / "tokenizer.safetensors"))
    parts = folder / FOLDER
    save_weights(parts / "tokenizer.safetensors", tokenizer, tokenizer.config)
    network = transformer(fingerprint_of(parts / "tokenizer.safetensors"))
    save_weights(parts / "dynamics.safetensors", network, network.config)
    write_checksums(folder)
    return folder
