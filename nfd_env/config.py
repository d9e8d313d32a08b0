"""YAML files -> frozen dataclasses; an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import numbers
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import yaml
from omegaconf import BooleanNode, FloatNode, IntegerNode, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from nfd_env.files import found_file

T = TypeVar("T")

# Far above what any config needs, far below what ends the interpreter.
_MOST_BYTES, _MOST_LEVELS = 2**20, 64


class ConfigError(ValueError):
    """A config file or value cannot be used; the message names the key and says what to do."""


@overload
def config_class(cls: type[T]) -> type[T]: ...
@overload
def config_class(*, kw_only: bool) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def config_class(cls: type[Any] | None = None, *, kw_only: bool = False) -> Any:
    """A frozen dataclass of settings, whose numbers are numbers however it is made.

    In Python True is 1, so that a seed or a number of steps that was mistaken for a switch would
    count as one. Making it raises ValueError then.
    """
    if cls is None:
        return functools.partial(config_class, kw_only=kw_only)
    check = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        for name, whole, optional in _numbers_of(type(self)):
            for part in _parts(getattr(self, name)):
                if not (is_number(part, whole) or (optional and part is None)):
                    kind = "a whole number" if whole else "a number"
                    raise ValueError(f"{name} must be {kind}, got {str(part)[:80]!r}")
        if check is not None:
            check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=kw_only)(cls)


def is_number(value: Any, whole: bool = False) -> bool:
    """Whether ``value`` is a real (or ``whole``) number, of Python's or NumPy's; a bool is none."""
    return isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(
        value, bool
    )


@functools.cache
def _numbers_of(cls: Any) -> list[tuple[str, bool, bool]]:
    """Names of the fields that hold numbers; whether they are whole, and whether None will do."""
    kinds = ((f.name, str(f.type)) for f in dataclasses.fields(cls))
    return [
        (name, "float" not in kind, "None" in kind)
        for name, kind in kinds
        if re.search(r"\b(int|float)\b", kind) and not re.search(r"\b(bool|str|Any)\b", kind)
    ]


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def from_mapping(
    schema: type[T],
    values: Mapping[str, Any],
    where: str = "config",
    foreign: bool = False,
    measured: bool = False,
) -> T:
    """Build the dataclass ``schema`` from nested plain ``values``.

    Args:
        schema: a (frozen) dataclass type, possibly with dataclass fields.
        values: nested mappings, lists and scalars, as a YAML file gives them.
        where: named in error messages, e.g. the file's path.
        foreign: the values may come from a stranger: ``${...}``, which could read this machine's
            environment, is refused.
        measured: they are figures, and NaN is one that could not be measured; no setting is NaN.

    Raises:
        ConfigError: on an unknown key, a missing value or a value of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {mistake(schema, values)}")
    _check(values, where, foreign, measured)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(values)))
        missing = OmegaConf.missing_keys(merged)
        result = None if missing else OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, TypeError, ArithmeticError) as error:
        # The last three are also the dataclass's own check.
        key = getattr(error, "full_key", None) or ""
        said = (str(error).splitlines() or [""])[0]
        said = re.sub(r"^Key '.*' not in '\w+'\.?", "unknown key.", said).removesuffix(".")
        reason = f"{key}: {said}" if key else said
        raise ConfigError(f"{where}: {mistake(schema, values) or reason}") from None
    if missing:
        raise ConfigError(f"{where}: missing value for {', '.join(sorted(missing))}")
    # Of values in a dict OmegaConf takes a list or a mapping for a number.
    if wrong := mistake(schema, values):
        raise ConfigError(f"{where}: {wrong}")
    assert isinstance(result, schema)
    return result


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read the user's own YAML file ``path`` into ``schema``.

    Interpolations are resolved, and "~/" at the beginning of a value is the user's home.

    Args:
        schema: see ``from_mapping``.
        path: the file.
        overrides: ``key.sub=value`` strings.

    Raises:
        ConfigError: if the file is missing, is not YAML, or does not fit the schema.
    """
    return from_mapping(schema, _at_home(read(path, overrides)), str(path))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of the YAML file ``path``; ``${...}`` stays as it is written.

    Raises:
        ConfigError: if the file is missing, is not YAML, or is too large or too deep.
    """
    path = Path(path).expanduser()
    if not found_file(path, ConfigError):
        raise ConfigError(f"{path}: no such config file")
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES + 1).decode()
        return copy.deepcopy(_parsed(text, tuple(overrides)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or "it holds no key: value pairs"
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}") from None


@functools.lru_cache(maxsize=32)  # a run reads its plan and its recordings' form again and again
def _parsed(text: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    _check_size(text)
    _check_root(text)
    values = OmegaConf.create(text)
    for override in overrides:
        _override(values, override)
    plain: Any = OmegaConf.to_container(values)
    return {str(key): value for key, value in plain.items()}


def _override(values: Any, override: str) -> None:
    """Put ``key.sub=value`` into ``values``; mappings are merged, but for an empty one.

    Raises:
        ConfigError: that names the override, where it cannot be read or leads nowhere.
    """
    key, equals, text = override.partition("=")
    try:
        if not equals or not key.strip():
            raise ValueError("an override is key.sub=value")
        given: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        value = given["value"]
        OmegaConf.update(values, key, value, merge=value != {}, force_add=True)
    except Exception as error:
        reason = " ".join(str(error).split()).split(" full_key:")[0]
        raise ConfigError(f"{override!r}: {reason}") from None


def _check_root(text: str) -> None:
    """Refuse a file that is no mapping."""
    events = yaml.parse(text, yaml.SafeLoader)
    root = next((event for event in events if isinstance(event, yaml.NodeEvent)), None)
    if root is not None and not isinstance(root, yaml.MappingStartEvent):
        got = "a list (lines that begin with -)"
        if isinstance(root, yaml.ScalarEvent):
            got = f"the text {' '.join(root.value.split())[:60]!r}"
        raise ConfigError(
            "must hold key: value pairs, one a line, such as name: MyGame (with a space behind "
            f"the colon); it holds {got}"
        )


def value(text: str, where: str) -> Any:
    """The plain value that ``text``, given on a command line as ``where``, is in YAML.

    Raises:
        ConfigError: if it is none.
    """
    try:
        _check_size(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}: cannot be read as YAML: {reason}") from None


def _check_size(text: str) -> None:
    """Refuse what would exhaust the parser's stack or the memory."""
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
    level = 0
    for event in yaml.parse(text, yaml.SafeLoader):  # which does not recurse, as loading does
        if isinstance(event, yaml.AliasEvent):  # a small file of them unfolds into a huge one
            raise ValueError("aliases (*name) are not allowed")
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if level > _MOST_LEVELS:
            raise ValueError(f"it is nested deeper than {_MOST_LEVELS} levels")


def check_ranges(settings: object, prefix: str = "", /, **ranges: str) -> None:
    """Refuse numbers outside of their ranges.

    Args:
        settings: has an attribute of each name; None is not set and not looked at.
        prefix: in front of the names in a message.
        ranges: intervals such as share="[0, 1)" or seed="[0, 2**63)"; "inf)" is all that is finite.

    Raises:
        ConfigError: naming the first number that is wrong, its range, and what it is.
    """
    for name, interval in ranges.items():
        value, (low, high) = getattr(settings, name), interval[1:-1].split(", ")
        if value is None:
            continue
        above = value >= _end(low) if interval[0] == "[" else value > _end(low)
        below = value <= _end(high) if interval[-1] == "]" else value < _end(high)
        if above and below:
            continue
        if interval[0] == "[" and interval[-1] == "]" and high != "inf":
            told = f"from {low} to {high}"
        else:
            told = f"at least {low}" if interval[0] == "[" else f"above {low}"
            if high != "inf":
                told += f" and {'at most' if interval[-1] == ']' else 'below'} {high}"
            elif interval[-1] == ")" and isinstance(value, float):
                told += " and finite"
        raise ConfigError(f"{prefix}{name} must be {told}, got {value}")


def _end(text: str) -> float:
    base, _, power = text.partition("**")
    return float(base) ** float(power or 1)


_SCALARS = {
    int: (IntegerNode, "a whole number"),
    float: (FloatNode, "a number"),
    bool: (BooleanNode, "true or false"),
    str: (StringNode, "text"),
}


def mistake(hint: Any, value: Any, at: str = "") -> str:
    """The first part of ``value`` that is not of the kind that ``hint``, a type, asks for.

    Returns:
        Where it is, what is to be written there, and what is; "" where all kinds are right.
    """
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if get_origin(hint) in (Union, UnionType):
        if value is None and len(kinds) < len(get_args(hint)):
            return ""
        hint = kinds[0]
    kind, inner = get_origin(hint) or hint, get_args(hint)
    parts: dict[str, tuple[Any, Any]] | None = None  # of a value of the right kind
    if kind in _SCALARS:
        node, wanted = _SCALARS[kind]
        if kind is str and isinstance(value, bool):
            return f"{at}{': ' * bool(at)}must be text, got {value}: put it in quotes"
        with suppress(OmegaConfBaseException):
            node(value, is_optional=False)
            return ""
    elif dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        wanted = f"key: value pairs, such as {next(iter(hints))}: ..."
        if isinstance(value, Mapping):
            parts = {f".{key}": (hints[key], part) for key, part in value.items() if key in hints}
    elif kind is dict:
        wanted = "key: value pairs"
        if isinstance(value, Mapping):
            parts = {f".{key}": (inner[1], part) for key, part in value.items() if inner}
    elif kind in (list, tuple):
        wanted = "a list, such as [a, b]"
        if isinstance(value, list | tuple):
            parts = {f"[{i}]": (inner[0], part) for i, part in enumerate(value) if inner}
    else:
        return ""
    if parts is not None:
        found = (mistake(*of, f"{at}{key}".lstrip(".")) for key, of in parts.items())
        return next(filter(None, found), "")
    shown = "nothing" if value is None else repr(" ".join(str(value).split())[:60])
    return f"{at}{': ' * bool(at)}must be {wanted}, got {shown}"


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a config dataclass, as ``from_mapping`` reads them back."""
    return dataclasses.asdict(config)


def fingerprint(values: Mapping[str, Any]) -> str:
    """The identity of plain nested values, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _check(value: Any, where: str, foreign: bool, measured: bool, level: int = 0) -> None:
    """Refuse what is too deep or is not a number, and what a stranger wants to be resolved."""
    if level > _MOST_LEVELS:
        raise ConfigError(f"{where}: is nested deeper than {_MOST_LEVELS} levels")
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check(key, where, foreign, measured, level + 1)
            place = f"{where}.{key}" if level else f"{where}: {key}"
            _check(part, place, foreign, measured, level + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check(part, where, foreign, measured, level + 1)
    elif isinstance(value, str) and "${" in value and foreign:
        raise ConfigError(f"{where}: ${{...}} is not allowed here, got {value[:80]!r}")
    elif isinstance(value, float) and value != value and not measured:
        raise ConfigError(f"{where}: must be a number, got {value}")


def _at_home(value: Any) -> Any:
    """``value`` with the user's home in place of "~/" at the beginning of strings."""
    if isinstance(value, dict):
        return {key: _at_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) and value[:2] == "~/" else value
