"""Worlds of any size with random weights: good for measuring speed, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from nfd_env import config
from nfd_env.inference.sampling import CONSISTENCY, SamplingConfig
from nfd_env.inference.state import Context
from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.sources.source import SourceConfig
from nfd_env.worlds.format import WorldSpec, save_world

STEPS = 4  # of the paper's distilled models, arXiv 2506.01380
_FPS = 20.0  # Minecraft's
_NEVER = -1000.0  # logit of an episode's end


def write_untrained(folder: Path, sizes: str | Path) -> None:
    """Write a world whose dynamics have the sizes of a config file.

    The tokenizer is the file's, else this package's default, for frames sixteen times as high and
    wide as the latents. Every number of an action is a key that is held or not. Episodes never end.

    Args:
        folder: where to.
        sizes: a game file that says all of ``flow.model``, e.g. configs/paper/310m.yaml, or a
            ``DynamicsConfig`` in YAML.

    Raises:
        ConfigError: when the file is missing or no such config.
    """
    sized, tokenized = read_sizes(sizes)
    dynamics = Dynamics(sized).eval()
    tokenizer = Tokenizer(tokenized).eval()
    size = sized.latent_channels * sized.latent_height * sized.latent_width
    heads = Heads(HeadsConfig(latent_size=size, action_width=sized.action_width)).eval()
    with torch.no_grad():
        heads.output.bias[0] = _NEVER
    factor = tokenizer.config.downsampling
    count = sum(p.numel() for p in dynamics.parameters())
    spec = WorldSpec(
        name=f"Untrained {Path(sizes).stem} ({count / 1e6:.1f} M parameters)",
        frame_size=[factor * sized.latent_height, factor * sized.latent_width],
        fps=_FPS,
        action_space={"type": "MultiBinary", "n": sized.action_width},
        source=SourceConfig(env_id="none"),
        sampling=SamplingConfig(STEPS, CONSISTENCY),
    )
    start = Context(torch.randn(2, *sized.latent_shape), torch.zeros(2, sized.action_width))
    save_world(folder, spec, tokenizer, dynamics, heads, [start], {"trained": False})


def read_sizes(path: str | Path) -> tuple[DynamicsConfig, TokenizerConfig]:
    """The sizes in a file, see ``write_untrained``.

    Raises:
        ConfigError: when the file is missing or no such config.
    """
    values = config.read(path)
    game = isinstance(values.get("flow"), dict)
    sized = values["flow"].get("model") or {} if game else values
    where = f"{path}: flow.model" if game else str(path)
    dynamics = config.from_mapping(DynamicsConfig, sized, where)
    own = (values.get("tokenizer") or {}).get("model") or {} if game else {}
    tokenizer = {**own, "latent_channels": dynamics.latent_channels}
    return dynamics, config.from_mapping(TokenizerConfig, tokenizer, f"{path}: tokenizer.model")
