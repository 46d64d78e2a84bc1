"""A symmetry written down: a YAML file with the arguments of `symgeo.Symmetry`.

::

    tensors: {up.weight: h _, up.bias: h, down.weight: _ h}
    groups: {h: Permutation}

    # or several of them, each under all prefixes that a glob matches
    - each: layers.*
      tensors: {query.weight: (H e) _, key.weight: (H e*) _}
      groups: {H: Permutation, e: {GeneralLinear: {per: H}}}
      sizes: {H: 4}
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, NoReturn

import yaml

from symgeo import groups as known
from symgeo.groups import Group
from symgeo.symmetry import Symmetry

KEYS = ("tensors", "groups", "sizes", "each")
GROUPS: dict[str, type[Group]] = {
    name: getattr(known, name) for name in known.__all__ if name != "Group"
}


def read_symmetry(path: str | Path) -> Symmetry:
    """The symmetry in a file.

    Raises ``ValueError`` naming the file and the entry, for a file that is missing or no such YAML, unknown keys and
    groups, and values of the wrong type; `SymmetryError` for a declaration that contradicts itself.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ValueError(f"groups {path}: {reason.lower()}; name a YAML file") from error
    except yaml.YAMLError as error:
        raise ValueError(f"groups {path}: not valid YAML ({' '.join(str(error).split())}); correct it") from error
    if content is None or content == []:
        _fail(path, "it is empty; needed tensors (parameter: pattern) and groups (name: group)")
    parts = content if isinstance(content, list) else [content]
    return reduce(or_, [_Reader(str(path)).symmetry(part) for part in parts])


class _Reader:
    """One declaration of a file, which error messages name."""

    def __init__(self, path: str) -> None:
        self.path = path

    def symmetry(self, content: Any) -> Symmetry:
        if not isinstance(content, dict) or "tensors" not in content:
            _fail(self.path, f"needed a mapping with tensors and groups; got {content!r}")
        for key in content:
            if key not in KEYS:
                _fail(self.path, f"unknown key {key!r}; known are {', '.join(KEYS)}")
        tensors = self.mapping("tensors", content["tensors"], str, "a pattern such as 'h _'")
        sizes = self.mapping("sizes", content.get("sizes", {}), int, "a whole number")
        given = content.get("groups") or {}
        if not isinstance(given, dict):
            _fail(self.path, f"groups must be a mapping of names to groups; got {given!r}")
        result = Symmetry(tensors, {str(name): self.group(name, value) for name, value in given.items()}, sizes)
        each = content.get("each")
        if each is not None and not isinstance(each, str):
            _fail(self.path, f"each must be a glob such as layers.*; got {each!r}")
        return result.each(each) if each is not None else result

    def mapping(self, key: str, content: Any, kind: type, wanted: str) -> dict[str, Any]:
        if not isinstance(content, dict):
            _fail(self.path, f"{key} must be a mapping; got {content!r}")
        for name, value in content.items():
            if not isinstance(value, kind) or isinstance(value, bool):
                _fail(self.path, f"{key}: {name} must be {wanted}; got {value!r}")
        return {str(name): value for name, value in content.items()}

    def group(self, name: Any, value: Any) -> Group:
        """``Permutation`` or ``{GeneralLinear: {per: H}}``"""
        kind, options = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
        if not isinstance(kind, str) or kind not in GROUPS:
            _fail(self.path, f"groups: {name} must be one of {', '.join(GROUPS)}, or such a name with options as in "
                             f"{{GeneralLinear: {{per: H}}}}; got {value!r}")
        try:
            return GROUPS[kind](**(options or {}))
        except TypeError as error:
            _fail(self.path, f"groups: {name}: {kind} does not take {options!r} ({error}); give {{per: NAME}}")


def _fail(path: str | Path, problem: str) -> NoReturn:
    raise ValueError(f"groups {path}: {problem}")
