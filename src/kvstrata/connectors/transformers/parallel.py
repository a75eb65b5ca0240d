"""Documents that share their positions: each is computed alone, once, for any order of them.

None has seen another, so attention to them is too flat and too strong; a temperature and a scale
bring it near to what it would be in one long prompt.

Source: APE, arXiv:2502.05431.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvstrata.connectors.transformers.attention import scores_changed
from kvstrata.connectors.transformers.kinds import new_cache
from kvstrata.errors import UsageError


@dataclass(frozen=True)
class Encoded:
    """Documents beside each other behind one head.

    Args:
        ids: tokens of the head and of all documents.
        layers: of each, keys and values (1, H, len(ids), D).
        head: tokens of the head.
        start: position of what follows: behind the longest document.
    """

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    head: int
    start: int

    def cache(self) -> DynamicCache:
        """A cache for one ``generate``, or one forward; it takes no memory that is shared."""
        return DynamicCache([(keys.clone(), values.clone()) for keys, values in self.layers])

    def positions(self, num_tokens: int) -> torch.Tensor:
        """Of ``ids`` and of so many tokens behind them: ``position_ids``, (1, T)."""
        follow = torch.arange(self.start, self.start + num_tokens)
        # Where a document's own tokens stood is in their keys; nobody asks for it again.
        return torch.cat([torch.arange(len(self.ids)).clamp(max=self.start - 1), follow])[None]


@torch.no_grad()
def encode_apart(model: Any, head: Sequence[int], documents: Sequence[Sequence[int]]) -> Encoded:
    """Compute documents, each behind the head and none behind another.

    Args:
        model: of transformers, whose layers are all of full attention.
        head: tokens that each document is computed behind, such as a system prompt; one at least,
            or each document would draw attention to its own first token.
        documents: tokens of each.
    Raises:
        UsageError: there is no head or no document.
    """
    if not head or not documents or not all(documents):
        raise UsageError("documents are encoded apart behind a head, and have tokens")
    parts: list[list[torch.Tensor]] = []
    for number, document in enumerate(documents):
        cache = new_cache(model)
        ids = torch.tensor([[*head, *document]], device=model.device)
        model.base_model(ids, past_key_values=cache, use_cache=True)
        begin = len(head) if number else 0
        parts.append(
            [x[:, :, begin:] for layer in cache.layers for x in (layer.keys, layer.values)]
        )
    whole = [torch.cat(states, dim=2) for states in zip(*parts, strict=True)]
    return Encoded(
        [*head, *(token for document in documents for token in document)],
        list(zip(whole[::2], whole[1::2], strict=True)),
        len(head),
        len(head) + max(map(len, documents)),
    )


@contextmanager
def adapted(model: Any, context: range, temperature: float, scale: float) -> Iterator[None]:
    """Within it, the model attends to the documents by another temperature and scale.

    Weights within the documents are those of scores over ``temperature``; the logarithm of their
    sum, by which the documents compete with the rest of the prompt, is multiplied by ``scale``.

    Args:
        model: of transformers.
        context: where the documents are in the cache.
        temperature: below 1 attention is sharper; 1 leaves it.
        scale: below 1 the documents weigh less; 1 leaves them.
    Raises:
        UsageError: a number is not above 0.
        Incompatible: as `kvstrata.connectors.transformers.attention.scores_changed`.
    """
    if not (temperature > 0 and scale > 0):
        raise UsageError(f"temperature {temperature:g}, scale {scale:g}: expected above 0")

    def change(_: int, scores: torch.Tensor) -> torch.Tensor:
        inside = scores[..., context.start : context.stop] / temperature
        total = inside.logsumexp(dim=-1, keepdim=True)
        # A row that sees nothing of the documents has no sum to scale.
        shift = torch.where(total.isfinite(), (scale - 1) * total, torch.zeros_like(total))
        return torch.cat(
            [scores[..., : context.start], inside + shift, scores[..., context.stop :]], dim=-1
        )

    with scores_changed(model, change):
        yield
