"""Balancing methods to compare with, all under the contract of :class:`excessmtl_ext.Balancer`."""

from excessmtl_ext.baselines.gradnorm import GradNorm
from excessmtl_ext.baselines.group_dro import GroupDRO
from excessmtl_ext.baselines.imtl import IMTL
from excessmtl_ext.baselines.mgda import MGDA
from excessmtl_ext.baselines.moml import MOML
from excessmtl_ext.baselines.single_task import SingleTask
from excessmtl_ext.baselines.uniform import Uniform

__all__ = ["IMTL", "MGDA", "MOML", "GradNorm", "GroupDRO", "SingleTask", "Uniform"]
