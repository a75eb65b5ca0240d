"""Two secrets, while one takes the other's place: what is found by which, and stored by which."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from tests.connector.fake_model import CHUNK
from tests.connector.gates import GatedTier, tiered
from tests.connector.rig import Rig, prompt
from tests.connector.test_disaggregated import Pair, decode, params, prefill, record
from vllm.v1.request import RequestStatus

from kvstrata.connectors.naming import prefill_elsewhere
from kvstrata.connectors.vllm.elsewhere import WRITTEN_S
from kvstrata.connectors.vllm.requests import RequestState
from kvstrata.errors import NodeUnavailable
from kvstrata.header import object_id
from kvstrata.objects import HEADER_BYTES, checksum, encode
from kvstrata.objects import decode as decode_header
from kvstrata.secret import save_secrets, secret_check
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

Make = Callable[..., Rig]

A, B = bytes(range(32)), bytes(range(32, 64))


class LastingTier(GatedTier):
    """One that outlives its node."""

    def close(self) -> None:
        pass


def restart(rig: Rig, *known: bytes) -> None:
    """A node that knows these secrets in the place of the one before."""
    if rig.node is not None:
        rig.stop_node()
        client = rig.side._lookups.client
        with contextlib.suppress(NodeUnavailable):
            if client is not None:
                client.status()  # so that it notices
        assert rig.side._lookups.attached() is None
    save_secrets(rig.config.secret_file, known)
    rig.start_node()
    rig.attach()
    rig.until(lambda: all(tier["state"] == "ok" for tier in rig.state()["tiers"]))


@pytest.fixture
def rig(make_rig: Make) -> Rig:
    """An engine whose node knows secret A, above a tier that stays."""
    return rig_of(make_rig)


def rig_of(make_rig: Make, **extra: Any) -> Rig:
    rig = make_rig(make_node=tiered(LastingTier()), extra=extra)
    restart(rig, A)
    return rig


def warm(rig: Rig, *prompts: list[int]) -> None:
    """Have the tier know these prompts, and vLLM none of them."""
    rig.reset()
    rig.warm(*prompts)
    flush(rig)


def flush(rig: Rig) -> None:
    assert rig.node is not None
    with contextlib.closing(rig.node.connect()) as client:
        client.flush()


def counted(rig: Rig, name: str) -> float:
    counters = rig.state()["counters"]
    return float(sum(count for one, count in counters.items() if one.startswith(name)))


def asked_again(rig: Rig, tokens: list[int], **options: Any) -> int:
    """Ask for what vLLM has forgotten; the tokens that came from the node, all others computed."""
    rig.reset()
    before = len(rig.steps)
    came = rig.ask(tokens, **options)
    computed = sum(step.num_tokens for step in rig.steps[before:])
    assert computed == max(1, len(tokens) - came), "a load failed"
    rig.settle()
    flush(rig)
    return came


def test_a_rotation_loses_no_hit(rig: Rig) -> None:
    first, second = prompt(4 * CHUNK, 1), prompt(4 * CHUNK, 2)
    warm(rig, first, second)
    restart(rig, A, B)
    assert asked_again(rig, first) == 4 * CHUNK
    restart(rig, B, A)
    assert asked_again(rig, first) == 4 * CHUNK
    assert record(rig)["other_secret_tokens"] == 4 * CHUNK
    restart(rig, B)
    assert asked_again(rig, first) == 4 * CHUNK, "it was stored again by the new one"
    assert record(rig)["other_secret_tokens"] == 0
    assert asked_again(rig, second) == 0, "this one was not"
    restart(rig, A)
    assert asked_again(rig, first) == 4 * CHUNK, "what is there stays"
    rig.check()


def test_a_machine_that_is_behind_misses_and_finds_its_own(rig: Rig) -> None:
    tokens = prompt(4 * CHUNK)
    restart(rig, B, A)
    warm(rig, tokens)
    restart(rig, A)
    assert asked_again(rig, tokens) == 0
    assert asked_again(rig, tokens) == 4 * CHUNK
    rig.check()


def test_one_question_more_only_where_the_first_misses_some(rig: Rig) -> None:
    def questions(tokens: list[int]) -> float:
        before = counted(rig, "matches_total")
        asked_again(rig, tokens)
        return counted(rig, "matches_total") - before

    tokens = prompt(4 * CHUNK)
    assert questions(tokens) == 1, "with one secret, whatever is missed"
    restart(rig, B, A)
    assert questions(tokens) == 2
    assert questions(tokens) == 1, "by now the first one finds all"
    assert questions(tokens + prompt(CHUNK)) == 2
    rig.check()


@pytest.mark.parametrize(
    ("by_new", "by_old", "loaded", "by_other"),
    [(2, 4, 4, 4), (4, 2, 4, 0), (3, 3, 3, 0), (0, 3, 3, 3), (2, 0, 2, 0)],
)
def test_the_longer_hit_wins_and_the_rest_is_stored_by_the_new_one(
    rig: Rig, by_new: int, by_old: int, loaded: int, by_other: int
) -> None:
    tokens = prompt(5 * CHUNK)
    for secret, count in ((A, by_old), (B, by_new)):
        restart(rig, secret)
        warm(rig, tokens[: count * CHUNK] or prompt(CHUNK, 9))
    restart(rig, B, A)
    before = len(rig.steps)
    assert asked_again(rig, tokens) == loaded * CHUNK
    assert record(rig)["other_secret_tokens"] == by_other * CHUNK
    (store,) = [store for step in rig.steps[before:] for store in step.stores]
    assert (store.first, len(store.prefix)) == (by_new, 5), "what it lacks, and no more"
    assert counted(rig, "stored_objects_total") == 5 - by_new
    restart(rig, B)
    assert asked_again(rig, tokens) == 5 * CHUNK
    rig.check()


def test_what_vllm_has_itself_is_stored_by_the_new_one(rig: Rig) -> None:
    tokens = prompt(4 * CHUNK + 5)
    warm(rig, tokens)
    rig.ask(tokens)
    restart(rig, B, A)
    assert rig.ask(tokens) == 0, "all of it is vLLM's own"
    rig.settle()
    flush(rig)
    restart(rig, B)
    assert asked_again(rig, tokens) == 4 * CHUNK
    rig.check()


def test_a_load_that_fails_is_computed_and_stored(rig: Rig) -> None:
    """Of what was found by the old secret, what did not come is stored by the new one, too."""
    tokens = prompt(5 * CHUNK)
    warm(rig, tokens)
    stay = {object_id(key, 0, 0) for key in state_of(rig, tokens).keys[:2]}
    restart(rig, B, A)
    assert rig.node is not None
    tier = rig.node.node.backings[0].tier
    assert isinstance(tier, LastingTier)
    tier.opened.clear()
    rig.add(tokens, 4)
    rig.until(lambda: bool(rig.step()) and tier.num_reads > 0)
    for name in set(tier._objects) - stay:
        del tier._objects[name]
    tier.opened.set()
    rig.run()
    assert rig.wrong() == []
    assert record(rig)["loaded_tokens"] == 2 * CHUNK
    flush(rig)
    restart(rig, B)
    assert asked_again(rig, tokens) == 5 * CHUNK
    rig.check()


def test_what_may_be_lossy_is_not_stored_again(rig: Rig) -> None:
    """It would go through a lossy codec a second time."""
    tokens = prompt(4 * CHUNK)
    warm(rig, tokens)
    by_old = state_of(rig, tokens).keys
    restart(rig, B, A)
    assert rig.node is not None
    with contextlib.closing(rig.node.connect()) as client:
        lookups = rig.side._lookups
        matched = client.match(by_old, [0], lookups.orders, lookups.lengths).wait(10)
        arrived, have = offsets_of(matched.offsets), 0
        while have < 4:
            came = client.await_arrival(matched.lease, have).wait(10)
            arrived[have : came.ready] = offsets_of(came.offsets)
            have = came.ready
        for offset in arrived:
            as_portable(rig, client.pool, offset)
        client.release(matched.lease)
    assert asked_again(rig, tokens + prompt(CHUNK, 7)) == 4 * CHUNK
    assert counted(rig, "stored_objects_total") == 1, "what was computed"
    rig.check()


def state_of(rig: Rig, tokens: list[int]) -> RequestState:
    """What the connector knew of a request with these tokens when that came."""
    request = rig.request(tokens, name="state")
    rig.connector.on_new_request(request)
    state = rig.side._states["state"]
    rig.look_up(request)
    request.status = RequestStatus.FINISHED_ABORTED
    rig.connector.request_finished(request, [])
    rig.settle()
    return state


def as_portable(rig: Rig, pool: Any, offset: int) -> None:
    """Have a slot hold the same KV as if a lossy codec had been there."""
    pages = rig.workers[0].payloads[0].pages
    header = decode_header(pool.array(offset, HEADER_BYTES).tobytes())
    payload = pool.array(offset + HEADER_BYTES, header.raw_length)
    native = payload.reshape(*header.shape[:2], -1)
    portable = pages.order.unpack_layers(native, pages.group).copy()
    payload[:] = portable.reshape(-1).view(np.uint8)
    shape = pages.group.portable_shape(CHUNK)
    sum_ = checksum(payload)
    changed = structs.replace(header, kind="portable", order="", shape=shape, raw_checksum=sum_,
                              stored_checksum=sum_)  # fmt: skip
    pool.array(offset, HEADER_BYTES)[:] = np.frombuffer(encode(changed), np.uint8)


def test_a_request_that_ends_between_two_questions_holds_nothing(make_rig: Make) -> None:
    rig = rig_of(make_rig, **{"deadlines.match": "50ms"})
    tokens = prompt(4 * CHUNK)
    restart(rig, B)
    warm(rig, tokens[: 2 * CHUNK])
    restart(rig, B, A)
    by_old = state_of(rig, tokens).asked_by_other
    assert rig.node is not None
    node, gate = rig.node.node, rig.gate(p.Match)
    held = node._handlers[p.Match]
    node._handlers[p.Match] = lambda client, asked: (
        held(client, asked) if asked.keys.startswith(by_old[0]) else node.match(client, asked)
    )
    name = rig.add(tokens)
    rig.until(lambda: bool(rig.step()) and gate.num_asked == 1)
    assert rig.side._states[name].lease, "what the first one found"
    rig.abort(name)
    gate.open()
    rig.run()
    rig.check()


# prefill and decode apart


@pytest.fixture
def pair(make_rig: Make) -> Pair:
    """The engine that computes stores by A, and the one that decodes by B; both know both."""
    first = make_rig(extra={"network.listen": "127.0.0.1:0"})
    second = make_rig(extra={"peer.named": "loopback", "peer.lookup_timeout": "1s"})
    restart(first, A, B)
    restart(second, B, A)
    return Pair(first, second)


@pytest.mark.parametrize("end", [0, 20])
def test_the_one_that_computes_says_by_which_it_stores(pair: Pair, end: int) -> None:
    tokens = prompt(4 * CHUNK + end)
    transfer = prefill(pair, tokens)
    assert transfer is not None
    assert transfer["kvstrata"]["secret"] == secret_check(A)
    before = time.monotonic()
    assert decode(pair, tokens, transfer) >= 4 * CHUNK
    assert time.monotonic() - before < WRITTEN_S, "nothing was waited for that nobody stores"
    assert record(pair.decode)["other_secret_tokens"] == 4 * CHUNK + end
    pair.settle()
    restart(pair.prefill, B)
    pair.decode.reset()
    assert pair.decode.ask(tokens) == 4 * CHUNK, "by B here"
    pair.decode.check()


def test_while_it_is_computed(pair: Pair) -> None:
    tokens = prompt(6 * CHUNK)
    rig = pair.decode
    assert pair.prefill.node is not None
    transfer = prefill_elsewhere(pair.prefill.node.node.address, secret_check(A))
    rig.add(tokens, **params(rig, transfer, 4))
    for _ in range(3):
        rig.step()
    assert rig.answers["r1"] == []
    computing = threading.Thread(target=prefill, args=(pair, tokens))
    computing.start()
    rig.run()
    computing.join()
    assert rig.num_external == 6 * CHUNK
    assert rig.cut == rig.failed == []
    pair.settle()


def test_a_secret_that_nobody_knows_is_ignored(pair: Pair) -> None:
    tokens = prompt(3 * CHUNK)
    pair.decode.warm(tokens)
    transfer = prefill(pair, tokens)
    assert transfer is not None
    transfer["kvstrata"]["secret"] = "0" * 16
    assert decode(pair, tokens, transfer) == 3 * CHUNK
    assert record(pair.decode)["other_secret_tokens"] == 0
    pair.settle()


# everything at once


@pytest.mark.parametrize("pipelined", [False, True])
def test_random_rotations_never_read_a_wrong_byte(make_rig: Make, pipelined: bool) -> None:
    secrets = [bytes([number]) * 32 for number in range(3)]
    for seed in range(3):
        chance = random.Random(seed)
        rig = make_rig(
            num_blocks=chance.choice([24, 64]),
            ranks=1 + seed % 2,
            pipelined=pipelined,
            make_node=tiered(LastingTier()),
            max_num_seqs=4,
            extra={"host.capacity": "1MiB", "deadlines.match": "2ms"},
        )
        wanted: dict[str, int] = {}
        for _ in range(250):
            action = chance.random()
            if action < 0.25:
                tokens = prompt(200, seed=chance.randrange(4))[: chance.randrange(1, 200)]
                count = chance.randrange(1, 60)
                wanted[rig.add(tokens, count)] = count
            elif action < 0.28:
                rig.stop_node()
                known = chance.sample(secrets, chance.randint(1, 2))
                save_secrets(rig.config.secret_file, tuple(known))
                rig.start_node()
            elif action < 0.32:
                rig.scheduler.reset_prefix_cache()
            else:
                rig.step()
        rig.run()
        assert all(len(rig.answers[name]) == count for name, count in wanted.items())
        rig.check()
