"""What all commands share: their common options, and what becomes of their results."""

import inspect
import re
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from symgeo.cli.errors import Failure

if TYPE_CHECKING:
    import torch


class Dtype(StrEnum):
    """The precision of a computation."""

    float32 = "float32"
    float64 = "float64"


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N, mps")
    return value


def finite_radius(value: float) -> float:
    """``value`` if it can be a radius, or a usage error."""
    if not 0 <= value < float("inf"):
        raise typer.BadParameter(f"a radius is a finite number >= 0; got {value}")
    return value


@dataclass(frozen=True)
class Run:
    """The options that every command has."""

    json: Annotated[
        str, typer.Option(metavar="FILE", help="Write the results as JSON; - is standard output, with nothing else.")
    ] = ""
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0
    device: Annotated[str, typer.Option(callback=_device, help="auto, cpu, cuda, cuda:N or mps.")] = "auto"
    dtype: Annotated[
        Dtype | None, typer.Option(help="Precision; by default what the command needs.", show_default=False)
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages and no progress bars.")] = False

    def say(self, message: str) -> None:
        """A message, on standard error."""
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)

    def precision(self, default: str = "float32") -> "torch.dtype":
        """The dtype asked for, or the command's own."""
        import torch

        return {"float32": torch.float32, "float64": torch.float64}[self.dtype or default]

    def place(self) -> "torch.device":
        """The device asked for; ``ValueError`` where this machine has none of that kind."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kind, _, index = self.device.partition(":")
        available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if int(index or 0) >= available[kind]:
            raise ValueError(f"--device {self.device}: torch finds no such device here; use --device cpu")
        return torch.device(self.device)


@dataclass(frozen=True)
class Outcome:
    """What a command found: text for people, the same as JSON, and why it counts as failed, if it does."""

    text: str
    result: dict[str, Any] = field(default_factory=dict)
    failure: str = ""


def command(function: Callable[..., Outcome]) -> Callable[..., None]:
    """A function of its own options and a ``run``, as a command with the common options too.

    An option of its own takes the place of the common one of that name.
    """
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "run"]
    names = {p.name for p in own}
    common = [p for p in inspect.signature(Run, eval_str=True).parameters.values() if p.name not in names]

    def wrapper(**options: Any) -> None:
        run = Run(**{p.name: options.pop(p.name) for p in common})
        _finish(function.__name__, options, run, lambda: function(**options, run=run))

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *common)]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__doc__ = function.__doc__
    return wrapper


def _finish(name: str, options: dict[str, Any], run: Run, work: Callable[[], Outcome]) -> None:
    from symgeo import report

    to_stdout = run.json == "-"
    if run.json and not to_stdout:
        report.prepare(run.json)
    start = time.perf_counter()
    guard: AbstractContextManager[Any] = redirect_stdout(sys.stderr) if to_stdout else nullcontext()
    with guard:  # whatever a user's function prints, the document stays alone on standard output
        outcome = work()
    if not to_stdout and outcome.text:
        print(outcome.text, flush=True)
    if run.json:
        settings = {"seed": run.seed, "device": run.device, "dtype": run.dtype, **options}
        document = report.document(name, settings, outcome.result, time.perf_counter() - start)
        report.write_json(run.json, document)
    if outcome.failure:
        raise Failure(outcome.failure)
