"""The device that a process of a run computes on."""

from __future__ import annotations

import os

import torch


def find_device(name: str) -> torch.device:
    """Returns the device called ``name``.

    Raises:
        ValueError: runs do not compute on such a device, or this machine does not have it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"Expected `device` such as cpu, cuda or cuda:1, but got {name!r}."
        ) from error
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ValueError(f"Expected `device` such as cpu, cuda or cuda:1, but got {name!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"Expected `device` to be one of this machine, but got {name!r} and torch {torch.__version__} "
            "finds no CUDA device. Pass --device cpu."
        )
    num_devices = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= num_devices:
        raise ValueError(
            f"Expected `device` to be one of the {num_devices} CUDA devices of this machine, counted from 0, "
            f"but got {name!r}."
        )
    return device


def local_device(device: torch.device) -> torch.device:
    """Returns the device of this process where ``device`` names only a kind: one GPU for each process of a machine."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    if device.index is not None:
        raise ValueError(
            f"Expected `device` without a number in a distributed run, but got {device}: each process takes the GPU "
            "of its own LOCAL_RANK. Pass --device cuda."
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
