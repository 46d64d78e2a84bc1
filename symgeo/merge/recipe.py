"""A merge written down: a YAML file with the options of ``symgeo merge``.

::

    adapters: [runs/math, runs/code]
    out: merged
    weights: [0.7, 0.3]
    method: bures
    rank: 16
    processes: 2

Keys are the arguments of :func:`symgeo.merge.merge_adapters`; paths are relative to the working directory, as on the
command line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options in a recipe, checked one by one.

    Raises ``ValueError`` naming the file and the key, for a file that is missing or no YAML mapping, for unknown
    keys, and for values of the wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"recipe {path}: {reason.lower()}; name a YAML file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path}: not valid YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path}: needed a mapping with keys such as adapters and out; got {content!r}")
    options = {}
    for key, value in content.items():
        if key not in KEYS:
            raise ValueError(f"recipe {path}: unknown key {key!r}; known are {', '.join(KEYS)}")
        wanted, convert = KEYS[key]
        try:
            options[key] = convert(value)
        except (TypeError, ValueError):
            raise ValueError(f"recipe {path}: {key} must be {wanted}; got {value!r}") from None
    return options


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)  # YAML reads 1e-3, without a point, as text


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _list(convert: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    def listed(value: Any) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise TypeError
        return [convert(entry) for entry in value]

    return listed


def _rank(value: Any) -> int | str:
    return value if value in ("max", "sum") else _integer(value)


KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "adapters": ("a list of folders", _list(_text)),
    "out": ("a folder", _text),
    "weights": ("a list of numbers", _list(_number)),
    "method": ("the name of a method", _text),
    "rank": ('an integer, "max" or "sum"', _rank),
    "scale": ("a number", _number),
    "dtype": ("the name of a dtype", _text),
    "seed": ("an integer", _integer),
    "overwrite": ("true or false", _flag),
    "processes": ("an integer", _integer),
}
