"""Prefill in one engine and decode in another, of models whose layers are of several kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.engine.engine import CHUNK, Engine, Prompt, request
from tests.engine.kinds import ALWAYS, KINDS, NEW, Kind
from tests.engine.place import Place, eventually
from tests.engine.plain import Texts
from tests.engine.test_parallel import detached

from kvstrata.connectors.naming import COMPUTE_FOR_ANOTHER, prefill_elsewhere
from kvstrata.testing.ports import HOST, free_port

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

LENGTHS = (90, 130, 300, 700, 1100)


class Sides:
    """Who computes and who decodes, each with a node of its own.

    Both compute in float32, so that a prompt that is cut otherwise rounds no token away; but where
    vLLM has states on a CPU, in bfloat16 alone. There a prompt is cut as upon vLLM's own hit.
    """

    def __init__(self, kind: Kind, prefill: Place, decode: Place, address: str) -> None:
        self._places = prefill, decode
        self._address = address
        self._stateful = kind.name == "tiny_qwen3_next"
        dtype = "bfloat16" if self._stateful else "float32"
        options = kind.engine(dtype=dtype, max_model_len=1280)
        self.prefill, self.decode = (place.engine(**options) for place in self._places)

    def ask(self, engine: Engine, prompt: Prompt, count: int, transfer: Any) -> dict[str, Any]:
        """An answer, and what goes to the engine that goes on with it."""
        asked = request(prompt, count, transfer=transfer)
        answer: dict[str, Any] = engine.call("ask", requests=[asked], in_turn=True)["answers"][0]
        return answer

    def one_after_the_other(self, prompt: Prompt) -> list[int]:
        computed = self.ask(self.prefill, prompt, 1, COMPUTE_FOR_ANOTHER)
        return list(self.ask(self.decode, prompt, NEW, computed["transfer"])["tokens"])

    def both_at_once(self, prompt: Prompt) -> list[int]:
        """As ``kvstrata proxy`` asks them."""
        with ThreadPoolExecutor(1) as threads:
            computing = threads.submit(self.ask, self.prefill, prompt, 1, COMPUTE_FOR_ANOTHER)
            answer = self.ask(self.decode, prompt, NEW, prefill_elsewhere(self._address))
            computing.result()
        return list(answer["tokens"])

    def handed_over(self, prompt: Prompt) -> int:
        """Tokens that the engine which decodes need not compute."""
        last = len(prompt) - 1
        return last // CHUNK * CHUNK if self._stateful else last

    def loaded(self, prompt: Prompt) -> int:
        """Tokens that the engine which decodes had from the other one's node just now."""
        record = self._places[1].last_record(len(prompt) + NEW)
        print(record)  # what says why, if this is not enough
        return int(record["loaded_tokens"])

    def forget(self) -> None:
        """Nobody has anything of any prompt."""
        for engine, place in zip((self.prefill, self.decode), self._places, strict=True):
            engine.forget()
            place.node.clear()

    def check(self) -> None:
        for place in self._places:
            place.check()


@pytest.fixture(scope="module", params=ALWAYS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def sides(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    address = f"{HOST}:{free_port()}"
    secret = str(tmp_path_factory.mktemp("deployment") / "secret")
    common = {"secret_file": secret, "host.capacity": "256MiB"}
    other = {"peer.named": address, "peer.lookup_timeout": "1s"}
    with (
        Place(kind.folder, {**common, "network.listen": address}) as prefill,
        Place(kind.folder, {**common, **other}) as decode,
    ):
        yield Sides(kind, prefill, decode, address)


@pytest.fixture(scope="module")
def prompts(kind: Kind, sides: Sides) -> list[tuple[Prompt, set[tuple[int, ...]]]]:
    """Prompts, and what one engine alone answers: cold, or upon a hit of its own."""
    from transformers import AutoTokenizer

    texts = Texts(AutoTokenizer.from_pretrained(kind.folder), f"apart {kind.name}").of(*LENGTHS)
    with detached(sides.prefill) as plain:
        return [
            (prompt, {tuple(answer.tokens) for answer in plain.both(prompt)}) for prompt in texts
        ]


@pytest.mark.parametrize("way", ["one after the other", "both at once"])
def test_the_same_tokens_as_one_engine_alone(
    sides: Sides, prompts: list[tuple[Prompt, set[tuple[int, ...]]]], way: str
) -> None:
    ask: Callable[[Prompt], list[int]] = (
        sides.both_at_once if way == "both at once" else sides.one_after_the_other
    )
    for prompt, allowed in prompts:

        def loaded(prompt: Prompt = prompt, allowed: set[tuple[int, ...]] = allowed) -> bool:
            sides.forget()
            assert tuple(ask(prompt)) in allowed
            return sides.loaded(prompt) == sides.handed_over(prompt)

        # More than once: where the machine stood still for as long as a peer is waited for.
        eventually(loaded, f"of {len(prompt)} tokens all are loaded")
    sides.check()
