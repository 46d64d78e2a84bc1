"""Memory and time of ``merge_adapters`` against the size of the adapters on disk.

Synthetic float16 adapters with the shapes of a LLaMA of 32 layers and width 2048 (all seven linear modules), merged
in a process of its own, on one thread, after a small merge that loads every library.  The figure is how far the
resident set rises above what it was before, at its peak, divided by the size of the adapters.  Linux only (it reads
/proc/self).

    python benchmarks/merge_memory.py [--adapters 4] [--rank 12] [--layers 32] [--method tsvd]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from safetensors.torch import save_file

WIDTH, INNER, KEYS = 2048, 5632, 256
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS, WIDTH), "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}  # fmt: skip


def write(folder: Path, layers: int, rank: int, seed: int) -> int:
    """An adapter with random factors; its size in bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layers):
        for name, (rows, columns) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).half()
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).half()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(SHAPES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (folder / "adapter_model.safetensors").stat().st_size


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM``, the peak of it, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure(folder: Path, count: int, method: str) -> None:
    """Merge and print the rise of the resident set at its peak, in bytes, and the seconds."""
    from symgeo.merge import merge_adapters, plan_merge

    torch.set_num_threads(1)
    merge_adapters([folder / "small"] * 2, folder / "warm", method=method)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    adapters = [folder / f"adapter{i}" for i in range(count)]
    before, start = resident("VmRSS"), time.perf_counter()
    merge_adapters(adapters, folder / "out", method=method)
    seconds, rise = time.perf_counter() - start, resident("VmHWM") - before
    print(json.dumps({"rise": rise, "seconds": seconds, "estimate": plan_merge(adapters, method=method).memory_bytes}))


def main() -> None:
    """Write the adapters, measure in a new process, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--method", default="tsvd")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.adapters, options.method)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "small", 1, options.rank, 99)
        size = sum(write(folder / f"adapter{i}", options.layers, options.rank, i) for i in range(options.adapters))
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{options.adapters} adapters, {size / 1e6:.0f} MB on disk, {options.method}: peak "
        f"{found['rise'] / 1e6:.0f} MB above the libraries = {found['rise'] / size:.2f} of their size "
        f"(planned {found['estimate'] / 1e6:.0f} MB), "
        f"{found['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
