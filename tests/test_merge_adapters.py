"""Merging adapter folders: what comes out is what PEFT itself computes from what went in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from adapters import (
    Net,
    blur,
    combine,
    deltas,
    distance,
    edit_config,
    edit_tensors,
    gpt2,
    llama,
    load,
    regauge,
    write,
)
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file

from symgeo.merge import merge_adapters, plan_merge
from symgeo.merge.methods import NAMES
from symgeo.merge.peft.config import pattern_key
from symgeo.merge.peft.output_config import exact_key
from symgeo.merge.peft.plan import BATCH_BYTES
from symgeo.merge.peft.tensors import TensorFile

ATTENTION = ["q_proj", "v_proj"]
TOKENS = torch.tensor([[1, 5, 7, 2, 11]])
VARIED = [
    {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["up", "down", "blocks.1"]},
    {"r": 3, "lora_alpha": 5, "rank_pattern": {"up": 4, "blocks.0": 1}, "alpha_pattern": {"^down": 7},
     "target_modules": ["up", "down", "0"]},
    {"r": 5, "lora_alpha": 2, "use_rslora": True, "rank_pattern": {r"blocks\.\d": 2}, "alpha_pattern": {"0": 11},
     "target_modules": r"up|blocks\.\d"},
]  # fmt: skip


def varied(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[list[Path], list[dict]]:
    """Three adapters with different ranks, alphas, patterns, stabilisation and modules."""
    folders = [tmp_path / f"varied{i}" for i in range(3)]
    models = [write(f, seed=i + 1, dtype=dtype, **config) for i, (f, config) in enumerate(zip(folders, VARIED))]
    return folders, [deltas(model) for model in models]


def pair(tmp_path: Path, **config: object) -> list[Path]:
    folders = [tmp_path / "one", tmp_path / "two"]
    for i, folder in enumerate(folders):
        write(folder, seed=i + 1, **{"r": 2, "lora_alpha": 3, **config})
    return folders


def near(tmp_path: Path) -> list[Path]:
    """Two adapters that are close to each other, so that every method can merge them."""
    folders = [tmp_path / "near1", tmp_path / "near2"]
    for i, folder in enumerate(folders):
        write(folder, r=2, lora_alpha=3)
        blur(folder, i)
    return folders


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_rank_sum_is_the_exact_weighted_sum(tmp_path: Path, dtype: torch.dtype, tolerance: float, first: int):
    folders, terms = varied(tmp_path, dtype)
    order = [first, (first + 1) % 3, (first + 2) % 3]  # nothing may be taken from the first adapter alone
    weights = [0.7, -1.3, 0.4]
    merge_adapters([folders[i] for i in order], tmp_path / "out", [weights[i] for i in order], rank="sum")
    assert distance(deltas(load(tmp_path / "out", Net, dtype)), combine(weights, terms)) < tolerance


def test_cat_is_the_exact_weighted_sum(tmp_path: Path):
    folders, terms = varied(tmp_path)
    merge_adapters(folders, tmp_path / "out", [0.7, -1.3, 0.4], method="cat")
    assert distance(deltas(load(tmp_path / "out")), combine([0.7, -1.3, 0.4], terms)) < 1e-6


@pytest.mark.parametrize("config", VARIED)
@pytest.mark.parametrize("method", ["tsvd", "bures"])
def test_one_adapter_with_weight_one_is_itself(tmp_path: Path, config: dict, method: str):
    terms = deltas(write(tmp_path / "one", **config))
    report = merge_adapters([tmp_path / "one"], tmp_path / "out", [1.0], method)
    merged = deltas(load(tmp_path / "out"))
    assert distance(merged, terms) < 1e-6
    assert [row["rank"] for row in report.modules] == [row["input_ranks"][0] for row in report.modules]
    alphas = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["lora_alpha"]
    assert distance({k: v * alphas for k, v in merged.items()}, terms) > 1e-3


def test_weights_one_and_zero_return_the_first(tmp_path: Path):
    folders, terms = varied(tmp_path)
    report = merge_adapters(folders, tmp_path / "out", [0, 1, 0])
    assert distance(deltas(load(tmp_path / "out")), terms[1]) < 1e-6
    left_out = [row["module"] for row in report.modules if row["rank"] == 0]
    assert left_out == ["blocks.1"]


@pytest.mark.parametrize("method", ["tsvd", "bures"])
def test_the_merge_does_not_depend_on_the_gauge(tmp_path: Path, method: str):
    folders, _ = varied(tmp_path)
    merge_adapters(folders, tmp_path / "before", method=method, rank=3)
    assert min(regauge(folder, 7 + i) for i, folder in enumerate(folders)) > 0.1
    merge_adapters(folders, tmp_path / "after", method=method, rank=3)
    assert distance(deltas(load(tmp_path / "after")), deltas(load(tmp_path / "before"))) < 5e-6


def test_averaging_factors_does(tmp_path: Path):
    folders = pair(tmp_path)
    merge_adapters(folders, tmp_path / "before", method="linear")
    for i, folder in enumerate(folders):
        regauge(folder, 7 + i)
    merge_adapters(folders, tmp_path / "after", method="linear")
    assert distance(deltas(load(tmp_path / "after")), deltas(load(tmp_path / "before"))) > 0.1


def test_averaging_factors_is_what_peft_does(tmp_path: Path):
    weights = [0.7, -0.4]
    folders = [tmp_path / "one", tmp_path / "two"]
    for i, folder in enumerate(folders):
        write(folder, seed=i + 1, r=2, lora_alpha=3 + 4 * i)
    merge_adapters(folders, tmp_path / "out", weights, method="linear")
    model = load(folders[0])
    model.load_adapter(folders[1], "two")
    model.add_weighted_adapter(["default", "two"], weights, "both", combination_type="linear")
    assert distance(deltas(load(tmp_path / "out")), deltas(model, "both")) < 1e-5


@pytest.mark.parametrize("method", ["tsvd", "bures", "geodesic-mix", "geodesic-inv"])
def test_an_adapter_merged_with_itself_is_itself(tmp_path: Path, method: str):
    folder = tmp_path / "one"
    term = deltas(write(folder, r=2, lora_alpha=3))
    merge_adapters([folder, folder], tmp_path / "same", [0.3, 0.7], method)
    assert distance(deltas(load(tmp_path / "same")), term) < 1e-5
    write(tmp_path / "copy", r=2, lora_alpha=3)
    regauge(tmp_path / "copy", 3)
    merge_adapters([folder, tmp_path / "copy"], tmp_path / "gauge", [0.3, 0.7], method)
    assert distance(deltas(load(tmp_path / "gauge")), term) < 1e-5


def test_the_order_of_adapters_does_not_matter(tmp_path: Path):
    folders, _ = varied(tmp_path, torch.float64)
    for method in ("tsvd", "bures"):
        merge_adapters(folders, tmp_path / f"{method}1", [1, 2, 3], method)
        merge_adapters(folders[::-1], tmp_path / f"{method}2", [3, 2, 1], method)
        one, two = (deltas(load(tmp_path / f"{method}{i}", Net, torch.float64)) for i in (1, 2))
        assert distance(one, two) < 1e-10


def test_means_normalise_weights_and_sums_do_not(tmp_path: Path):
    folders = pair(tmp_path)
    merged = {}
    for method in ("tsvd", "bures"):
        for weights in ([2, 1], [4, 2]):
            merge_adapters(folders, tmp_path / f"{method}{weights[0]}", weights, method, rank="sum")
            merged[method, weights[0]] = deltas(load(tmp_path / f"{method}{weights[0]}"))
    assert distance(merged["bures", 4], merged["bures", 2]) < 1e-6
    doubled = {k: 2 * v for k, v in merged["tsvd", 2].items()}
    assert distance(merged["tsvd", 4], doubled) < 1e-6


def test_scale_multiplies_the_result(tmp_path: Path):
    folders = pair(tmp_path)
    for scale in (1.0, -2.5):
        merge_adapters(folders, tmp_path / f"out{scale}", scale=scale)
    one, two = (deltas(load(tmp_path / f"out{scale}")) for scale in (1.0, -2.5))
    assert distance(two, {k: -2.5 * v for k, v in one.items()}) < 1e-6


def test_how_the_scaling_is_written_does_not_matter(tmp_path: Path):
    folders = pair(tmp_path)
    merge_adapters(folders, tmp_path / "before", [0.6, 0.4])
    edit_config(folders[0], lora_alpha=3 * 8)  # alpha * 8, B / 8
    edit_tensors(folders[0], lambda t: {k: v / 8 if "lora_B" in k else v for k, v in t.items()})
    edit_config(folders[1], use_rslora=True, lora_alpha=3 / 2**0.5)  # the same alpha / r
    merge_adapters(folders, tmp_path / "after", [0.6, 0.4])
    before = deltas(load(tmp_path / "before"))
    assert distance(deltas(load(tmp_path / "after")), before) < 1e-6
    edit_config(folders[1], use_rslora=False)
    merge_adapters(folders, tmp_path / "wrong", [0.6, 0.4])
    assert distance(deltas(load(tmp_path / "wrong")), before) > 1e-3


@pytest.mark.parametrize("method", ["tsvd", "bures"])
def test_modules_that_only_some_have(tmp_path: Path, method: str):
    term = deltas(write(tmp_path / "one", r=2, lora_alpha=3, target_modules=["up", "down"]))
    write(tmp_path / "two", seed=2, r=2, lora_alpha=3, target_modules=["up"])
    report = merge_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "out", [0.25, 0.75], method)
    rows = {row["module"]: row for row in report.modules}
    share = 0.25 if method == "tsvd" else 1.0  # zero for the others in a sum, the mean of those that have it
    merged = deltas(load(tmp_path / "out"))["down"]
    assert float((merged - share * term["down"]).norm() / merged.norm()) < 1e-6
    assert "only 1 of 2 adapters have this module" in rows["down"]["warnings"][0]
    assert not any("adapters have this module" in text for text in rows["up"]["warnings"])


@pytest.mark.parametrize("kind", ["conv", "conv1d", "table", "attention"])
def test_layers_of_other_kinds(tmp_path: Path, kind: str):
    models = [write(tmp_path / f"{i}", seed=i, r=2, lora_alpha=3 + i, target_modules=[kind]) for i in (1, 2)]
    terms = [deltas(model) for model in models]
    merge_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out", [0.7, -0.3], rank="sum")
    assert distance(deltas(load(tmp_path / "out")), combine([0.7, -0.3], terms)) < 1e-6
    merge_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "cut", rank=1)
    assert all(d.shape == terms[0][k].shape for k, d in deltas(load(tmp_path / "cut")).items())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("base", "modules"), [(llama, ATTENTION), (llama, [*ATTENTION, "embed_tokens", "lm_head"]), (gpt2, ["c_attn"])]
)
def test_language_models_compute_the_exact_sum(tmp_path: Path, base, modules: list[str]):
    weights = [0.7, -0.4]
    terms = []
    for i in (1, 2):
        model = write(tmp_path / f"{i}", base, i, r=2 + i, lora_alpha=5, target_modules=modules, task_type="CAUSAL_LM")
        terms.append(deltas(model))
    merge_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out", weights, rank="sum")
    merged = load(tmp_path / "out", base)
    assert type(merged).__name__ == "PeftModelForCausalLM"
    assert distance(deltas(merged), combine(weights, terms)) < 1e-6

    exact = base().double()
    for name, delta in combine(weights, terms).items():
        exact.get_submodule(name).weight = torch.nn.Parameter(exact.get_submodule(name).weight + delta)
    assert float((logits(merged) - logits(exact)).abs().max()) < 1e-5
    assert float((logits(base()) - logits(exact)).abs().max()) > 1e-3


def test_tensors_of_the_base_are_passed_on(tmp_path: Path):
    for i in (1, 2):
        write(tmp_path / f"{i}", llama, i, r=2, target_modules=["embed_tokens"])
    merge_adapters([tmp_path / "1", tmp_path / "2"], tmp_path / "out", dtype="float16")
    (key,) = (k for k in load_file(tmp_path / "1" / "adapter_model.safetensors") if "base_layer" in k)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(stored[key], llama().model.embed_tokens.weight)
    assert {v.dtype for k, v in stored.items() if k != key} == {torch.float16}


@pytest.mark.parametrize(
    ("inputs", "asked", "expected"),
    [
        (["float16", "float16"], None, "float16"),
        (["bfloat16", "bfloat16"], None, "bfloat16"),
        (["float16", "bfloat16"], None, "float32"),
        (["float16", "float64"], None, "float64"),
        (["float32", "float32"], "float16", "float16"),
        (["float16", "float16"], torch.float64, "float64"),
    ],
)
def test_dtypes(tmp_path: Path, inputs: list[str], asked: object, expected: str):
    terms = []
    for i, name in enumerate(inputs):
        terms.append(deltas(write(tmp_path / f"{i}", seed=i, r=2, lora_alpha=3, dtype=getattr(torch, name))))
    merge_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "out", rank="sum", dtype=asked)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {x.dtype for x in stored.values()} == {getattr(torch, expected)}
    precision = 4 * torch.finfo(getattr(torch, expected)).eps
    assert distance(deltas(load(tmp_path / "out")), combine([0.5, 0.5], terms)) < max(precision, 1e-6)


def test_a_zero_adapter_is_finite(tmp_path: Path):
    folders = pair(tmp_path)
    edit_tensors(folders[1], lambda t: {k: 0 * v if "lora_B" in k else v for k, v in t.items()})
    for method in ("tsvd", "bures"):
        merge_adapters(folders, tmp_path / method, method=method)
        assert all(x.isfinite().all() for x in load_file(tmp_path / method / "adapter_model.safetensors").values())


def test_rows_of_the_report(tmp_path: Path):
    folders, _ = varied(tmp_path)
    report = merge_adapters(folders, tmp_path / "out")
    wanted = {"module", "method", "rank", "converged", "iterations", "retained_energy", "spectral_gap", "warnings",
              "fallback"}  # fmt: skip
    assert all(wanted <= row.keys() for row in report.modules)
    assert [row["module"] for row in report.modules] == ["blocks.0", "blocks.1", "down", "up"]
    document = json.loads((tmp_path / "out" / "symgeo_report.json").read_text())
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == {"out": str(tmp_path / "out"), **document}
    assert document["modules"] == report.modules and document["settings"]["weights"] == [1 / 3] * 3
    assert "modules          4" in str(report) and str(tmp_path / "out") in str(report)


def test_the_card_names_what_it_is_made_of(tmp_path: Path):
    import hashlib

    folders = pair(tmp_path)
    for name, expected in (("owner/tiny-base", "owner/tiny-base"), (str(tmp_path), None), (None, None)):
        for folder in folders:
            edit_config(folder, base_model_name_or_path=name)
        merge_adapters(folders, tmp_path / "out", [0.25, 0.75], "bures", overwrite=True)
        _, front, text = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
        meta = yaml.safe_load(front)
        assert meta["library_name"] == "peft" and meta["tags"] == ["lora", "merge", "symgeo"]
        assert meta.get("base_model") == expected and (name is None or name in text)
        hashes = [hashlib.sha256((f / "adapter_model.safetensors").read_bytes()).hexdigest() for f in folders]
        assert all(part in text for part in ("symgeo", "`bures`", "0.25", "0.75", "one", "two", *hashes))


def test_metadata_and_layout_of_the_file(tmp_path: Path):
    merge_adapters(pair(tmp_path), tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(contents(tmp_path / "out")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "symgeo_report.json",
    ]  # fmt: skip


def test_a_file_written_in_pieces_is_read_by_safetensors(tmp_path: Path):
    tensors = {"a": torch.randn(3, 5), "é": torch.randn(7).to(torch.bfloat16), "c": torch.arange(4).reshape(2, 2),
               "d": torch.randn(5, 3).double().T, "empty": torch.zeros(0, 3)}  # fmt: skip
    with TensorFile(tmp_path / "x.safetensors", {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[k], v) for k, v in tensors.items())
    with TensorFile(tmp_path / "y.safetensors", {"a": (torch.float32, (3, 5))}) as file:
        with pytest.raises(ValueError, match="announced"):
            file.write("a", torch.randn(5, 3))
        file.write("a", tensors["a"])
    with pytest.raises(ValueError, match="never written"), TensorFile(tmp_path / "z", {"a": (torch.float32, (1,))}):
        pass


def test_a_second_run_is_identical(tmp_path: Path):
    folders = near(tmp_path)
    for method in NAMES:
        outputs = []
        for i in (1, 2):
            merge_adapters(folders, tmp_path / f"{method}{i}", method=method, seed=5)
            outputs.append(contents(tmp_path / f"{method}{i}"))
        assert outputs[0] == outputs[1]
    merge_adapters(folders, tmp_path / "other", method="dare", seed=6)
    key = "adapter_model.safetensors"
    assert contents(tmp_path / "other")[key] != contents(tmp_path / "dare1")[key]


def test_batches_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in (1, 2):
        write(tmp_path / f"{i}", llama, i, r=2, target_modules="all-linear")
    folders = [tmp_path / "1", tmp_path / "2"]
    counts = []
    for limit in (2**24, 1):
        monkeypatch.setitem(BATCH_BYTES, "cpu", limit)
        counts.append(len(list(plan_merge(folders).batches())))
        merge_adapters(folders, tmp_path / f"dare{limit}", method="dare", seed=3)
    assert counts == [4, 14]
    one, two = (deltas(load(tmp_path / f"dare{limit}", llama)) for limit in (2**24, 1))
    assert distance(one, two) < 1e-6


def test_modules_chosen_narrowly_stay_so(tmp_path: Path):
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q = torch.nn.Linear(3, 5)
            self.inner = torch.nn.ModuleDict({"q": torch.nn.Linear(3, 5)})

    for name, config in {"regex": {"target_modules": "q"},
                         "excluded": {"target_modules": ["q"], "exclude_modules": ["inner.q"]}}.items():  # fmt: skip
        write(tmp_path / name, Nested, r=2, **config)
        merge_adapters([tmp_path / name], tmp_path / f"{name}-out")
        assert list(deltas(load(tmp_path / f"{name}-out", Nested))) == ["q"]
    write(tmp_path / "both", Nested, r=2, target_modules=["q"], rank_pattern={"^q": 1})
    merge_adapters([tmp_path / "both"], tmp_path / "both-out")
    assert distance(deltas(load(tmp_path / "both-out", Nested)), deltas(load(tmp_path / "both", Nested))) < 1e-6


def test_patterns_are_resolved_as_peft_does():
    keys = ["q_proj", r"layers\.1\.k_proj", "^v_proj", "0.o_proj", "layers.[02].k_proj", "proj"]
    modules = [f"{p}layers.{i}.{x}_proj" for p in ("", "model.") for i in (0, 1, 10) for x in "qkvo"] + ["v_proj", "ab"]
    for module in modules:
        for start in range(len(keys)):
            assert pattern_key(keys[start:], module) == get_pattern_key(keys[start:], module)
    assert exact_key("a.b", ["a.b", "a_b"]) == r"^a\.b" and exact_key("a-b", ["a-b"]) == r"^a\-b"


def test_an_adapter_with_a_name_lies_in_a_subfolder(tmp_path: Path):
    model = write(tmp_path / "one", r=2, lora_alpha=3)
    (tmp_path / "outer").mkdir()
    (tmp_path / "one").rename(tmp_path / "outer" / "mine")
    report = merge_adapters([tmp_path / "outer"], tmp_path / "out")
    assert distance(deltas(load(tmp_path / "out")), deltas(model)) < 1e-6
    assert any("subfolder mine" in note for note in report.notes)


def test_the_plan_reads_no_tensor_and_writes_nothing(tmp_path: Path):
    folders, _ = varied(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    plan = plan_merge(folders, rank="sum", dtype="float16")
    assert {m.module: m.rank for m in plan.modules} == {"blocks.0": 3, "blocks.1": 4, "down": 5, "up": 7}
    assert plan.output_bytes == 2 * (3 * 22 + 4 * 22 + 5 * 18 + 7 * 20)
    assert "4 modules of 3 adapters" in str(plan) and json.dumps(plan.to_dict(), allow_nan=False)
    assert sorted(tmp_path.rglob("*")) == before
    merge_adapters(folders, tmp_path / "out", rank="sum", dtype="float16")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {k: (v.dtype, tuple(v.shape)) for k, v in stored.items()} == plan.tensors()


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("rank", ["max", "sum", 1, 5])
def test_the_plan_knows_the_ranks_of_every_method(tmp_path: Path, method: str, rank: int | str):
    folders = near(tmp_path)
    report = merge_adapters(folders, tmp_path / "out", method=method, rank=rank)
    planned = {m.module: m.rank for m in plan_merge(folders, method=method, rank=rank).modules}
    assert {row["module"]: row["rank"] for row in report.modules} == planned
    load(tmp_path / "out", Net)


def test_progress_counts_modules(tmp_path: Path):
    seen = []
    merge_adapters(pair(tmp_path), tmp_path / "out", progress=lambda *what: seen.append(what))
    assert seen == [(1, 2, "down"), (2, 2, "up")]
