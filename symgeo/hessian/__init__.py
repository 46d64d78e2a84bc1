"""Hessians that do not depend on coordinates nobody chose, as linear operators, with exact products."""

from symgeo.hessian.blocks import block, module_blocks
from symgeo.hessian.criteria import Criterion
from symgeo.hessian.estimate import Estimate, TensorEstimate
from symgeo.hessian.geodesic import Jet, geodesic_jet
from symgeo.hessian.interop import from_curvlinops, to_curvlinops
from symgeo.hessian.invariant import invariant_hessian
from symgeo.hessian.lanczos import SpectralDensity
from symgeo.hessian.laplace import laplace_evidence
from symgeo.hessian.low_rank import LowRankPlusDiagonal, low_rank_plus_diagonal
from symgeo.hessian.matrices import empirical_fisher, euclidean_hessian, fisher, ggn
from symgeo.hessian.metrics import Metric, fisher_metric, kronecker_metric, pullback_metric
from symgeo.hessian.model_loss import ModelLoss, model_loss
from symgeo.hessian.operator import HessianOperator
from symgeo.hessian.parallel import data_parallel
from symgeo.hessian.reparametrization import Reparametrization
from symgeo.hessian.riemannian import riemannian_hessian
from symgeo.hessian.spectrum import Eigenpairs

__all__ = [
    "Criterion",
    "Eigenpairs",
    "Estimate",
    "HessianOperator",
    "Jet",
    "LowRankPlusDiagonal",
    "Metric",
    "ModelLoss",
    "Reparametrization",
    "SpectralDensity",
    "TensorEstimate",
    "block",
    "data_parallel",
    "empirical_fisher",
    "euclidean_hessian",
    "fisher",
    "fisher_metric",
    "from_curvlinops",
    "geodesic_jet",
    "ggn",
    "invariant_hessian",
    "kronecker_metric",
    "laplace_evidence",
    "low_rank_plus_diagonal",
    "model_loss",
    "module_blocks",
    "pullback_metric",
    "riemannian_hessian",
    "to_curvlinops",
]
