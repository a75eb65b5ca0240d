"""What a node does when its fleet is told something: each command once, in order, answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from blake3 import blake3

from kvstrata.errors import (
    DeadlineExceeded,
    Incompatible,
    KVStrataError,
    TierUnavailable,
    UsageError,
)
from kvstrata.fleet import commands
from kvstrata.fleet.registry import Registry
from kvstrata.node.node import Node
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.peers import PeerBacking
from kvstrata.node.slots.clients import Client
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p

logger = logging.getLogger(__name__)

TAKEN: tuple[type, ...] = (
    p.Clear, p.Pin, p.Unpin, p.Quota, p.Flush, o.Drain, o.Undrain, o.Scrub, o.Prefetch, o.Copy,
    o.Move, o.Transcode, o.Reload,
)  # fmt: skip
"""The requests that a fleet may be told to carry out."""
LOOK_S = 0.05
"""Between two looks at a job."""
FORGETTING: tuple[type, ...] = (p.Clear,)
"""Those of them after which a node reads from no other until all have done it."""


class Obeying:
    """Carries commands out on a node's loop.

    Args:
        node: the node.
        registry: of the fleet.
        in_thread: does what blocks.
    """

    def __init__(
        self,
        node: Node,
        registry: Registry,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
    ) -> None:
        self.name = node.config.fleet.name
        self._node = node
        self._registry = registry
        self._in_thread = in_thread
        self._client = Client("the fleet")

    async def carry_out(
        self, number: int, value: bytes, absent_since: float | None
    ) -> tuple[p.Reply | None, list[str]]:
        """Do what an entry of the stream says.

        Args:
            number: of the command.
            value: the entry.
            absent_since: from when on the node has used nothing that it shares, seconds since 1970
                by the registry's clock; None: it uses that.
        Returns:
            The answer, None if it is for other nodes; and the shared stores that were cleared.
        """
        try:
            command = commands.decode_command(value)
            if command.nodes and self.name not in command.nodes:
                return None, []
            if command.protocol != p.PROTOCOL_VERSION:
                raise Incompatible(
                    f"the command is of protocol {command.protocol}, this node of "
                    f"{p.PROTOCOL_VERSION}; install one release everywhere"
                )
            request = p.decode_request(command.request)
            if not isinstance(request, TAKEN):
                raise UsageError(f"a {type(request).__name__.lower()} is nothing for a fleet")
            now_s = self._node.wall() / 1e9
            match request:
                case p.Clear():
                    late = absent_since is not None and command.posted > absent_since
                    return await self._clear(number, request, late)
                case p.Pin():  # its time runs from when it was given, for every node
                    left_s = request.ttl_s - max(0.0, now_s - command.posted)
                    if left_s <= 0:
                        return p.Pinned(0, len(request.keys) // 32, 0, {}, {}), []
                    request = msgspec.structs.replace(request, ttl_s=left_s)
            if isinstance(request, commands.LASTING):
                return await self._answer(request), []
            left_s = command.until - now_s
            if left_s <= 0:
                raise DeadlineExceeded("the command came too late, and was left")
            return await asyncio.wait_for(self._work(request), left_s), []
        except asyncio.TimeoutError:
            return p.Failed(0, "DeadlineExceeded", "it was not done in time"), []
        except KVStrataError as error:
            return p.Failed(0, type(error).__name__, str(error)), []
        except Exception as error:  # whoever may write to the registry must not end a membership
            logger.exception("command %d of the fleet failed by a mistake of ours", number)
            return p.Failed(0, "KVStrataError", f"a mistake of ours: {error!r}"), []

    async def forget_own(self) -> None:
        """Forget all that the node's own tiers have: it missed commands that nobody knows now."""
        own = [one.name for one in self._node.backings if isinstance(one, OwnedBacking)]
        try:
            await self._answer(p.Clear(0, None, ["host", *own]))
        except TierUnavailable as error:
            logger.error("not all that was to be forgotten could be deleted: %s", error)

    async def _work(self, request: p.Request) -> p.Reply | None:
        """Do it; of a job the answer is how it ended."""
        if isinstance(request, o.Reload):
            return await self._node.operations.amend(request.config)
        answer = await self._answer(request)
        if not isinstance(answer, o.Started):
            return answer
        job = self._node.operations.jobs.get(answer.job)
        while job is not None and job.running:
            await asyncio.sleep(LOOK_S)
        if job is None or job.state != "done":
            state = "gone" if job is None else f"{job.state}: {'; '.join(job.told().troubles)}"
            return p.Failed(0, "KVStrataError", f"the job {answer.job} is {state}")
        return o.JobPage(0, [job.told()], 0)

    async def _answer(self, request: p.Request) -> p.Reply | None:
        answer = self._node.handle(self._client, request)
        return await answer if isinstance(answer, Awaitable) else answer

    async def _clear(
        self, number: int, request: p.Clear, late: bool
    ) -> tuple[p.Reply | None, list[str]]:
        """A clear. A store that others have cleared since is not cleared again by who comes late.

        It has whatever was stored there after that, and the late node has stored nothing meanwhile.
        """
        tiers = ["host", *(one.name for one in self._node.backings)]
        if request.tiers:
            tiers = [name for name in tiers if name in request.tiers]
        stores = self._stores(tiers)
        if late:
            there = await self._in_thread(
                partial(commands.already_cleared, self._registry, number, list(stores.values()))
            )
            stores = {name: store for name, store in stores.items() if store not in there}
            tiers = [name for name in tiers if self._is_own(name) or name in stores]
        if not tiers:
            return p.Done(0, 0), []
        done = await self._answer(msgspec.structs.replace(request, id=0, tiers=tiers))
        return done, list(stores.values())

    def _is_own(self, name: str) -> bool:
        """Whether a tier is the node's alone, or the peers', of which it has only hints."""
        kinds = (OwnedBacking, PeerBacking)
        shared = [one.name for one in self._node.backings if not isinstance(one, kinds)]
        return name not in shared

    def _stores(self, tiers: list[str]) -> dict[str, str]:
        """By the name of a shared tier what tells its store from others'."""
        shown = self._node.config.shown()
        return {
            name: blake3(repr(sorted(shown.get(name, {}).items())).encode()).hexdigest(16)
            for name in tiers
            if not self._is_own(name)
        }
