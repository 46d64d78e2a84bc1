"""paper_figs/README.md says what paper_figs/results/ holds: every table row by row, and figures of the sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "paper_figs"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
NO_RECORD = "of which no record is kept"  # what a section says whose full size was not run again
UNBOUND: set[str] = set()
Rows = list[list[str]]


@cache
def record(name: str) -> Any:
    """The committed numbers of a figure."""
    return json.loads((FOLDER / "results" / f"{name}.json").read_text())


@cache
def sections() -> dict[str, str]:
    """The text under each heading of a figure, which names its script."""
    parts = re.split(r"^### `(\w+)\.py`.*$", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    return {name: re.split(r"^## ", text, flags=re.MULTILINE)[0] for name, text in zip(parts[1::2], parts[2::2])}


def tables(text: str) -> list[Rows]:
    """The bodies of all tables, by cells."""
    found: list[Rows] = []
    for block in re.findall(r"(?:^\| .*\n|^\|-.*\n)+", text + "\n", re.MULTILINE):
        found.append([[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]])
    return found


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def interval(cell: dict[str, float], key: str = "tau") -> str:
    """tau with its interval."""
    return f"{signed(cell[key])} [{signed(cell['low'])}, {signed(cell['high'])}]"


def two(value: float) -> str:
    """Two digits, and one of what is below a thousandth."""
    if value < 9.5e-4:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{float(f'{value:.2g}'):g}"


def error(mean: float, standard_error: float, plus: bool = False) -> str:
    return f"{signed(mean, 3) if plus else f'{mean:.3f}'.replace('-', '−')} ± {standard_error:.3f}"


MEASURES = {"`adaptive`": "adaptive", "`inv`": "geodesic inv", "`mix`": "geodesic mix", "Euclidean": "euclidean"}


def vision_transformers() -> list[Rows]:
    found, rows = record("vision_transformers"), []
    for models, start in {"all models": "", "without decay": "without decay: "}.items():
        for label, measure in MEASURES.items():
            cells = found["tau"][models]["loss gap"][measure]
            radii = f", ρ = {', '.join(cells)}" if not start else ""
            theirs = found["paper_tau"].get(measure)
            paper = "" if start else "–" if theirs is None else signed(theirs)
            rows.append([start + label + radii, paper, *map(interval, cells.values())])
    return [rows, differences(found, {"all models": "all 24", "without decay": "without decay"})]


def differences(found: Any, names: dict[str, str]) -> Rows:
    """The paired differences."""
    pairs = found["tau of inv less that of adaptive"]
    return [[label, *(interval(cell, "difference") for cell in pairs[name])] for name, label in names.items()]


def language_models() -> list[Rows]:
    found, rows = record("language_models"), []
    for models in ("from scratch", "fine-tuned"):
        for label, measure in MEASURES.items():
            theirs = found["paper_tau"].get(measure)
            cells = found["tau"][models]["loss gap"][measure].values()
            rows.append([f"{models}: {label}", "–" if theirs is None else signed(theirs), *map(interval, cells)])
    return [rows, differences(found, {"from scratch": "from scratch", "fine-tuned": "fine-tuned"})]


def diagonal_nets() -> list[Rows]:
    found = record("diagonal_nets")
    kinds = [("`adaptive`, package", "package", "adaptive"), ("`adaptive`, over β", "beta_space", "adaptive"),
             ("`inv`, package", "package", "inv"), ("`inv`, over β", "beta_space", "inv"),
             ("`mix` exact, over β", "beta_space", "mix"),
             ("`mix` second order, package", "package", "mix_taylor2"),
             ("`mix` second order, over β", "beta_space", "mix_taylor2")]  # fmt: skip
    problems = found["problems"].values()
    return [[[label, signed(found["paper_tau"][kind]), *(interval(p[search]["tau"]["0.1"][kind]) for p in problems)]
             for label, search, kind in kinds]]  # fmt: skip


def orbit() -> list[Rows]:
    kinds = {"`adaptive`": "adaptive", "Euclidean": "euclidean", "geodesic `inv`, exact": "geodesic inv",
             "geodesic `inv`, second order": "geodesic inv taylor2", "geodesic `mix`, exact": "geodesic mix",
             "`inv` with M + 0.01 I, first order in ρ": "first-order inv, M + 0.01 I"}  # fmt: skip
    return [[[f"{label}: {kind}", *map(two, model["max_abs_ratio_minus_1"][key].values())]
             for label, model in zip(("ViT", "BERT"), record("orbit")["models"].values())
             for kind, key in kinds.items()]]  # fmt: skip


def geodesic_order() -> list[Rows]:
    tau = record("geodesic_order")["vision transformers"]["tau"]
    rows = []
    for label in ("neither", "correction only", "norm only", "both", "exact"):
        keys = [label if label == "neither" else f"{metric}: {label}" for metric in ("inv", "mix")]
        rows.append([label, *(interval(tau[rho][key]) for key in keys for rho in ("0.3", "1"))])
    return [rows]


def relaxation() -> list[Rows]:
    found = record("relaxation")
    plain, covariant = found["orbit"]["plain"], found["orbit"]["covariant"]
    first = [[f"M + εI, ε = {eps}", *map(two, plain[eps])] for eps in ("0.0001", "0.01", "1")]
    first.append(["covariant, ε = 0 to 1, at most", *(two(max(column)) for column in zip(*covariant.values()))])
    chosen = [found["parameters"]["eps"].index(eps) for eps in (0.0, 0.01, 0.1, 1.0, 10.0)]
    lines = {"M + εI, trained": ("trained", "plain"), "M + εI, moved": ("moved", "plain"),
             "covariant, trained": ("trained", "covariant"), "covariant, moved": ("moved", "covariant")}  # fmt: skip
    second = [[label, *(interval(found["tau"][at][kind][k]) for k in chosen)] for label, (at, kind) in lines.items()]
    return [first, second]


def lora_merges() -> list[Rows]:
    found = record("lora_merges")["summary"]
    labels = {"`tsvd` lifted": "tsvd, lifted", "PEFT `svd`": "PEFT svd", "`bures` lifted": "bures, lifted",
              "PEFT `linear`": "PEFT linear", "PEFT `ties`": "PEFT ties",
              "base, without adapter": "base"}  # fmt: skip
    plain = ("tsvd", "bures", "knots", "iso", "ties", "core", "linear", "tsv", "dare", "cat")
    labels |= {f"`{name}`": name for name in plain}
    rows = []
    for label, name in sorted(labels.items(), key=lambda item: -found["independent"][item[1]]["accuracy"]):
        row, gauges = [label], []
        for start in ("independent", "shared"):
            line = found[start][name]
            row.append(error(line["accuracy"], line["accuracy standard error"]))
            row.append(error(line["above tsvd"], line["above tsvd standard error"], plus=True))
            gauges.append(line.get("gauge", 0.0))
        rows.append([*row, two(max(gauges)) if max(gauges) else "–"])
    return [rows]


def curvature_against_hessian() -> list[Rows]:
    nets = record("curvature_against_hessian")["nets"]
    signs = "signed permutations"
    kinds = {"Hessian itself": (signs, "Hessian"),
             "its average over signed permutations": (signs, "Hessian, group average"),
             "Eq. 11, permutations": ("permutations", "Eq. 11, gradient"),
             "Eq. 11, signed permutations": (signs, "Eq. 11, gradient"),
             "the same, block-diagonal": (signs, "Eq. 11, block-diagonal"),
             "Eq. 11, rotations tensor by tensor": ("rotations, tensor by tensor", "Eq. 11, gradient"),
             "Eq. 10, signed permutations": (signs, "Eq. 10, riccati"),
             "secant, signed permutations": (signs, "secant"),
             "Shampoo": (signs, "Shampoo"), "identity": (signs, "identity")}  # fmt: skip
    rows = []
    for label, (group, kind) in kinds.items():
        row = [label]
        for net in nets.values():
            for along in ("random", "negative gradient"):
                cell = net["mean_and_error_over_training"][along][group].get(kind)
                row.append("–" if cell is None else error(*(cell.values() if isinstance(cell, dict) else cell)))
        rows.append(row)
    return [rows]


def accuracy_against_cost() -> list[Rows]:
    found = record("accuracy_against_cost")["groups"]
    one, averaged = found.values()
    rows = []
    for a, b in zip(one, averaged):
        cells = [f"{row['gradient'][key]:.2f} ({row['riccati'][key]:.2f})".replace("-0.00", "0.00")
                 for key in ("cosine", "distance") for row in (a, b)]  # fmt: skip
        rows.append([a["group"], str(a["numbers"]), f"{100 * a['kept']:.0f} %", *cells])
    return [rows]


def invariant_eigenvalues() -> list[Rows]:
    changes = record("invariant_eigenvalues")["changes"]
    kinds = {"Euclidean": "Euclidean H", "G⁻¹H": "G^-1 H", "covariant": "covariant"}
    return [[[f"{at} point: {label}", *(two(cell[kind]["eigenvalues"]) for cell in changes[at].values())]
             for at in ("critical", "random") for label, kind in kinds.items()]]  # fmt: skip


def cpu(name: str) -> str:
    """What a script took, as the table says it."""
    seconds = record(name)["cpu_seconds"]
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


RECORDED = sorted(name for name, text in sections().items() if NO_RECORD not in " ".join(text.split()))
TABLES = [vision_transformers, language_models, diagonal_nets, orbit, geodesic_order, relaxation, lora_merges,
          curvature_against_hessian, accuracy_against_cost, invariant_eigenvalues]  # fmt: skip
BOUND = [make for make in TABLES if make.__name__ in RECORDED]


@pytest.mark.parametrize("expected", BOUND, ids=lambda function: function.__name__)
def test_tables_are_the_records(expected: Callable[[], list[Rows]]) -> None:
    text = sections()[expected.__name__]
    assert tables(text) == expected()
    _, body = text.split("|---|\n", 1)
    line = next(line for line in body.splitlines() if line.startswith("| ") and re.search(r"\.\d", line))
    wrong = re.sub(r"(.*)\.(\d)", lambda match: f"{match[1]}.{(int(match[2]) + 1) % 10}", line, count=1)
    assert tables(text.replace(line, wrong)) != expected()


def test_no_table_is_left_out() -> None:
    assert {name for name, text in sections().items() if tables(text)} == {make.__name__ for make in TABLES}


def test_every_figure_has_its_section_picture_and_record() -> None:
    assert sorted(sections()) == SCRIPTS and UNBOUND == set(SCRIPTS) - set(RECORDED)
    for text in sections().values():
        assert [word for word in ("**Paper.**", "**Agrees.**", "**Differs.**") if word not in text] == []
    for name in RECORDED:
        assert f"(results/{name}.png)" in sections()[name]
        assert (FOLDER / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (record(name)["figure"], record(name)["size"], record(name)["seed"]) == (name, "full", 0)


def test_times_are_those_recorded() -> None:
    start = re.split(r"^## ", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)[0]
    (rows,) = tables(start)
    assert sorted(name for name, _, _ in rows) == [f"`{name}.py`" for name in SCRIPTS]
    for label, _, time in rows:
        name = label[1:-4]
        if name not in RECORDED:
            assert time == "no record", name
        elif "cpu_seconds" in record(name):
            assert time == cpu(name), name


def largest(values: Any) -> float:
    return max(values)


def orbit_phrases() -> dict[str, list[str]]:
    """The largest changes along orbits."""
    vit, bert = record("orbit")["models"].values()
    outputs = largest([*vit["max_relative_output_change"].values(), *bert["max_relative_output_change"].values()])
    exact = largest(v for m in (vit, bert) for kind, row in m["max_abs_ratio_minus_1"].items() if "geodesic" in kind
                    for v in row.values())  # fmt: skip
    return {"orbit": [f"at most {value:.1e}".replace("e-0", "e-") for value in (outputs, exact)]}


def phrases() -> dict[str, list[str]]:
    """What sentences say, from the records."""
    levels = record("level_sets")["max_relative_variation_along_orbit"]
    toy, spread = record("toy_merge"), record("merge_spread")
    copies = {(row["gauge"], row["method"]): row["value"] for row in toy["copies_of_one_predictor"]}
    slopes = dict(spread["by_spread"]["slope"])
    third = slopes.pop("tsvd - embedded")
    amplitudes = spread["by_amplitude"]
    one = amplitudes["amplitude"].index(1.0)
    common, own = ([amplitudes["cosine"][m][part][one]["mean"] for m in ("average", "tsvd", "bures")]
                   for part in ("common", "adapters"))  # fmt: skip
    ratios = record("geodesic_order")["vision transformers"]["median_ratio"]
    straight = [f"{ratios[f'{m}: {kind}'][rho]:.3f}" for m in ("inv", "mix") for rho in ("0.3", "1")
                for kind in ("norm only", "both")]  # fmt: skip
    orbits = record("relaxation")
    ends = {name: row["losses"][-1] for name, row in record("char_lm")["curves"].items()}
    along = record("invariant_eigenvalues")["orbit"]
    growth = [along["points"][-1]["Euclidean"][k] / along["start"]["Euclidean"][k] for k in (0, 3)]
    moved = {kind: largest(abs(x / y - 1) for p in along["points"] for x, y in zip(p[kind], start))
             for kind, start in along["start"].items()}  # fmt: skip
    return {
        **(orbit_phrases() if "orbit" in RECORDED else {}),
        "level_sets": [f"vary by {100 * levels['euclidean gradient norm']:.0f} % and "
                       f"{100 * levels['euclidean hessian trace']:.0f} %"],
        "toy_merge": [f"from {low:.2g} to {high:.2g}" for low, high in (toy["range_over_gauges"]["fisher"],)]
        + [f"make {copies[3.0, 'euclidean']:.0f} and {copies[3.0, 'fisher']:.2f}",
           f"{copies[10.0, 'euclidean']:.2f} and {copies[10.0, 'fisher']:.2f}",
           " ".join(f"{row['value']:.5g}" for row in toy["means"][:1])],
        "merge_spread": [f"slopes {min(slopes.values()):.2f} to {max(slopes.values()):.2f}", f"third ({third:.2f})",
                         f"{common[0]:.3f} for the plain average, {common[1]:.3f} for `tsvd`, {common[2]:.3f}",
                         ", ".join(f"{value:.3f}" for value in own)],
        "geodesic_order": [f"{a} (straight) and {b} (second order)" for a, b in (straight[:2],)]
        + [f"{straight[2]} and {straight[3]}", f"{straight[4]} and {straight[5]}, {straight[6]} and {straight[7]}"],
        "relaxation": [f"changes by {100 * orbits['orbit']['plain']['0.01'][-1]:.0f} % along an orbit",
                       f"at most {two(largest(map(largest, orbits['orbit']['covariant'].values())))}"],
        "char_lm": [f"ends at {ends['symo_shampoo']:.3f} and {ends['shampoo_tuned']:.3f}",
                    f"{ends['symo_muon']:.3f} and {ends['muon']:.3f}", f"AdamW at {ends['adamw']:.3f}"],
        "lora_merges": [f"each adapter has {record('lora_merges')['summary'][start][name]['accuracy']:.2f}"
                        for start, name in (("independent", "each adapter on its own"),)],
        "invariant_eigenvalues": [f"by a factor of {growth[0]:.0f} and the trace by {growth[1]:.2g}",
                                  f"at most {two(moved['covariant, inv'])} (`inv`) and {two(moved['covariant, mix'])}"],
    }  # fmt: skip


def test_sentences_are_the_records() -> None:
    for name, figures in phrases().items():
        text = " ".join(sections()[name].split())
        assert [figure for figure in figures if figure not in text] == [], name
