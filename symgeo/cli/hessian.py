"""``symgeo hessian``."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, inf
from typing import TYPE_CHECKING, Annotated, Any

import typer

from symgeo.cli.options import Batches, BatchSize, Data, Metric, MetricOption, Model, Plot, plot_target
from symgeo.cli.run import Outcome, Run

if TYPE_CHECKING:
    from torch import nn

    from symgeo.flatness import Flatness
    from symgeo.functional import Loss, Params
    from symgeo.hessian import Estimate

KINDS = {"euclidean": "Euclidean", "invariant": "covariant"}  # as results and as people call them


def _fraction(value: float) -> float:
    if not 0 < value < 1:
        raise typer.BadParameter(f"a threshold is a number between 0 and 1; got {value}")
    return value


def _tolerance(value: float | None) -> float | None:
    if value is not None and not 0 < value < inf:
        raise typer.BadParameter(f"a tolerance is a positive number; got {value}")
    return value


def hessian(
    model: Model,
    data: Data,
    top: Annotated[int, typer.Option(min=1, help="Eigenvalues to print, from the largest down.", metavar="K")] = 5,
    metric: MetricOption = Metric.inv,
    orbits: Annotated[int, typer.Option(min=0, help="Random points of the orbit to measure again.", metavar="N")] = 1,
    threshold: Annotated[
        float,
        typer.Option(callback=_fraction, help="Near zero is a magnitude up to this, relative to the largest."),
    ] = 1e-6,
    samples: Annotated[int, typer.Option(min=2, help="Random vectors for estimates, above 4096 parameters.")] = 8,
    tol: Annotated[
        float | None,
        typer.Option(callback=_tolerance, help="Stop drawing at this relative error; --samples is then the most."),
    ] = None,
    batches: Batches = None,
    batch_size: BatchSize = 128,
    plot: Plot = "",
    *,
    run: Run,
) -> Outcome:
    """The top eigenvalues and the trace of a model's Hessian, Euclidean and covariant.

    The covariant Hessian is that on the quotient by the GL and rotary groups of attention. Both are measured
    again at random points of the orbit, where the model is the same function: the Euclidean one changes.
    At a minimum every direction of the symmetry is an eigenvalue 0 of the Euclidean Hessian; the last lines say how
    many near-zero eigenvalues there are, and how many of them the symmetry explains.
    """
    plot_target(plot)
    import torch

    from symgeo.batches import load_batches, place
    from symgeo.flatness import measure_flatness
    from symgeo.loading import load_model
    from symgeo.models import find_symmetry

    torch.manual_seed(run.seed)
    device, dtype = run.place(), run.precision("float64")
    module = load_model(model, device, dtype, run.say)
    listed = [place(batch, device, dtype) for batch in load_batches(data, batch_size, batches)]
    params = _trainable(model, module)
    found = measure_flatness(
        _loss(module, params, listed), params, listed, find_symmetry(module), metric.value, top, orbits, threshold,
        samples, bool(plot), run.seed, progress=not run.quiet, tol=tol,
    )
    for warning in found.warnings:
        run.say(f"note: {warning}")
    if plot:
        from symgeo.plots import plot_spectrum

        plot_spectrum(found, plot)
    return Outcome(_text(found), found.to_dict())


def _trainable(model: str, module: "nn.Module") -> "Params":
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError(f"MODEL {model}: no parameter is trainable; call requires_grad_() on those to differentiate")
    return params


def _loss(module: "nn.Module", params: "Params", batches: Sequence[Any]) -> "Loss":
    """The default loss, shown to work on the data, and to be the same twice, first.

    Inside derivatives torch's own errors have to pass: they say which kind of derivative an operation lacks.
    """
    import torch

    from symgeo.batches import default_loss, supervised
    from symgeo.functional import functional_loss
    from symgeo.hessian.derivatives import check_repeatable

    careful = default_loss(module, batches[0])
    with torch.no_grad():
        check_repeatable("losses", lambda: torch.stack([careful(params, batch) for batch in batches]))
    return functional_loss(module, None if isinstance(batches[0], Mapping) else supervised)


def _text(found: "Flatness") -> str:
    lines = _aligned(_rows(found))
    moved = {kind: found.moved(kind) for kind in KINDS}
    if moved["euclidean"] is not None:
        lines.append("")
        lines += [f"largest change along the orbit  {KINDS[kind]} {change:.1e}" for kind, change in moved.items()]
    lines += [
        "",
        f"near zero (up to {found.threshold:g} of the largest)  {_count(found.flat)} of {found.parameters}",
        f"explained by the symmetry       {found.explained}",
        f"difference                      {_count(found.unexplained)}",
        f"gradient norm                   {found.gradient:.3g}"
        + ("; the symmetry's directions have eigenvalue 0 only where it vanishes" if found.gradient else ""),
        f"{found.pairs} factor pairs, metric {found.metric}",
    ]
    return "\n".join(lines)


def _rows(found: "Flatness") -> list[list[str]]:
    columns = [(kind, point, getattr(point, kind)) for kind in KINDS for point in found.points]
    rows = [["", *(KINDS[kind] for kind, _, _ in columns)], ["", *(point.name for _, point, _ in columns)]]
    for i in range(len(columns[0][2].top)):
        rows.append([f"eigenvalue {i + 1}", *(f"{spectrum.top[i]:.8g}" for _, _, spectrum in columns)])
    rows.append(["trace", *(str(spectrum.trace) for _, _, spectrum in columns)])
    rows.append(["near zero", *("-" if s.zeros is None else _count(s.zeros) for _, _, s in columns)])
    rows.append(["of", *(str(spectrum.size) for _, _, spectrum in columns)])
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def _count(number: "Estimate") -> str:
    from symgeo.flatness import resolved

    if not resolved(number):
        low, high = number.bounds or (0.0, 0.0)
        return f"not resolved: {floor(low)} to {ceil(high)}"
    return f"{number.value:.0f}" + (f" ± {number.stderr:.2g}" if number.samples else "")
