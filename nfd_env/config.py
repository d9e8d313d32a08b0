"""YAML files -> frozen dataclasses; an unknown key or a wrong type is an error that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


class ConfigError(ValueError):
    """A config file or value cannot be used; the message names the key and says what to do."""


def from_mapping(
    schema: type[T], values: Mapping[str, Any], where: str = "config", foreign: bool = False
) -> T:
    """Build the dataclass ``schema`` from nested plain ``values``.

    Args:
        schema: a (frozen) dataclass type, possibly with dataclass fields.
        values: nested mappings, lists and scalars, as a YAML file gives them.
        where: named in error messages, e.g. the file's path.
        foreign: the values may come from a stranger: ``${...}``, which could read this machine's
            environment, is refused.

    Raises:
        ConfigError: on an unknown key, a missing value or a value of the wrong type.
    """
    if foreign:
        _refuse_interpolations(values, where)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(dict(values)))
        missing = OmegaConf.missing_keys(merged)
        result = None if missing else OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        at = f"{where}: {key}: " if key else f"{where}: "
        raise ConfigError(f"{at}{reason}") from None
    except (
        ValueError,
        TypeError,
        ArithmeticError,
    ) as error:  # the dataclass's own check of its values
        raise ConfigError(f"{where}: {error}") from None
    if missing:
        raise ConfigError(f"{where}: missing value for {', '.join(sorted(missing))}")
    assert isinstance(result, schema)
    return result


def _refuse_interpolations(value: Any, where: str) -> None:
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"{where}: ${{...}} is not allowed here, got {value[:80]!r}")
    parts: Sequence[Any] = ()
    if isinstance(value, Mapping):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        parts = value
    for part in parts:
        _refuse_interpolations(part, where)


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read the YAML file ``path`` into ``schema``; ``overrides`` are ``key.sub=value`` strings.

    Raises:
        ConfigError: if the file is missing, is not YAML, or does not fit the schema.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        values = OmegaConf.load(path)
        if overrides:
            values = OmegaConf.merge(values, OmegaConf.from_dotlist(list(overrides)))
    except Exception as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    plain = OmegaConf.to_container(values)
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: must hold key: value pairs, got {type(plain).__name__}")
    return from_mapping(schema, {str(k): v for k, v in plain.items()}, str(path))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a config dataclass, as ``from_mapping`` reads them back."""
    return dataclasses.asdict(config)
