"""What a store copies from blocks into slots, and the checksums of what it meant to copy.

A block that is not full has another request's KV behind its last token. None of that leaves the
engine: a tail goes by way of memory of the connector's own, where it is zeroed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvstrata.connectors.vllm.copies import Copier, Plan, copy_runs, payload_checksums
from kvstrata.connectors.vllm.payloads import Payloads
from kvstrata.objects import checksum


def fill(
    copier: Copier,
    payloads: Payloads,
    tail_tokens: int,
    addresses: Sequence[int],
    blocks: Sequence[int],
    after: Any,
    read: threading.Event,
) -> list[bytes]:
    """Copy blocks into slots; the checksums of their payloads.

    Args:
        copier: of these blocks.
        payloads: of their layer group.
        tail_tokens: that the one payload has, where it is no whole chunk; 0: all are.
        addresses: of the payloads.
        blocks: equally many for each payload.
        after: a mark of the copier's; the blocks hold their bytes from then on.
        read: set as soon as the blocks may be overwritten.
    """
    if tail_tokens % payloads.pages.block_tokens:
        (address,) = addresses
        return [_fill_tail(copier, payloads, tail_tokens, address, blocks, after, read)]
    plan = Plan(payloads.pages, addresses, blocks)
    sums = _checksums(copier, plan, len(addresses), before=True)
    copier.store(plan, after)
    read.set()  # what remains reads the slots
    return sums or _checksums(copier, plan, len(addresses), before=False)


def _fill_tail(
    copier: Copier,
    payloads: Payloads,
    num_tokens: int,
    address: int,
    blocks: Sequence[int],
    after: Any,
    read: threading.Event,
) -> bytes:
    pages = payloads.pages
    tail = np.empty(len(blocks) * len(pages.layer_names) * pages.page_bytes, np.uint8)
    copier.store(Plan(pages, [tail.ctypes.data], blocks), after)
    read.set()
    payloads.blank_behind(tail, num_tokens)
    digest = checksum(tail.data)
    copy_runs([address], [tail.ctypes.data], [tail.nbytes])
    return digest


def _checksums(copier: Copier, plan: Plan, count: int, *, before: bool) -> list[bytes]:
    """Of what is meant to be stored, so before the copy; where only a GPU reads the blocks, of
    what came, so after it."""
    if before is not copier.reads_blocks:
        return []
    pages = plan.blocks if before else plan.slots
    return payload_checksums(pages, plan.page_bytes, count)
