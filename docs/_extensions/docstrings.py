"""Renders the docstrings of this package: plain text with equations indented and `name: meaning` lists.

They are written to be read in a terminal: an indented paragraph is an equation and becomes a literal block; a list of
`name: meaning`, under an underlined heading or by itself with a colon behind a space, becomes a list of definitions;
everything else is prose, in which only literals, roles, single backticks and one **bold** word mean anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

HEADINGS = ("Parameters", "Attributes", "Returns", "Raises", "Notes")
WORDS = {"Args:": "Parameters", "Returns:": "Returns", "Raises:": "Raises"}
PROTECTED = re.compile(r"(``.+?``|:[\w:]+:`[^`]+`|`[^`]+`|(?<![\w*])\*\*[A-Za-z]+\*\*(?![\w*]))", re.S)
NAMES = r"\*{0,2}[A-Za-z_][\w.]*(?:, \*{0,2}[A-Za-z_][\w.]*)*"
ENTRY = re.compile(rf"^({NAMES}) ?: +(\S.*)$")
SPACED = re.compile(rf"^({NAMES}) +: (\S.*)$")
LOWER = re.compile(r"^[a-z][\w.]*(?:, [a-z][\w.]*)*: +\S")
NEXT = re.compile(rf"(?:;|(?<=\.))  +(?={NAMES} ?: )")
LITERAL = (".. code-block:: text", "")
BULLET = re.compile(r"^(-|\d+\.) ")


def render(lines: Sequence[str]) -> list[str]:
    """A docstring as reStructuredText.

    >>> render(["The mean.", "", "    m = sum w_i x_i", "", "w : weights, >= 0", "x : points;  tol : of it"])
    ['The mean.', '', '.. code-block:: text', '', '    m = sum w_i x_i', '', '``w``', '    weights, >= 0', '', \
'``x``', '    points', '', '``tol``', '    of it', '']
    """
    result: list[str] = []
    listed = False
    for number, block in enumerate(_blocks(lines)):
        if len(block) > 1 and block[0] in HEADINGS and set(block[1]) == {"-"}:
            result += [f"**{block[0]}**", ""]
            listed, block = True, block[2:]
            if block:
                result += _definitions(block)
            continue
        if block[0] in WORDS and len(block) > 1:
            result += [f"**{WORDS[block[0]]}**", "", *_definitions([line[4:] for line in block[1:]])]
        else:
            result += _rendered(block, listed, number > 0)
        listed = False
    return result


def _rendered(block: list[str], listed: bool, later: bool) -> list[str]:
    """One block: doctest, table, equation, list or prose; the first one of a docstring is no list of names."""
    if block[0].startswith(">>>") or block[0].startswith("=="):
        return [*block, ""]
    if all(line.startswith("    ") for line in block):
        return [*LITERAL, *block, ""]
    if BULLET.match(block[0]):
        return [*(_prose(line) for line in block), ""]
    start = next((i for i, line in enumerate(block) if SPACED.match(line)), None)
    if (listed and ENTRY.match(block[0])) or (later and LOWER.match(block[0])):
        return _definitions(block)
    if start is not None:
        before = [*_text(block[:start])] if start else []
        return [*before, *_definitions(block[start:])]
    return _text(block)


def _text(block: Sequence[str]) -> list[str]:
    """Prose; what is indented below a line that ends in a colon is an equation."""
    for i, line in enumerate(block):
        if i and line.startswith("    ") and block[i - 1].rstrip().endswith(":"):
            rest = next((j for j in range(i, len(block)) if not block[j].startswith("    ")), len(block))
            after = _text(block[rest:]) if rest < len(block) else []
            return [*_text(block[:i]), *LITERAL, *block[i:rest], "", *after]
    return [*_prose("\n".join(line.strip() for line in block)).split("\n"), ""] if block else []


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    """Runs of lines between empty ones; a doctest is one run, and equations keep their own."""
    block: list[str] = []
    for line in lines:
        if line.strip():
            fresh = line.startswith(">>>") and block and not block[-1].startswith((">>>", "..."))
            if fresh and not block[0].startswith(">>>"):
                yield block
                block = []
            block.append(line.rstrip())
        elif block:
            yield block
            block = []
    if block:
        yield block


def _definitions(block: Sequence[str]) -> list[str]:
    """Entries `name: meaning`, several of which may share a line (`a: x;  b: y`); further lines are indented or not."""
    entries: list[tuple[str, list[str]]] = []
    spaced = bool(SPACED.match(block[0]))
    pattern = SPACED if spaced else ENTRY
    for line in block:
        for piece in NEXT.split(line):
            match = pattern.match(piece)
            if match:
                entries.append((match[1], [match[2]]))
            elif entries:
                entries[-1][1].append(piece.strip())
            else:
                entries.append(("", [piece.strip()]))
    result: list[str] = []
    for names, texts in entries:
        meaning = _prose(" ".join(texts))
        if names:
            result += [", ".join(f"``{name.strip()}``" for name in names.split(",")), f"    {meaning}", ""]
        else:
            result += [meaning, ""]
    return result


def _prose(text: str) -> str:
    """Text in which nothing but literals, roles, single backticks and one bold word is markup.

    >>> print(_prose("`h*` acts on |x|, see ``a*b`` and EMA_"))
    ``h*`` acts on \\|x\\|, see ``a*b`` and EMA\\_
    >>> print(_prose("**not** 2**n of **kwargs"))
    **not** 2\\*\\*n of \\*\\*kwargs
    """
    pieces = PROTECTED.split(text)
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            pieces[i] = re.sub(r"_(?=\W|$)", r"\\_", re.sub(r"([*|`])", r"\\\1", piece))
        elif re.fullmatch(r"`[^`]+`", piece) and not re.fullmatch(r"`[\w.]+`", piece):
            pieces[i] = f"`{' '.join(piece.split())}`"
        if i % 2 and pieces[i + 1][:1].isalnum():  # inline markup must end before a word
            pieces[i] += r"\ "
        if i % 2 and pieces[i - 1][-1:].isalnum():
            pieces[i] = r"\ " + pieces[i]
    return "".join(pieces)


def process(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """The hook of autodoc."""
    lines[:] = render(lines)


def plain(
    app: Sphinx, what: str, name: str, obj: object, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Aliases of types by their names."""
    clean = [part and re.sub(r"TypeAliasForwardRef\('([\w.]+)'\)", r"\1", part) for part in (signature, returned)]
    return clean[0], clean[1]


def skip(app: Sphinx, what: str, name: str, obj: object, hidden: bool, options: Any) -> bool | None:
    """The fields of named tuples are described in the docstring of the class."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def resolve(app: Sphinx, env: Any, node: Any, contnode: nodes.Element) -> nodes.Element | None:
    """A name without its module, or with the one where it is defined: found where the reference has it."""
    if node.get("refdomain") != "py":
        return None
    last = node["reftarget"].rsplit(".", 1)[-1]
    domain = env.get_domain("py")
    found = [name for name in domain.objects if name.rsplit(".", 1)[-1] == last and not _member(domain, name)]
    if len(found) != 1:
        return None
    entry = domain.objects[found[0]]
    docname = node.get("refdoc", env.docname)
    target = nodes.reference("", "", contnode.deepcopy(), internal=True)
    target["refuri"] = f"{app.builder.get_relative_uri(docname, entry.docname)}#{entry.node_id}"
    target["reftitle"] = found[0]
    return target


def _member(domain: Any, name: str) -> bool:
    return domain.objects[name].objtype in ("method", "attribute", "property")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", plain)
    app.connect("autodoc-skip-member", skip)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
