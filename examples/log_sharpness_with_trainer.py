"""
Log sharpness while a Trainer trains
====================================

A callback for the Trainer of transformers: every k steps it measures the geodesic sharpness of the model on a few fixed
batches and logs it beside the loss, wherever the Trainer logs. The symmetry of the model is found once, before the
first step.

::

    python examples/log_sharpness_with_trainer.py [--size small|full] [--out DIR]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import matplotlib.pyplot as plt
import torch
from _run import options, save
from _tiny_bert import make_batch, tiny_bert
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import symgeo

# %%
# The callback
# ------------
# The parameters are copied, and the model is in evaluation mode for the time of the measurement. ``functional_loss``
# takes the loss that the model itself computes from a batch with labels.


class LogSharpness(TrainerCallback):
    """Logs ``sharpness`` before the first step and after every ``every`` steps.

    trainer : whose ``log`` is called, so that all its integrations see the numbers
    batches : mappings of tensors, with labels; the same for every measurement
    rho, steps : as in :func:`symgeo.geodesic_sharpness`
    """

    def __init__(
        self, trainer: Trainer, batches: Sequence[dict[str, Tensor]], every: int, rho: float = 0.3, steps: int = 10
    ) -> None:
        self.trainer, self.batches, self.every, self.rho, self.steps = trainer, batches, every, rho, steps
        self.symmetry: symgeo.Symmetry | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the symmetry, and measures."""
        self.symmetry = symgeo.find_symmetry(self.trainer.model)
        self.measure()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures when it is time."""
        if state.global_step % self.every == 0:
            loss_is_due = control.should_log
            self.measure()
            control.should_log = loss_is_due  # which every log takes back

    def measure(self) -> None:
        """Measures and logs."""
        model: nn.Module = self.trainer.model
        training = model.training
        model.eval()
        try:
            params = {name: p.detach().clone() for name, p in model.named_parameters()}
            loss = symgeo.functional_loss(model)
            manifold = symgeo.ParameterManifold(params, self.symmetry, metric="inv")
            found = symgeo.geodesic_sharpness(loss, params, self.batches, manifold, self.rho, self.steps)
        finally:
            model.train(training)
        self.trainer.log({"sharpness": found.value})


# %%
# A run
# -----
# Nothing else about the Trainer changes: one call of ``add_callback``.


def run(steps: int, every: int, search: int) -> list[dict[str, Any]]:
    """What a Trainer logged."""
    generator = torch.Generator().manual_seed(0)
    examples = make_batch(2048, generator)
    data = [{name: values[i] for name, values in examples.items()} for i in range(2048)]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=3e-3,
            logging_steps=every, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=tiny_bert(), args=settings, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogSharpness(trainer, [make_batch(64, generator)], every, steps=search))
        trainer.train()
    return trainer.state.log_history


def draw(measured: list[dict[str, Any]], losses: list[dict[str, Any]]) -> Figure:
    """Training loss and sharpness."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot([row["step"] for row in losses], [row["loss"] for row in losses], "o-", color="C7")
    left.set(xlabel="step", ylabel="training loss")
    right.plot([row["step"] for row in measured], [row["sharpness"] for row in measured], "o-")
    right.set(xlabel="step", ylabel="geodesic sharpness")
    return figure


def main() -> None:
    """Trains, prints and plots."""
    chosen = options(__doc__)
    history = run(*{"small": (40, 10, 5), "full": (400, 25, 20)}[chosen.size])
    measured = [row for row in history if "sharpness" in row]
    losses = [row for row in history if "loss" in row]
    by_step = {row["step"]: row["loss"] for row in losses}
    print(f"{'step':>6}{'training loss':>16}{'geodesic sharpness':>22}")
    for row in measured:
        loss = f"{by_step[row['step']]:16.4f}" if row["step"] in by_step else f"{'-':>16}"
        print(f"{row['step']:6}{loss}{row['sharpness']:22.6f}")
    save(chosen.out, "log_sharpness_with_trainer", history, draw(measured, losses))


if __name__ == "__main__":
    main()
