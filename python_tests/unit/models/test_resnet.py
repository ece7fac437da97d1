"""ResNet-18 keeps torchvision's layers and gets one head per task."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torchvision import models as torchvision_models

from excessmtl_ext.models.resnet import resnet18_heads


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_each_task_has_its_own_images_and_a_linear_head() -> None:
    model = resnet18_heads([65, 3])
    outputs = model([torch.randn(2, 3, 32, 32), torch.randn(3, 3, 32, 32)])
    assert [tuple(output.shape) for output in outputs] == [(2, 65), (3, 3)]
    assert [type(head) for head in model.heads] == [torch.nn.Linear] * 2


def test_encoder_is_resnet18_without_its_classifier() -> None:
    encoder = resnet18_heads([2]).encoder
    expected = torchvision_models.resnet18()
    shapes = {name: tuple(each.shape) for name, each in expected.named_parameters()}
    del shapes["fc.weight"], shapes["fc.bias"]
    assert {name: tuple(each.shape) for name, each in encoder.named_parameters()} == shapes


def test_a_task_without_samples_passes_in_eval_mode() -> None:
    # What the last batches of an evaluation look like to a domain that has run out.
    model = resnet18_heads([4, 4]).eval()
    outputs = model([torch.randn(1, 3, 32, 32), torch.zeros(0, 3, 32, 32)])
    assert [tuple(output.shape) for output in outputs] == [(1, 4), (0, 4)]


def test_without_torchvision_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "\.\[train\]" in a clone'):
        resnet18_heads([2])


def test_pretrained_without_a_network_is_an_error_that_names_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(url: str, **options: object) -> None:
        assert url == torchvision_models.ResNet18_Weights.IMAGENET1K_V1.url
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(
        RuntimeError, match=r"resnet18-.*\.pth for `pretrained`, but got: Name or service not known"
    ):
        resnet18_heads([2], pretrained=True)


class RunsCode:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pretrained_file_in_the_cache_is_not_unpickled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    name = torchvision_models.ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    torch.save({"conv1.weight": RunsCode(tmp_path / "ran")}, tmp_path / "checkpoints" / name)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        resnet18_heads([2], pretrained=True)
    assert not (tmp_path / "ran").exists()
