import math

import numpy as np
import pytest
import torch

from ijepa.augmentation import YIQ, color_jitter, random_resized_crop


def test_crops_have_the_areas_aspects_and_places_asked_for():
    # The first channel of the images is the column, the second one is the row.
    line = torch.arange(32, dtype=torch.uint8)
    coordinates = torch.stack([line.expand(32, 32), line[:, None].expand(32, 32)])
    images = torch.cat([coordinates, coordinates[:1]]).expand(4000, -1, -1, -1)
    views = 255 * random_resized_crop(images, 0.25, torch.Generator().manual_seed(0)).double()
    columns, rows, _ = views.unbind(dim=1)
    width = (columns[:, 16, 20] - columns[:, 16, 12]).numpy() / 8 * 32
    height = (rows[:, 20, 16] - rows[:, 12, 16]).numpy() / 8 * 32
    x = (columns[:, 16, 15] + columns[:, 16, 16]).numpy() / 2
    y = (rows[:, 15, 16] + rows[:, 16, 16]).numpy() / 2
    flipped = width < 0
    assert abs(flipped.mean() - 0.5) < 0.04
    width = abs(width)
    area, aspect = width * height / 32**2, width / height
    assert area.min() == pytest.approx(0.25, abs=0.01)
    assert area.max() <= 1 + 1e-3
    assert np.median(area) == pytest.approx(0.625, abs=0.02)  # uniform, all but the widest
    # A box wider or higher than the image is cut to it, which brings its aspect nearer to 1.
    small = area < 0.7
    assert aspect[small].min() == pytest.approx(3 / 4, abs=0.02)
    assert aspect[small].max() == pytest.approx(4 / 3, abs=0.02)
    assert np.log(aspect[small]).mean() == pytest.approx(0, abs=0.02)
    for middle, extent in ((x, width), (y, height)):
        # Pixel centres are whole numbers, so that the image reaches from -0.5 to 31.5.
        assert (middle - extent / 2 > -0.5 - 0.02).all()
        assert (middle + extent / 2 < 31.5 + 0.02).all()
        free = extent < 28
        place = (middle - extent / 2 + 0.5)[free] / (32 - extent[free])
        assert np.histogram(place, 5, (0, 1))[0] / free.sum() == pytest.approx(0.2, abs=0.04)


def test_jitter_equals_a_loop_with_the_same_factors():
    rng = torch.Generator()
    view = torch.rand(10, 3, 32, 32, generator=rng.manual_seed(1))
    seen = color_jitter(view, 0.4, 0.3, rng.manual_seed(0)).numpy()
    draws = torch.rand(5, 10, generator=rng.manual_seed(0)).numpy().astype(float)
    to_yiq, greys = np.array(YIQ), 0
    for row in range(10):
        brightness, contrast, saturation = 1 + 0.4 * (2 * draws[:3, row] - 1)
        expected = view[row].numpy().astype(float) * brightness
        expected = expected.mean() + contrast * (expected - expected.mean())
        grey = expected.mean(axis=0)
        expected = grey + saturation * (expected - grey)
        angle = 2 * math.pi * 0.1 * (2 * draws[3, row] - 1)
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
        turn = np.linalg.inv(to_yiq) @ turn @ to_yiq
        expected = np.clip(np.einsum("ij,jhw->ihw", turn, expected), 0, 1)
        if draws[4, row] < 0.3:
            expected, greys = np.broadcast_to(expected.mean(axis=0), expected.shape), greys + 1
        np.testing.assert_allclose(seen[row], expected, atol=1e-5)
    assert 0 < greys < 10
