"""A smaller copy of a world: fewer bits a weight, with or without its teacher."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from nfd_env.models.dynamics import Dynamics, DynamicsConfig
from nfd_env.models.heads import Heads, HeadsConfig
from nfd_env.models.tokenizer import Tokenizer, TokenizerConfig
from nfd_env.models.weights import (
    CheckpointError,
    Origin,
    fingerprint_of,
    load_weights,
    read_origin,
    read_rounded,
    save_weights,
)
from nfd_env.players.load import agents_of
from nfd_env.players.policy import ActorCritic, PolicyConfig, of_networks
from nfd_env.spaces import ActionCodec, space_from_dict
from nfd_env.training.export import check_bits, round_networks
from nfd_env.worlds.checksums import verify
from nfd_env.worlds.format import AGENTS, NETWORKS, kind_of, read_spec, save_world
from nfd_env.worlds.load import find_world
from nfd_env.worlds.starts import load_starts


def shrink(
    world: str,
    folder: Path,
    bits: Mapping[str, int],
    teacher: bool = True,
    agents: Collection[str] | None = None,
) -> Path:
    """Write a copy of a world with rounded weights, all or nothing.

    Agents come along in half precision and are told the rounded networks, which give them almost
    the latents and features that they know; what they reach is to be measured again.

    Args:
        world: a folder or the name of a shipped world.
        folder: of the copy; replaced when it already holds a world.
        bits: see ``ExportConfig``; networks that it does not name stay as they are.
        teacher: keep the flow model behind a distilled dynamics, where the world has it.
        agents: names of those that come along; None for all.

    Returns:
        The folder.

    Raises:
        CheckpointError: when the world is missing or damaged, or has no such agent.
        FolderInUseError: when another process is writing the same world.
        ValueError: for bits that there are not.
    """
    check_bits(bits)
    source = find_world(world)
    spec = read_spec(source)
    names = [n for n in NETWORKS if (source / f"{n}.safetensors").exists()]
    if not teacher or "teacher" not in names:
        spec = replace(spec, teacher=None)
        names = [n for n in names if n != "teacher"]
    if absent := bits.keys() - names:
        raise ValueError(f"bits names the {min(absent)}, which the copy does not have")
    known = agents_of(source)
    taken = list(known) if agents is None else list(agents)
    if unknown := set(taken) - known.keys():
        raise CheckpointError(f"{source} has no agent {min(unknown)!r}, but {', '.join(known)}")
    paths = {name: source / f"{name}.safetensors" for name in names}
    verify(source, "starts.safetensors", *(path.name for path in paths.values()))
    tokenizer = load_weights(paths["tokenizer"], Tokenizer, TokenizerConfig)
    dynamics = load_weights(paths["dynamics"], Dynamics, DynamicsConfig)
    heads = load_weights(paths["heads"], Heads, HeadsConfig)
    taught = None
    if "teacher" in paths:
        taught = load_weights(paths["teacher"], Dynamics, DynamicsConfig)
    prints = {name: fingerprint_of(path) for name, path in paths.items()}
    made_from = {n: p for n, p in prints.items() if n in ("tokenizer", "teacher")}
    origins = {
        name: read_origin(path) or Origin(kind_of(name, spec), prints[name], made_from)
        for name, path in paths.items()
    }
    width = ActionCodec(space_from_dict(spec.action_space)).width
    starts = load_starts(source / "starts.safetensors", dynamics.config.latent_shape, width)
    networks = {"tokenizer": tokenizer, "dynamics": dynamics, "heads": heads, "teacher": taught}
    rounded, errors = round_networks(networks, bits, starts)
    provenance = yaml.safe_load((source / "provenance.yaml").read_text(encoding="utf-8"))
    for name in paths.keys() - bits.keys():  # as it is
        if (stored := read_rounded(paths[name])) is not None:
            rounded[name] = stored
    provenance["bits"] = provenance.get("bits", {}) | errors

    def beside(copy: Path) -> None:
        for path in (*source.glob("clip.*"), *source.glob("*LICENSE*")):
            verify(source, path.name)
            shutil.copy(path, copy)
        for name in taken:
            verify(source, f"{AGENTS}/{known[name].name}")
            agent = load_weights(known[name], ActorCritic, PolicyConfig)
            mine = agent.config.spec
            if mine == of_networks(mine, source):  # it was trained here
                mine = of_networks(mine, copy)
            path = copy / AGENTS / known[name].name
            save_weights(path, agent, replace(agent.config, spec=mine), torch.float16)

    return save_world(
        folder,
        spec,
        tokenizer,
        dynamics,
        heads,
        starts,
        provenance,
        taught,
        rounded,
        origins,
        beside=beside,
    )
