"""What becomes of dropped tokens where they are not simply gone: a part of kept ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Merging(Protocol):
    """Dropped tokens into kept ones, of one head."""

    def merged(
        self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the kept tokens, (n, D) each.

        Args:
            keys, values: (T, D) float32, of all tokens.
            kept: (n,) positions, ascending, at least one.
        """
        ...


@dataclass(frozen=True)
class IntoNearest:
    """Into the kept token with the most similar key.

    Args:
        weighted: by similarity, and only what is more similar than dropped tokens are on average
            (D2O, arXiv:2406.13035); otherwise all, each as much as the kept one (the averaged
            merging of LOOK-M, arXiv:2406.18139).
    """

    weighted: bool = True

    def merged(
        self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dropped = torch.ones(len(keys), dtype=torch.bool, device=keys.device)
        dropped[kept] = False
        if not dropped.any():
            return keys[kept], values[kept]
        unit = torch.nn.functional.normalize(keys, dim=-1)
        similar, nearest = (unit[dropped] @ unit[kept].T).max(-1)
        if self.weighted:
            # A kept token is exactly like itself: e to the power of 1.
            own, weights = torch.e, similar.exp() * (similar >= similar.mean())
        else:
            own, weights = 1.0, torch.ones_like(similar)
        total = torch.full((len(kept),), own, device=keys.device).index_add(0, nearest, weights)

        def into(states: torch.Tensor) -> torch.Tensor:
            sums = (states[kept] * own).index_add(0, nearest, states[dropped] * weights[:, None])
            return sums / total[:, None]

        return into(keys), into(values)
