"""Reports as files: JSON that every reader takes, written whole or not at all, and pages that need nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA = 1  # of every JSON document; raise it when a reader of the old one would misread the new
PACKAGES = ("torch", "geoopt", "numpy", "scipy", "safetensors", "transformers", "peft", "triton")


def versions() -> dict[str, str | None]:
    """Versions of Python, symgeo and what it stands on; None for what is not installed."""
    from symgeo import __version__

    return {"python": sys.version.split()[0], "symgeo": __version__} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def plain(value: Any) -> Any:
    """The value in the types of JSON; numbers that are not finite become None.

    >>> plain({"tau": float("nan"), "folder": Path("a"), "rhos": (0.1, 1)})
    {'tau': None, 'folder': 'a', 'rhos': [0.1, 1]}
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def document(command: str, settings: Mapping[str, Any], result: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The envelope of every JSON document: what was run, with what, how long it took, and what came out."""
    return {
        "schema": SCHEMA,
        "tool": "symgeo",
        "command": command,
        "settings": dict(settings),
        "versions": versions(),
        "seconds": round(seconds, 3),
        "result": dict(result),
    }


def write_json(path: str | Path, value: Any) -> None:
    """Write the value as JSON, to standard output where ``path`` is ``-``."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def prepare(path: str | Path) -> Path:
    """Make the parent folder of a file that is to be written later; ``ValueError`` if it could not be."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path}: its folder cannot be made ({(error.strerror or 'error').lower()}); choose another path"
        ) from error
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    try:
        _beside(path).cleanup()
    except OSError as error:
        raise ValueError(
            f"{path}: its folder is not writable ({(error.strerror or 'error').lower()}); choose another path"
        ) from error
    return path


def _beside(path: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path``, with its suffix; it takes the place of ``path`` if the block succeeds."""
    path = prepare(path)
    with _beside(path) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A plain table; the first ``left`` columns are aligned to the left, the others to the right.

    >>> print(aligned(["measure", "tau"], [["adaptive", "+0.35"]]))
    measure     tau
    adaptive  +0.35
    """
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    pad = [str.ljust if i < left else str.rjust for i in range(len(header))]
    return "\n".join("  ".join(pad[i](row[i], widths[i]) for i in range(len(header))).rstrip() for row in table)


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}table{border-collapse:collapse;margin:1rem 0}
th,td{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left}img{max-width:100%;height:auto}figure{margin:1rem 0}
figcaption{color:#555;font-size:.9rem}.scroll{overflow-x:auto}"""


def page(title: str, *body: str) -> str:
    """A self-contained HTML page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body>\n<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def heading(text: str) -> str:
    """A section heading."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def bullets(items: Sequence[str]) -> str:
    """A list of plain texts."""
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


def figure(image: str | Path, caption: str) -> str:
    """A PNG, inside the page itself."""
    data = base64.b64encode(Path(image).read_bytes()).decode("ascii")
    text = html.escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'
