"""One small random instance of every supported architecture, with inputs that make all of its parameters matter.

``ZOO[name]()`` builds a `Case`; its sizes may be given, ``ZOO["LLaMA"](width=12, layers=2, eps=0.0)``.
"""

from __future__ import annotations

from collections.abc import Callable

from zoo_base import Case, Sizes, nullity_of
from zoo_decoders import DECODERS
from zoo_encoders import ENCODERS
from zoo_sequence import SEQUENCE
from zoo_torch import TORCH
from zoo_vision import VISION

ZOO: dict[str, Callable[..., Case]] = {**ENCODERS, **DECODERS, **SEQUENCE, **VISION, **TORCH}

__all__ = ["ZOO", "Case", "Sizes", "nullity_of"]
