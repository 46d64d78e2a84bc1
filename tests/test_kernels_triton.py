"""Triton without a GPU: its programs in the interpreter, and compiled as far as machine code for one.

Triton decides at its import whether it interprets, so each of the two has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from symgeo import kernels

TESTS = Path(__file__).parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("triton", reason="Triton is not installed")

COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.language import float32

from symgeo.kernels import programs
from symgeo.kernels.triton.products import choose_tile

LARGE = choose_tile(torch.bfloat16, 4096, 4096, 528, capability=9)
PRODUCT = {"ACC": float32, "BLOCK": LARGE.block, "STEP": LARGE.step, "NATIVE": True, "PRECISION": "ieee"}
ACC = {"ACC": float32, "BLOCK": 32}
CASES = {
    "gram_program": ({**PRODUCT, "CENTER": False, "AVERAGE": True}, {"x": "*bf16"}),
    "apply_program": ({**PRODUCT, "GROUP": 8}, {"w": "*bf16", "p": "*bf16", "x": "*bf16"}),
    "inner_program": ({**ACC, "K": 4, "BLOCK": 1024, "STEPS": 8}, {"out": "*fp64"}),
    "combination_program": ({**ACC, "K": 4, "BLOCK": 4096}, {"x1": "*bf16"}),
    "exponential_program": ({**ACC, "BLOCK": 4096}, {"w": "*bf16", "out": "*bf16"}),
    "power_program": ({"QUARTERS": -1, "CUT": True, "SQUARINGS": 16, "BLOCK": 16},
                      {"t": "*bf16", "out": "*fp64", "table": "*fp64", "constants": "*fp64"}),
    "polar_program": ({"SQUARINGS": 1, "ROWS": 16, "COLUMNS": 16}, {"x": "*bf16", "out": "*fp64", "table": "*fp64"}),
    "pair_sums_program": (ACC, {"y": "*bf16"}),
    "line_sums_program": (ACC, {"y": "*bf16"}),
    "affine_program": (ACC, {"y": "*bf16", "out": "*bf16"}),
}
NUMBERS = ("keep", "keep_low", "weight", "weight_low", "rate", "rate_low")
CONTIGUOUS = ("x_n", "out_j", "w_j", "p_j", "x_j", "s0", "s1", "s2", "s3", "stride_n", "stride_j")
assert set(CASES) == set(programs.__all__)
for name, (constants, types) in CASES.items():
    program, products = getattr(programs, name), "NATIVE" in constants
    names = [parameter.name for parameter in program.params]
    constants = {**constants, **{name: 1 for name in CONTIGUOUS if name in names}}
    signature = {
        name: "constexpr" if name in constants else types[name] if name in types else "fp32" if name in NUMBERS
        else "i32" if name in ("f", "m", "n", "chunk", "steps", "sign_steps") or "_" in name[:-1] and name[-2] == "_"
        or name.startswith("stride_") else "*fp32" for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] in "*i"}
    options = {"num_warps": LARGE.warps, "num_stages": LARGE.stages} if products else {}
    kernel = compile(ASTSource(program, signature, constants, aligned), GPUTarget("cuda", 90, 32), options)
    print(name, kernel.metadata.shared, "wgmma.mma_async" in kernel.asm["ptx"])
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
    names = ("test_kernels.py", "test_kernels_dispatch.py", "test_kernels_passes.py", "test_kernels_triton.py")
    files = [str(TESTS / name) for name in names]
    ran = process(["-m", "pytest", "-p", "no:cacheprovider", *files, "-k", "triton"], tmp_path, interpret=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert int(ran.stdout.split(" passed")[0].split()[-1].lstrip("=")) >= 90


@pytest.mark.skipif(INTERPRETING, reason="compiles in a process of its own")
def test_the_programs_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    ran = process(["-W", "ignore", "-c", COMPILE], tmp_path, interpret=False)
    assert ran.returncode == 0, ran.stderr
    found = {name: (int(shared), cores) for name, shared, cores in map(str.split, ran.stdout.splitlines())}
    assert len(found) == 10
    # large products: bfloat16 goes to tensor cores without being widened, four stages of two tiles in 227 KiB
    assert {name for name, (_, cores) in found.items() if cores == "True"} == {"gram_program", "apply_program"}
    assert all(shared == (4 * 2 * 128 * 64 * 2 if cores == "True" else shared) for shared, cores in found.values())
    assert all(shared <= 227 * 1024 for shared, _ in found.values())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's process")
@pytest.mark.parametrize(("f", "n", "splits"), [(29, 41, 1), (33, 65, 2)])  # two rows and columns of tiles, and three
def test_triton_gram_in_several_chunks_and_tiles(f: int, n: int, splits: int) -> None:
    from symgeo.kernels import triton
    from symgeo.kernels.triton.products import Tile

    x, tile = random(f, n), Tile(16, 32, 4, 2)
    for center in (False, True):
        found = triton.gram(x, center, splits=splits, tile=tile)
        wanted = kernels.gram(x.double(), center, backend="reference")
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-6
        assert torch.equal(found, found.mT)
    t = kernels.gram(random(f, f, seed=1))
    wanted = 0.75 * t.double() + 0.25 * wanted
    assert triton.ema_gram(t, x, 0.75, center=True, splits=splits, tile=tile) is t
    assert float((t - wanted).norm() / wanted.norm()) <= 1e-6
    assert torch.equal(t, t.mT)


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's process")
def test_triton_update_in_several_tiles() -> None:
    from symgeo.kernels import triton
    from symgeo.kernels.triton.products import Tile

    w, p, x = random(2, 35, 19), random(2, 35, 35, seed=1), random(2, 35, 19, seed=2)
    wanted = 0.875 * w.double() - 0.25 * p.double() @ x.double()
    triton.apply_update(w, p, x, 0.25, decay=0.5, tile=Tile(16, 32, 4, 2))
    assert float((w - wanted).norm() / wanted.norm()) <= 1e-6


@pytest.mark.skipif(not INTERPRETING, reason="runs in the interpreter's process")
def test_triton_refuses_what_it_cannot_do() -> None:
    polar, power = kernels.get("polar", "triton"), kernels.get("power", "triton")
    with pytest.raises(ValueError, match=r"x: backend 'triton' needs matrices up to 64 x 64, found \(65, 2\)"):
        polar(torch.zeros(65, 2))
    with pytest.raises(ValueError, match=r"p: backend 'triton' needs one of \(-1\.0, .*\), found 2\.0"):
        power(torch.eye(2), 2.0)
    tracked = torch.ones(3, 3, requires_grad=True)
    for name, arguments in (
        ("polar", (tracked,)),
        ("ema_gram", (torch.ones(3, 3), tracked, 0.5)),
        ("inner_products", ([tracked[0]],)),
        ("exponential_map", (torch.ones(3, 3), tracked)),
    ):
        with pytest.raises(ValueError, match="backend 'triton' has no derivative"):
            kernels.get(name, "triton")(*arguments)


@pytest.mark.skipif(INTERPRETING, reason="needs Triton that compiles")
def test_triton_refuses_a_tensor_on_the_cpu() -> None:
    from symgeo.kernels import triton

    for call in (lambda: triton.gram(torch.eye(2)), lambda: triton.combination([torch.ones(2)], torch.ones(1))):
        with pytest.raises(ValueError, match="backend 'triton' needs a tensor on a GPU, found one on the CPU"):
            call()


def test_tiles_of_triton_products() -> None:
    from symgeo.kernels.triton.products import choose_tile

    assert choose_tile(torch.bfloat16, 4096, 4096, 528, capability=9)[:2] == (128, 64)
    assert choose_tile(torch.bfloat16, 1024, 1024, 32, capability=9)[:2] == (64, 64)  # too few of 128 for a GPU
    for dtype, size, capability in ((torch.float32, 4096, 9), (torch.bfloat16, 4096, 7), (torch.bfloat16, 100, 9)):
        assert choose_tile(dtype, size, size, 528, capability)[:2] == (64, 32)
    assert choose_tile(torch.float32, 5, 5, 1, capability=9).block == 16


class Newer:
    """The settings of products where the newer name was used: torch refuses to read the older one."""

    fp32_precision = "tf32"

    @property
    def allow_tf32(self) -> bool:
        raise RuntimeError("mix of the legacy and new APIs")


def test_tf32_is_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from symgeo.kernels.triton.products import _precision

    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert _precision(torch.float32) == ("tf32" if allowed else "ieee")
        assert _precision(torch.float64) == "ieee"
    monkeypatch.setattr(torch.backends.cuda, "matmul", Newer())
    assert _precision(torch.float32) == "tf32"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_products_on_a_gpu(dtype: torch.dtype) -> None:
    x, tolerance = random(2075, 333).to("cuda", dtype), 2e-2 if dtype.itemsize == 2 else 1e-6
    for center in (False, True):
        found, wanted = (kernels.gram(x, center, backend=name).double() for name in ("triton", "reference"))
        assert float((found - wanted).norm() / wanted.norm()) <= tolerance and torch.equal(found, found.mT)
        averages = [torch.eye(len(x), device="cuda") for _ in range(2)]
        for t, name in zip(averages, ("triton", "reference")):
            kernels.ema_gram(t, x, 0.5, center=center, backend=name)
        assert float((averages[0] - averages[1]).norm() / averages[1].norm()) <= (1e-3 if center else 1e-5)
        assert torch.equal(averages[0], averages[0].mT)
    p, steps = random(2075, 2075, seed=1).to("cuda", dtype), [x.clone(), x.clone()]
    for w, name in zip(steps, ("triton", "reference")):
        kernels.apply_update(w, p, x, 0.01, decay=1.0, backend=name)
    assert float((steps[0].double() - steps[1].double()).norm() / steps[1].double().norm()) <= tolerance
