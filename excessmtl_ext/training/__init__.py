"""Training runs in which only the balancer varies, and what they leave on disk. Needs the extra ``[train]``."""

from excessmtl_ext.training.run.config import TrainConfig
from excessmtl_ext.training.run.loop import train
from excessmtl_ext.training.run.methods import METHODS, Method, make_balancer
from excessmtl_ext.training.run.progress import Progress, TrainingInterrupted
from excessmtl_ext.training.run.ranks import OtherRankFailed
from excessmtl_ext.training.run.record import RunRecord

__all__ = [
    "METHODS",
    "Method",
    "OtherRankFailed",
    "Progress",
    "RunRecord",
    "TrainConfig",
    "TrainingInterrupted",
    "make_balancer",
    "train",
]
