"""How far a tensor is from what it should be, and how far it may be."""

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest `relative_error` of a kernel against its definition, by dtype."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`|actual - expected| / |expected|` in the Euclidean norm; infinite where something is not a number."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)
    return difference.item() if torch.isfinite(difference) else float("inf")


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """`max |actual - expected| / max |expected|`; infinite where something is not a number."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return difference.item() if torch.isfinite(difference) else float("inf")
