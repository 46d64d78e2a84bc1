"""The directive `command-help`: what `symgeo COMMAND --help` prints."""

from __future__ import annotations

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from typer.main import get_command
from typer.testing import CliRunner

from symgeo.cli import app as commands


def help_of(command: str) -> str:
    """The help text, as on a terminal of 88 columns."""
    arguments = [*command.split(), "--help"]
    result = CliRunner().invoke(commands, arguments, prog_name="symgeo", env={"COLUMNS": "88", "TERM": "dumb"})
    return result.output.rstrip()


def names() -> list[str]:
    """All commands, in the order of the help."""
    return list(get_command(commands).commands)  # type: ignore[attr-defined]


class CommandHelp(Directive):
    """`command-help` without an argument is the help of `symgeo` itself."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        text = help_of(self.arguments[0] if self.arguments else "")
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
