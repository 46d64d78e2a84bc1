"""``symgeo merge``."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from symgeo.cli.bar import bar
from symgeo.cli.errors import UsageError
from symgeo.cli.run import Outcome, Run


class Method(StrEnum):
    """How adapters are merged."""

    tsvd = "tsvd"
    bures = "bures"
    geodesic_mix = "geodesic-mix"
    geodesic_inv = "geodesic-inv"
    cat = "cat"
    linear = "linear"
    ties = "ties"
    dare = "dare"
    knots = "knots"
    tsv = "tsv"
    iso = "iso"
    core = "core"


class StoredDtype(StrEnum):
    """The precision of merged factors."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"
    float64 = "float64"


def _weights(text: str) -> str:
    try:
        _numbers(text)
    except ValueError:
        message = f"numbers with commas between them, such as 0.7,0.3 (signed: --weights=-0.4,1.4); got {text!r}"
        raise typer.BadParameter(message) from None
    return text


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")] if text else []


def _rank(text: str) -> str:
    if text and text not in ("max", "sum") and not (text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"an integer >= 1, max or sum; got {text!r}")
    return text


Adapters = Annotated[
    list[str] | None,
    typer.Argument(metavar="ADAPTER", show_default=False, help="Folders of LoRA adapters, as PEFT saves them."),
]
Out = Annotated[
    str, typer.Option("--out", "-o", metavar="OUT", help="Folder for the merged adapter.", show_default=False)
]
Weights = Annotated[
    str,
    typer.Option(
        callback=_weights,
        metavar="w1,w2,..",
        show_default=False,
        help="One number per adapter, by default 1/N each.  bures and geodesic-* are means: weights are >= 0 and only "
        "their ratios count (2,1 is the same as 4,2).  All other methods are weighted sums: weights are used as they "
        "are, of any sign (--weights=-0.4,1.4).",
    ),
]
MethodOption = Annotated[
    Method | None, typer.Option(help="tsvd by default: the weighted sum, cut to the rank.", show_default=False)
]
Rank = Annotated[
    str,
    typer.Option(
        callback=_rank,
        metavar="R",
        show_default=False,
        help="Rank of the result: a number, max (the largest of the adapters, default) or sum (nothing is cut).",
    ),
]
Scale = Annotated[
    float | None, typer.Option(metavar="S", help="Multiplies the merged update; 1 by default.", show_default=False)
]
Config = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="A YAML file with adapters, out, weights, method, rank, scale, dtype, seed, overwrite, processes; what "
        "is given on the command line overrides it.",
    ),
]
DtypeOption = Annotated[
    StoredDtype | None, typer.Option(help="Precision of the result, by default the adapters'.", show_default=False)
]
Seed = Annotated[int | None, typer.Option(help="Decides everything random; 0 by default.", show_default=False)]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        show_default=False,
        help="Worker processes that share the modules, each with one thread and one batch in memory; 1 by default: "
        "no workers.  The result is the same.  On --device cuda they take the visible devices in turn.",
    ),
]


def merge(
    adapters: Adapters = None,
    out: Out = "",
    weights: Weights = "",
    method: MethodOption = None,
    rank: Rank = "",
    scale: Scale = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")] = False,
    config: Config = "",
    dtype: DtypeOption = None,
    seed: Seed = None,
    processes: Processes = None,
    *,
    run: Run,
) -> Outcome:
    """Merge LoRA adapters into one, without their base model.

    The result does not depend on the gauge of the factors (but for --method linear), nor on how the scaling is
    split between alpha, rank and factors.  Adapters that are not plain LoRA are refused.
    """
    options = _options(config, {
        "adapters": adapters, "out": out, "weights": _numbers(weights), "method": method and method.value,
        "rank": int(rank) if rank.isdecimal() else rank, "scale": scale, "dtype": dtype and dtype.value, "seed": seed,
        "overwrite": overwrite, "processes": processes,
    })  # fmt: skip
    if not options.get("adapters"):
        raise UsageError("Missing argument 'ADAPTER...'")
    if not options.get("out"):
        raise UsageError("Missing option '--out' / '-o'")
    folders, target, replace = options.pop("adapters"), options.pop("out"), options.pop("overwrite", False)
    if dry_run:
        from symgeo.merge.peft.folder import check_target
        from symgeo.merge.peft.planning import plan_merge

        plan = plan_merge(folders, **options)
        check_target(target, plan.sources, replace)
        return Outcome(f"{plan}\nwould write {target}", plan.to_dict())
    from symgeo.merge.adapters import merge_adapters

    with bar("modules", not run.quiet) as advance:
        report = merge_adapters(
            folders, target, **options, device=run.place(), overwrite=replace, progress=advance, say=run.say
        )
    return Outcome(str(report), report.to_dict())


def _options(config: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of the recipe, if there is one, and before them those of the command line that were given."""
    recipe: dict[str, Any] = {}
    if config:
        from symgeo.merge.recipe import read_recipe

        recipe = read_recipe(config)
    return recipe | {name: value for name, value in given.items() if value not in (None, "", [], False)}
