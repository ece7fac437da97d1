"""Statistics are over the pixels of all images, and standardise them."""

from __future__ import annotations

import torch

from excessmtl_ext.data.channel_statistics import channel_statistics, evenly_spaced


def test_statistics_are_those_of_all_pixels() -> None:
    images = [torch.rand(3, 4, 5), torch.rand(3, 8, 2) + 1]
    pixels = torch.cat([image.flatten(1) for image in images], dim=1)
    statistics = channel_statistics(images)
    torch.testing.assert_close(statistics.mean.flatten(), pixels.mean(1))
    torch.testing.assert_close(statistics.std.flatten(), pixels.std(1, correction=0))
    standardised = torch.cat([statistics.standardise(image).flatten(1) for image in images], dim=1)
    torch.testing.assert_close(standardised.mean(1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(standardised.std(1, correction=0), torch.ones(3))


def test_a_channel_of_one_value_is_not_blown_up() -> None:
    image = torch.full((3, 50, 50), 0.3)
    assert channel_statistics([image]).standardise(image).abs().max() < 1e-6


def test_evenly_spaced_indices_are_distinct_and_reach_over_all() -> None:
    assert evenly_spaced(5, 64) == [0, 1, 2, 3, 4]
    spaced = evenly_spaced(1_000, 64)
    assert len(set(spaced)) == 64
    assert spaced[0] == 0
    assert 1_000 - 1_000 // 64 - 1 <= spaced[-1] < 1_000
