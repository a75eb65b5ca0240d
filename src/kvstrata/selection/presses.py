"""Methods of kvpress, run in a process of their own, in an environment of their own.

kvpress needs other versions of its libraries than engines do, and changes transformers when it is
imported. So a program (`press_process.py`) runs with the Python of that environment, which
``scripts/install-kvpress.sh`` makes: tokens go there and positions come back, as plain numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from kvstrata.errors import UsageError
from kvstrata.selection import press_process
from kvstrata.selection.evidence import Context
from kvstrata.selection.gathering import gathered
from kvstrata.selection.kept import Kept

PREFIX = "kvpress:"
ENVIRONMENT = Path(".venv-kvpress")
"""Where the command puts it, in the folder where it runs."""

HOW = "scripts/install-kvpress.sh makes an environment for kvpress"
_SHOWN = 500  # characters of what the program said last


class Presses:
    """Presses on one model; the program lives until `close`.

    Args:
        folder: of the model, in the Hugging Face form.
        environment: a virtual environment with kvpress.
    Raises:
        UsageError: there is no such environment, or it cannot load the model.
    """

    def __init__(self, folder: Path, environment: Path = ENVIRONMENT) -> None:
        python = environment / "bin" / "python"
        if not python.exists():
            raise UsageError(f"there is no {python}: {HOW}")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        # Without the caller's paths: no module of ours, or of our environment, is found there.
        self._process = subprocess.Popen(
            [python, "-I", press_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            self._tell({"model": str(folder)})
            self._hear()
        except BaseException:
            self.close()
            raise

    def positions(
        self, name: str, tokens: Sequence[int], fraction: float
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """What a press keeps of a context.

        Args:
            name: as kvpress has it, without Press; around another one: ``AdaKV(SnapKV)``.
            tokens: of the context.
            fraction: to keep, about.
        Returns:
            Counts (L, H) int64, and for each layer and head the positions, int64, ascending.
        Raises:
            UsageError: there is no such press, or it failed; the message says how.
        """
        ids = np.asarray(tokens, np.int32)
        self._tell({"press": name, "kept": fraction, "tokens": len(ids)}, ids.tobytes())
        said = self._hear()
        layers, heads, rows = (int(said[part]) for part in ("layers", "heads", "rows"))
        numbers = np.frombuffer(self._read(4 * (layers * heads + rows)), np.int32).astype(np.int64)
        counts = numbers[: layers * heads].reshape(layers, heads)
        if int(counts.sum()) != rows:
            raise UsageError(f"kvpress said {rows} rows and counted {counts.sum()}")
        of_heads = np.split(numbers[layers * heads :], np.cumsum(counts)[:-1])
        flat = [torch.from_numpy(one.copy()) for one in of_heads]
        return (
            torch.from_numpy(counts.copy()),
            [flat[heads * layer : heads * (layer + 1)] for layer in range(layers)],
        )

    def select(self, context: Context, name: str, fraction: float) -> Kept:
        """As `kvstrata.selection.select.select`; the rows are those of the context's own cache."""
        counts, positions = self.positions(name, context.tokens, fraction)
        if tuple(counts.shape) != (len(context.layers), context.heads):
            raise UsageError(f"kvpress has a model of {tuple(counts.shape)} layers and heads")
        return gathered(context, counts, positions)

    def close(self) -> None:
        """End the program."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                # It may have died with something unread, which closing would still send.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Presses:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _tell(self, words: dict[str, Any], numbers: bytes = b"") -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(words).encode() + b"\n" + numbers)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise UsageError(f"kvpress: {said['error']}")
        return said

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        numbers = self._process.stdout.read(size)
        if len(numbers) != size:
            raise self._ended()
        return numbers

    def _ended(self) -> UsageError:
        self._process.wait()
        self._said.seek(0)
        last = self._said.read()[-_SHOWN:].decode(errors="replace").strip()
        return UsageError(f"kvpress ended with {self._process.returncode}: {last}")
