"""``symgeo symmetry``."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from symgeo.cli.options import SPEC, BatchSize, Model
from symgeo.cli.run import Outcome, Run

if TYPE_CHECKING:
    from torch import nn

    from symgeo.models.probe import Call

TOLERANCE = 1e-4  # transformers computes norms and softmax in float32 whatever the dtype


def symmetry(
    model: Model,
    data: Annotated[str, typer.Option(metavar="SPEC", help=f"Inputs for the check: {SPEC}")] = "",
    batch_size: BatchSize = 8,
    samples: Annotated[int, typer.Option(min=1, help="Random elements to try for every group.")] = 4,
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
    from symgeo.models import find_symmetry
    from symgeo.models.probe import output_function

    torch.manual_seed(run.seed)
    device, dtype = run.place(), run.precision("float64")
    module = load_model(model, device, dtype, run.say)
    call = _call(module, data, batch_size, run.seed)
    found = find_symmetry(module)
    params = {name: parameter.detach() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(run.seed)
    report = check(
        found, output_function(module, call), params, samples, generator, TOLERANCE if dtype == torch.float64 else None
    )
    parameters, dimension = sum(p.numel() for p in params.values()), found.dimension(params)
    result = {
        **asdict(report),
        "ok": report.ok,
        "parameters": parameters,
        "dimension": dimension,
        "share": dimension / parameters,
    }
    text = f"{report}\n\nparameters      {parameters}\nflat dimensions {dimension} ({dimension / parameters:.2%})"
    failure = (
        ""
        if report.ok
        else (
            f"the symmetry does not hold: outputs change by {report.invariance:.1e}, more than {report.tolerance:.0e}; "
            "the table names the group"
        )
    )
    return Outcome(text, result, failure)


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
