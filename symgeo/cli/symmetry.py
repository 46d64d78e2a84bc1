"""``symgeo symmetry``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from symgeo.cli.options import SPEC, BatchSize, Model
from symgeo.cli.run import Outcome, Run

if TYPE_CHECKING:
    from torch import nn

    from symgeo.models.find import Findings
    from symgeo.models.probe import Call

TOLERANCE = 1e-4  # a model may compute some of its parts in single precision whatever its dtype


def symmetry(
    model: Model,
    data: Annotated[str, typer.Option(metavar="SPEC", help=f"Inputs for the check: {SPEC}")] = "",
    batch_size: BatchSize = 8,
    samples: Annotated[int, typer.Option(min=1, help="Random elements to try for every group.")] = 4,
    count: Annotated[bool, typer.Option("--count", help="Also measure how many directions are flat.")] = False,
    approximate: Annotated[bool, typer.Option("--approximate", help="With what norms remove up to their eps.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture of the parameters by group (.png or .pdf).")] = None,
    *,
    run: Run,
) -> Outcome:
    """The groups that act on a model, with measured invariance.

    Random elements of every group move the parameters; the table shows by how much the output changes, relative
    to its size.  Without --data the input is random, of the shape that the model's configuration asks for.
    """
    import torch

    from symgeo import check
    from symgeo.loading import load_model
    from symgeo.models.find import examine
    from symgeo.models.probe import evaluating, output_function

    torch.manual_seed(run.seed)
    device, dtype = run.place(), run.precision("float64")
    module = load_model(model, device, dtype, run.say)
    call = _call(module, data, batch_size, run.seed)
    findings = examine(module, approximate)
    _refuse(findings, type(module).__name__)
    params = {name: parameter.detach() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(run.seed)
    with evaluating(module), _exactly(dtype):
        report = check(findings.symmetry, output_function(module, call), params, samples, generator,
                       1e-2 if approximate else TOLERANCE if dtype == torch.float64 else None)
    text, result = _told(findings, report, params, _exact_names(module, findings, params) if approximate else None)
    if count:
        more, counted = _counted(findings, module, params)
        text, result = f"{text}\n\n{more}", result | {"count": counted}
    if plot:
        from symgeo.plots import plot_symmetry, target

        plot_symmetry(findings.symmetry, params, target(plot))
        text = f"{text}\npicture         {plot}"
    failure = (
        ""
        if report.ok
        else (
            f"the symmetry does not hold: outputs change by {report.invariance:.1e}, more than {report.tolerance:.0e}; "
            "the table names the group"
        )
    )
    return Outcome(text, result, failure)


def _refuse(findings: "Findings", kind: str) -> None:
    """Nothing to tell of is an error, with what was tried and what was not recognised."""
    if not findings.found:
        from symgeo.errors import SymmetryError

        guesses = ", ".join(f"{a} as {b}" for a, b in findings.refused)
        tried = f"; tried and refuted: {guesses}" if guesses else ""
        unknown = f"; it has {', '.join(findings.unknown[:4])}" if findings.unknown else ""
        raise SymmetryError(f"{kind} has no part that symgeo recognises{unknown}{tried}; declare its symmetry with "
                            "symgeo.Symmetry and verify it with symgeo.check")


def _told(
    findings: "Findings", report: Any, params: dict[str, Any], exact: set[str] | None
) -> tuple[str, dict[str, Any]]:
    """The table and what stands below it, and the same as data."""
    from symgeo.models.summary import rows, table
    from symgeo.report import aligned

    parameters, dimension = sum(p.numel() for p in params.values()), findings.symmetry.dimension(params)
    told = rows(report, parameters, exact)
    families = ", ".join(f"{name} x {n}" if n > 1 else name for name, n in _tally([what for _, what in findings.found]))
    lines = [
        aligned(*table(told), left=3), "",
        f"recognised      {families}",
        f"refuted         {', '.join(f'{where} as {what}' for where, what in findings.refused) or 'nothing'}",
        f"not recognised  {', '.join(findings.unknown) or 'nothing'}",
        f"all together    outputs change by {report.invariance:.0e}, parameters by {report.moved:.2f} of their length",
        f"parameters      {parameters}",
        f"flat dimensions {dimension} ({dimension / parameters:.2%})",
    ]
    result = {
        **asdict(report), "ok": report.ok, "rows": [asdict(row) for row in told], "parameters": parameters,
        "dimension": dimension, "share": dimension / parameters, "found": findings.found, "refused": findings.refused,
        "unknown": findings.unknown,
    }
    return "\n".join(lines), result


def _tally(names: list[str]) -> list[tuple[str, int]]:
    return [(name, names.count(name)) for name in dict.fromkeys(names)]


def _exact_names(module: "nn.Module", findings: "Findings", params: dict[str, Any]) -> set[str]:
    """The generators that a search for exact ones finds too, as rows name them."""
    from symgeo.models.find import examine
    from symgeo.symmetry.check import row_names

    return set(row_names(examine(module).symmetry.bind(params)))


def _counted(findings: "Findings", module: "nn.Module", params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Declared beside measured."""
    from symgeo.models.probe import evaluating
    from symgeo.nullity import count

    with evaluating(module):
        report = count(findings.symmetry, module, params)
    verdict = "complete" if report.complete else f"{report.measured - report.explained} directions not declared"
    text = (f"declared        {report.declared}\nmeasured        {report.measured}, the nullity of the Jacobian of the "
            f"outputs ({verdict}; gap {report.gap:.0e}{'' if report.reliable else ', too small to be relied on'})"
            f"\nunused          {report.unused} numbers on which no output depends")
    return text, asdict(report) | {"complete": report.complete, "reliable": report.reliable}


def _exactly(dtype: Any) -> Any:
    """Full double precision for models in float64."""
    from contextlib import nullcontext

    import torch

    from symgeo.models.precision import full_double

    return full_double() if dtype == torch.float64 else nullcontext()


def _call(module: "nn.Module", data: str, batch_size: int, seed: int) -> "Call":
    """The arguments to try the model on: the inputs of the first batch of the data, or random ones."""
    import torch

    from symgeo.batches import load_batches, place
    from symgeo.models.probe import inputs

    if not data:
        call = inputs(module, torch.Generator().manual_seed(seed))
        if call is None:
            raise ValueError(f"{type(module).__name__} does not say what its inputs are; give some with --data SPEC")
        return call
    first = next(module.parameters())
    batch = place(load_batches(data, batch_size, 1)[0], first.device, first.dtype)
    return ((), batch) if isinstance(batch, dict) else (batch[:1], {})
