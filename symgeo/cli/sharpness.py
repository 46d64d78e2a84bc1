"""``symgeo sharpness``."""

from typing import TYPE_CHECKING

from symgeo.cli.options import (
    Batches,
    BatchSize,
    Data,
    Geodesic,
    GeodesicOption,
    InPlace,
    Metric,
    MetricOption,
    Model,
    Plot,
    Radius,
    Steps,
    plot_target,
)
from symgeo.cli.run import Outcome, Run

if TYPE_CHECKING:
    from symgeo.sharpness import SharpnessResult


def sharpness(
    model: Model,
    data: Data,
    rho: Radius = 0.1,
    metric: MetricOption = Metric.inv,
    geodesic: GeodesicOption = Geodesic.exact,
    steps: Steps = 20,
    batches: Batches = None,
    batch_size: BatchSize = 128,
    plot: Plot = "",
    in_place: InPlace = False,
    *,
    run: Run,
) -> Outcome:
    """The geodesic sharpness of a model, the same in every basis of heads.

    The largest increase of the loss within a distance on the quotient by the symmetries that the model has.
    Each batch has its own worst case; their mean is printed.
    """
    plot_target(plot)
    import torch

    from symgeo import ParameterManifold, geodesic_sharpness, in_place_sharpness
    from symgeo.batches import default_loss, load_batches, place
    from symgeo.loading import load_model
    from symgeo.models import find_symmetry

    torch.manual_seed(run.seed)
    device, dtype = run.place(), run.precision()
    module = load_model(model, device, dtype, run.say)
    listed = [place(batch, device, dtype) for batch in load_batches(data, batch_size, batches)]
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    symmetry, loss = find_symmetry(module), default_loss(module, listed[0])
    if in_place:
        result = in_place_sharpness(
            module, listed, rho, symmetry, metric=metric.value, steps=steps, geodesic=geodesic.value, seed=run.seed,
            progress=not run.quiet, loss=loss,
        )
    else:
        manifold = ParameterManifold(params, symmetry, metric.value)
        result = geodesic_sharpness(
            loss, params, listed, manifold, rho, steps, geodesic.value, run.seed, progress=not run.quiet
        )
    for warning in result.warnings:
        run.say(f"note: {warning}")
    if plot:
        from symgeo.plots import plot_history

        plot_history(result, plot)
    return Outcome(_text(result, sum(p.numel() for p in params.values())), result.to_dict())


def _text(result: "SharpnessResult", parameters: int) -> str:
    base = sum(result.base_losses) / len(result.base_losses)
    return (
        f"{result.kind} sharpness  {result.value:.6g}\n"
        f"loss                    {base:.6g}\n"
        f"rho {result.rho:g}, {result.geodesic} geodesics, {result.steps} steps, {len(result.per_batch)} batches; "
        f"{result.pairs} factor pairs among {parameters} parameters"
    )
