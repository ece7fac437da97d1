"""Every workload trains by name: its loader, network, losses and metrics fit together."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from _datasets import (
    make_sarcos_rows,
    write_diamonds,
    write_human_ratings,
    write_movielens,
    write_nyuv2,
    write_office_home,
    write_qm9,
    write_sarcos,
)

from excessmtl_ext.training import TrainConfig, train
from excessmtl_ext.training.run.metrics import HIGHER_IS_BETTER
from excessmtl_ext.training.run.workloads import WORKLOADS, find_workload


def _sarcos(root: Path) -> Path:
    write_sarcos(root, make_sarcos_rows(200, 0), make_sarcos_rows(40, 1))
    return root


def _nyuv2(root: Path) -> Path:
    return write_nyuv2(root, num_train=10, num_test=2, height=16, width=32)


def _config(dataset: str, data_root: Path, **values: object) -> TrainConfig:
    workload = WORKLOADS[dataset]
    return TrainConfig(
        **{
            "dataset": dataset,
            "method": "excessmtl-recommended",
            "epochs": 1,
            "batch_size": workload.batch_size,
            "lr": workload.lr,
            "weight_decay": workload.weight_decay,
            "noise": 0.8,
            "data_root": str(data_root),
            **values,
        }  # type: ignore[arg-type]
    )


# Warnings of the libraries about made-up data would be errors; there are none.
@pytest.mark.parametrize(
    ("dataset", "write", "options", "num_tasks", "noisy"),
    [
        ("sarcos", _sarcos, {}, 7, ["torque_1", "torque_2"]),
        ("nyuv2", _nyuv2, {"network_width": 4}, 3, ["segmentation"]),
        ("office-home", write_office_home, {"image_size": 32}, 4, ["product"]),
        ("diamonds", write_diamonds, {"noise_kind": "pair_flip"}, 4, ["cut"]),
        ("movielens", write_movielens, {}, 4, ["rating"]),
        ("qm9", write_qm9, {}, 11, ["homo", "r2"]),
        ("human-ratings", write_human_ratings, {"noise": 0.0}, 4, ["editorials"]),
    ],
)
def test_a_data_set_trains_and_reports_every_metric(
    tmp_path: Path,
    dataset: str,
    write: Callable[[Path], Path],
    options: dict[str, object],
    num_tasks: int,
    noisy: list[str],
) -> None:
    config = _config(dataset, write(tmp_path / "data"), **options)
    result = train(config, tmp_path / "run")
    assert result["noisy_tasks"] == noisy
    assert len(result["final_task_weights"]) == num_tasks
    assert sum(result["final_task_weights"].values()) == pytest.approx(1.0)
    final = result["final"]
    assert all(math.isfinite(value) for value in final.values())
    for task in result["tasks"]:
        measured = {
            name.removeprefix(f"test/{task['name']}_")
            for name in final
            if name.startswith(f"test/{task['name']}_")
        }
        assert "score" in measured
        assert measured & HIGHER_IS_BETTER.keys()


@pytest.mark.skipif("EXCESSMTL_DATA" not in os.environ, reason="EXCESSMTL_DATA names no real data")
@pytest.mark.slow
def test_segnet_overfits_real_frames(tmp_path: Path) -> None:
    config = _config(
        "nyuv2",
        Path(os.environ["EXCESSMTL_DATA"]),
        method="uniform",
        noise=0.0,
        epochs=45,
        batch_size=2,
        num_train=4,
        lr=1e-3,
        image_size=48,
        network_width=8,
    )
    train(config, tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    first, last = (
        dict(zip(names, map(float, row.split(",")), strict=True)) for row in (rows[1], rows[-1])
    )
    for task in ("segmentation", "depth", "normals"):
        assert last[f"train/{task}_loss"] < 0.8 * first[f"train/{task}_loss"]


@pytest.mark.skipif("EXCESSMTL_DATA" not in os.environ, reason="EXCESSMTL_DATA names no real data")
def test_real_sarcos_is_learned_in_three_epochs(tmp_path: Path) -> None:
    config = _config("sarcos", Path(os.environ["EXCESSMTL_DATA"]), noise=0.0, epochs=3)
    final = train(config, tmp_path / "run")["final"]
    # The mean of the targets has 1.
    assert max(final[f"test/torque_{joint}_nmse"] for joint in range(1, 8)) < 0.3


def test_an_unknown_data_set_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Expected `dataset` to be one of multimnist, .*'cifar'"):
        find_workload("cifar")


def test_human_ratings_take_a_dose_of_raters_and_no_injected_noise(tmp_path: Path) -> None:
    root = write_human_ratings(tmp_path / "data")
    workload = WORKLOADS["human-ratings"]
    one, everyone = (
        workload.load(_config("human-ratings", root, noise=0.0, raters=raters)) for raters in (1, 0)
    )
    assert one.noise_shares["tweets"] > everyone.noise_shares["tweets"]
    with pytest.raises(ValueError, match=r"Expected `noise` of 0 .* Choose the dose by `raters`"):
        workload.load(_config("human-ratings", root, noise=0.5))


@pytest.mark.parametrize("dataset", [name for name, w in WORKLOADS.items() if w.needs_data_root])
def test_a_missing_data_root_is_an_error(tmp_path: Path, dataset: str) -> None:
    workload = WORKLOADS[dataset]
    config = TrainConfig(dataset=dataset, method="uniform", epochs=1, batch_size=4, lr=workload.lr)
    with pytest.raises(ValueError, match="Expected `data_root` to name the folder"):
        train(config, tmp_path / "run")
