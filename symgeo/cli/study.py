"""``symgeo study``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from symgeo.cli.bar import bar
from symgeo.cli.options import Batches, BatchSize, Plot, Steps, plot_target
from symgeo.cli.run import Outcome, Run, finite_radius

if TYPE_CHECKING:
    from symgeo.study import Candidate, Study


def _radii(text: str) -> str:
    try:
        radii = [finite_radius(float(part)) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"numbers with commas between them, such as 0.1,0.3,1.0; got {text!r}") from None
    if len(set(radii)) != len(radii):
        raise typer.BadParameter(f"every radius once; got {text!r}")
    return text


def study(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT",
            show_default=False,
            help="Models, at least 3 of them: each as MODEL of the other commands.",
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            show_default=False,
            help='module:function returning {"train": batches, "test": batches}, or a .safetensors file '
            "with x_train, y_train, x_test, y_test (or other columns with these endings).",
        ),
    ],
    rho: Annotated[str, typer.Option(callback=_radii, metavar="LIST", help="Radii.")] = "0.1,0.3,1.0",
    steps: Steps = 20,
    batches: Batches = None,
    batch_size: BatchSize = 128,
    workers: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 1,
    plot: Plot = "",
    *,
    run: Run,
) -> Outcome:
    """Sharpness against generalization gap over several models.

    Kendall's tau of Euclidean, adaptive and geodesic sharpness with the loss gap and the error gap, each with a
    95 % bootstrap interval.  --batches limits the training batches that sharpness is measured on; the gaps are
    taken over all data.
    """
    plot_target(plot)
    from symgeo.batches import load_splits
    from symgeo.study import Lazy
    from symgeo.study import study as measure

    _check_models(checkpoints)
    load_splits(data, batch_size)
    models = [Lazy(name, Load(name, data, batch_size, batches, run)) for name in checkpoints]
    with bar("models", not run.quiet) as advance:
        found = measure(
            models,
            [float(part) for part in rho.split(",")],
            steps=steps,
            seed=run.seed,
            workers=workers,
            progress=advance,
        )
    for line in found.failures:
        run.say(f"left out: {line}")
    if plot:
        from symgeo.plots import plot_tau

        plot_tau(found.correlations, plot)
    return Outcome(str(found), found.to_dict(), _failure(found))


def _check_models(checkpoints: list[str]) -> None:
    from symgeo.loading import kind_of

    for checkpoint in checkpoints:
        kind_of(checkpoint)
        if checkpoints.count(checkpoint) > 1:
            raise typer.BadParameter(f"every model once; {checkpoint!r} is given {checkpoints.count(checkpoint)} times")


@dataclass(frozen=True)
class Load:
    """Makes the candidate for a checkpoint, in whichever process it is measured."""

    source: str
    data: str
    batch_size: int
    batches: int | None
    run: Run

    def __call__(self) -> "Candidate":
        """Load the model and the data, find the symmetry, and evaluate the gaps."""
        from symgeo.batches import default_loss, load_splits, place
        from symgeo.evaluation import gaps
        from symgeo.loading import load_model
        from symgeo.models import find_symmetry
        from symgeo.study import Candidate

        device, dtype = self.run.place(), self.run.precision()
        model = load_model(self.source, device, dtype, self.run.say)
        splits = load_splits(self.data, self.batch_size)
        sides = {side: [place(batch, device, dtype) for batch in listed] for side, listed in splits.items()}
        params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return Candidate(
            self.source,
            default_loss(model, sides["train"][0]),
            params,
            sides["train"][: self.batches],
            gaps(model, sides["train"], sides["test"]),
            find_symmetry(model),
        )


def _failure(found: "Study") -> str:
    if all(c.tau is None for c in found.correlations):
        left_out = found.failures[0] if found.failures else "no model was measured"
        reason = found.correlations[0].reason if found.correlations else left_out
        return f"no correlation could be computed: {reason}; give at least 3 models that differ"
    return ""
