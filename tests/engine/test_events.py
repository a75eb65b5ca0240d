"""A router that reads a real engine's KV events learns what the node has, and what it forgets."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest
from tests.engine.engine import CHUNK
from tests.engine.place import Place
from tests.engine.plain import Texts

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]


def test_a_router_learns_what_the_node_has(tiny_llama: Path, texts: Texts, tmp_path: Path) -> None:
    from tests.support.subscribers import Subscriber, until
    from vllm.distributed.kv_events import MEDIUM_CPU

    document, other, short = texts.of(300, 290, 40)
    with contextlib.closing(Subscriber(tmp_path)) as router, Place(tiny_llama) as place:
        engine = place.engine(kv_events_config=dataclasses.asdict(router.config))

        def step() -> None:
            engine.answer(short, 1)

        engine.answer(other, salt="alice")
        engine.answer(document)
        place.await_stored(engine, [document])
        whole = document[: 2 * CHUNK]
        until(
            lambda: (
                sorted(t for block in router.known(MEDIUM_CPU).values() for t in block)
                == sorted(whole)
            ),
            step,
            60.0,
        )
        own = router.known("GPU")
        assert all(own[one] == block for one, block in router.known(MEDIUM_CPU).items())
        place.node.clear()
        until(lambda: not router.known(MEDIUM_CPU), step, 60.0)
        place.check()
