"""Codecs under a real vLLM: lossless ones change no token, lossy ones only where they are named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engine import Engine, Prompt, whole_chunks
from tests.engine.place import Place, known_tokens
from tests.engine.plain import Plain, Texts
from tests.engine.shared import Engines

from kvstrata.codecs import codec_named
from kvstrata.identity import weights_identity
from kvstrata.objects import HEADER_BYTES, decode
from kvstrata.quality import table as tables
from kvstrata.testing import models

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore::ResourceWarning")]


NEW = 8


@pytest.fixture(scope="module")
def plain(engines: Engines, smollm2: Path) -> Plain:
    """Plain vLLM with the real model, whose numbers are what a lossy codec is made for."""
    return engines.plain(smollm2, new_tokens=NEW)


@pytest.fixture(scope="module")
def some(tokenizer: models.Tokenizer) -> list[Prompt]:
    return Texts(tokenizer, "codecs").of(300, 400, 550, 700, 1000)


def fill(place: Place, engine: Engine, prompts: list[Prompt]) -> None:
    """Have every whole chunk of these prompts in every tier."""
    cold = engine.answers(prompts)
    place.await_stored(engine, [known_tokens(*pair) for pair in zip(prompts, cold, strict=True)])
    place.flush()


def hits(place: Place, tier: str) -> float:
    return place.count(f'hit_chunks_total{{tier="{tier}"}}')


@pytest.fixture(scope="module")
def exact(smollm2: Path, some: list[Prompt]) -> Iterator[tuple[Place, Engine]]:
    """Lossless codecs everywhere, and a target so far away that no coarser copy is ever read."""
    with Place(smollm2) as place:
        place.use_disk()
        place.set("memory.capacity", "1GiB")
        place.set("disk.coarser", "cachegen-3")
        place.set("disk.load_target", "60s")
        engine = place.engine(new_tokens=NEW)
        fill(place, engine, some)
        yield place, engine


@pytest.mark.parametrize("tier", ["host", "memory", "disk"])
def test_lossless_codecs_change_no_token(
    exact: tuple[Place, Engine], plain: Plain, some: list[Prompt], tier: str
) -> None:
    place, engine = exact
    faster = ["host", "memory", "disk"][: ["host", "memory", "disk"].index(tier)]
    if faster:
        place.node.clear(tiers=faster)
    before = hits(place, tier)
    engine.forget()
    warm = engine.answers(some)
    assert [answer.cached for answer in warm] == [whole_chunks(len(prompt)) for prompt in some]
    assert hits(place, tier) - before == sum(len(prompt) // 128 for prompt in some)
    assert [answer.tokens for answer in warm] == plain.warm(some)
    if tier == "disk":
        assert place.count('streamed_objects_total{level="0"') > 0
        assert place.count("streamed_objects_total") == place.count(
            'streamed_objects_total{level="0"'
        )
    place.check()


def score(value: float) -> tables.Estimate:
    return tables.Estimate(value, value, value)


def row(name: str, bits: float, kl: float) -> tables.Measured:
    codec = codec_named(name)
    fields: dict[str, Any] = {
        "bits": bits, "key_error": 0.0, "value_error": 0.0, "perplexity": score(0), "kl_mean":
        score(kl), "kl_p99": score(kl), "agreement": score(1), "retrieval": None, "rules": score(1),
        "rules_nats": score(0), "rules_by_place": (),
    }  # fmt: skip
    return tables.Measured(
        name=name, family=codec.family, parameters=codec.parameters().hex(),
        lossless=codec.lossless, encode_gbps=1.0, decode_gbps=2.0,
        scores=tuple(tables.Scores(length=length, **fields) for length in (0, 1024)),
    )  # fmt: skip


def test_auto_without_a_table_is_exact_and_with_one_keeps_the_bound(
    smollm2: Path,
    some: list[Prompt],
    plain: Plain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Place(smollm2) as place:
        place.use_disk()
        place.set("disk.codec", "auto")
        place.set("quality", "kl <= 0.01")
        engine = place.engine(new_tokens=NEW)
        fill(place, engine, some)
        place.node.clear(tiers=["host"])
        engine.forget()
        assert [answer.tokens for answer in engine.answers(some)] == plain.warm(some)
        assert place.node.status()["tiers"][0]["codec"] == "auto (lossless)"
        assert f"kvstrata quality {smollm2}" in engine.log
        place.end()

        weights = weights_identity(smollm2, None)
        rows = (row("lossless", 10.9, 0), row("cachegen-2", 4, 0.0023), row("cachegen-5", 2, 0.05))
        exact = tables.Exact(length=1024, perplexity=6.0, retrieval=(1.0,), rules=1.0)
        table = tables.Table(
            kvstrata="0.1.0", model="smollm2", weights=weights, text="", windows=1,
            lengths=(1024,), machine="", exact=(exact,), codecs=rows, left_out={},
        )  # fmt: skip
        tables.save(table, tables.path_for(weights))
        place.set("disk.path", str(place.folder / "another"))
        engine = place.engine(new_tokens=NEW)
        fill(place, engine, some)
        assert place.node.status()["tiers"][0]["codec"] == "auto (cachegen-2)"
        files = sorted((place.folder / "another" / "objects").rglob("*.kvo"))
        headers = [decode(path.read_bytes()[:HEADER_BYTES]) for path in files]
        assert {header.codec for header in headers} == {"cachegen"}
        assert {header.kind for header in headers} == {"portable"}
        written = place.count("tier_writes_total")
        place.node.clear(tiers=["host"])
        engine.forget()
        lossy = engine.answers(some)
        assert [answer.cached for answer in lossy] == [whole_chunks(len(p)) for p in some]
        # Nearly all answers begin as they should; what changed is what a lossy codec changes.
        first = [answer.tokens[0] for answer in lossy]
        assert sum(a == b[0] for a, b in zip(first, plain.warm(some), strict=True)) >= len(some) - 1
        # vLLM has lossy KV in its own cache now. Asked again it offers that to be stored again.
        place.node.clear(tiers=["host"])
        assert [answer.tokens for answer in engine.answers(some)] == [a.tokens for a in lossy]
        place.flush()
        assert place.count("tier_writes_total") == written, "lossy KV was encoded once more"
        place.check()
