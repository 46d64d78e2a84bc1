"""``symgeo demo``."""

from typing import Annotated

import typer

from symgeo.cli.bar import bar
from symgeo.cli.run import Outcome, Run


def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="Half a minute: fewer models than one can conclude from.")
    ] = False,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder for the report and the figures.")] = "symgeo-demo",
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    *,
    run: Run,
) -> Outcome:
    """Train two dozen tiny models and see what sharpness says.

    Vision transformers of 18154 parameters, on handwritten digits that need no download, in minutes on two
    cores.  The report is a folder with report.html, report.json and figures; trained models are kept in the
    user's cache folder.
    """
    from symgeo.demo.run import run_demo

    if run.device not in ("auto", "cpu"):
        raise ValueError(f"--device {run.device}: the models of the demo are too small for it; leave it out")
    report = run_demo(out, quick, run.seed, workers, run.precision(), run.say, lambda label: bar(label, not run.quiet))
    return Outcome(report.text, report.result)
