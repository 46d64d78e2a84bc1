"""Optimizers on one task under equal tuning: final loss, steps to the loss of AdamW, and the cost of a step.

    python benchmarks/optimizers.py [--methods adamw,muon] [--size full] [--seeds 5] [--workers 2]
                                    [--json benchmarks/optimizers.json] [--windows 0] [--forget NAME,NAME]

The rules are those of _protocol.py, the methods those of _methods.py.  Every run is kept in the JSON file and not made
again.  ``--windows 9`` measures the cost: all methods of the file and AdamW take turns in one process on one thread,
ten steps each (one renewal of a preconditioner among them); the figures are medians over windows of the ratio within a
window, so that a noisy machine disturbs all alike.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _methods import METHODS, REFERENCE, TIMED
from _protocol import SIZES, Key, Setting, Trainer, best_rate, missing, summary, train, tuning
from _records import Records, forget

from symgeo.data import Text, python_source
from symgeo.parallel import one_thread, spread

WINDOW = 10  # steps


@dataclass(frozen=True)
class Job:
    """One run, as it is sent to a worker process."""

    key: Key
    setting: Setting


def work(job: Job) -> list[float]:
    """The validation losses of a run."""
    key = job.key
    return train(METHODS[key.method], key.lr, key.seed, job.setting, python_source())


def complete(names: Sequence[str], records: Records, setting: Setting, seeds: int, workers: int) -> None:
    """Make the runs that the methods still miss, keeping each as it ends."""
    while jobs := {
        f"{key.method} lr {key.lr:g} seed {key.seed}": Job(key, setting)
        for name in names
        for key in missing(name, METHODS[name], records.runs, seeds)
    }:
        for title, losses in spread(work, jobs, workers):
            records.runs[jobs[title].key] = losses
            records.write(summarise(records, setting))
            print(f"{title}: {losses[-1]:.4f}", flush=True)


def summarise(records: Records, setting: Setting) -> dict[str, Any]:
    """The summary of all methods in the file; none before the reference has run."""
    done = {key.method for key in records.runs}
    if REFERENCE not in done:
        return {}
    return dict(summary(sorted(done), records.runs, setting, REFERENCE))


def measure(records: Records, setting: Setting, text: Text, windows: int) -> dict[str, Any]:
    """Cost of an optimizer step, and of the forward and backward pass, in units of AdamW's step."""
    done = {key.method for key in records.runs} | {REFERENCE}
    methods = {name: method for name, method in METHODS.items() if name in done} | TIMED
    longer = replace(setting, steps=WINDOW * (windows + 1))
    trainers = {}
    for name, method in methods.items():
        tried = tuning(name, records.runs)
        trainers[name] = Trainer(method, best_rate(tried) if tried else method.grid[2], 0, longer, text)
    passes: dict[str, list[float]] = {name: [] for name in methods}
    steps: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(windows + 1):
        for name, trainer in trainers.items():
            times = [(seconds(trainer.backward), seconds(trainer.step)) for _ in range(WINDOW)]
            passes[name].append(sum(a for a, _ in times))
            steps[name].append(sum(b for _, b in times))

    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above[1:], below[1:]))  # the first window warms up

    base = REFERENCE
    return {
        "processor": platform.machine(),
        "threads": 1,
        "windows": windows,
        "step / step of AdamW": {name: round(ratio(steps[name], steps[base]), 3) for name in methods},
        "step / step of default AdamW": {
            name: round(ratio(steps[name], steps["adamw_default"]), 3) for name in methods
        },
        "forward and backward / step of AdamW": round(ratio(passes[base], steps[base]), 3),
    }


def seconds(call: Callable[[], None]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(records: Records, setting: Setting) -> str:
    """The summary, one line per method, the best first."""
    lines = [f"{'method':<18}{'lr':>9}{'final loss':>12}{'error':>9}{'minus AdamW':>13}{'error':>9}{'steps':>7}"
             f"{'cost':>7}"]
    costs = records.timing.get("step / step of AdamW", {})
    rows = summarise(records, setting)
    for name, row in sorted(rows.items(), key=lambda item: item[1]["final loss"]):
        difference, error = (row[f"{part}minus {REFERENCE}{rest}"] for part, rest in (
            ("", ", same seed"), ("standard error of ", "")))
        steps = "never" if math.isinf(row["steps to target"]) else f"{row['steps to target']:g}"
        cost = f"{costs[name]:.1f}" if name in costs else ""
        edge = "" if row["interior"] else "  (best learning rate at the end of its grid)"
        lines.append(f"{name:<18}{row['lr']:>9.3g}{row['final loss']:>12.4f}{row['standard error']:>9.4f}"
                     f"{difference:>13.4f}{error:>9.4f}{steps:>7}{cost:>7}{edge}")
    return "\n".join(lines)


def main() -> None:
    """Make the missing runs, measure the cost if asked to, write the file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--size", choices=tuple(SIZES), default="full", help="small takes seconds")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--windows", type=int, default=0, help="measure the cost over so many windows; 0: not at all")
    parser.add_argument("--forget", default="", help="drop the runs of these methods first")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    names = [name for name in arguments.methods.split(",") if name]
    if unknown := [name for name in names if name not in METHODS]:
        parser.error(f"--methods: needed some of {', '.join(METHODS)}, found {', '.join(unknown)}")
    if REFERENCE not in names:
        names.insert(0, REFERENCE)  # the target is its loss
    setting, text = SIZES[arguments.size], python_source()
    if arguments.forget and arguments.json.exists():
        forget(arguments.json, arguments.forget.split(","))
    try:
        records = Records(arguments.json, setting, text, METHODS)
    except ValueError as error:
        parser.error(str(error))
    complete(names, records, setting, arguments.seeds, arguments.workers)
    if arguments.windows > 0:
        with one_thread():
            records.timing = measure(records, setting, text, arguments.windows)
    records.write(summarise(records, setting))
    print(table(records, setting))


if __name__ == "__main__":
    main()
