"""The tiers of a node by name, and what a chunk is made of in them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvstrata.errors import UsageError, did_you_mean
from kvstrata.node.service.backing import Backing, Question
from kvstrata.node.service.owned import OwnedBacking
from kvstrata.node.service.peers import PeerBacking
from kvstrata.node.service.shared import SharedBacking
from kvstrata.node.service.single import Singly
from kvstrata.node.slots.host import HostMemory
from kvstrata.parts import MAX_PART

HOST = "host"


class Made(NamedTuple):
    """What chunks are made of, as far as whoever asks says it; nothing said is found out.

    Args:
        parts: that make up a chunk; empty: those that the tier knows of.
        orders: that will do; empty: any.
        namespace: without which, and orders and parts, shared tiers cannot be asked.
        needs: of each part, how many of the last chunks a boundary needs; 0, and empty: all.
    """

    parts: tuple[int, ...]
    orders: tuple[str, ...]
    namespace: bytes
    needs: tuple[int, ...] = ()

    @classmethod
    def checked(
        cls,
        parts: Sequence[int],
        orders: Sequence[str],
        namespace: bytes,
        needs: Sequence[int] = (),
    ) -> Made:
        """Raises `UsageError` for what nothing can be made of."""
        if len(set(parts)) != len(parts) or not all(0 <= part <= MAX_PART for part in parts):
            raise UsageError(f"{list(parts)} are no parts, each once: group << 16 | rank")
        if len(namespace) not in (0, 32):
            raise UsageError(f"a namespace of {len(namespace)} bytes, not 32")
        if needs and (len(needs) != len(parts) or min(needs) < 0):
            raise UsageError(f"needs of {list(needs)} do not go with {len(parts)} parts")
        return cls(tuple(parts), tuple(dict.fromkeys(orders)), namespace, tuple(needs))

    @property
    def optional(self) -> tuple[int, ...]:
        """The parts that a chunk may be without."""
        return tuple(part for part, need in zip(self.parts, self.needs, strict=False) if need)

    def check_for(self, backing: Singly) -> None:
        """Raises `UsageError` where more has to be said, since a tier is known only by asking."""
        if backing.must_be_asked and not (self.parts and self.orders and self.namespace):
            raise UsageError(
                f"{backing.name} is shared, and known only by asking: name parts, orders and the "
                "namespace"
            )


class Places:
    """Host memory and the slower tiers, by name.

    Args:
        host: host memory.
        backings: the slower tiers.
    """

    def __init__(self, host: HostMemory, backings: Sequence[Backing]) -> None:
        self.host = host
        self.backings = [one for one in backings if isinstance(one, Singly)]
        self._named = {one.name: one for one in self.backings}
        self.peers = next((one for one in self.backings if isinstance(one, PeerBacking)), None)

    @property
    def names(self) -> list[str]:
        """Of all tiers, host memory first."""
        return [HOST, *self._named]

    @property
    def owned(self) -> list[str]:
        """Of those that are this node's alone: what they hold is known."""
        return [HOST, *(one.name for one in self.backings if isinstance(one, OwnedBacking))]

    def holders(self) -> dict[str, Callable[[bytes], bool]]:
        """Whether a tier of the node's own holds anything of a chunk, by the tier's name."""
        indexes = {one.name: one.index for one in self.backings if isinstance(one, OwnedBacking)}
        return {HOST: self.host.index.__contains__} | {
            name: index.__contains__ for name, index in indexes.items()
        }

    def named(self, name: str) -> Singly | None:
        """A tier; None: host memory. Raises `UsageError` where there is none of that name."""
        if name != HOST and name not in self._named:
            hint = did_you_mean(name, self.names)
            raise UsageError(f"no tier {name!r} here{hint}; there are {', '.join(self.names)}")
        return self._named.get(name)

    def owned_named(self, name: str) -> OwnedBacking | None:
        """Likewise, of those whose contents are known."""
        backing = self.named(name)
        if backing is None or isinstance(backing, OwnedBacking):
            return backing
        raise UsageError(f"what {name} holds is known only by asking: name the keys")

    def keeps(self, key: bytes, name: str) -> bool:
        """Whether a chunk is pinned in a tier."""
        backing = self._named.get(name)
        if backing is None:
            return key in self.host.index.pinned
        return isinstance(backing, OwnedBacking) and key in backing.index.pinned

    def can_keep(self, name: str) -> bool:
        """Whether what is pinned stays pinned in a tier: one of the slower ones, the node's own."""
        return isinstance(self._named.get(name), OwnedBacking)

    def parts_of(self, key: bytes, name: str) -> list[int]:
        """The objects that a tier of the node's own has of a chunk, without coarser copies."""
        backing = self._named.get(name)
        if backing is None:
            return [part for part, _ in self.host.index.objects(key)]
        if not isinstance(backing, OwnedBacking):
            return []
        return [part for part, _ in backing.index.objects(key) if part <= MAX_PART]

    async def ask(self, keys: Sequence[bytes], made: Made, backings: Sequence[Singly]) -> None:
        """Let shared tiers say what they have of these chunks, however long that takes."""
        shared = [one for one in backings if isinstance(one, SharedBacking)]
        if not (shared and made.parts and made.orders and made.namespace):
            return
        every = tuple(part for part in made.parts if part not in made.optional)
        questions = [Question(made.namespace, keys, every, made.orders)] if every else []
        if made.optional:  # of each of them any chunk may be there
            needs = (len(keys),) * len(made.optional)
            some = Question(made.namespace, keys, made.optional, made.orders, needs=needs)
            questions.append(some)
        await asyncio.gather(*[one.ask(each) for one in shared for each in questions])
