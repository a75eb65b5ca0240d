"""``codec = auto``: the codec that the model's own table allows, and nothing lossy without it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.nodes import clear, flush
from tests.support.real_nodes import ME, chunk, load, on_real_node, store, stored_codec, timed

from kvstrata.codecs import codec_named
from kvstrata.errors import ConfigError
from kvstrata.node.coding import auto
from kvstrata.node.coding.auto import Tables
from kvstrata.node.node import Node
from kvstrata.quality.bound import Bound
from kvstrata.quality.choice import Place, trouble
from kvstrata.quality.table import Estimate, Measured, Scores, Table, path_for, save
from kvstrata.testing.clock import ManualClock
from kvstrata.wire import protocol as p

WEIGHTS = "ab" * 32


def row(name: str, bits: float, kl: float, parameters: str = "") -> Measured:
    codec = codec_named(name)
    one = Estimate(1.0, 1.0, 1.0)
    scores = Scores(
        length=0, bits=bits, key_error=0, value_error=0, perplexity=one,
        kl_mean=Estimate(kl, kl, kl), kl_p99=one, agreement=one, retrieval=None, rules=one,
        rules_nats=one, rules_by_place=(),
    )  # fmt: skip
    return Measured(
        name=name, family=codec.family, parameters=parameters or codec.parameters().hex(),
        lossless=codec.lossless, encode_gbps=1.0, decode_gbps=20.0, scores=(scores,),
    )  # fmt: skip


def save_table(*rows: Measured, weights: str = WEIGHTS) -> None:
    table = Table(
        kvstrata="0", model="tiny", weights=weights, text="", windows=1, lengths=(), machine="",
        exact=(), codecs=rows, left_out={},
    )  # fmt: skip
    save(table, path_for(WEIGHTS))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "quality": "kl <= 0.01",
        "disk.path": tmp_path / "disk",
        "disk.capacity": "8MiB",
        "disk.codec": "auto",
    }


LOSSLESS, GOOD, BAD = (
    row("lossless", 11, 0),
    row("cachegen-2", 4, 0.002),
    row("cachegen-5", 2, 0.05),
)


class Tier:
    """A tier as far as the choice of its codec goes; its speed is not known until it is set."""

    name = "disk"
    capacity_bytes = 8 << 20

    def __init__(self, bytes_per_s: float | None, writable: bool = True) -> None:
        self.bytes_per_s = bytes_per_s
        self.writable = writable

    def place(self) -> Place | None:
        if self.bytes_per_s is None:
            return None
        return Place(self.name, self.capacity_bytes, self.bytes_per_s, cores=2)


def tables_of(tier: Tier, clock: ManualClock | None = None) -> Tables:
    tables = Tables(Bound.parse("kl <= 0.01"), path_for(WEIGHTS).parent, clock or ManualClock())
    tables.backings.append(tier)
    return tables


def chosen(tables: Tables, weights: str = WEIGHTS, compute_s: float = 1e-6) -> str:
    codec = tables.codecs(weights, compute_s)["disk"]
    return "raw" if codec is None else codec.name


def named(name: str) -> tuple[str, bytes]:
    codec = codec_named(name)
    return codec.family, codec.parameters()


async def _store(node: Node, weights: str) -> tuple[str, bytes]:
    # A choice waits until all tiers have been measured.
    await timed(node)
    store(node, weights)
    await flush(node, ME)
    return stored_codec(node)


def test_the_densest_codec_within_the_bound(options: dict[str, Any]) -> None:
    save_table(LOSSLESS, GOOD, BAD)

    async def test(node: Node) -> None:
        assert await _store(node, WEIGHTS) == named("cachegen-2")
        await clear(node, ME, tiers=["host"])
        assert (await load(node))[1] != [chunk(number) for number in range(3)]
        tiers = node.status(ME, p.Status(1)).state["tiers"]
        assert tiers[0]["codec"] == "auto (cachegen-2)"

    on_real_node(test, options)


def test_a_wider_bound_allows_more(options: dict[str, Any]) -> None:
    save_table(LOSSLESS, GOOD, BAD)

    async def test(node: Node) -> None:
        assert await _store(node, WEIGHTS) == named("cachegen-5")

    on_real_node(test, options | {"quality": "kl <= 0.05"})


def test_memory_and_disk_are_chosen_together(options: dict[str, Any]) -> None:
    save_table(LOSSLESS, GOOD, BAD)

    async def test(node: Node) -> None:
        assert await _store(node, WEIGHTS) == named("cachegen-2")
        codecs = {t["name"]: t["codec"] for t in node.status(ME, p.Status(1)).state["tiers"]}
        assert codecs == {"memory": "auto (cachegen-2)", "disk": "auto (cachegen-2)"}

    on_real_node(test, options | {"memory.capacity": "4MiB", "memory.codec": "auto"})


@pytest.mark.parametrize("weights", ["", "hub:org/model@1", "../" * 20, "cd" * 32])
def test_an_unknown_model_is_stored_exactly(options: dict[str, Any], weights: str) -> None:
    save_table(LOSSLESS, GOOD)

    async def test(node: Node) -> None:
        assert await _store(node, weights) == named("lossless")
        await clear(node, ME, tiers=["host"])
        assert (await load(node))[1] == [chunk(number) for number in range(3)]

    on_real_node(test, options)


def test_another_version_of_a_codec_was_not_measured(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    save_table(LOSSLESS, row("cachegen-2", 4, 0.002, parameters="ff"), BAD)

    async def test(node: Node) -> None:
        family, _ = await _store(node, WEIGHTS)
        assert family in ("raw", "lossless")

    on_real_node(test, options)
    again = [one.message for one in caplog.records if one.message.endswith("measure again")]
    assert again == ["cachegen-2 was measured in another version; measure again"]


def test_a_table_that_is_made_later_is_found(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    clock = ManualClock()

    async def test(node: Node) -> None:
        assert await _store(node, WEIGHTS) == named("lossless")
        assert "run kvstrata quality" in caplog.text
        save_table(LOSSLESS, GOOD)
        await clear(node, ME)
        assert await _store(node, WEIGHTS) == named("lossless"), "not asked for every object"
        clock.advance(61)
        await clear(node, ME)
        assert await _store(node, WEIGHTS) == named("cachegen-2")

    with caplog.at_level(logging.ERROR):
        on_real_node(test, options, clock)


def test_where_computing_is_sooner_than_decoding_it_stores_raw() -> None:
    save_table(LOSSLESS, GOOD)
    tables = tables_of(Tier(1e15))
    assert chosen(tables, compute_s=1e-11) == "raw"
    assert tables.chosen("disk") == ["raw"]


def test_what_is_chosen_is_compiled_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(auto, "warm_up", lambda codec: compiled.append(codec.name))
    save_table(LOSSLESS, GOOD)
    tables = tables_of(Tier(1e9))
    assert [chosen(tables), chosen(tables)] == ["cachegen-2"] * 2
    assert compiled == ["cachegen-2"]


def test_a_choice_waits_until_a_tier_was_measured_that_can_be_written() -> None:
    save_table(LOSSLESS, GOOD)
    assert chosen(tables_of(Tier(None, writable=False))) == "cachegen-2"
    tier, clock = Tier(None), ManualClock()
    tables = tables_of(tier, clock)
    assert chosen(tables) == "lossless"
    tier.bytes_per_s = 1e9
    assert chosen(tables) == "lossless", "not asked for every object"
    clock.advance(auto.MEASURE_S)
    assert chosen(tables) == "cachegen-2"
    tier.bytes_per_s = 1e15
    clock.advance(1e6)
    assert chosen(tables, compute_s=1e-11) == "cachegen-2", "a choice is for long"


def test_the_table_of_another_model_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    save_table(LOSSLESS, GOOD, weights="cd" * 32)
    assert chosen(tables_of(Tier(1e9))) == "lossless"
    assert "is the table of another model" in caplog.text


def test_a_codec_that_is_no_more_is_passed_over() -> None:
    save_table(LOSSLESS, msgspec.structs.replace(GOOD, name="gone-1"), GOOD)
    assert chosen(tables_of(Tier(1e9))) == "cachegen-2"


def test_of_many_models_the_one_is_forgotten_whose_choice_is_oldest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "MAX_MODELS", 2)
    clock, first, second, third = ManualClock(), "01" * 32, "02" * 32, "03" * 32
    tables = tables_of(Tier(1e9), clock)
    chosen(tables, first)
    chosen(tables, second)
    clock.advance(61)
    chosen(tables, first)  # anew, as it has no table
    chosen(tables, third)
    caplog.clear()
    chosen(tables, first)
    chosen(tables, third)
    assert not caplog.records, "both are known"
    chosen(tables, second)
    assert "no table says" in caplog.text


def test_auto_needs_a_bound(options: dict[str, Any]) -> None:
    async def test(node: Node) -> None:
        pass

    with pytest.raises(ConfigError, match=r"disk.codec is auto; expected .*kl <= 0.01"):
        on_real_node(test, options | {"quality": "none"})


def test_why_not_is_said_with_the_command_that_mends_it() -> None:
    bound = Bound.parse("kl <= 0.01")
    assert trouble(WEIGHTS, bound, "/m").endswith("make it: kvstrata quality /m")
    save_table(LOSSLESS, BAD)
    assert "no lossy codec" in trouble(WEIGHTS, bound, "/m")
    save_table(LOSSLESS, GOOD)
    assert trouble(WEIGHTS, bound, "/m") == ""
    path_for(WEIGHTS).write_text("{")
    assert "is no table of quality" in trouble(WEIGHTS, bound, "/m")
