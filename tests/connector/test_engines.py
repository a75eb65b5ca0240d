"""What another engine computed is loaded where both are told to share, and nowhere else.

The other engine is one by hand: it makes keys and payloads as SGLang's connector does, out of
what is written in ``docs/keys.md`` and ``docs/format.md``, and asks a real node.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.connector.fake_model import BLOCK, CHUNK, LAYERS, Memory, digests, heads_of
from tests.connector.gates import TIMEOUT_S
from tests.connector.rig import Rig, prompt, vllm_config
from tests.connector.test_disaggregated import Pair, decode, prefill, record
from tests.connector.test_rotation import A, B, restart, state_of

from kvstrata.connectors.identity import shared_layout, shared_namespace
from kvstrata.connectors.vllm.engines import engines_namespace, refuse_alone
from kvstrata.connectors.vllm.fingerprint import engine_namespace
from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.errors import Incompatible
from kvstrata.header import ObjectHeader
from kvstrata.identity import weights_identity
from kvstrata.keys import Namespace
from kvstrata.layout import LayerGroup, native_order
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.objects import decode as header_of
from kvstrata.pagekeys import PageKeys, page_hashes, page_seed
from kvstrata.parts import PORTABLE
from kvstrata.testing import models
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

Make = Callable[..., Rig]

SHARE = {"share": "engines"}
FULL = Group(0, "full", BLOCK)
ORDERS = [PORTABLE, f"vllm/strided-NHC/b{BLOCK}/bfloat16", f"vllm/strided-HNC/b{BLOCK}/bfloat16"]


class Other:
    """Another engine of the rig's model on the rig's node.

    Args:
        rig: whose node it is.
        ranks: of this engine.
        heads: KV heads of a layer, on all ranks together.
        producer: what it calls itself.
    """

    def __init__(
        self, rig: Rig, ranks: int = 1, heads: int | None = None, producer: str = "sglang"
    ) -> None:
        assert rig.node is not None
        self._client: NodeClient = rig.node.connect()
        self._ranks, self._heads, self._producer = ranks, heads or ranks, producer
        folder = str(models.tiny_llama())
        self.namespace: Namespace = shared_namespace(
            folder, weights_identity(folder, None), "bfloat16", "bfloat16", 2048,
            shared_layout(LAYERS, 2, len(heads_of(0, ranks, self._heads)), 2, "bfloat16"),
            CHUNK, ranks, tenant="default",
        )  # fmt: skip

    def keys(self, tokens: Sequence[int], salt: str | None = None) -> list[bytes]:
        hashes = page_hashes(tokens, CHUNK, page_seed(salt=salt))
        return PageKeys(self._client.hello.secret, self.namespace.digest()).of(hashes)

    def store(self, tokens: Sequence[int], salt: str | None = None) -> int:
        """Store a prompt's whole pages; how many were not there."""
        keys, stored = self.keys(tokens, salt), 0
        if not keys:
            return 0
        for rank in range(self._ranks):
            pages = self._computed(tokens, rank, salt)
            layers, states, heads, _, _, dim = pages.shape
            template = p.Template(
                "portable", "", "bfloat16", [layers, states, heads, CHUNK, dim], CHUNK,
                pages.nbytes // len(keys), CHUNK, producer=self._producer,
            )  # fmt: skip
            digest = self.namespace.digest()
            reserved = self._client.reserve(digest, keys, 0, rank, template).wait(TIMEOUT_S)
            sums = []
            for number, offset in enumerate(offsets_of(reserved.offsets)):
                if offset >= 0:
                    payload = self._client.pool.array(offset + HEADER_BYTES, template.raw_length)
                    page = np.ascontiguousarray(pages[:, :, :, number])
                    payload[:] = page.reshape(-1).view(np.uint8)
                sums.append(checksum(payload.data) if offset >= 0 else bytes(16))
                stored += offset >= 0
            self._client.commit(reserved.reservation, sums).wait(TIMEOUT_S)
        return stored

    def load(self, tokens: Sequence[int], salt: str | None = None) -> list[ObjectHeader]:
        """Load a prompt's leading pages, and see whether they are right; their headers."""
        keys, parts = self.keys(tokens, salt), list(range(self._ranks))
        if not keys:
            return []
        matched = self._client.match(keys, parts, ORDERS).wait(TIMEOUT_S)
        found = []
        for i, offset in enumerate(offsets_of(matched.offsets)):
            number, rank = divmod(i, self._ranks)
            header = header_of(self._client.pool.view(offset, HEADER_BYTES))
            payload = self._client.pool.array(offset + HEADER_BYTES, header.raw_length)
            wanted = self._computed(tokens, rank, salt)[:, :, :, number]
            assert np.array_equal(portable(header, payload), wanted)
            found.append(header)
        self._client.release(matched.lease)
        return found

    def close(self) -> None:
        self._client.close()

    def _computed(
        self, tokens: Sequence[int], rank: int, salt: str | None
    ) -> npt.NDArray[np.uint16]:
        """What a rank computes of whole pages: (L, S, H, pages, T, D)."""
        memory = Memory(1, heads_of(rank, self._ranks, self._heads))
        whole = len(tokens) // CHUNK * CHUNK
        words = memory.words(digests(tokens, (salt or "").encode())[:whole])
        heads = 1 if words.ndim == 3 else words.shape[2]
        numbers = words.view(np.uint16).reshape(LAYERS, -1, CHUNK, heads, 2, 2)
        return np.ascontiguousarray(numbers.transpose(0, 4, 3, 1, 2, 5))


def portable(header: ObjectHeader, payload: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """An object's numbers as (L, S, H, T, D), by its header alone."""
    if header.kind == "portable":
        return payload.view(np.uint16).reshape(header.shape)
    layers, blocks, states, heads, _, dim = header.shape
    group = LayerGroup(0, "full", layers, heads, dim, states, header.dtype)
    pages = payload.reshape(layers, blocks, -1)
    return native_order(header.order).unpack_layers(pages, group)


@contextlib.contextmanager
def beside(rig: Rig, **options: Any) -> Iterator[Other]:
    other = Other(rig, **options)
    try:
        yield other
    finally:
        other.close()


@pytest.mark.parametrize(("ranks", "heads"), [(1, 1), (1, 3), (2, 2), (2, 4)])
def test_what_another_engine_computed_is_loaded(make_rig: Make, ranks: int, heads: int) -> None:
    rig = make_rig(ranks=ranks, heads=heads, extra=SHARE)
    tokens = prompt(5 * CHUNK + 7)
    with beside(rig, ranks=ranks, heads=heads) as other:
        assert other.store(tokens) == 5 * ranks
    assert rig.ask(tokens, 3) == 5 * CHUNK
    told = record(rig)
    assert told["loaded_tokens"] == 5 * CHUNK
    assert told["loaded_from"] == {"sglang": 5 * CHUNK}
    assert rig.failed == []
    rig.check()


@pytest.mark.parametrize(("ranks", "heads"), [(1, 1), (1, 3), (2, 2), (2, 4)])
def test_another_engine_reads_what_vllm_stored(make_rig: Make, ranks: int, heads: int) -> None:
    rig = make_rig(ranks=ranks, heads=heads, extra=SHARE)
    tokens = prompt(5 * CHUNK + 7)
    rig.warm(tokens)
    with beside(rig, ranks=ranks, heads=heads) as other:
        assert {header.kind for header in other.load(tokens)} == {"native"}
        assert len(other.load(tokens)) == 5 * ranks
        assert other.store(tokens) == 5 * ranks, "as any engine that cannot read vLLM's order"
    rig.check()


def test_each_goes_on_with_what_the_other_began(make_rig: Make) -> None:
    rig = make_rig(extra=SHARE)
    tokens = prompt(6 * CHUNK)
    with beside(rig) as other:
        rig.warm(tokens[: 2 * CHUNK])
        rig.reset()
        other.store(tokens[: 4 * CHUNK])
        longer = [*tokens, 7]
        assert rig.ask(longer, 2) == 4 * CHUNK
        told = record(rig)["loaded_from"]
        assert sum(told.values()) == 4 * CHUNK
        assert told["sglang"] >= 2 * CHUNK
        rig.settle()
        assert len(other.load(tokens)) == 6
    rig.check()


@pytest.mark.parametrize("share", ["none", "ranks"])
def test_engines_that_are_not_told_to_never_meet(make_rig: Make, share: str) -> None:
    rig = make_rig(extra={"share": share})
    tokens, others = prompt(4 * CHUNK, 1), prompt(4 * CHUNK, 2)
    rig.warm(tokens)
    with beside(rig) as other:
        other.store(others)
        assert other.load(tokens) == []
        assert rig.ask(others, 2) == 0
        assert set(state_of(rig, others).keys).isdisjoint(other.keys(others))
        told = record(rig)
    assert "loaded_from" not in told
    rig.check()


def test_an_engine_that_shares_and_one_that_does_not_never_meet(make_rig: Make) -> None:
    rig = make_rig(extra=SHARE)
    alone = make_rig(node=rig.node, path=rig.path)
    tokens, others = prompt(4 * CHUNK, 1), prompt(4 * CHUNK, 2)
    rig.warm(tokens)
    alone.warm(others)
    assert (alone.ask(tokens), rig.ask(others)) == (0, 0)
    assert rig.ask(tokens) == 4 * CHUNK
    for one in (rig, alone):
        one.check()


def test_salts_part_engines_alike(make_rig: Make) -> None:
    rig = make_rig(extra=SHARE)
    tokens = prompt(3 * CHUNK + 1)
    with beside(rig) as other:
        other.store(tokens, "alice")
        assert rig.ask(tokens) == 0
        assert rig.ask(tokens, cache_salt="bob") == 0
        assert rig.ask(tokens, cache_salt="alice") == 3 * CHUNK
        rig.settle()
        assert len(other.load(tokens, "bob")) == 3
    rig.check()


def test_a_lossy_codec_is_no_engine(make_rig: Make) -> None:
    rig = make_rig(extra=SHARE)
    tokens = prompt(3 * CHUNK + 1)
    with beside(rig, producer="") as other:
        other.store(tokens)
    assert rig.ask(tokens) == 3 * CHUNK
    assert record(rig)["loaded_from"] == {"a lossy codec": 3 * CHUNK}
    rig.check()


def test_what_vllm_stored_it_loads_as_its_own(make_rig: Make) -> None:
    rig = make_rig(extra=SHARE)
    tokens = prompt(3 * CHUNK + 1)
    rig.warm(tokens)
    assert rig.ask(tokens) == 3 * CHUNK
    assert record(rig)["loaded_from"] == {"vllm": 3 * CHUNK}
    with beside(rig) as other:
        (told, *_) = rig.state()["namespaces"]
        assert told["digest"] == other.namespace.digest().hex()
        assert told["parts"]["pages"] is True
    rig.check()


def test_an_exchange_of_the_secret_loses_no_hit(make_rig: Make) -> None:
    rig = make_rig(extra=SHARE)
    restart(rig, A)
    tokens = prompt(4 * CHUNK)
    with beside(rig) as other:
        by_old = other.keys(tokens)
    restart(rig, B, A)
    state = state_of(rig, tokens)
    with beside(rig) as other:
        assert state.asked == other.keys(tokens)
    assert state.asked_by_other == by_old
    rig.check()


def test_answers_grow_into_pages(make_rig: Make) -> None:
    """The keys of chunks that a request generates go on from its prompt's."""
    rig = make_rig(extra=SHARE)
    tokens = prompt(CHUNK + 5)
    name = rig.add(tokens, 3 * CHUNK)
    rig.run()
    rig.settle()
    with beside(rig) as other:
        assert len(other.load(rig.tokens[name])) == 4
    rig.check()


def test_ends_and_parted_prompts_are_reused_among_vllms(make_rig: Make) -> None:
    rig = make_rig(extra={**SHARE, "inside": "on"})
    tokens = prompt(2 * CHUNK + 20)
    rig.warm(tokens)
    parted = [*tokens[: 2 * CHUNK + 16], *prompt(40, seed=9)]
    assert rig.ask(parted, 2) > 2 * CHUNK
    assert record(rig)["inside_tokens"] == 16
    rig.check()


def test_prefill_and_decode_apart_share_too(make_rig: Make) -> None:
    prefilling = make_rig(extra={**SHARE, "network.listen": "127.0.0.1:0"})
    peers = {"peer.named": "loopback", "peer.lookup_timeout": "1s"}
    pair = Pair(prefilling, make_rig(extra={**SHARE, **peers}))
    assert pair.decode.node is not None
    backing = pair.decode.node.node.backings[0]
    pair.decode.until(lambda: backing.readable)
    tokens = prompt(10 * CHUNK + 5)
    transfer = prefill(pair, tokens)
    assert transfer is not None
    assert decode(pair, tokens, transfer) == 10 * CHUNK + BLOCK, "its end, too"
    with beside(pair.prefill) as other:
        assert len(other.load(tokens)) == 10
    pair.prefill.check()
    pair.decode.check()


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(make_rig: Make, seed: int) -> None:
    """Whoever stored what, and whatever was evicted: nothing that is loaded is wrong."""
    rng = random.Random(seed)
    rig = make_rig(extra={**SHARE, "host.capacity": "1MiB"}, num_blocks=48)
    alone = make_rig(node=rig.node, path=rig.path)
    stems = [prompt(rng.randrange(1, 6 * CHUNK), i) for i in range(5)]
    loaded = 0
    with beside(rig) as other:
        for _ in range(120):
            tokens = list(rng.choice(stems))
            tokens = tokens[: rng.randrange(1, len(tokens) + 1)]
            tokens += prompt(rng.randrange(1, 4 * CHUNK), rng.randrange(20))
            salt = rng.choice([None, None, "alice"])
            match rng.randrange(5):
                case 0:
                    other.store(tokens, salt)
                case 1:
                    loaded += len(other.load(tokens, salt))
                case 2:
                    alone.ask(tokens, rng.randrange(1, 4), cache_salt=salt)
                case _:
                    loaded += rig.ask(tokens, rng.randrange(1, 4), cache_salt=salt)
                    told = record(rig)
                    assert sum(told["loaded_from"].values()) == told["loaded_tokens"]
            if rng.random() < 0.3:
                rig.settle()
                rig.reset()
    assert loaded > 0
    rig.check()
    alone.check()


# who shares


def told_to(config: Any) -> Namespace:
    groups = Groups((FULL,), CHUNK)
    return engines_namespace(config, groups, ["a layout"], "5f3a", "default")


def test_both_namespaces_of_an_engine_differ() -> None:
    config = vllm_config({}, 8)
    own = engine_namespace(config, "a layout", CHUNK, "default")
    assert told_to(config).digest() != own.digest()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: setattr(c, "speculative_config", object()), "drafts tokens"),
        (lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2), "pipeline"),
        (lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2), "context"),
        (lambda c: setattr(c.model_config, "hf_overrides", {"rope_theta": 1}), "not the check"),
        (lambda c: setattr(c.model_config, "hf_config_path", "other"), "not the checkpoint's"),
        (lambda c: setattr(c.model_config, "quantization_config", {"a": 1}), "not the checkpoint"),
        (lambda c: setattr(c.model_config, "model_weights", "s3://x"), "weights or its code"),
        (lambda c: setattr(c.model_config, "config_format", "mistral"), "format 'mistral'"),
        (lambda c: setattr(c.model_config, "model", "org/unknown"), "has no folder"),
        (lambda c: setattr(c.model_config, "quantization", "fp8"), "quantized by the engine"),
        (lambda c: setattr(c.cache_config, "cache_dtype", "fp8"), "its KV is fp8"),
    ],
)
def test_what_an_engine_changes_is_its_own(change: Callable[[Any], None], why: str) -> None:
    config = vllm_config({}, 8)
    change(config)
    with pytest.raises(Incompatible, match=why):
        told_to(config)


def test_a_checkpoint_of_two_configurations_needs_to_be_told_which(tmp_path: Path) -> None:
    for name in ("config.json", "params.json"):
        (tmp_path / name).write_text("{}")
    config = vllm_config({}, 8)
    config.model_config.model = str(tmp_path)
    with pytest.raises(Incompatible, match="--config-format hf"):
        told_to(config)
    config.model_config.config_format = "hf"
    assert told_to(config).pages


def test_ranks_that_differ_share_nothing() -> None:
    with pytest.raises(Incompatible, match="different KV"):
        engines_namespace(vllm_config({}, 8), Groups((FULL,), CHUNK), ["a", "b"], "5f", "")


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        (Groups((FULL, FULL), CHUNK), "full attention"),
        (Groups((Group(0, "sliding", BLOCK, 40),), CHUNK), "full attention"),
        (Groups((FULL,), CHUNK, more=(Group(1, "full", BLOCK, more_of=0),)), "one shape"),
        (Groups((Group(0, "full", BLOCK, replicated=True),), CHUNK), "latent"),
    ],
)
def test_layers_of_other_kinds_are_not_shared(groups: Groups, why: str) -> None:
    with pytest.raises(Incompatible, match=why):
        refuse_alone(vllm_config({}, 8), groups)


def test_who_cannot_share_caches_alone_and_says_why(
    make_rig: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    rig = make_rig(kinds=("full", "window"), extra=SHARE)
    rig.until(lambda: "shares no KV with other engines" in caplog.text)
    assert "KVStrata shares no KV with other engines: not all of its layers" in caplog.text
    alone = make_rig(kinds=("full", "window"), node=rig.node, path=rig.path)
    tokens = prompt(4 * CHUNK + 3)
    rig.warm(tokens)
    assert alone.ask(tokens, 2) == 4 * CHUNK
    rig.check()
    alone.check()


def test_requests_with_an_adapter_or_media_are_the_engines_own(make_rig: Make) -> None:
    rig = make_rig(extra=SHARE)
    namespaces = rig.side._lookups.namespaces
    plain = SimpleNamespace(lora_request=None, mm_features=[])
    shared = namespaces.parts_of(plain)
    own = namespaces.parts_of(SimpleNamespace(lora_request=None, mm_features=["an image"]))
    assert shared is not None
    assert own is not None
    assert (shared.pages, own.pages) == (True, False)
    folder = Path(rig.path.parent, "adapter")
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    lora = SimpleNamespace(lora_path=str(folder), lora_int_id=1)
    request = SimpleNamespace(lora_request=lora, mm_features=[])
    rig.until(lambda: namespaces.parts_of(request) is not None)
    adapted = namespaces.parts_of(request)
    assert adapted is not None
    assert not adapted.pages
    assert adapted.adapter
    rig.check()


def test_after_a_reset_an_engine_is_alone(make_rig: Make) -> None:
    """Its weights may have changed."""
    rig = make_rig(extra=SHARE)
    tokens = prompt(3 * CHUNK + 1)
    with beside(rig) as other:
        other.store(tokens)
        rig.connector.reset_cache()
        assert rig.ask(tokens) == 0
    rig.check()


def test_with_both_options_engines_come_first(make_rig: Make) -> None:
    both = {"share": "engines, ranks"}
    rig = make_rig(ranks=2, heads=4, extra=both)
    assert rig.side._lookups.parts == [0, 1]
    tokens = prompt(3 * CHUNK + 1)
    with beside(rig, ranks=2, heads=4) as other:
        other.store(tokens)
    assert rig.ask(tokens) == 3 * CHUNK
    rig.check()
    windows = make_rig(ranks=2, heads=4, kinds=("window",), extra=both)
    assert len(windows.side._lookups.parts) == 4, "slices, since it shares with no other engine"
    windows.check()
