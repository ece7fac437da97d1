"""Balancing methods to compare with, all under the contract of :class:`excessmtl_ext.Balancer`."""

from excessmtl_ext.baselines.dual_balancing import DualBalancing
from excessmtl_ext.baselines.dynamic_weight_average import DynamicWeightAverage
from excessmtl_ext.baselines.famo import FAMO
from excessmtl_ext.baselines.fixed_weights import FixedWeights
from excessmtl_ext.baselines.gradnorm import GradNorm
from excessmtl_ext.baselines.group_dro import GroupDRO
from excessmtl_ext.baselines.imtl import IMTL
from excessmtl_ext.baselines.inverse_norm import InverseNorm
from excessmtl_ext.baselines.mgda import MGDA
from excessmtl_ext.baselines.moml import MOML
from excessmtl_ext.baselines.single_task import SingleTask
from excessmtl_ext.baselines.smooth_tchebycheff import SmoothTchebycheff
from excessmtl_ext.baselines.uncertainty_weights import UncertaintyWeights
from excessmtl_ext.baselines.uniform import Uniform

__all__ = [
    "FAMO",
    "IMTL",
    "MGDA",
    "MOML",
    "DualBalancing",
    "DynamicWeightAverage",
    "FixedWeights",
    "GradNorm",
    "GroupDRO",
    "InverseNorm",
    "SingleTask",
    "SmoothTchebycheff",
    "UncertaintyWeights",
    "Uniform",
]
