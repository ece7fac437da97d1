"""ExcessMTL for PyTorch: training one network on several tasks whose labels cannot all be trusted."""

from excessmtl_ext import _ctrl_c as _ctrl_c  # first: before torch, whose import takes seconds
from excessmtl_ext import functional, reference
from excessmtl_ext.balancer import Balancer
from excessmtl_ext.baselines import (
    FAMO,
    IMTL,
    MGDA,
    MOML,
    DualBalancing,
    DynamicWeightAverage,
    FixedWeights,
    GradNorm,
    GroupDRO,
    InverseNorm,
    SingleTask,
    SmoothTchebycheff,
    UncertaintyWeights,
    Uniform,
)
from excessmtl_ext.collapse import TaskCollapseWarning
from excessmtl_ext.excess_mtl import ExcessMTL
from excessmtl_ext.graphed_step import GraphedStep
from excessmtl_ext.skips import SkippedStepsWarning
from excessmtl_ext.split import TaskSplit

__all__ = [
    "FAMO",
    "IMTL",
    "MGDA",
    "MOML",
    "Balancer",
    "DualBalancing",
    "DynamicWeightAverage",
    "ExcessMTL",
    "FixedWeights",
    "GradNorm",
    "GraphedStep",
    "GroupDRO",
    "InverseNorm",
    "SingleTask",
    "SkippedStepsWarning",
    "SmoothTchebycheff",
    "TaskCollapseWarning",
    "TaskSplit",
    "UncertaintyWeights",
    "Uniform",
    "functional",
    "reference",
]
