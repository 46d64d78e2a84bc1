"""`SymO`: the optimizer that takes its preconditioner from the symmetries of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from symgeo.distributed import check_replicas, check_same, local, processes
from symgeo.optim import momentum
from symgeo.optim.adamw import adamw_, descend_, full_precision
from symgeo.optim.checkpoint import consolidated, keep_owned
from symgeo.optim.gauge import Gauge
from symgeo.optim.graft import adam_steps, grafted
from symgeo.optim.options import Options
from symgeo.optim.plan import Plan, check_group, check_overrides, rest_rate
from symgeo.optim.sharing import Shared, Survey
from symgeo.optim.undo import undone
from symgeo.optim.whitening import whitened_step
from symgeo.symmetry import Symmetry

Group = dict[str, Any]
Named = Iterable[tuple[str, Tensor]] | Iterable[Group]

#: what a group of parameters may set for itself
GROUP_OPTIONS = ("lr", "betas", "weight_decay", "rest_lr")


class SymO(torch.optim.Optimizer):
    r"""Steps along ``H^-1 m`` with the curvature H that the symmetries of the loss give to one gradient.

    A loss that does not change under a group has a known gradient on a whole orbit, and the second moment of the
    gradient over the orbit, ``S_g``, estimates the square of the Hessian (arXiv 2606.00442; see
    `symgeo.curvature`).  At step t = 1, 2, ..., for a gradient g:

        m  <- b1 m + (1 - b1) g            mh = m / (1 - b1^t)
        T  <- b2 T + (1 - b2) blocks(mh)   Th = T / (1 - b2^t)
        w  <- (1 - lr wd) w - lr H^-1 mh   H = S_g^power from Th ("gradient"), power = 1/2

    The choice of the group is the choice of the method (see `symgeo.optim.presets`): ``Orthogonal`` on one axis of
    a matrix gives Muon (b2 = 0) or one-sided Shampoo, ``SignFlip`` on all axes Adam with momentum inside its second
    moment, and a pair of one-sided symmetries Shampoo, whose step is the geometric mean
    ``S_1^(-power / 2) S_2^(-power / 2) mh``.  ``corrected=True`` turns Shampoo into SOAP.

    Parameters
    ----------
    named_params: pairs (name, parameter), as ``model.named_parameters()``, or groups as dicts whose ``"params"`` are
        such pairs and which may have their own ``lr``, ``betas``, ``weight_decay``, ``rest_lr``
    symmetry: a `Symmetry`, or a pair of them that act on different axes of the same parameters
    lr: a number or a tensor;  betas: of momentum and statistics;  weight_decay: decoupled
    damping: relative to the largest eigenvalue of all blocks together: ``|s| + damping s_max``
    estimator: "gradient", "riccati" (statistics of the current weights too) or "secant" (averages of both);
        see `symgeo.curvature.hessian`
    update_every: powers are recomputed at steps 1, 1 + update_every, ...; averages are taken every step
    trivial: the kind that no group moves: "diagonal", "dense", "uncentred" (the average of x x^T, as "dense"), "drop"
    nesterov: ``(b1 m + (1 - b1) g) / (1 - b1^(t + 1))`` takes the place of mh, in the statistics too
    rest_lr: learning rate of AdamW (eps 1e-8, the same betas and weight decay) for parameters that the symmetry does
        not name; by default lr.  Schedulers of lr keep the ratio of the two
    compact: non-compact groups (GeneralLinear, PositiveScaling, Rotary): momentum and weights are carried into the
        balanced gauge at every step, the statistics live there, and the step is carried back, so that the whole
        trajectory moves along with every element of the group
    power: of S_g.  1 without the root (with a pair: each side to the power -1/2)
    graft: scale every parameter's step to the norm of mh ("sgd") or of Adam's step ("adam")
    divergence: how the two of a pair are fitted: "frobenius" each alone, "kl" each whitened by the other (power=1)
    roots: "eigh", "newton" (matrix products only, without waiting for the device), "auto" (newton on accelerators),
        or "group" (no roots and no inverses; power=1): see `symgeo.optim.roots`
    corrected: keep only the eigenvectors of the statistics (renewed every update_every steps, of g itself), and take
        the eigenvalues from averages of g^2 in their basis: SOAP for a pair, KL-SOAP with divergence="kl", Adam for
        SignFlip on all axes; the first step only finds the basis.  See `symgeo.optim.corrected`; without graft
    process_group: the processes that train one model, by default all of torch.distributed where that is initialised;
        False for a model of this process alone

    Under DistributedDataParallel and ``fully_shard`` (FSDP2, also with replicas of shards) a step is that of one
    process to the last bit, given the same gradients.  Parameters that share statistics have one owner, which gathers
    their gradients, keeps their state and sends the step to all; AdamW steps the rest where it is.  All processes make
    the optimizer and take steps together: one that has no gradients takes part, and what one raises all raise
    (`symgeo.distributed.PeerError`).  State dictionaries hold what a process owns, under the parameters: save and load
    them with `torch.distributed.checkpoint` (any number of processes may load), or as one file with
    `consolidated_state_dict`.

    A step that raises leaves parameters, momentum, statistics and counters as they were, in every process: gradients
    that are not finite, or whose squares the statistics cannot hold (norms beyond 1e18 in single precision), a closure
    that raises, or matrices without eigenvalues do so before anything moves.  Only gradients may have changed.  Not
    undone is what ends a step from outside, such as memory that runs out between two renewals.

    On an accelerator a step does not wait for the device, except for the eigenvalues of roots="eigh" (estimators
    "riccati" and "secant", corrected=True, and powers that "newton" does not find) when they are renewed, and, with
    compact=True, for the singular values of `torch.linalg`; groups that share a block are balanced in rounds that read
    one number each.  A step that does not wait does not look at the size of gradients either.

    A gradient of None counts as zero in the statistics, and its parameter stays where it is.  State is kept under the
    parameters: ``exp_avg``, ``step``, ``exp_avg_sq`` (AdamW and graft="adam") of their shape, at least in single
    precision, and statistics under the first parameter that carries a kind.

    Raises ValueError for names that are missing, options that do not fit, complex parameters, sparse gradients, and
    processes whose parameters differ; SymmetryError for groups without an average and for pairs that do not commute.

    >>> from symgeo.groups import SignFlip
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -5.0]))
    >>> optimizer = SymO([("w", w)], Symmetry({"w": "h"}, {"h": SignFlip()}), lr=1.0, betas=(0.0, 0.0), damping=0.0)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> w.data
    tensor([ 2., -4.])
    """

    def __init__(
        self,
        named_params: Named,
        symmetry: Symmetry | tuple[Symmetry, Symmetry],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        damping: float = 1e-4,
        estimator: str = "gradient",
        update_every: int = 1,
        trivial: str = "diagonal",
        weight_decay: float = 0.0,
        nesterov: bool = False,
        rest_lr: float | None = None,
        compact: bool = False,
        *,
        power: float = 0.5,
        graft: str | None = None,
        divergence: str = "frobenius",
        roots: str = "auto",
        corrected: bool = False,
        process_group: Any = None,
    ) -> None:
        self._symmetries = _symmetries(symmetry)
        self._options = Options(
            len(self._symmetries), damping, estimator, update_every, trivial, nesterov, compact, power, graft,
            divergence, roots, corrected,
        )
        self._plan: Plan | None = None
        self._process_group, self._checked = process_group, False
        self._complete = False
        super().__init__(named_params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "rest_lr": rest_lr})
        self._complete = True
        self._planned()

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, named as in the constructor.  Kinds whose copies change start their statistics anew."""
        if isinstance(param_group, dict):
            check_overrides(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, [name for other in self.param_groups[:-1] for name in other["param_names"]])
            group["base_lr"] = float(group["lr"])
            self._plan = None
            if self._complete:
                self._planned()
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        own = {"_symmetries": self._symmetries, "_options": self._options, "_complete": True,
               "_process_group": self._process_group if isinstance(self._process_group, bool) else None,
               "_checked": False}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plan = None  # groups and states are other objects now

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned: copies, in the precision in which they were saved.

        Of several processes each keeps what it owns, so that the state of one may be loaded by all.
        """
        seen: list[dict[str, Any]] = []
        names = [group["param_names"] for group in self.param_groups]
        handle = self.register_load_state_dict_pre_hook(lambda _, hooked: seen.append(hooked))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for group, own in zip(self.param_groups, names):
            group["param_names"] = own  # the symmetry knows these
        numbers = [i for group in seen[0]["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params):
            for key, value in seen[0]["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(p.device, copy=True)
        keep_owned(self._planned(), self.state)

    def consolidated_state_dict(self) -> dict[str, Any] | None:
        """What `state_dict` would be with one process, on the CPU, at process 0, and None at the others.

        With one process `state_dict` itself.  All processes call it.  `load_state_dict` takes it everywhere.
        """
        return consolidated(self._planned(), self.state_dict())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns the loss of the closure, if there is one.

        Of several processes all give a closure, or none.  See `symgeo.distributed.Processes.announcing` for one that
        raises in the middle of collectives of its own.
        """
        plan = self._planned()
        if not self._checked:
            if isinstance(plan.share, Shared):
                check_replicas(plan.share.team, plan.params)
            self._checked = True
        ready, loss = plan.ready(self.state), None
        if closure is not None:
            with plan.share.announcing(), torch.enable_grad():
                loss = closure()
        with plan.share.together():
            plan.check_gradients()
            if plan.waits_for_nothing or (self._due(plan, ready) and self._options.method(plan.device) == "eigh"):
                plan.check_finite()
        survey = plan.share.survey(plan.params, ready)
        step = self._step_members(plan, survey)  # what may fail is behind us; now everything moves
        plan.share.complete(plan.rest, survey)
        for group, (named, rest) in zip(self.param_groups, plan.split):
            params = [p for _, p in rest]
            adamw_(params, [self.state[p] for p in params], rest_rate(group), group["betas"], group["weight_decay"])
            moving = [(name, p) for name, p in named if survey.moving(name)]
            if moving:
                descend_([local(p) for _, p in moving], [step[name] for name, _ in moving], group["lr"],
                         group["weight_decay"])
        return loss

    def _planned(self) -> Plan:
        if self._plan is None:
            team = processes(self._process_group)
            if team is not None:
                check_same(team, {name: p for group in self.param_groups
                                  for name, p in zip(group["param_names"], group["params"])})
            self._plan = Plan(self.param_groups, self._symmetries, self._options, team)
        return self._plan

    def _step_members(self, plan: Plan, survey: Survey) -> Mapping[str, Tensor]:
        """The steps of the parameters that the symmetry names, after which their state has seen the gradients."""
        if not plan.members:
            return {}
        due = self._due(plan, survey.ready)
        grads = plan.share.gradients(survey)
        weights = plan.share.weights() if self._options.needs_weights else {}
        decomposing = due and self._options.method(plan.device) == "eigh"  # what else may fail has been looked at
        owners = plan.share.owned.values()
        with undone(self.state, owners, momentum.MOMENTS) if decomposing else nullcontext():
            with plan.share.together(), plan.share.agreeing():
                owned = self._owned_step(plan, grads, weights, due, survey.ready)
            step = plan.share.spread(owned, survey)
        for group, named in self._owned(plan):
            momentum.keep(named, self.state, grads, group["betas"], self._options.graft == "adam")
        for p in plan.members.values():  # all processes count steps
            self.state[p]["step"] = momentum.steps_after(self.state, p)
        return step

    def _owned_step(
        self, plan: Plan, grads: Mapping[str, Tensor], here: Mapping[str, Tensor], due: bool, ready: bool
    ) -> dict[str, Tensor]:
        """The steps of what this process owns, from whole gradients and weights."""
        means, squares = self._moments(plan, grads)
        gradient: Mapping[str, Tensor] = means
        gauge = None
        if self._options.compact:
            gauge = Gauge(plan.symmetries[0], plan.action, here)
            gradient = gauge.gradients(means)
        weights = None
        if self._options.estimator != "gradient":
            weights = gauge.params if gauge else here
        if plan.corrected:
            found = plan.corrected.step(self.state, gradient, self._gradients(plan, grads, gauge), due)
        else:
            found = whitened_step(plan.sides, self.state, gradient, weights, due, ready, self._options.divergence)
        step = {name: found[name] for name in plan.share.owned}
        if self._options.graft is not None:
            lengths = adam_steps(list(means.values()), squares) if self._options.graft == "adam" else [
                gradient[name] for name in step]
            step = dict(zip(step, grafted(list(step.values()), lengths)))
        return dict(gauge.back(step)) if gauge else step

    def _gradients(self, plan: Plan, grads: Mapping[str, Tensor], gauge: Gauge | None) -> Mapping[str, Tensor]:
        """The gradients themselves, in the gauge of the statistics."""
        found = {name: grads[name].to(plan.precisions[name]) if name in grads else full_precision(p)
                 for name, p in plan.share.owned.items()}
        return gauge.gradients(found) if gauge else found

    def _due(self, plan: Plan, ready: bool) -> bool:
        """Whether this step recomputes the powers."""
        if not plan.members:
            return False
        steps = self.state.get(next(iter(plan.members.values())), {}).get("step", 0)  # before this one
        every = self._options.update_every
        return every == 1 or steps % every == 0 or not ready

    def _moments(self, plan: Plan, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Debiased averages of the gradients by name, and of their squares if something needs them."""
        means: dict[str, Tensor] = {}
        squares: list[Tensor] = []
        for group, named in self._owned(plan):
            b1, b2 = group["betas"]
            means |= momentum.means(named, self.state, found, b1, self._options.nesterov)
            if self._options.graft == "adam":
                squares += momentum.squares(named, self.state, found, b2)
        return means, squares

    def _owned(self, plan: Plan) -> list[tuple[Group, list[tuple[str, Tensor]]]]:
        """For every group those of its parameters that this process owns."""
        return [(group, [(name, p) for name, p in members if name in plan.share.owned])
                for group, (members, _) in zip(self.param_groups, plan.split)]


def _symmetries(symmetry: Symmetry | tuple[Symmetry, Symmetry]) -> tuple[Symmetry, ...]:
    found = (symmetry,) if isinstance(symmetry, Symmetry) else tuple(symmetry)
    if len(found) not in (1, 2) or not all(isinstance(s, Symmetry) for s in found):
        raise ValueError(f"symmetry: needed a symgeo.Symmetry or a pair of them; found {symmetry!r}")
    return found
