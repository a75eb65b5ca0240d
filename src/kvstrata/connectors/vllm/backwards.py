"""Chunks of a load that arrive the last first, on their way into their blocks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kvstrata.connectors.vllm.meeting import Meeting
from kvstrata.errors import DeadlineExceeded, KVStrataError, NodeUnavailable
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

logger = logging.getLogger(__name__)

SLEEP_S = 0.02
"""For how long one who waits sleeps before it sees that nothing is wanted any more."""

Copy = Callable[[list[list[int]], int, int], None]
"""Copies chunks of a load: the slots of all of them, the first of these, and behind the last."""


def bring(meeting: Meeting, client: NodeClient | None, copy: Copy, deadline: float) -> None:
    """Copy a load's chunks as they arrive, until it meets what is computed; never raises.

    Args:
        meeting: of the load.
        client: of the node that brings it.
        copy: returns once they lie in their blocks.
        deadline: of the whole load, monotonic seconds.
    """
    load = meeting.load
    try:
        if client is None or client.hello.node != load.node:
            raise NodeUnavailable("this worker is not attached to the node of the lease")
        _bring(meeting, client, copy, deadline)
    except KVStrataError as error:
        meeting.fail()
        logger.warning("KVStrata: the rest of request %s is computed: %s", load.request_id, error)
    except Exception:
        meeting.fail()
        logger.exception("KVStrata: a load died of a bug, request %s", load.request_id)


def _bring(meeting: Meeting, client: NodeClient, copy: Copy, deadline: float) -> None:
    offsets, first = list(meeting.load.offsets), meeting.load.first_chunk
    arriving = (i for i, chunk in enumerate(offsets) if p.ARRIVING in chunk)
    head = next(arriving, len(offsets))
    if not meeting.wanted:
        meeting.fail()
        return
    if head:
        copy(offsets, 0, head)
    meeting.begin(first + head)
    while meeting.wants_more:
        have = low = meeting.taken - first
        while low > head and p.ARRIVING not in offsets[low - 1]:
            low -= 1
        if low < have:
            some = meeting.take(first + low)
            if some:
                copy(offsets, some.start - first, some.stop - first)
            meeting.copied()
            continue
        came = _arrived(meeting, client, first + have, deadline)
        offsets[have - len(came) : have] = came


def _arrived(meeting: Meeting, client: NodeClient, first: int, deadline: float) -> list[list[int]]:
    """The slots of the chunks right before number ``first``, once there are any.

    None if they are not wanted any more.

    Raises:
        DeadlineExceeded: they will not come, or not in time.
        NodeUnavailable: the node has gone.
    """
    call = client.await_arrival_before(meeting.load.lease, first)
    while call.reply is None and meeting.wants_more:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        client.pump(call, min(left, SLEEP_S))
    if call.reply is None and not meeting.wants_more:
        call.abandon()
        return []
    arrived: p.Arrived = call.wait(0)
    slots, width = offsets_of(arrived.offsets).tolist(), len(meeting.load.parts)
    if not slots and meeting.wants_more:
        raise DeadlineExceeded(f"chunk {first - 1} did not come")
    return [slots[i : i + width] for i in range(0, len(slots), width)]
