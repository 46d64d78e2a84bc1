"""The demo's report in words: for the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from symgeo.demo.orbit import Orbit
from symgeo.report import aligned, bullets, figure, heading, paragraph, table
from symgeo.report import page as assemble
from symgeo.study import Study

MEASURED = (
    "Sharpness is the largest increase of the training loss within a distance rho of the trained parameters. What "
    "counts as distance makes the difference: Euclidean sharpness measures the length of the change, adaptive "
    "sharpness the relative change of every single parameter, geodesic sharpness the length of the shortest path "
    "between functions. In attention, the product of the query and key matrices of a head is all that the network "
    "sees; any invertible matrix can be put between them, and taken back, without changing any output. Such a "
    "change of gauge moves the parameters along an orbit. Geodesic sharpness measures across orbits only, with one "
    "of two metrics, inv and mix, that do not depend on the gauge."
)
TAU = (
    "Kendall's tau compares two rankings of the models. +1: the sharper of two models always has the larger "
    "generalization gap (test minus training); 0: no relation; -1: always the smaller. Brackets are 95 % bootstrap "
    "intervals over models; where one contains 0, the sign is not known."
)
CAVEATS = (
    "The models are few, and share one data set, one split and one architecture: the intervals are wide, and they do "
    "not cover another task.",
    "Equal rho are not equal distances: Euclidean, adaptive and geodesic radii have different units. Compare whole "
    "curves over rho, not points.",
    "The radii run in half-decades over the range in which the loss of the median model rises, and were fixed by that "
    "increase after a coarser first sweep on these models. Picking the best radius afterwards would flatter any "
    "measure: read the whole curves.",
    "The search finds a lower bound of the true maximum, with the same number of steps for all measures.",
    "Many intervals are shown at once; some exclude 0 by chance.",
)


def summary(study: Study, orbit: Orbit) -> str:
    """The results for a terminal: the table of correlations, what was left out, and the orbit."""
    left_out = [f"left out: {line}" for line in study.failures]
    return "\n".join([str(study), *left_out, "", _orbit_sentence(orbit), "", aligned(*_orbit_table(orbit))])


def page(images: Path, document: Mapping[str, Any], study: Study, orbit: Orbit) -> str:
    """The page, with the figures of the folder ``images`` inside it."""
    models = document["result"]["models"]
    return assemble(
        f"Sharpness and generalization of {len(models)} small vision transformers",
        heading("What was measured"),
        paragraph(_models_sentence(document)),
        paragraph(MEASURED),
        heading("Does sharpness say anything about generalization?"),
        paragraph(TAU),
        *(paragraph(sentence) for sentence in _findings(study)),
        figure(images / "tau.png", "Kendall's tau with its interval, over the radius."),
        table(*study.rows()),
        figure(images / "scatter.png", "The models themselves: sharpness at the middle radius against the gaps."),
        bullets([f"Left out: {line}." for line in study.failures]) if study.failures else "",
        heading("One function, many parameters"),
        paragraph(_orbit_sentence(orbit)),
        figure(images / "orbit.png", "Along the orbit of one model, by the condition number of the gauge change."),
        table(*_orbit_table(orbit)),
        paragraph(
            "So the value of adaptive sharpness is partly a property of the gauge that training happened to end "
            "in, about which the function says nothing. Geodesic sharpness does not see the gauge."
        ),
        heading("How far to trust this"),
        bullets(CAVEATS),
        heading("The models"),
        table(*_models_table(models)),
        paragraph(_made_by(document)),
    )


def _models_sentence(document: Mapping[str, Any]) -> str:
    models, plan = document["result"]["models"], document["settings"]["plan"]
    excluded = [model["name"] for model in models if model["excluded"]]
    ending = (
        f" {len(excluded)} of them ({', '.join(excluded)}) do not fit their training data and were left out."
        if excluded
        else ""
    )
    return (
        f"{len(models)} vision transformers of 18154 parameters were trained on {plan['recipe']['train']} images of "
        "handwritten digits, with different learning rates, weight decays, initial scales and batch sizes, until they "
        f"fitted them, and tested on the other images of the set. Sharpness was measured on {plan['images']} of the "
        f"training images, with {plan['steps']} steps of search.{ending}"
    )


def _findings(study: Study) -> list[str]:
    """What the table says, by the numbers: for each gap, the range of tau of every measure over all its radii."""
    sentences = []
    for gap in dict.fromkeys(c.gap for c in study.correlations):
        ranges = []
        for measure in dict.fromkeys(c.measure for c in study.correlations):
            taus = [c.tau for c in study.correlations if (c.measure, c.gap) == (measure, gap) and c.tau is not None]
            if taus:
                span = f"{min(taus):+.2f}" if len(taus) == 1 else f"{min(taus):+.2f} to {max(taus):+.2f}"
                ranges.append(f"{measure} {span}")
        clear = [c for c in study.correlations if c.gap == gap and (c.low or 0.0) * (c.high or 0.0) > 0]
        total = sum(c.gap == gap for c in study.correlations)
        sentences.append(
            f"With the {gap}, tau over all radii is: {', '.join(ranges) or 'not defined'}. "
            f"{len(clear)} of {total} intervals exclude 0."
        )
    return sentences


def _orbit_sentence(orbit: Orbit) -> str:
    adaptive = [*orbit.relative("adaptive"), 1.0]
    return (
        f"One trained model was moved along its orbit by random gauge changes up to condition number "
        f"{max(orbit.conditions):g}, which moves the parameters by up to {max(orbit.moved):.1f} times their norm. Its "
        f"outputs changed by at most {max(orbit.output_change):.0e} of the largest; geodesic sharpness by at most "
        f"{max(orbit.change('geodesic inv')):.0e} (inv) and {max(orbit.change('geodesic mix')):.0e} (mix) of its "
        f"value: rounding. Adaptive sharpness ranged from {min(adaptive):.3g} to {max(adaptive):.3g} times its value "
        "at the trained parameters."
    )


def _orbit_table(orbit: Orbit) -> tuple[list[str], list[list[str]]]:
    rows = [["trained", "0", "0", *(f"{value:.6g}" for value in orbit.start.values())]]
    for i, condition in enumerate(orbit.conditions):
        values = [f"{orbit.sharpness[measure][i]:.6g}" for measure in orbit.start]
        rows.append([f"{condition:g}", f"{orbit.moved[i]:.2f}", f"{orbit.output_change[i]:.0e}", *values])
    return ["condition", "parameters moved", "outputs changed", *orbit.start], rows


def _models_table(models: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["model", "learning rate", "weight decay", "initial scale", "batch", "train accuracy", "test accuracy",
              "loss gap"]  # fmt: skip
    rows = [
        [
            f"{m['name']}{' (left out)' if m['excluded'] else ''}", f"{m['lr']:g}", f"{m['weight_decay']:g}",
            f"{m['init_scale']:g}", str(m["batch_size"]), f"{m['train_accuracy']:.3f}", f"{m['test_accuracy']:.3f}",
            f"{m['test_loss'] - m['train_loss']:.3f}",
        ]
        for m in models
    ]  # fmt: skip
    return header, rows


def _made_by(document: Mapping[str, Any]) -> str:
    seconds = ", ".join(f"{part} {value:.0f} s" for part, value in document["result"]["timings"].items())
    known = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if value)
    return f"Made by symgeo demo with seed {document['settings']['seed']}. Time: {seconds}. Versions: {known}."
