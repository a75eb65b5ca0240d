"""The other end of `kvstrata.selection.presses`: a program of its own, in kvpress's environment.

It imports nothing of KVStrata. On its standard input come a line of JSON with the model's folder,
then for each selection a line of JSON and the tokens as native int32; on its standard output go a
line of JSON, and counts and positions in the same form. What libraries print goes to the standard
error.
"""

from __future__ import annotations

import array
import json
import os
import re
import sys
from typing import Any, BinaryIO

_NAME = re.compile(r"([A-Za-z0-9]+)(?:\(([A-Za-z0-9]+)\))?")


def main() -> None:
    """Answer until the standard input ends."""
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
    try:
        import torch  # noqa: F401  (before kvpress, which patches transformers)

        worker = _Worker(json.loads(questions.readline())["model"])
    except Exception as error:
        _say(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _say(answers, {"ready": True})
    while line := questions.readline():
        asked = json.loads(line)
        tokens = array.array("i", questions.read(4 * asked["tokens"])).tolist()
        try:
            numbers, shape = worker.select(asked["press"], asked["kept"], tokens)
        except Exception as error:
            _say(answers, {"error": f"{type(error).__name__}: {error}"})
            continue
        _say(answers, shape)
        answers.write(array.array("i", numbers).tobytes())
        answers.flush()


def _say(answers: BinaryIO, words: dict[str, Any]) -> None:
    answers.write(json.dumps(words).encode() + b"\n")
    answers.flush()


class _Worker:
    """A model, and the exact cache of the tokens that were asked of last."""

    def __init__(self, folder: str) -> None:
        import kvpress
        import torch
        from transformers import AutoModelForCausalLM

        self._presses, self._torch = kvpress, torch
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        self._tokens: list[int] = []
        self._exact: Any = None

    def select(self, name: str, kept: float, tokens: list[int]) -> tuple[list[int], dict[str, int]]:
        """Counts and positions, in one list, and how many of each.

        Raises:
            ValueError: there is no such press, or what it leaves are no tokens of the context.
        """
        press = self._press(name, 1 - kept)
        if tokens != self._tokens:
            self._exact, self._tokens = self._read(tokens, None), tokens
        cache = self._read(tokens, press)
        counts: list[int] = []
        positions: list[int] = []
        for number, layer in enumerate(self._model.model.layers):
            masked = getattr(layer.self_attn, "masked_key_indices", None)
            layer.self_attn.masked_key_indices = None
            for of_head in self._kept(cache, number, masked):
                counts.append(len(of_head))
                positions += of_head
        layers = len(self._model.model.layers)
        return counts + positions, {
            "layers": layers,
            "heads": len(counts) // layers,
            "rows": len(positions),
        }

    def _press(self, name: str, ratio: float) -> Any:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is no press: Name, or Name(Name) for one around another")
        parts = [f"{part}Press" for part in match.groups() if part]
        if not all(hasattr(self._presses, part) for part in parts):
            raise ValueError(f"kvpress has no press {name!r}")
        press = getattr(self._presses, parts[-1])(compression_ratio=ratio)
        return getattr(self._presses, parts[0])(press=press) if len(parts) == 2 else press

    def _read(self, tokens: list[int], press: Any) -> Any:
        from contextlib import nullcontext

        from transformers import DynamicCache

        cache = DynamicCache()
        with self._torch.no_grad(), press(self._model) if press else nullcontext():
            self._model.model(
                input_ids=self._torch.tensor([tokens]),
                past_key_values=cache,
                cache_position=self._torch.arange(len(tokens)),
            )
        return cache

    def _kept(self, cache: Any, number: int, masked: Any) -> list[list[int]]:
        """For each head the positions that are left, ascending."""
        layer, exact = cache.layers[number], self._exact.layers[number]
        dropped: list[set[int]] = [set() for _ in range(exact.keys.shape[1])]
        if masked is not None:
            # Presses with budgets of their heads' own only say what attention shall not see.
            for head, position in zip(masked[1].tolist(), masked[2].tolist(), strict=True):
                dropped[head].add(position)
        found = []
        for head, gone in enumerate(dropped):
            # A press says not which rows it took; a row of a key and a value is the exact one's.
            places = {row.tobytes(): place for place, row in enumerate(_rows(exact, head))}
            try:
                kept = {places[row.tobytes()] for row in _rows(layer, head)}
            except KeyError:
                raise ValueError(
                    f"layer {number} has rows that no token of the context had"
                ) from None
            found.append(sorted(kept - gone))
        return found


def _rows(layer: Any, head: int) -> Any:
    """(n, 2 * D) of one head: keys beside values."""
    import torch

    return torch.cat([layer.keys[0, head], layer.values[0, head]], dim=-1).numpy()


if __name__ == "__main__":
    main()
