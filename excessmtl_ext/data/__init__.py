"""Data sets of several tasks, with fixed and seeded corruption of the training labels of chosen tasks."""

from excessmtl_ext.data.diamonds import load_diamonds
from excessmtl_ext.data.digits import load_digit_pairs
from excessmtl_ext.data.human_ratings import load_human_ratings
from excessmtl_ext.data.label_noise import (
    ClassNoise,
    CorruptedLabels,
    ValueNoise,
    choose_corrupted,
    corrupt_classes,
    corrupt_pixels,
    corrupt_values,
    noise_share,
)
from excessmtl_ext.data.movielens import load_movielens
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
from excessmtl_ext.data.nyuv2 import load_nyuv2
from excessmtl_ext.data.office_home import load_office_home
from excessmtl_ext.data.own_inputs import OwnInputsSplit
from excessmtl_ext.data.qm9 import load_qm9
from excessmtl_ext.data.sarcos import load_sarcos

__all__ = [
    "IGNORED_CLASS",
    "Batch",
    "ClassNoise",
    "CorruptedLabels",
    "MultiTaskData",
    "OwnInputsSplit",
    "Split",
    "Task",
    "TaskKind",
    "TensorSplit",
    "ValueNoise",
    "choose_corrupted",
    "corrupt_classes",
    "corrupt_pixels",
    "corrupt_values",
    "load_diamonds",
    "load_digit_pairs",
    "load_human_ratings",
    "load_movielens",
    "load_multimnist",
    "load_nyuv2",
    "load_office_home",
    "load_qm9",
    "load_sarcos",
    "noise_share",
]
