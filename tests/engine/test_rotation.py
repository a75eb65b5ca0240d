"""The deployment's secret is exchanged under a real engine, which never restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engine.engine import CHUNK, Engine, Prompt, whole_chunks
from tests.engine.place import PATIENCE_S, Place, eventually
from tests.engine.plain import Plain, Texts
from tests.engine.shared import SETTINGS

from kvstrata.secret import save_secrets
from kvstrata.testing.workplace import wait_ready

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]

A, B = bytes(range(32)), bytes(range(32, 64))


def restart(place: Place, engine: Engine, probe: Prompt, *known: bytes) -> None:
    """Have the node end, and another one know these secrets, and the engine be attached to it."""
    if place._service is not None:
        place._service.terminate()
        place._service.wait(PATIENCE_S)
    place._node = None
    file = Path(place.config.secret_file)
    file.touch(0o600)
    save_secrets(file, known)
    place._serve()
    wait_ready(place.node, PATIENCE_S)

    def hits() -> bool:
        engine.forget()
        return engine.answer(probe).cached > 0

    eventually(hits, "the engine has found its new node")
    place.await_stored(engine, [probe])


def test_a_secret_is_exchanged_and_no_hit_is_lost(
    tiny_llama: Path, plain: Plain, texts: Texts
) -> None:
    prompts, (probe,) = texts.of(300, 700, 1100), texts.of(400)
    whole = [whole_chunks(len(prompt)) for prompt in prompts]
    with Place(tiny_llama, SETTINGS) as place:
        place.set("node", f"unix:{place.folder}/node.sock")
        place.use_disk()
        engine = place.engine()
        restart(place, engine, probe, A)
        cold = engine.answers(prompts)
        assert [answer.tokens for answer in cold] == plain.cold(prompts)
        place.await_stored(engine, prompts)
        for known, num_stored in (((A, B), 0), ((B, A), sum(whole) // CHUNK), ((B,), 0)):
            restart(place, engine, probe, *known)
            before = place.count("stored_objects_total")
            warm = engine.answers(prompts)
            assert [answer.cached for answer in warm] == whole
            assert [answer.tokens for answer in warm] == plain.warm(prompts)
            place.await_stored(engine, prompts)
            assert place.count("stored_objects_total") - before == num_stored
            assert "is computed" not in engine.log, "a load failed"
        place.check()
