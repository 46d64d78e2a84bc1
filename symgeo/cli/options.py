"""Options that several commands have."""

from enum import StrEnum
from typing import Annotated

import typer

from symgeo.cli.run import finite_radius

SPEC = (
    "module:function returning batches, (x, y) or dictionaries; or a .safetensors file with x and y, or with "
    "columns such as input_ids and labels."
)


class Metric(StrEnum):
    """The metric of factor pairs."""

    inv = "inv"
    mix = "mix"


class Geodesic(StrEnum):
    """The curves along which sharpness is searched."""

    exact = "exact"
    taylor2 = "taylor2"
    linear = "linear"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder that transformers can load, module:function returning a torch.nn.Module, a checkpoint "
        "of the demo, or a hub id owner/name (the only case in which anything is downloaded).",
        show_default=False,
    ),
]
Data = Annotated[str, typer.Option(metavar="SPEC", help=SPEC, show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per batch when SPEC is a file.")]
Batches = Annotated[int | None, typer.Option(min=1, help="Use the first N batches; all by default.", metavar="N")]
MetricOption = Annotated[Metric, typer.Option(help="Metric of the factor pairs of attention.")]
GeodesicOption = Annotated[
    Geodesic, typer.Option(help="Curves to search along: exact, their second-order or first-order expansion.")
]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the search for the worst case.")]
Radius = Annotated[float, typer.Option(callback=finite_radius, help="Radius of the ball that is searched.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Move the model's own parameters: less memory, same result.")]
Plot = Annotated[str, typer.Option(metavar="FILE", help="Also draw a figure, .png or .pdf.")]


def plot_target(path: str) -> None:
    """Fail before the work, not after it, where a figure could not be written; nothing for no path."""
    if path:
        from symgeo.plots import target

        target(path)
