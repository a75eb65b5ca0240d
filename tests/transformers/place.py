"""Where models of transformers and one node meet, in a folder of their own."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tests.engine.checked_node import CODE
from tests.engine.service import Serviced
from transformers import AutoModelForCausalLM

from kvstrata.connectors.transformers import Attached, attach
from kvstrata.testing.models import MODELS

CHUNK = 128
PATIENCE_S = 60.0


class Place(Serviced):
    """Models and their node, which looks at its own laws; leaving it ends them all.

    Args:
        settings: KVStrata's options, dotted.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self._attached: list[Attached] = []
        # On a busy machine seconds may pass before the node has its turn; that is no one's fault.
        # And a node that looks at a hit by chance would find what a test broke before a call does.
        defaults = {
            "host.capacity": "128MiB", "planner": "off", "deadlines.request": "20s",
            "host.verify_every": "0",
        }  # fmt: skip
        super().__init__(Path(), {**defaults, **(settings or {})}, CODE)

    @property
    def settings(self) -> dict[str, Any]:
        """KVStrata's options, dotted."""
        return dict(self._settings)

    def use_disk(self) -> None:
        """A disk tier in this folder, for the next node that is started."""
        self._settings["disk.path"] = str(self.folder / "disk")
        self._settings["disk.capacity"] = "1GiB"
        self._settings["disk.codec"] = "lossless"

    def attach(self, model: Any, **more: Any) -> Attached:
        """Attach a model to the node here."""
        attached = attach(model, **{**self._settings, **more})
        self._attached.append(attached)
        return attached

    def detach(self) -> None:
        """Detach all of them."""
        while self._attached:
            self._attached.pop().detach()
        gc.collect()

    def stop_still(self) -> None:
        """Have the node do nothing, as one that hangs."""
        assert self._service is not None
        self._service.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it go on."""
        assert self._service is not None
        self._service.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """End every process here and wait for that; the folder stays."""
        self.detach()
        super().end()

    def check(self) -> None:
        """Nothing is held any more, and no bug was hit."""

        def quiet() -> bool:
            held = self.node.status()["leases"]
            return not any(held[name] for name in ("count", "reservations", "bytes"))

        eventually(quiet, "all leases and reservations returned")
        counters = self.node.status()["counters"]
        assert not {name for name in counters if name.startswith("bugs_")}


def load(name: str, dtype: str = "float32", **more: Any) -> Any:
    """A test model, by its name in `MODELS`; other ones are equal to it."""
    folder = MODELS[name]()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **more).eval()


def greedy(model: Any, tokens: Sequence[int], count: int, **more: Any) -> list[int]:
    """Prompt and answer: so many tokens, whatever they are."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **more}
    given = () if "input_ids" in more else (torch.tensor([list(tokens)]),)
    found = model.generate(*given, max_new_tokens=count, **options)
    answer: list[int] = found[0].tolist()
    return answer


def whole(count: int) -> int:
    """How many of so many tokens whole chunks hold."""
    return count // CHUNK * CHUNK


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as it holds; fail when it does not for this long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
