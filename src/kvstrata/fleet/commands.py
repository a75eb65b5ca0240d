"""Commands to a fleet: entries of one stream, numbered without gaps, that each node carries out.

A command is an operator's request of the node's own protocol, and what a node answers is what it
would answer on its socket. Numbers come from the stream itself, so a node that has been away knows
what it missed, and whether the registry still knows all of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import msgspec

from kvstrata.errors import Incompatible, TierUnavailable, UsageError
from kvstrata.fleet.members import LASTS_S, Member
from kvstrata.fleet.registry import Registry, born
from kvstrata.wire import protocol as p
from kvstrata.wire.message import Message, Strings

MAX_COMMANDS = 256
"""That the registry keeps; a node that missed more than these forgets all that it has."""
ANSWERS_S = 86400
"""For how long answers are kept."""
POLL_S = 0.05
LASTING: tuple[type, ...] = (p.Clear, p.Pin, p.Unpin, p.Quota)
"""Requests that a node which was away carries out when it is back, before it takes part."""

_POST = """
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)
local now = redis.call('TIME')
local number = last[1] and tonumber(string.match(last[1][1], '^%d+')) + 1 or 1
redis.call('SETNX', KEYS[3], ARGV[3] .. ':' .. now[1] .. string.format('.%06d', now[2]))
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], string.format('%.0f-0', number), 'c', ARGV[1])
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
  if tonumber(string.match(field, '^%d+')) <= number - ARGV[2] then
    redis.call('HDEL', KEYS[2], field)
  end
end
return {number, redis.call('GET', KEYS[3])}
"""

_ANSWER = """
local boot = ARGV[2]
local old = redis.call('GET', KEYS[4])
if old and string.sub(old, 1, 16) > boot then return 0 end
if redis.call('GET', KEYS[5]) ~= ARGV[6] then return 0 end
if ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[4])
  redis.call('EXPIRE', KEYS[1], ARGV[5])
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
for i = 7, #ARGV do redis.call('HSET', KEYS[3], ARGV[3] .. ':' .. ARGV[i], ARGV[1]) end
return 1
"""


class Command(Message, frozen=True):
    """One entry.

    Args:
        protocol: of the request.
        posted: when it was given, seconds since 1970 by the registry's clock.
        until: likewise; only what is `LASTING` is carried out later.
        nodes: for these alone; empty: for all.
        request: as a frame's body. A reload names the options alone that change, by their paths.
    """

    protocol: int
    posted: float
    until: float
    nodes: Strings
    request: Annotated[bytes, msgspec.Meta(max_length=p.MAX_FRAME_BYTES)]


_decoder = msgspec.msgpack.Decoder(Command)


def decode_command(value: bytes) -> Command:
    """One entry of the stream.

    Raises:
        Incompatible: it is none.
    """
    try:
        return _decoder.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Incompatible(f"the fleet's command is none: {error}") from error


class Answers(NamedTuple):
    """What became of a command.

    Args:
        answered: what each node answered, by its name.
        gone: nodes whose registration ran out first. They carry it out before they use anything
            that they share again.
        silent: nodes that were registered when the time was over, and had not answered.
    """

    answered: dict[str, p.Reply]
    gone: list[str]
    silent: list[str]

    @property
    def failed(self) -> dict[str, p.Failed]:
        """The answers that say that it could not be done."""
        return {name: one for name, one in self.answered.items() if isinstance(one, p.Failed)}

    @property
    def done(self) -> bool:
        """Whether every node has done it, or is none of the fleet any more."""
        return not self.silent and not self.failed


class Posted(NamedTuple):
    """A command that was given.

    Args:
        number: of it.
        generation: of the registry.
        nodes: whose answers are waited for.
        everybody: whether it is for all nodes.
        young_s: for how long there may be nodes that registered in an earlier generation, and rely
            on that, and are not known in this one.
    """

    number: int
    generation: bytes
    nodes: frozenset[str]
    everybody: bool = False
    young_s: float = 0.0


def post(
    registry: Registry, request: p.Request, timeout_s: float, nodes: Sequence[str] = ()
) -> Posted:
    """Give a command.

    Args:
        registry: of the fleet.
        request: a message that a node takes as a command; its ``id`` plays no part.
        timeout_s: nodes that come to it later leave it, unless it is `LASTING`.
        nodes: for these alone; empty: for all.
    Raises:
        TierUnavailable: the registry cannot be used; whether it was given is not known.
        UsageError: one of the nodes is not there, or the request names a tier that none of them
            has.
    """
    there = registry.members()
    members = {member.name for member in there}
    if missing := set(nodes) - members:
        raise UsageError(f"no node {min(missing)!r} is registered; there are {sorted(members)}")
    _check_tiers(request, [one for one in there if not nodes or one.name in nodes])
    names = registry.names
    with registry.call():
        now = registry.run("TIME")
        command = Command(
            p.PROTOCOL_VERSION,
            int(now[0]) + int(now[1]) / 1e6,
            int(now[0]) + 1 + timeout_s,
            list(nodes),
            p.encode(request)[p.LENGTH_BYTES :],
        )
        number, generation = registry.script(
            _POST, [names.commands, names.cleared, names.generation],
            msgspec.msgpack.encode(command), MAX_COMMANDS, b"unknown",
        )  # fmt: skip
    # Who registers after the command was given carries it out before it takes part.
    present = members | {member.name for member in registry.members()}
    age_s = command.posted - born(generation)
    young_s = min(max(0.0, LASTS_S - age_s), LASTS_S)
    return Posted(number, generation, frozenset(nodes or present), not nodes, young_s)


def _check_tiers(request: p.Request, members: Sequence[Member]) -> None:
    match request:
        case p.Clear(tiers=named):
            there = {tier.tier for one in members for tier in one.tiers}
        case p.Quota(tier=tier):
            named = [tier]
            there = {tier.tier for one in members for tier in one.tiers if not tier.shared}
        case _:
            return
    if there and (missing := set(named) - there):
        known = ", ".join(sorted(there))
        raise UsageError(f"no node has a tier {min(missing)!r}; there are {known}")


def wait(
    registry: Registry,
    posted: Posted,
    timeout_s: float,
    tell: Callable[[str, p.Reply], None] = lambda name, reply: None,
) -> Answers:
    """Wait until every node has answered or its registration has run out.

    Args:
        registry: of the fleet.
        posted: the command.
        timeout_s: how long to wait at most.
        tell: is told of each answer as it comes.
    Raises:
        TierUnavailable: the registry cannot be used, or has lost its memory meanwhile; or just
            before, and the time is over before all nodes can have registered again.
    """
    began = time.monotonic()
    deadline, settled = began + timeout_s, began + posted.young_s
    nodes = posted.nodes
    answered: dict[str, p.Reply] = {}
    while True:
        # Who is registered is asked first: a node may answer, and end, in between.
        young = time.monotonic() < settled
        members = {member.name for member in registry.members()}
        if posted.everybody and young:
            nodes |= members
        with registry.call():
            if registry.run("GET", registry.names.generation) != posted.generation:
                raise TierUnavailable(
                    "the registry has lost its memory while the command was under way: repeat it"
                )
            flat = registry.run("HGETALL", registry.names.answers(posted.number))
        for name, body in _answers(flat):
            if name not in answered:
                answered[name] = body
                tell(name, body)
        waiting = nodes - answered.keys()
        late = time.monotonic() >= deadline
        if late and young and not waiting & members:
            raise TierUnavailable(
                "the registry is new or has lost its memory: not all nodes can have registered "
                "yet; repeat the command"
            )
        if late or not (young or waiting & members):
            return Answers(answered, sorted(waiting - members), sorted(waiting & members))
        time.sleep(POLL_S)


def give(
    registry: Registry, request: p.Request, timeout_s: float, nodes: Sequence[str] = ()
) -> Answers:
    """Give a command and wait for it, see `post` and `wait`."""
    return wait(registry, post(registry, request, timeout_s, nodes), timeout_s)


def one_by_one(
    registry: Registry,
    request: p.Request,
    timeout_s: float,
    tell: Callable[[str, p.Reply], None] = lambda name, reply: None,
    nodes: Sequence[str] = (),
) -> Answers:
    """Give a command to one node after the other, and to the next only if all went well so far.

    Args:
        registry: of the fleet.
        request: as of `post`.
        timeout_s: for each of them.
        tell: as of `wait`.
        nodes: as of `post`.
    Raises:
        TierUnavailable: as of `wait`.
    """
    answered: dict[str, p.Reply] = {}
    gone: list[str] = []
    left = list(nodes) or [member.name for member in registry.members()]
    for name in left:
        if name not in {member.name for member in registry.members()}:
            gone.append(name)
            continue
        one = wait(registry, post(registry, request, timeout_s, [name]), timeout_s, tell)
        answered |= one.answered
        gone += one.gone
        if not one.done:
            return Answers(answered, gone, [x for x in left if x not in answered and x not in gone])
    return Answers(answered, gone, [])


def answer(
    registry: Registry,
    generation: bytes,
    member: Member,
    number: int,
    reply: p.Reply | None,
    cleared: Sequence[str] = (),
) -> None:
    """A node's answer to a command; from now on it counts as carried out there.

    Args:
        registry: of the fleet.
        generation: of the registry that gave the command; another one is told nothing.
        member: the node.
        number: of the command.
        reply: None: it was not for this node.
        cleared: the shared stores that it has cleared, see `already_cleared`.
    Raises:
        TierUnavailable: the registry cannot be used.
    """
    names = registry.names
    body = b"" if reply is None else p.encode(reply)[p.LENGTH_BYTES :]
    keys = [names.answers(number), names.seen, names.cleared, names.member(member.name)]
    keys.append(names.generation)
    with registry.call():
        registry.script(
            _ANSWER,
            keys,
            member.name,
            b"%016d" % member.boot,
            number,
            body,
            ANSWERS_S,
            generation,
            *cleared,
        )


def already_cleared(registry: Registry, number: int, stores: Sequence[str]) -> set[str]:
    """Which of these shared stores another node has cleared for a command already.

    Raises:
        TierUnavailable: the registry cannot be used.
    """
    if not stores:
        return set()
    fields = [f"{number}:{store}" for store in stores]
    with registry.call():
        found = registry.run("HMGET", registry.names.cleared, *fields)
    return {store for store, by in zip(stores, found, strict=True) if by is not None}


def _answers(flat: Sequence[bytes] | dict[bytes, bytes]) -> Sequence[tuple[str, p.Reply]]:
    pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
    found: list[tuple[str, p.Reply]] = []
    for name, body in pairs:
        try:
            reply = p.decode_reply(body)
        except Incompatible as error:
            reply = p.Failed(0, "Incompatible", str(error))
        found.append((name.decode(errors="replace"), reply))
    return found
