"""transformers' forward over a prompt of which some rows come from other prompts: a reference.

Nothing of it is KVStrata's or vLLM's: keys are turned by the model's own frequencies, and each
token that is read writes its row and sees all rows up to itself, whoever wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

Floats = npt.NDArray[np.float32]


class Moved(NamedTuple):
    """Rows of one prompt in another.

    Args:
        prompt: tokens of the one.
        was: position there of the first of them.
        position: here.
        length: how many.
    """

    prompt: list[int]
    was: int
    position: int
    length: int


class Rows:
    """A prompt's rows in all layers; as much of transformers' cache as a forward asks for."""

    is_compileable = False
    is_sliding: Sequence[bool] = ()

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.layers = torch.zeros(shape)  # (L, 2, H, T, D)
        self.places = torch.zeros(0, dtype=torch.int64)

    def get_seq_length(self, layer: int = 0) -> int:
        """None: masks come from outside."""
        return 0

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write the read tokens' rows; the whole of the layer comes back."""
        self.layers[layer][:, :, self.places] = torch.cat([keys, values])
        return self.layers[layer][:1], self.layers[layer][1:]


class Reference:
    """A model in float32.

    Args:
        folder: of the model.
        interleaved: whether neighbours in a head are turned together; else halves.
    """

    def __init__(self, folder: Path, interleaved: bool = False) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._interleaved = interleaved
        config = self._model.config
        self._shape = (config.num_hidden_layers, 2, config.num_key_value_heads)
        self._dim = config.head_dim

    def blended(self, ids: Sequence[int], moved: Sequence[Moved], room: int) -> Rows:
        """A prompt's rows: those from elsewhere, keys turned; the others are empty."""
        rows = Rows((*self._shape, len(ids) + room, self._dim))
        for prompt, was, position, length in moved:
            theirs = Rows((*self._shape, len(prompt), self._dim))
            self.read(theirs, prompt, range(len(prompt)))
            some = theirs.layers[:, :, :, was : was + length].clone()
            some[:, 0] = self._turned(some[:, 0], position - was)
            rows.layers[:, :, :, position : position + length] = some
        return rows

    def read(self, rows: Rows, ids: Sequence[int], positions: Sequence[int]) -> Any:
        """Have the model read the tokens at these positions; logits after each of them."""
        at = torch.tensor(list(positions))
        rows.places = at
        hidden = torch.arange(rows.layers.shape[3])[None] > at[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        with torch.inference_mode():
            return self._model(
                torch.tensor([[ids[position] for position in positions]]),
                past_key_values=rows,
                position_ids=at[None],
                attention_mask=mask[None, None],
            ).logits[0]

    def deviation(self, rows: Rows, ids: Sequence[int], positions: Sequence[int]) -> Floats:
        """Of each of these tokens, how far its row in the second layer is from the right one."""
        right = Rows(tuple(rows.layers.shape))
        self.read(right, ids, range(len(ids)))
        off = (right.layers[1] - rows.layers[1])[:, :, list(positions)].square()
        found: Floats = off.sum(dim=(0, 1, 3)).numpy()
        return found

    def answer(self, rows: Rows, ids: Sequence[int], first: int, count: int) -> list[Any]:
        """What is answered once the tokens from position ``first`` on are read.

        Returns:
            For each of the new tokens, the logarithms of all probabilities.
        """
        known, told = list(ids), []
        logits = self.read(rows, known, range(first, len(known)))[-1]
        for _ in range(count):
            told.append(logits.log_softmax(-1))
            known.append(int(logits.argmax()))
            logits = self.read(rows, known, [len(known) - 1])[-1]
        return told

    def _turned(self, keys: Any, shift: int) -> Any:
        """(..., D), by so many positions."""
        angles = shift * self._model.model.rotary_emb.inv_freq.double()
        width = 2 * len(angles)
        first = slice(0, width, 2) if self._interleaved else slice(0, width // 2)
        second = slice(1, width, 2) if self._interleaved else slice(width // 2, width)
        turned = keys.clone()
        one, two = keys[..., first].double(), keys[..., second].double()
        turned[..., first] = (one * angles.cos() - two * angles.sin()).float()
        turned[..., second] = (two * angles.cos() + one * angles.sin()).float()
        return turned
