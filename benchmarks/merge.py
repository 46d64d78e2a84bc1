"""What merging LoRA adapters costs.

  one layer   1024 x 1024, four adapters of rank 8 to 16: `merge_factors` (tsvd, bures) against the combination type
              `svd` of PEFT's add_weighted_adapter, in one process on one thread, float32. Rounds interleave all three;
              figures are medians over rounds of seconds and of ratios within a round.
  wide layer  16384 x 16384, four adapters of rank 8, each method in a process of its own, one thread.
  7B layout   32 layers of the seven projections of a LLaMA of 7 B parameters, three adapters of rank 16, float16
              folders, `merge_adapters` from folders to folder, each time in a process of its own, one thread and two.

All factors are independent normal numbers, so that adapters are nearly orthogonal, where bures converges slowest.
Extra memory is the peak resident size during the merge minus the resident size before it, so that pages of the input
files, which are read during the merge, count. It needs Linux (/proc), and PEFT.

    python benchmarks/merge.py [--size small|full] [--rounds 5] [--json benchmarks/merge.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor, nn

from symgeo.merge import merge_adapters, merge_factors

MEANS = ("tsvd", "bures")
MIB = 2**20


@dataclass(frozen=True)
class Size:
    """Widths of the two single layers; layers and width of the transformer (its MLP is 43/16 as wide)."""

    one: int
    wide: int
    layers: int
    width: int


SIZES = {"small": Size(128, 1024, 2, 128), "full": Size(1024, 16384, 32, 4096)}
LIMITS = {
    "PEFT svd / tsvd": "at least 20",
    "wide layer": "less than 10 s and 200 MiB",
    "7B layout": "less than 120 s and twice the size of the adapters",
}


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, made without a temporary copy."""
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


def one_layer(width: int, rounds: int) -> dict[str, Any]:
    """Medians of seconds and ratios for a single layer, and how far tsvd is from PEFT's result."""
    from peft import LoraConfig, get_peft_model

    ranks = (8, 11, 13, 16)
    names = [f"adapter{i}" for i in range(len(ranks))]
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), _config(ranks[0]), names[0])
    for name, rank in zip(names[1:], ranks[1:]):
        model.add_adapter(name, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
    layer = model.base_model.model[0]
    factors = []
    for i, (name, rank) in enumerate(zip(names, ranks)):
        layer.lora_B[name].weight.data = normal(width, rank, seed=2 * i)
        layer.lora_A[name].weight.data = normal(rank, width, seed=2 * i + 1)
        factors.append((layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()))

    def peft() -> None:
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), "merged", "svd")

    runs: dict[str, Callable[[], Any]] = {"PEFT svd": peft}
    runs |= {method: partial(merge_factors, factors, method=method) for method in MEANS}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            results[name] = run()
            elapsed = time.perf_counter() - start
            if number:  # the first round warms up
                seconds[name].append(elapsed)
        reference = layer.get_delta_weight("merged").detach()
        model.delete_adapter("merged")
    ratios = {
        f"PEFT svd / {name}": statistics.median(x / y for x, y in zip(seconds["PEFT svd"], seconds[name]))
        for name in MEANS
    }
    gap = (results["tsvd"].B @ results["tsvd"].A - reference).norm() / reference.norm()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"width": width, "ranks": list(ranks), "seconds (median)": medians, "ratios (median of rounds)": ratios,
            "relative difference of tsvd from PEFT svd": float(gap),
            "bures": iterations([results["bures"].report])}  # fmt: skip


def _config(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])


def memory(row: str) -> int:
    """Bytes: VmRSS is what is resident now, VmHWM its peak since it was last set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{row}:")).split()[1]) * 1024


def measured(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of a call, and its peak of memory above what was resident before; and what it returned."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back, which imports may have raised
    before, cpu, start = memory("VmRSS"), time.process_time(), time.perf_counter()
    result = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "CPU seconds": cpu, "extra MiB": (memory("VmHWM") - before) / MIB}, result


def iterations(reports: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The most that a module took, and how many modules did not converge."""
    unfinished = sum(not report["converged"] for report in reports)
    return {"most iterations": max(report["iterations"] for report in reports), "modules not converged": unfinished}


def wide_layer(width: int, method: str) -> dict[str, float]:
    """One merge of a wide layer, after one of a small layer that loads what has to be loaded."""
    torch.set_num_threads(1)
    small, wide = ([(normal(n, 8, seed=2 * i), normal(8, n, seed=2 * i + 1)) for i in range(4)] for n in (64, width))
    merge_factors(small, method=method)
    result, merged = measured(lambda: merge_factors(wide, method=method))
    return result | iterations([merged.report])


def projections(size: Size) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of the linear layers of a LLaMA."""
    width, inner = size.width, size.width * 43 // 16
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    return {f"model.layers.{i}.{name}": shape for i in range(size.layers) for name, shape in shapes.items()}


def write_adapters(size: Size, folder: Path, rank: int = 16) -> list[Path]:
    """Three adapters in float16."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folders = []
    for k in range(3):
        tensors = {}
        for i, (module, (rows, columns)) in enumerate(projections(size).items()):
            for name, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                x = normal(*shape, seed=1000 * k + 2 * i + (name == "lora_B"))
                tensors[f"base_model.model.{module}.{name}.weight"] = (0.02 * x).half()
        folders.append(folder / f"adapter{k}")
        targets = sorted({module.rpartition(".")[2] for module in projections(size)})
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
        config.inference_mode = True
        config.save_pretrained(str(folders[-1]))
        save_file(tensors, folders[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
    return folders


def layout(folder: Path, method: str, threads: int) -> dict[str, float]:
    """One merge of the folders below ``folder``, and its peak of memory relative to their size."""
    torch.set_num_threads(threads)
    folders = sorted(folder.glob("adapter?"))
    total = sum((path / "adapter_model.safetensors").stat().st_size for path in folders)
    result, report = measured(lambda: merge_adapters(folders, folder / f"merged-{method}-{threads}", method=method))
    result |= {"adapters MiB": total / MIB, "extra / adapters": result["extra MiB"] * MIB / total}
    return result | iterations(report.modules)


def child(part: str, *arguments: str) -> dict[str, float]:
    """Measures a part in a fresh process."""
    command = [sys.executable, __file__, "--part", part, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr}")
    result: dict[str, float] = json.loads(finished.stdout.splitlines()[-1])
    print(part, *arguments, result, file=sys.stderr)
    return result


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """All parts."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        write_adapters(size, Path(temporary))
        folders = {
            f"{method}, {threads} threads": child("layout", temporary, method, str(threads))
            for method in MEANS
            for threads in (1, 2)
        }
    return {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "rounds": rounds,
        "one layer": one_layer(size.one, rounds),
        "wide layer": {"width": size.wide} | {method: child("wide", str(size.wide), method) for method in MEANS},
        "7B layout": {"layers": size.layers, "width": size.width} | folders,
        "wanted": LIMITS,
    }


def main() -> None:
    """Runs the benchmark, prints the result and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="default: merge.json beside this file, for the full size only")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, where, method, *threads = options.part
        wide = part == "wide"
        print(json.dumps(wide_layer(int(where), method) if wide else layout(Path(where), method, int(threads[0]))))
        return
    result = {"size": options.size} | measure(SIZES[options.size], options.rounds)
    text = json.dumps(result, indent=2) + "\n"
    target = options.json or (Path(__file__).with_suffix(".json") if options.size == "full" else None)
    if target is not None:
        target.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
