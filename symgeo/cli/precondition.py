"""``symgeo precondition``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from symgeo.cli.options import Model
from symgeo.cli.run import Outcome, Run

if TYPE_CHECKING:
    from torch import nn

    from symgeo.symmetry import Symmetry

PRESETS = ("muon", "shampoo", "adam", "mlp", "attention", "lora")


def _groups(value: str) -> str:
    if value not in PRESETS and not Path(value).is_file():
        raise typer.BadParameter(f"{value!r} is no file and none of {', '.join(PRESETS)}")
    return value


def precondition(
    model: Model,
    groups: Annotated[
        str,
        typer.Option(
            metavar="PRESET|FILE",
            callback=_groups,
            help=f"{', '.join(PRESETS)}; or a YAML file with tensors (parameter: pattern), groups (name: Permutation, "
            "or name: {GeneralLinear: {per: H}}), sizes, and each (a glob of layers), or with a list of such.",
        ),
    ] = "muon",
    update_every: Annotated[int, typer.Option(min=1, metavar="N", help="Renew the roots every N steps.")] = 1,
    *,
    run: Run,
) -> Outcome:
    """The preconditioner that a choice of groups gives.

    What it keeps, what it costs, and what it is known as.

    Every layer with the groups on its axes; its isotypic kinds, with M copies of an irreducible representation of
    dimension d; the numbers kept; the FLOPs of a step; and the published method that this is, read off the blocks.
    """
    import torch

    from symgeo.loading import load_model
    from symgeo.preconditioner import describe

    torch.manual_seed(run.seed)
    module = load_model(model, run.place(), run.precision(), run.say)
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    report = describe(_symmetry(groups, module), params, update_every)
    return Outcome(str(report), report.to_dict())


def _symmetry(groups: str, module: "nn.Module") -> "Symmetry | tuple[Symmetry, Symmetry]":
    """That of a preset for a model, or of a file."""
    from symgeo.optim import presets
    from symgeo.preconditioner import read_symmetry

    if groups not in PRESETS:
        return read_symmetry(groups)
    found: Symmetry | tuple[Symmetry, Symmetry] = getattr(presets, groups)(module)
    return found
