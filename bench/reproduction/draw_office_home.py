"""Draws a made-up Office-Home: four domains, 65 classes, small JPEGs, for the runs named smoke and overfit.

    python bench/reproduction/draw_office_home.py DATA --images 8

Office-Home itself may not be passed on, so what these runs show is that the loader, ResNet-18, the balancers and the
metrics work together at the real number of classes; their accuracies say nothing about the real images. A class is a
star of so many points, so sharp and of such a colour; a domain is a way to draw it.
"""

from __future__ import annotations

import argparse
import colorsys
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

DOMAINS = ("Art", "Clipart", "Product", "Real World")
NUM_CLASSES = 65
NUM_HUES = 13


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description="Draws a made-up Office-Home for the runs named smoke and overfit."
    )
    parser.add_argument("output", type=Path, help="Folder for OfficeHome/DOMAIN/CLASS/*.jpg.")
    parser.add_argument("--images", type=int, default=8, help="Of each class in each domain.")
    parser.add_argument("--size", type=int, default=64, help="Width and height in pixels.")
    arguments = parser.parse_args()
    for domain in DOMAINS:
        for label in range(NUM_CLASSES):
            folder = arguments.output / "OfficeHome" / domain / f"Class_{label:02}"
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(arguments.images):
                image = draw_image(domain, label, number, arguments.size)
                image.save(folder / f"{number:05}.jpg", quality=92)


def draw_image(domain: str, label: int, number: int, size: int) -> Image.Image:
    """Returns one image; place, size and angle of the star vary with ``number``."""
    style = DOMAINS.index(domain)
    generator = np.random.default_rng((style, label, number))
    points, hue = divmod(label, NUM_HUES)
    colour = colorsys.hsv_to_rgb(hue / NUM_HUES, 0.9, 0.9)
    fill = tuple(round(255 * channel) for channel in colour)
    image = Image.fromarray(_background(style, size, generator))
    radius = size * generator.uniform(0.28, 0.42)
    centre = size * generator.uniform(0.4, 0.6, size=2)
    ImageDraw.Draw(image).polygon(
        _star(points + 3, radius, centre, angle=generator.uniform(0, 2 * math.pi)),
        fill=fill,
        outline=(0, 0, 0) if domain in ("Art", "Clipart") else fill,
    )
    return image


def _star(
    points: int, radius: float, centre: np.ndarray, angle: float
) -> list[tuple[float, float]]:
    corners = []
    for corner in range(2 * points):
        reach = radius if corner % 2 == 0 else 0.45 * radius
        turn = angle + math.pi * corner / points
        corners.append((centre[0] + reach * math.cos(turn), centre[1] + reach * math.sin(turn)))
    return corners


def _background(style: int, size: int, generator: np.random.Generator) -> np.ndarray:
    """Paper with strokes, white, a light gradient, and noise."""
    rows = np.linspace(0, 1, size)[:, None, None]
    if style == 0:
        strokes = generator.normal(200, 25, size=(size, 1, 3))
        pixels = np.broadcast_to(strokes, (size, size, 3))
    elif style == 1:
        pixels = np.full((size, size, 3), 255.0)
    elif style == 2:
        pixels = np.broadcast_to(255 - 40 * rows, (size, size, 3))
    else:
        pixels = generator.normal(110 + 50 * rows, 40, size=(size, size, 3))
    return pixels.clip(0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
