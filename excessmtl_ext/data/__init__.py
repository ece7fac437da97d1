"""Data sets of several tasks, with fixed and seeded corruption of the training labels of chosen tasks."""

from excessmtl_ext.data.digits import load_digit_pairs
from excessmtl_ext.data.label_noise import CorruptedLabels, corrupt_classes
from excessmtl_ext.data.multimnist import load_multimnist
from excessmtl_ext.data.multitask_data import (
    IGNORED_CLASS,
    Batch,
    MultiTaskData,
    Split,
    Task,
    TaskKind,
    TensorSplit,
)

__all__ = [
    "IGNORED_CLASS",
    "Batch",
    "CorruptedLabels",
    "MultiTaskData",
    "Split",
    "Task",
    "TaskKind",
    "TensorSplit",
    "corrupt_classes",
    "load_digit_pairs",
    "load_multimnist",
]
