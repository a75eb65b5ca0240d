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


class Model:
    """A model of transformers on one device.

    Args:
        folder: in the Hugging Face form; read from the disk alone, never from a network.
    Raises:
        UsageError: transformers is missing, or the folder holds no such model.
    """

    def __init__(self, folder: Path) -> None:
        self._torch = _library("torch")
        transformers = _library("transformers")
        with _quiet(transformers):
            try:
                self._model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=self._torch.float32, local_files_only=True
                ).eval()
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                    folder, local_files_only=True
                )
            except (OSError, ValueError, KeyError) as error:
                raise UsageError(f"{folder} holds no causal language model: {error}") from error
        self.device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self._model.to(self.device)
        self._new_cache = transformers.DynamicCache
        config = self._model.config.get_text_config()
        self._layer_types: list[str] = list(getattr(config, "layer_types", None) or [])
        self._window = int(getattr(config, "sliding_window", None) or 0)
        self.max_tokens = int(config.max_position_embeddings)

    def prefill(self, ids: Sequence[int]) -> Elements:
        """The KV of a prompt, layers with a sliding window in full length too.

        Returns:
            (L, 2, H, T, D), words of bfloat16. The KV of a prefix is the prefix of the KV.
        Raises:
            UsageError: the layers' KV differ in shape, or some have none.
        """
        torch = self._torch
        # A cache that is not told of the model's windows keeps every token; the masks see to them.
        cache = self._new_cache()
        with torch.inference_mode():
            prompt = torch.tensor([list(ids)], device=self.device)
            self._model(prompt, past_key_values=cache, logits_to_keep=1)
            states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
            if len({tuple(state.shape) for state in states}) != 1 or len(cache.layers) == 0:
                shapes = sorted({str(list(state.shape)) for state in states})
                raise UsageError(f"the layers' KV have several shapes: {', '.join(shapes)}")
            kv = torch.cat(states).to(torch.bfloat16).view(torch.int16).cpu().numpy()
        words: Elements = kv.view(np.uint16)
        return words.reshape(len(cache.layers), 2, *words.shape[1:])

    def branches(self, kv: Elements, count: int) -> Branches:
        """``count`` continuations of one prefix, none of which sees another.

        Args:
            kv: (L, 2, H, T, D), words of bfloat16, as of `prefill`; slices along T are fine.
        """
        return Branches(self, kv, count)

    def _cache(self, kv: Elements) -> Any:
        cache = self._new_cache()
        for layer, states in enumerate(kv):
            # torch has no bfloat16 from numpy and no unsigned words; the bits are the same.
            words = self._torch.from_numpy(np.ascontiguousarray(states).view(np.int16))
            keys, values = words.view(self._torch.bfloat16).to(self.device, self._torch.float32)
            cache.update(keys[None], values[None], layer)
        return cache


class Branches:
    """Continuations of one prefix, computed together: the tokens of a step lie side by side and a
    mask keeps them apart.

    Args:
        model: of which it is.
        kv: (L, 2, H, T, D), words of bfloat16.
        count: how many continuations.
    """

    def __init__(self, model: Model, kv: Elements, count: int) -> None:
        self._model = model
        self._cache = model._cache(kv)
        self._prefix = kv.shape[3]
        self._lengths = [0] * count
        self._branch = np.empty(0, np.int64)
        self._position = np.empty(0, np.int64)

    def append(self, steps: Sequence[Sequence[int]], keep: Sequence[int]) -> list[Floats]:
        """Let every branch read some more tokens.

        Args:
            steps: token ids, for each branch; none for a branch that rests.
            keep: for each branch, of how many of its last tokens the predictions are wanted.
        Returns:
            For each branch (keep, vocabulary): natural logarithms of the probabilities of the
            token that follows.
        """
        torch, model = self._model._torch, self._model
        before = len(self._branch)
        for branch, step in enumerate(steps):
            start = self._prefix + self._lengths[branch]
            self._branch = np.append(self._branch, np.full(len(step), branch))
            self._position = np.append(self._position, np.arange(start, start + len(step)))
            self._lengths[branch] += len(step)
        ends = before + np.cumsum([len(step) for step in steps])
        kept = [np.arange(end - n, end) for end, n in zip(ends, keep, strict=True)]
        with torch.inference_mode():
            ids = [token for step in steps for token in step]
            logits = model._model(
                torch.tensor([ids], device=model.device),
                past_key_values=self._cache,
                position_ids=torch.from_numpy(self._position[None, before:]).to(model.device),
                attention_mask=self._masks(before),
                logits_to_keep=torch.from_numpy(np.concatenate(kept) - before).to(model.device),
            ).logits[0]
            numbers: Floats = torch.log_softmax(logits.float(), -1).cpu().numpy()
        return np.split(numbers, np.cumsum(keep)[:-1])

    def _masks(self, before: int) -> Any:
        """What each new token may see: the prefix, and its own branch up to itself."""
        branch = np.append(np.full(self._prefix, -1), self._branch)
        position = np.append(np.arange(self._prefix), self._position)
        new = slice(self._prefix + before, None)
        seen = (branch[None] == -1) | (branch[None] == branch[new, None])
        distance = position[new, None] - position[None]
        full = seen & (distance >= 0)
        if not self._model._layer_types:
            return self._tensor(full)
        sliding = self._tensor(full & (distance < (self._model._window or len(position))))
        masks = {"full_attention": self._tensor(full), "sliding_attention": sliding}
        unknown = set(self._model._layer_types) - set(masks)
        if unknown:
            raise UsageError(f"cannot measure a model with layers of {', '.join(sorted(unknown))}")
        return masks

    def _tensor(self, mask: npt.NDArray[np.bool_]) -> Any:
        return self._model._torch.from_numpy(mask[None, None]).to(self._model.device)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"measuring quality needs {name}: pip install 'kvstrata[transformers]'"
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
