"""A causal language model whose KV cache can be taken out, changed and put back.

It computes in float32 on KV rounded to bfloat16, which is what an engine stores. So two runs
differ by what a codec did and by nothing else: under bfloat16 arithmetic the rounding alone,
started by any difference at all, is a KL divergence of 0.001 per token.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstrata.codecs.elements import Floats
from kvstrata.errors import UsageError
from kvstrata.layout import Elements

DTYPE = "bfloat16"
"""Of the KV that is encoded."""

_FULL, _SLIDING = "full_attention", "sliding_attention"
_PIECE_TOKENS = 512  # of a prompt at a time: masks stay small, and sliding windows are used
_ROWS = 16  # of logits that are made probabilities at a time


class Model:
    """A model of transformers on one device.

    Args:
        folder: in the Hugging Face form; read from the disk alone, never from a network.
    Raises:
        UsageError: transformers is missing, or the folder holds no such model.
    """

    def __init__(self, folder: Path) -> None:
        self.torch: Any = _library("torch")
        transformers = _library("transformers")
        with _quiet(transformers):
            try:
                self._model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=self.torch.float32, local_files_only=True
                ).eval()
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True
                )
            except (OSError, ValueError, KeyError) as error:
                raise UsageError(f"{folder} holds no causal language model: {error}") from error
        self.device = "cuda" if self.torch.cuda.is_available() else "cpu"
        self._model.to(self.device)
        self._new_cache = transformers.DynamicCache
        config = self._model.config.get_text_config()
        self.max_tokens = int(config.max_position_embeddings)
        window = getattr(config, "sliding_window", None)
        self._window = int(window or self.max_tokens)
        types = list(getattr(config, "layer_types", None) or [])
        # Without types all layers are alike, and take one mask.
        self._masks_by_type = bool(types)
        self.layer_types: list[str] = (
            types or [_SLIDING if window else _FULL] * config.num_hidden_layers
        )

    @property
    def causal(self) -> Any:
        """The model of transformers."""
        return self._model

    @property
    def base(self) -> Any:
        """The model of transformers without its head."""
        return self._model.base_model

    def prefill(self, ids: Sequence[int]) -> Elements:
        """The KV of a prompt, layers with a sliding window in full length too.

        Returns:
            (L, 2, H, T, D), words of bfloat16. The KV of a prefix is the prefix of the KV.
        Raises:
            UsageError: the layers' KV differ in shape, or some have none.
        """
        pieces = []
        cache = self._new_cache()
        for start in range(0, len(ids), _PIECE_TOKENS):
            piece = ids[start : start + _PIECE_TOKENS]
            position = np.arange(start + len(piece))
            self.read(cache, piece, np.full(len(position), -1), position, start, [len(piece) - 1])
            pieces.append(self._take(cache, len(piece)))
        return np.concatenate(pieces, axis=3)

    def branches(self, kv: Elements, count: int, start: int | None = None) -> Branches:
        """``count`` continuations of one prefix, none of which sees another.

        Args:
            kv: (L, 2, H, T, D), words of bfloat16, as of `prefill`; slices along T are fine.
            start: position of the first token behind it; T where it is a whole prompt's. Another
                one for full attention alone.
        """
        return Branches(self, kv, count, kv.shape[3] if start is None else start)

    def read(
        self,
        cache: Any,
        ids: Sequence[int],
        branch: npt.NDArray[np.int64],
        position: npt.NDArray[np.int64],
        prefix: int,
        keep: Sequence[int] | npt.NDArray[np.int64],
        places: npt.NDArray[np.int64] | None = None,
    ) -> Any:
        """Let the model read tokens; the cache then holds them too.

        Args:
            cache: of transformers; its sliding layers hold of the prefix what they can see.
            ids: of the new tokens.
            branch, position: of every token that the cache then holds, in its order; of branch
                -1 are those that everyone sees.
            prefix: tokens before all branches, or before the new ones if there are no branches.
            keep: of which of the new tokens the predictions are wanted.
            places: of the new tokens in the cache; None: they are its last ones.
        Returns:
            Logits (len(keep), vocabulary), a tensor.
        """
        torch = self.torch
        new = np.arange(len(position))[-len(ids) :] if places is None else places
        with torch.inference_mode():
            return self._model(
                torch.tensor([list(ids)], device=self.device),
                past_key_values=cache,
                position_ids=torch.from_numpy(position[None, new]).to(self.device),
                attention_mask=self._masks(branch, position, new, self._hidden(prefix)),
                logits_to_keep=torch.as_tensor(np.asarray(keep, np.int64), device=self.device),
            ).logits[0]

    def _hidden(self, prefix: int) -> int:
        """Tokens of a prefix that a sliding layer no longer sees from behind it."""
        return max(0, prefix - self._window + 1)

    def _masks(
        self,
        branch: npt.NDArray[np.int64],
        position: npt.NDArray[np.int64],
        new: npt.NDArray[np.int64],
        hidden: int,
    ) -> Any:
        """What each new token may see: the prefix, and its own branch up to itself."""
        seen = (branch[None] == -1) | (branch[None] == branch[new, None])
        distance = position[new, None] - position[None]
        seen &= distance >= 0
        masks = {_FULL: lambda: seen, _SLIDING: lambda: seen & (distance < self._window)}
        kinds = set(self.layer_types)
        if kinds - set(masks):
            unknown = ", ".join(sorted(kinds - set(masks)))
            raise UsageError(f"cannot measure a model with layers of {unknown}")
        made = {
            kind: self._tensor(masks[kind]()[:, hidden if kind == _SLIDING else 0 :])
            for kind in kinds
        }
        return made if self._masks_by_type else made.popitem()[1]

    def _tensor(self, mask: npt.NDArray[np.bool_]) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(mask)[None, None]).to(self.device)

    def _take(self, cache: Any, tokens: int) -> Elements:
        """The KV of the last tokens, and out of the cache what no later token will see.

        Returns:
            (L, 2, H, tokens, D), words of bfloat16.
        """
        torch = self.torch
        with torch.inference_mode():
            states = [
                x[:, :, -tokens:] for layer in cache.layers for x in (layer.keys, layer.values)
            ]
            shapes = sorted({str(list(state.shape)) for state in states})
            if len(shapes) != 1 or len(cache.layers) != len(self.layer_types):
                raise UsageError(
                    f"{len(cache.layers)} of {len(self.layer_types)} layers have KV, of the "
                    f"shapes {', '.join(shapes)}; expected one shape for all"
                )
            kv = torch.cat(states).to(torch.bfloat16).view(torch.int16).cpu().numpy()
            for layer, kind in zip(cache.layers, self.layer_types, strict=True):
                if kind == _SLIDING:
                    layer.keys = layer.keys[:, :, 1 - self._window :]
                    layer.values = layer.values[:, :, 1 - self._window :]
        words: Elements = kv.view(np.uint16)
        return words.reshape(len(cache.layers), 2, *words.shape[1:])

    def _cache(self, kv: Elements) -> Any:
        cache = self._new_cache()
        for layer, states in enumerate(kv):
            if self.layer_types[layer] == _SLIDING:
                states = states[:, :, self._hidden(kv.shape[3]) :]
            ((keys, values),) = self.layers(states[None])
            cache.update(keys[None].float(), values[None].float(), layer)
        return cache

    def layers(self, kv: Elements) -> list[tuple[Any, Any]]:
        """Keys and values of each layer, tensors (H, T, D) of bfloat16 on the model's device.

        Args:
            kv: (L, 2, H, T, D), words of bfloat16.
        """
        # torch has no bfloat16 from numpy and no unsigned words; the bits are the same.
        words = self.torch.from_numpy(np.ascontiguousarray(kv).view(np.int16))
        return [(keys, values) for keys, values in words.view(self.torch.bfloat16).to(self.device)]


class Branches:
    """Continuations of one prefix, computed together: the tokens of a step lie side by side and a
    mask keeps them apart.

    Args:
        model: of which it is.
        kv: (L, 2, H, T, D), words of bfloat16.
        count: how many continuations.
        start: position of their first token.
    """

    def __init__(self, model: Model, kv: Elements, count: int, start: int) -> None:
        self._model = model
        self._cache = model._cache(kv)
        self._prefix = kv.shape[3]
        self._start = start
        self._lengths = [0] * count
        self._branch = np.full(self._prefix, -1)
        # Whatever else it was, the prefix lies before what follows.
        self._position = np.arange(self._prefix).clip(max=start - 1)

    def append(self, steps: Sequence[Sequence[int]], keep: Sequence[int]) -> list[Floats]:
        """Let every branch read some more tokens.

        Args:
            steps: token ids, for each branch; none for a branch that rests.
            keep: for each branch, of how many of its last tokens the predictions are wanted.
        Returns:
            For each branch (keep, vocabulary): natural logarithms of the probabilities of the
            token that follows.
        """
        for branch, step in enumerate(steps):
            start = self._start + self._lengths[branch]
            self._branch = np.append(self._branch, np.full(len(step), branch))
            self._position = np.append(self._position, np.arange(start, start + len(step)))
            self._lengths[branch] += len(step)
        ends = np.cumsum([len(step) for step in steps])
        kept = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, keep, strict=True)])
        ids = [token for step in steps for token in step]
        logits = self._model.read(
            self._cache, ids, self._branch, self._position, self._prefix, kept
        ).float()
        with self._model.torch.inference_mode():
            # In place, a few rows at a time: logits of 262,144 tokens are hundreds of megabytes.
            for rows in logits.split(_ROWS):
                rows -= rows.logsumexp(-1, keepdim=True)
            numbers: Floats = logits.cpu().numpy()
        return np.split(numbers, np.cumsum(keep)[:-1])


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"measuring quality needs {name}: pip install 'kvstrata[quality]'"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars of other libraries while a model is loaded."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
