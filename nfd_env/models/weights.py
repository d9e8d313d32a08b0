"""A network's weights on disk: safetensors, with config and origin in the header; never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nfd_env import config
from nfd_env.files import atomic_write, found_file
from nfd_env.models.rounding import MOST_BITS, Rounded, from_steps, pack, unpack

M = TypeVar("M", bound=nn.Module)

KINDS = ("tokenizer", "flow", "student", "heads")
_SCALE = ".int8_scale"
_CALLS_A_TENSOR = 100  # of torch, to make a network: some ten are usual


class CheckpointError(ValueError):
    """A checkpoint cannot be used: missing, damaged, or of something else."""


@dataclass(frozen=True)
class Origin:
    """What weights are, and what they were made from.

    Attributes:
        kind: one of ``KINDS``.
        fingerprint: of the weights as they were trained; rounding to fp16 or fewer bits keeps it.
        made_from: name of an input ("tokenizer", "teacher", "recordings") -> its fingerprint.
    """

    kind: str
    fingerprint: str
    made_from: Mapping[str, str] = field(default_factory=dict)


def save_weights(
    path: str | Path,
    network: nn.Module,
    settings: Any,
    dtype: torch.dtype | None = None,
    rounded: Rounded | None = None,
    *,
    kind: str = "",
    made_from: Mapping[str, str] | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write ``network``'s state and its config dataclass ``settings``, all or nothing.

    Args:
        path: the file to write.
        network: whose state_dict is written.
        settings: the dataclass that ``network`` was built from.
        dtype: convert floating-point tensors to this type first, e.g. ``torch.float16``.
        rounded: of ``network``, which is stored in place of its own matrices and kernels.
        kind: one of ``KINDS``, for a part of a world; "" for anything else, such as an agent.
        made_from: see ``Origin``; goes with ``kind``.
        fingerprint: see ``Origin``; None for that of ``network`` as it is.

    Raises:
        CheckpointError: when a weight is NaN or infinite, or too large for ``dtype``.
    """
    assert not kind or kind in KINDS, kind
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    packed = {}
    for name, tensor in network.state_dict().items():
        if rounded is not None and name in rounded.steps:
            tensor, tensors[name + _SCALE] = rounded.steps[name], rounded.scales[name]
            if rounded.bits < MOST_BITS:
                packed[name] = list(tensor.shape)
                tensor = pack(tensor, rounded.bits)
        else:
            tensor = tensor.detach().cpu()
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
        tensors[name] = tensor
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _check_finite(path, tensors)
    header = {"class": type(network).__name__, "config": json.dumps(config.to_dict(settings))}
    if rounded is not None and packed:
        header["packed"] = json.dumps({"bits": rounded.bits, "shapes": packed})
    if kind:
        header["kind"] = kind
        header["fingerprint"] = fingerprint or fingerprint_network(network)
        header["made_from"] = json.dumps(dict(made_from or {}), sort_keys=True)
    save_tensors(path, tensors, header)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, all or nothing.

    Raises:
        OSError: when it cannot be written.
    """
    with atomic_write(path) as temporary:
        try:
            save_file(dict(tensors), temporary, None if header is None else dict(header))
        except SafetensorError as error:  # its own way to say that the disk is full
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def load_weights(path: str | Path, network_type: type[M], config_type: type) -> M:
    """Build a ``network_type`` from the file's own config and load its weights as float32.

    Raises:
        CheckpointError: when the file is missing, damaged, or holds another network.
    """
    path = Path(path).expanduser()
    header, tensors = _read(path)
    if header.get("class") != network_type.__name__:
        raise CheckpointError(
            f"{path}: holds a {header.get('class', 'foreign checkpoint')}, "
            f"not a {network_type.__name__}"
        )
    try:
        # What earlier versions stored and this one does not know, see ``DynamicsConfig.of_header``.
        values = getattr(config_type, "of_header", dict)(json.loads(header["config"]))
        settings = config.from_mapping(config_type, values, "its config", foreign=True)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: holds no usable config: {error}") from None
    with neutral_torch():
        try:
            with _Bounded(tensors):
                network = network_type(settings)
        except (ValueError, ArithmeticError, RuntimeError, AssertionError, MemoryError) as error:
            raise CheckpointError(f"{path}: holds no usable config: {error}") from None
        _check_fit(path, tensors, network.state_dict())
        network.float().load_state_dict(tensors)
    return network.eval()


def read_origin(path: str | Path) -> Origin | None:
    """Where the weights in the file ``path`` come from; None for files from before this was kept.

    Raises:
        CheckpointError: when the file is missing or damaged.
    """
    path = Path(path)
    with _opened(path) as file:
        header = file.metadata() or {}
    if "kind" not in header:
        return None
    try:
        origin = Origin(header["kind"], header["fingerprint"], json.loads(header["made_from"]))
        if origin.kind in KINDS and all(isinstance(v, str) for v in origin.made_from.values()):
            return origin
    except (KeyError, ValueError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{path}: its header does not say properly where it comes from")


def fingerprint_of(path: str | Path) -> str:
    """The identity of the weights in the file ``path``, see ``Origin``.

    Raises:
        CheckpointError: when the file is missing or damaged.
    """
    origin = read_origin(path)
    return origin.fingerprint if origin else _fingerprint(_read(Path(path))[1])


def fingerprint_network(network: nn.Module) -> str:
    """The identity of the weights that ``network`` has now."""
    return _fingerprint(network.state_dict())


@contextmanager
def neutral_torch() -> Iterator[None]:
    """Networks made within are the same whatever a process has set as torch's defaults.

    New tensors are float32 and on the CPU. No random number is drawn: initial weights are left as
    they come, for a file's to take their place. One thread at a time.
    """
    with _BUILDING:
        default = torch.get_default_dtype()
        if default != torch.float32:
            torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"), _NoRandomWeights():
                yield
        finally:
            if default != torch.float32:
                torch.set_default_dtype(default)


_BUILDING = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork may happen while another thread is loading
    os.register_at_fork(after_in_child=getattr(_BUILDING, "_at_fork_reinit"))  # noqa: B009


class _NoRandomWeights(TorchFunctionMode):
    _DRAWING = frozenset({"uniform_", "normal_", "kaiming_uniform_", "trunc_normal_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") in self._DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


class _Bounded(TorchFunctionMode):
    """Ends the making of a network that is far larger than its weights, before memory is full."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._calls = _CALLS_A_TENSOR * (len(tensors) + 16)
        self._numbers = 8 * sum(t.numel() for t in tensors.values()) + 10_000_000

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self._calls -= 1
        if isinstance(made, Tensor) and not any(isinstance(a, Tensor) for a in args):
            self._numbers -= made.numel()
        if min(self._calls, self._numbers) < 0:
            raise ValueError("it asks for a far larger network than the file has weights for")
        return made


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The safetensors file ``path``, with errors that name it."""
    if not found_file(path, CheckpointError):
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error})") from None


def read_rounded(path: str | Path) -> Rounded | None:
    """The weights in few bits that the file ``path`` holds; None where it has none.

    Raises:
        CheckpointError: when the file is missing or damaged.
    """
    header, tensors, scales = _read_stored(Path(path))
    if not scales:
        return None
    bits = json.loads(header["packed"])["bits"] if "packed" in header else MOST_BITS
    return Rounded(bits, {name: tensors[name] for name in scales}, scales)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors, the floating-point ones as float32."""
    header, tensors, scales = _read_stored(path)
    for name, tensor in tensors.items():
        if name in scales:
            tensor = from_steps(tensor, scales[name])
        tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    return header, tensors


def _read_stored(path: Path) -> tuple[dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Header, tensors, those in few bits as int8 steps, and the scales of these by their names."""
    with _opened(path) as file, torch.device("cpu"):
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ends = [name for name in tensors if name.endswith(_SCALE)]
    scales = {name.removesuffix(_SCALE): tensors.pop(name) for name in ends}
    _check_finite(path, tensors | {name + _SCALE: scale for name, scale in scales.items()})
    if "packed" in header:
        tensors |= _unpacked(path, header["packed"], tensors)
    for name, scale in scales.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: has a scale for {name!r}, but not its weights")
        steps = tensors[name]
        if steps.dtype != torch.int8 or steps.ndim < 2 or scale.shape != steps.shape[:1]:
            raise CheckpointError(f"{path}: the scale of {name!r} does not fit it")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8 and name not in scales:
            raise CheckpointError(f"{path}: {name!r} is stored as int8, but has no scale")
    return header, tensors, scales


def _unpacked(path: Path, described: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The int8 steps of the packed ones of ``tensors``, as the header describes them."""
    try:
        read = json.loads(described)
        return {n: unpack(tensors[n], read["bits"], shape) for n, shape in read["shapes"].items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its packed weights are damaged: {error}") from None


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {name!r} holds NaN or infinity")


def _check_fit(path: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of the network that their own config describes."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: does not fit its own config: {reason}")

    for names, reason in (
        (wanted.keys() - tensors.keys(), "is missing"),
        (tensors.keys() - wanted.keys(), "is not part of the network"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise refuse(f"{min(names)!r} {reason}{more}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise refuse(
                f"{name!r} has the shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}"
            )
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            raise refuse(f"{name!r} holds {tensors[name].dtype}, not {tensor.dtype}")


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
