"""Known traps of an installation, found without importing anything that may crash."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PROBE_SECONDS = 120
TORCH = """
import torch
print(torch.version.cuda or "")
print("cpu")
for i in range(torch.cuda.device_count()): print(f"cuda:{i} ({torch.cuda.get_device_name(i)})")
if torch.backends.mps.is_available(): print("mps")
"""
TORCHVISION = "import torch, torchvision; torch.ops.torchvision.nms"


@dataclass(frozen=True)
class Finding:
    """Something about the installation: what it is, what to do, and whether it breaks symgeo."""

    what: str
    remedy: str
    serious: bool


def findings() -> list[Finding]:
    """All traps that this installation has fallen into, the serious ones first."""
    found = [finding for check in CHECKS for finding in check()]
    return sorted(found, key=lambda finding: not finding.serious)


def probe(code: str) -> subprocess.CompletedProcess[str]:
    """Run a line of Python in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
    )


@cache
def _torch() -> tuple[str, ...]:
    """The CUDA version that torch is built for (may be empty), then the devices it sees; () if it does not import."""
    done = probe(TORCH)
    return tuple(done.stdout.splitlines()) if done.returncode == 0 else ()


def devices() -> list[str]:
    """The devices that torch sees."""
    return list(_torch()[1:])


def installed(package: str) -> str | None:
    """The version of a distribution, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def torch_starts() -> Iterator[Finding]:
    """torch imports, and a build for CUDA finds a device."""
    if not _torch():
        yield Finding("torch does not import", "reinstall it: pip install --force-reinstall torch", True)
    elif _torch()[0] and not any(device.startswith("cuda") for device in devices()):
        yield Finding(
            "torch is built for CUDA and finds no device",
            "if there is a GPU, update its driver; if not, the CPU build is smaller",
            False,
        )


def torchvision_loads() -> Iterator[Finding]:
    """A torchvision built for another torch breaks every model import of transformers."""
    if installed("torchvision") and probe(TORCHVISION).returncode:
        yield Finding(
            "torchvision is installed but broken, and transformers imports it",
            "pip uninstall torchvision, or install the build that matches torch",
            True,
        )


def manifolds_is_ours() -> Iterator[Finding]:
    """The unrelated distribution `manifolds` has a package of the same name, and its files overwrite ours."""
    import symgeo

    if installed("manifolds"):
        yield Finding(
            "the unrelated package manifolds is installed over ours",
            "pip uninstall manifolds, then pip install --force-reinstall --no-deps symgeo",
            True,
        )
    spec = find_spec("manifolds")
    home = Path(symgeo.__file__).parent.parent
    if spec is None or spec.origin is None or Path(spec.origin).parent.parent != home:
        where = spec.origin if spec is not None else "nowhere"
        yield Finding(
            f"import manifolds finds {where}, not the package of symgeo in {home}",
            "rename or remove the other one, or run from another folder",
            True,
        )


def transformers_is_new() -> Iterator[Finding]:
    """The model tables are for transformers 5."""
    found = installed("transformers")
    if found is None:
        yield Finding("transformers is not installed, so that no model folder loads", "pip install 'symgeo[hf]'", False)
    elif int(found.split(".")[0]) < 5:
        yield Finding(
            f"transformers {found} names its modules in another way", "pip install -U 'transformers>=5'", True
        )


def demo_has_data() -> Iterator[Finding]:
    """The demo's images come with scikit-learn."""
    if installed("scikit-learn") is None:
        yield Finding(
            "scikit-learn is not installed, and the demo's images come with it", "pip install 'symgeo[demo]'", False
        )


def geoopt_momentum() -> Iterator[Finding]:
    """geoopt starts the momentum of RiemannianSGD from the Euclidean gradient."""
    if installed("geoopt"):
        yield Finding(
            "geoopt's RiemannianSGD starts its momentum with the Euclidean gradient, which no symmetry preserves",
            "nothing to do on the manifolds of this package, which correct it",
            False,
        )


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    torch_starts,
    torchvision_loads,
    manifolds_is_ours,
    transformers_is_new,
    demo_has_data,
    geoopt_momentum,
)
