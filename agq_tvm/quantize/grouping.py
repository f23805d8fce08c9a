"""Channels in groups."""

import torch
from torch import Tensor


def to_groups(x: Tensor, group_size: int) -> Tensor:
    """Reshape [T, K] to [T, G, group_size], the last group padded with zeros."""
    missing = -x.shape[1] % group_size
    return torch.nn.functional.pad(x, (0, missing)).unflatten(1, (-1, group_size))
