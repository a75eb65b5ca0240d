"""A real vLLM that tests drive step by step, and plain vLLM's answers to compare with.

bfloat16 rounds differently when a batch is cut differently. So a cold answer is compared with plain
vLLM's cold one, and a warm answer with what plain vLLM answers upon a hit in its own prefix cache:
both then compute the same tail, and every token must be the same.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstrata.objects import object_id
from kvstrata.testing import engine as base
from kvstrata.testing import models
from kvstrata.wire.client import NodeClient

CHUNK = 128
NEW_TOKENS = 32
PATIENCE_S = 60.0

# Every engine computes on one core, the next one on the next.
_CORES = itertools.cycle(sorted(os.sched_getaffinity(0)))

# Shorter than a chunk, one token around its ends, and up to twelve chunks; no whole multiples,
# whose hit vLLM cuts otherwise than we do.
LENGTHS = (
    40, 90, 127, 129, 130, 140, 160, 191, 200, 230, 254, 255, 257, 270, 300, 310, 330, 345, 383,
    385, 400, 420, 450, 500, 511, 513, 560, 600, 641, 700, 769, 900, 1100, 1500,
)  # fmt: skip

Prompt = list[int]


class Answer(NamedTuple):
    """What one prompt got: the new tokens, and how many of the prompt's were not computed."""

    tokens: list[int]
    cached: int


def request(prompt: Sequence[int], max_tokens: int = NEW_TOKENS, **more: Any) -> dict[str, Any]:
    """One request as `Engine.ask` takes it; ``more``: ``salt``, ``lora``, ``embeds``."""
    return {"prompt": list(prompt), "max_tokens": max_tokens, **more}


def whole_chunks(num_tokens: int) -> int:
    """Tokens of the whole chunks of a prompt."""
    return num_tokens // CHUNK * CHUNK


class Engine(base.Engine):
    """vLLM in a child process that runs `tests/engine/serve_child.py`."""

    def __init__(
        self, model: Path, log: Path, environment: Mapping[str, str], options: Mapping[str, Any]
    ) -> None:
        self._log = log
        ours, theirs = socket.socketpair()
        child = Path(__file__).with_name("serve_child.py")
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(child), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                env=_environment(environment),
            )
        self._socket = ours
        self._pipe = ours.makefile("rw")
        self._about: dict[str, Any] | None = None
        self._say({"model": str(model), **base.ENGINE_OPTIONS, **options})

    @property
    def log(self) -> str:
        """Everything the child printed so far."""
        return self._log.read_text(errors="replace")

    def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """What the child's method of this name returns."""
        return self._call(verb=verb, **arguments)

    def answers(
        self, requests: Sequence[Mapping[str, Any] | Prompt], in_turn: bool = True
    ) -> list[Answer]:
        """Answer requests, each alone in its batch, or all at once."""
        asked = [request(item) if isinstance(item, list) else dict(item) for item in requests]
        reply = self.call("ask", requests=asked, in_turn=in_turn)
        return [Answer(answer["tokens"], answer["cached"]) for answer in reply["answers"]]

    def answer(self, prompt: Sequence[int], max_tokens: int = NEW_TOKENS, **more: Any) -> Answer:
        """Answer one request."""
        return self.answers([request(prompt, max_tokens, **more)])[0]

    def forget(self, connector: bool = False) -> int:
        """Make vLLM forget its own prefixes; how often it refused, blocks not being free yet."""
        refused: int = self.call("reset", connector=connector)["refused"]
        return refused

    def free_blocks(self) -> tuple[int, int]:
        """Free blocks, and all blocks."""
        reply = self.call("blocks")
        return reply["free"], reply["all"]

    def keys(self, tokens: Sequence[int], salt: str = "") -> list[bytes]:
        """Chunk keys as the connector in this engine makes them."""
        return [bytes.fromhex(key) for key in
                self.call("keys", tokens=list(tokens), salt=salt)["keys"]]  # fmt: skip

    def kv(self, tokens: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Bytes of the full blocks that vLLM holds of these tokens: (layers, blocks, page)."""
        path = self._log.with_suffix(".kv")
        about = self.call("kv", tokens=list(tokens), path=str(path))
        data = np.frombuffer(path.read_bytes(), np.uint8)
        path.unlink()
        return data.reshape(about["layers"], about["blocks"], -1)


class Place(base.Workplace):
    """Engines of one node, in a folder of their own; leaving it ends them all."""

    def __init__(
        self, model: Path, settings: Mapping[str, Any] | None = None, service: bool = False
    ) -> None:
        # On a busy machine 250 ms may pass before the node has its turn; that is no one's fault.
        defaults = {"host.capacity": "1GiB", "deadlines.request": "5s"}
        super().__init__(model, {**defaults, **(settings or {})}, service)
        self._node: NodeClient | None = None
        # A node that was stopped may hear of a lease's end before a worker's question about it,
        # which came on another connection, and refuses that.
        self.was_stopped = False

    def engine(  # type: ignore[override]
        self,
        with_kvstrata: bool = True,
        environment: Mapping[str, str] | None = None,
        model: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Engine:
        """Begin to start an engine; the first one with KVStrata starts the node."""
        if with_kvstrata:
            options["kv_transfer_config"] = {
                **base.CONNECTOR,
                "kv_connector_extra_config": {**self._settings, **(settings or {})},
            }
        log = self.folder / f"engine-{len(self._engines)}-{os.urandom(2).hex()}.log"
        around = {"XDG_RUNTIME_DIR": str(self.folder), **(environment or {})}
        engine = Engine(model or self._model, log, around, options)
        self._engines.append(engine)
        return engine

    def end(self) -> None:
        """End every process here and wait for that; the folder stays."""
        self._node = None
        super().end()

    def set(self, option: str, value: str) -> None:
        """One more of KVStrata's options, for what is started from now on."""
        self._settings[option] = value

    def use_disk(self) -> None:
        """A disk tier in this folder, for what is started from now on."""
        self.set("disk.path", str(self.folder / "disk"))
        self.set("disk.capacity", "4GiB")
        self.set("disk.write_queue", "1GiB")
        self.set("disk.codec", "lossless")  # not one token may change
        # A scrub would find what a test broke before a request does.
        self.set("disk.scrub_rate", "0")

    def file(self, key: bytes, rank: int = 0) -> Path:
        """The disk tier's file of one object."""
        name = object_id(key, 0, rank).hex()
        (path,) = (self.folder / "disk" / "objects").rglob(f"{name}-*.kvo")
        return path

    @property
    def node(self) -> NodeClient:
        """The test's own client of the node."""
        if self._node is None or not self._node.alive:
            self._node = self.client()
        return self._node

    def count(self, name: str) -> float:
        """A counter of the node; all of them whose name begins so, summed."""
        counters = self.node.status()["counters"]
        return float(sum(value for key, value in counters.items() if key.startswith(name)))

    def last_record(self, engine_tokens: int) -> dict[str, Any]:
        """The record of the request that ended last, once it is one of so many tokens."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = self.node.status()["requests"][-1:]
            return bool(found) and found[0]["tokens"] == engine_tokens

        eventually(there, f"the record of a request of {engine_tokens} tokens")
        return found[0]

    def loaded(self, prompt: Sequence[int], answer: Answer) -> int:
        """Tokens of the answer just given that came from the node, as that recorded it.

        vLLM goes on counting what a load was to bring as cached when the load ends early.
        """
        count: int = self.last_record(len(prompt) + len(answer.tokens))["loaded_tokens"]
        return count

    def await_stored(
        self, engine: Engine, sequences: Sequence[Sequence[int]], ranks: int = 1
    ) -> None:
        """Return once all whole chunks of these tokens are in the node."""
        for tokens in sequences:
            keys = engine.keys(tokens)
            eventually(
                lambda keys=keys: 255 not in self.node.lookup(keys, list(range(ranks))),  # type: ignore[misc]
                f"{len(keys)} chunks stored",
            )

    def check(self) -> None:
        """After every scenario: nothing is held any more, nothing was refused, no bug was hit."""

        def quiet() -> bool:
            leases = self.node.status()["leases"]
            return not any(leases[held] for held in ("count", "reservations", "bytes"))

        eventually(quiet, "all leases and reservations returned")
        status = self.node.status()
        counters = status["counters"]
        counted = ("bugs_",) if self.was_stopped else ("bugs_", "requests_refused_")
        assert not {k: v for k, v in counters.items() if k.startswith(counted)}


def known_tokens(prompt: Sequence[int], answer: Answer) -> list[int]:
    """The tokens whose KV an answered request leaves: all but the last new one."""
    return [*prompt, *answer.tokens[:-1]]


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return as soon as it holds; fail when it does not for this long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


class Texts:
    """Prompts of real text, no two of which begin alike."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._seed = 0

    def of(self, *lengths: int) -> list[Prompt]:
        """New prompts of these lengths."""
        self._seed += 1
        cut = models.documents(len(lengths), max(lengths), self._tokenizer, self._seed)
        return [list(text[:length]) for text, length in zip(cut, lengths, strict=True)]

    def words(self, text: str) -> Prompt:
        """Tokens of a text."""
        return list(self._tokenizer.encode(text))


class Plain:
    """Plain vLLM's answers, each asked for once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: dict[tuple[int, ...], tuple[Answer, Answer]] = {}

    def both(self, prompt: Prompt) -> tuple[Answer, Answer]:
        """The answer when nothing is cached, and upon vLLM's hit in its own prefix cache."""
        key = tuple(prompt)
        if key not in self._known:
            # It may have been asked before, up to some other split.
            self.engine.forget()
            cold, warm = self.engine.answers([prompt, prompt])
            assert cold.cached == 0
            self._known[key] = cold, warm
        return self._known[key]

    def upon_hit(self, prompt: Prompt, num_tokens: int) -> tuple[Answer, Answer]:
        """The answer when vLLM's own prefix cache has so many of its tokens, and the one after.

        What is computed after a hit may be rounded otherwise than what is computed at once, so the
        second answer, upon a hit of everything, is not always the one of `both`.
        """
        if num_tokens == 0:
            return self.both(prompt)
        self.engine.forget()
        self.engine.answer(prompt, 1)
        self.engine.call("evict", tokens=prompt, keep=num_tokens // CHUNK)
        first, second = self.engine.answers([prompt, prompt])
        assert first.cached == num_tokens
        return first, second

    def cold(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens without any hit."""
        return [self.both(prompt)[0].tokens for prompt in prompts]

    def warm(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens where all whole chunks of the prompt are hit."""
        answers = [self.both(prompt)[1] for prompt in prompts]
        assert [answer.cached for answer in answers] == [whole_chunks(len(p)) for p in prompts]
        return [answer.tokens for answer in answers]


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """The children's: this process's without KVStrata's options, one binding of threads for all."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KVSTRATA_")}
    with suppress(KeyError):
        kept["KVSTRATA_MODEL_CACHE"] = os.environ["KVSTRATA_MODEL_CACHE"]
    path = os.pathsep.join(part for part in sys.path if part)
    return {
        **kept,
        **base.ENGINE_ENVIRONMENT,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # One thread each: two that share busy cores spend their time waiting for one another.
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(next(_CORES)),
        "PYTHONPATH": path,
        **more,
    }
