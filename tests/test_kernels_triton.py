"""Triton without a GPU: its programs in the interpreter, and compiled as far as machine code for one.

Triton decides at its import whether it interprets, so each of the two has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from symgeo import kernels

TESTS = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("triton", reason="Triton is not installed")

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.language import float32

from symgeo.kernels import programs

WIDE = {"ACC": float32}
CONSTANTS = {
    "gram_program": {**WIDE, "CENTER": True, "BLOCK": 16, "STEP": 32},
    "power_program": {"QUARTERS": -1, "CUT": True, "SQUARINGS": 16, "BLOCK": 16},
    "polar_program": {"SQUARINGS": 5, "ROWS": 32, "COLUMNS": 16},
    "pair_sums_program": {**WIDE, "BLOCK": 32},
    "line_sums_program": {**WIDE, "BLOCK": 32},
    "affine_program": {**WIDE, "BLOCK": 32},
}
DOUBLE = ("power_program", "polar_program")
for name, constants in CONSTANTS.items():
    program = getattr(programs, name)
    types = {}
    for index, parameter in enumerate(program.params):
        pointer = parameter.name in ("mean", "out", "table", "constants", "row_sums", "column_sums", "diagonal",
                                     "entries", "factor", "row_terms", "column_terms")
        types[parameter.name] = (
            "constexpr" if parameter.name in constants else "*bf16" if index == 0
            else ("*fp64" if name in DOUBLE else "*fp32") if pointer else "i32"
        )
    kernel = compile(ASTSource(program, types, constants), target=GPUTarget("cuda", 90, 32))
    print(name, len(kernel.asm["ptx"]))
"""


def process(arguments: list[str], cache: Path, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(INTERPRETING, reason="this is the process in question")
def test_the_laws_hold_in_the_interpreter(tmp_path: Path) -> None:
    laws = ["-m", "pytest", "-p", "no:cacheprovider", str(TESTS / "test_kernels.py"), __file__, "-k", "triton"]
    ran = process(laws, tmp_path, interpret=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.split(" passed")[0].split()[-1].lstrip("=")) >= 60


@pytest.mark.skipif(INTERPRETING, reason="compiles in a process of its own")
def test_the_programs_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    ran = process(["-W", "ignore", "-c", COMPILE], tmp_path, interpret=False)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 6


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's process")
def test_triton_gram_in_several_chunks_and_tiles() -> None:
    from symgeo.kernels import triton

    x = torch.randn(67, 101, generator=torch.Generator().manual_seed(0))
    for center in (False, True):
        found = triton.gram(x, center, splits=3)
        wanted = kernels.gram(x.double(), center, backend="reference")
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-6
        assert torch.equal(found, found.mT)


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's process")
def test_triton_refuses_what_it_cannot_do() -> None:
    polar, power = kernels.get("polar", "triton"), kernels.get("power", "triton")
    with pytest.raises(ValueError, match=r"x: backend 'triton' needs matrices up to 64 x 64, found \(65, 2\)"):
        polar(torch.zeros(65, 2))
    with pytest.raises(ValueError, match=r"p: backend 'triton' needs one of \(-1\.0, .*\), found 2\.0"):
        power(torch.eye(2), 2.0)
    with pytest.raises(ValueError, match="backend 'triton' has no derivative"):
        polar(torch.ones(3, 2, requires_grad=True))


@pytest.mark.skipif(INTERPRETING, reason="needs Triton that compiles")
def test_triton_refuses_a_tensor_on_the_cpu() -> None:
    from symgeo.kernels import triton

    with pytest.raises(ValueError, match="backend 'triton' needs a tensor on a GPU, found one on the CPU"):
        triton.gram(torch.eye(2))
