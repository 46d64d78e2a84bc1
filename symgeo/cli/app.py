"""The commands, put together."""

import typer

from symgeo import __version__
from symgeo.cli.demo import demo
from symgeo.cli.doctor import doctor
from symgeo.cli.hessian import hessian
from symgeo.cli.merge import merge
from symgeo.cli.precondition import precondition
from symgeo.cli.run import command
from symgeo.cli.sharpness import sharpness
from symgeo.cli.study import study
from symgeo.cli.symmetry import symmetry

app = typer.Typer(
    name="symgeo",
    help="The geometry of loss landscapes that respects the symmetries of neural networks.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"symgeo {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print it and exit."),
) -> None:
    pass


for _function in (demo, symmetry, sharpness, hessian, study, merge, precondition, doctor):
    app.command(_function.__name__)(command(_function))
