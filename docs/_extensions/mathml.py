"""Formulas as MathML, which browsers draw themselves: no script, no network."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
LIMITS = ("max", "min", "sup", "inf")  # what stands below them in a displayed formula


def mathml(latex: str, display: str) -> str:
    """A formula.

    >>> mathml("a", "inline")
    '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline"><mrow><mi>a</mi></mrow></math>'
    """
    latex = re.sub(r"\\begin\{aligned\}(.*?)\\end\{aligned\}", _aligned, latex, flags=re.S)
    ElementTree.register_namespace("", NAMESPACE)
    root = ElementTree.fromstring(convert(latex, display=display))
    for element in root.iter():
        if element.text and element.text.startswith("\\"):
            raise ValueError(f"latex2mathml does not know {element.text} in {latex}")
        if display == "block" and element.tag == f"{{{NAMESPACE}}}msub" and element[0].text in LIMITS:
            element.tag = f"{{{NAMESPACE}}}munder"
    return ElementTree.tostring(root, encoding="unicode")


def _aligned(match: re.Match[str]) -> str:
    """`aligned` as an array, whose columns take turns at being flush right and left."""
    columns = 1 + max(row.count("&") for row in match[1].split(r"\\"))
    return rf"\begin{{array}}{{{('rl' * columns)[:columns]}}}{match[1]}\end{{array}}"


def inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(f'<span class="math">{mathml(node.astext(), "inline")}</span>')
    raise nodes.SkipNode


def block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True}
