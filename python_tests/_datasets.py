"""Small made-up data sets in the layouts of the public downloads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

OFFICE_HOME_CLASSES = ("Alarm_Clock", "Backpack", "Bed")
# Images of each class: 30, 60, 45 and 90 in a domain.
OFFICE_HOME_IMAGES = {"Art": 10, "Clipart": 20, "Product": 15, "Real World": 30}


def make_sarcos_rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(3.0, 5.0, size=(count, 28))


def write_sarcos(folder: Path, train: np.ndarray, test: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / "sarcos_inv.mat", {"sarcos_inv": train})
    savemat(folder / "sarcos_inv_test.mat", {"sarcos_inv_test": test})


def make_nyuv2_frame(number: int, height: int, width: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(number)
    normals = generator.normal(size=(height, width, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[0, 0] = 0
    depth = generator.uniform(0.5, 9, size=(height, width, 1))
    depth[1, 1] = 0
    return {
        "image": generator.uniform(0.2, 0.8, size=(height, width, 3)).astype(np.float32),
        "label": generator.integers(-1, 13, size=(height, width)).astype(np.float32),
        "depth": depth.astype(np.float32),
        "normal": normals.astype(np.float32),
    }


def write_nyuv2(root: Path, *, num_train: int, num_test: int, height: int, width: int) -> Path:
    for part, count, first in (("train", num_train, 0), ("val", num_test, 100)):
        for number in range(count):
            for kind, array in make_nyuv2_frame(first + number, height, width).items():
                folder = root / "nyuv2" / part / kind
                folder.mkdir(parents=True, exist_ok=True)
                np.save(folder / f"{number}.npy", array)
    return root


def office_home_colour(domain: str, class_name: str, number: int) -> tuple[int, int, int]:
    return (
        20 + 60 * list(OFFICE_HOME_IMAGES).index(domain),
        30 + 80 * OFFICE_HOME_CLASSES.index(class_name),
        8 * number,
    )


def write_office_home(root: Path) -> Path:
    for domain, count in OFFICE_HOME_IMAGES.items():
        for class_name in OFFICE_HOME_CLASSES:
            folder = root / domain / class_name
            folder.mkdir(parents=True)
            for number in range(count):
                colour = office_home_colour(domain, class_name, number)
                Image.new("RGB", (12, 9), colour).save(folder / f"{number:05}.jpg", quality=95)
    return root
