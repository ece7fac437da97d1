"""Training runs in which only the balancer varies, and what they leave on disk. Needs the extra ``[train]``."""

from excessmtl_ext.training.config import TrainConfig
from excessmtl_ext.training.loop import Progress, TrainingInterrupted, train
from excessmtl_ext.training.methods import METHODS, Method, make_balancer
from excessmtl_ext.training.ranks import OtherRankFailed
from excessmtl_ext.training.run_record import RunRecord

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
