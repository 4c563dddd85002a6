"""Bootstrap intervals of metrics that are ratios of sums over images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A value over a data set, with the interval that resampling its images gives."""

    value: float
    """NaN where there is nothing to average."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    n: int
    """What was averaged: objects, or images for metrics per image."""
    images: int
    """Images that were evaluated, those without objects included."""


def ratio_metric(numerators: np.ndarray, denominators: np.ndarray, *, samples: int = 1000, seed: int = 0) -> Metric:
    """Sum of numerators over sum of denominators, with a percentile bootstrap over images.

    Means over objects are such ratios (sum of IoUs over number of objects), and resampling whole images keeps the
    correlation of the objects in one image, which resampling objects would ignore.

    Args:
        numerators: (images,) finite.
        denominators: (images,) non-negative.
        samples: resamplings; our choice.
        seed: of the resampling, so that a report can be reproduced.
    """
    total, images = float(denominators.sum()), len(denominators)
    if total == 0:
        return Metric(value=float("nan"), low=float("nan"), high=float("nan"), n=0, images=images)
    rng = np.random.default_rng(seed)
    ratios = []
    for start in range(0, samples, 100):  # 100 rows of counts at once stay small for any number of images
        counts = rng.multinomial(images, np.full(images, 1 / images), size=min(100, samples - start))
        weights = counts @ denominators
        ratios.append((counts @ numerators)[weights > 0] / weights[weights > 0])
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Metric(
        value=float(numerators.sum() / total), low=float(low), high=float(high), n=round(total), images=images
    )
