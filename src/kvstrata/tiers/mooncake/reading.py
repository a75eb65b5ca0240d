"""Reads, by the library's sessions: its plain read keeps a core busy for every thread that waits.

A session remembers where an object lies, and how long it is. It reads exactly what it is asked for,
and refuses, without a word to anybody, what goes beyond the object's end. So a buffer's length is
tried first, and a byte behind what was read tells whether that was all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvstrata.errors import DeadlineExceeded
from kvstrata.tiers.mooncake import codes
from kvstrata.tiers.mooncake.client import Client, Open
from kvstrata.tiers.mooncake.memory import Loan

AGAIN = codes.LEASE_EXPIRED
PATIENCE_S = 5.0
"""For how long a read begins anew when its object was replaced, or held still no longer."""


def read(
    client: Client, current: Open, keys: Sequence[str], into: Sequence[memoryview]
) -> list[int]:
    """Read each object; its size, or a code.

    Raises:
        TierUnavailable: the master gives no answer.
    """
    lengths, left = [AGAIN] * len(keys), list(range(len(keys)))
    until = time.monotonic() + PATIENCE_S
    try:
        with current.memory.lend(into) as loans:
            while left:
                some = {keys[i]: i for i in left}
                with current.alone([f"get {key}" for key in some], until) as alone:
                    if not alone:
                        break
                    answers = _read(
                        client, current.store, list(some), [loans[i] for i in some.values()]
                    )
                for i, length in zip(some.values(), answers, strict=True):
                    lengths[i] = length
                again = AGAIN if time.monotonic() < until else None
                done = {i for i in some.values() if lengths[i] != again}
                left = [i for i in left if i not in done]
            for loan, length in zip(loans, lengths, strict=True):
                loan.give_back(max(0, length))
    except DeadlineExceeded:
        pass
    return lengths


def sizes_of(store: Any, keys: Sequence[str]) -> dict[str, int]:
    """How large each object is that is there."""
    found = store.batch_get_replica_desc(list(keys)) if keys else {}
    return {
        key: int(copy.get_memory_descriptor().buffer_descriptor.size)
        for key, copies in found.items()
        for copy in copies
        if copy.is_memory_replica()
    }


def _read(client: Client, store: Any, keys: list[str], loans: Sequence[Loan]) -> list[int]:
    """Of keys that differ."""
    lengths = list(client.answered(store.batch_get_session_start(keys)))
    wanted = {i: loans[i].nbytes for i, code in enumerate(lengths) if code == codes.OK}
    answers = _fetch(store, keys, loans, wanted)
    if others := [i for i in wanted if answers[i] == codes.INVALID]:
        sizes = sizes_of(store, [keys[i] for i in others])
        room = {i: loans[i].nbytes for i in others}
        # What is not of the size that was said, or is gone, was replaced meanwhile.
        answers |= {i: AGAIN for i in others if sizes.get(keys[i], 0) <= room[i]}
        wanted = {i: sizes[keys[i]] for i in others if 0 < sizes.get(keys[i], 0) < room[i]}
        answers |= {
            i: AGAIN if answer == codes.INVALID else answer
            for i, answer in _fetch(store, keys, loans, wanted).items()
        }
    store.batch_get_session_end(keys)
    return [answers.get(i, code) for i, code in enumerate(lengths)]


def _fetch(
    store: Any, keys: Sequence[str], loans: Sequence[Loan], sizes: Mapping[int, int]
) -> dict[int, int]:
    """Read so many bytes of each; that many, or a code: `INVALID` where the object has others."""
    if not sizes:
        return {}
    some, ends = [keys[i] for i in sizes], [[size] for size in sizes.values()]
    places = [[loans[i].address] for i in sizes]
    read = store.batch_get_into_multi_buffer_ranges(some, places, ends, [[0]] * len(some))
    more = store.batch_get_into_multi_buffer_ranges(some, places, [[1]] * len(some), ends)
    return {
        i: length if length < 0 or beyond == codes.INVALID else codes.INVALID
        for i, length, beyond in zip(sizes, read, more, strict=True)
    }
