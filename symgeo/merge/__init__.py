"""Merging LoRA adapters and whole models by Fréchet averages."""

from symgeo.merge.adapters import MergeReport, merge_adapters
from symgeo.merge.alignment import Alignment, align, align_report
from symgeo.merge.barrier import Barrier, barrier
from symgeo.merge.factors import MergedFactors, merge_factors
from symgeo.merge.models import merge_models
from symgeo.merge.peft.plan import MergePlan
from symgeo.merge.peft.planning import plan_merge

__all__ = [
    "Alignment",
    "Barrier",
    "MergePlan",
    "MergeReport",
    "MergedFactors",
    "align",
    "align_report",
    "barrier",
    "merge_adapters",
    "merge_factors",
    "merge_models",
    "plan_merge",
]
