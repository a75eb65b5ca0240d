"""The registry: where nodes register for a while, renew that, and learn what they are to do."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstrata.config import Config
from kvstrata.errors import ConfigError, Incompatible, KVStrataError
from kvstrata.fleet.members import Member, decode_member, encode_member
from kvstrata.fleet.names import Names
from kvstrata.tiers.base import Outcome

if TYPE_CHECKING:
    from kvstrata.tiers.redis.client import Client

TIMEOUT_S = 2.0
FORGET_S = 30 * 86400.0
"""A node that has not been seen for so long is forgotten; one that comes back begins anew."""
BATCH = 16
"""Commands that are read at once."""
HELD_S = 3600
"""For how long what a node holds is kept in the registry after it renewed that last."""

_BEGIN = """
local now = redis.call('TIME')
local boot = now[1] * 1000 + math.floor(now[2] / 1000)
local old = redis.call('GET', KEYS[1])
if old then boot = math.max(boot, tonumber(string.sub(old, 1, 16)) + 1) end
local top = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if top[1] then boot = math.max(boot, tonumber(string.match(top[1][1], '^%d+')) + 1) end
return string.format('%.0f', boot)
"""

# Registered first, then told of commands: whoever posts one later finds the node registered.
_RENEW = """
local name, value, now = ARGV[1], ARGV[2], redis.call('TIME')
local old = redis.call('GET', KEYS[1])
if old and string.sub(old, 1, 16) > string.sub(value, 1, 16) then return {now, 0} end
redis.call('SET', KEYS[1], value, 'PX', ARGV[3])
local last = redis.call('ZSCORE', KEYS[2], name)
redis.call('ZADD', KEYS[2], now[1], name)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. (now[1] - ARGV[6]))
redis.call('SETNX', KEYS[3], ARGV[4] .. ':' .. now[1] .. string.format('.%06d', now[2]))
for i = 6, #KEYS do redis.call('EXPIRE', KEYS[i], ARGV[7]) end
local seen = tonumber(ARGV[5])
if seen < 0 then seen = tonumber(redis.call('HGET', KEYS[5], name) or '0') end
local after = string.format('(%.0f-0', seen)
local commands = redis.call('XRANGE', KEYS[4], after, '+', 'COUNT', ARGV[8])
return {now, 1, redis.call('GET', KEYS[3]), seen, commands, old and 1 or 0, last or ''}
"""

_LEAVE = """
local old = redis.call('GET', KEYS[1])
if old and string.sub(old, 1, 16) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

# The keys of all members are made in it: they are in the one slot of the key that it is given.
_MEMBERS = """
local found = {}
for _, name in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local value = redis.call('GET', ARGV[1] .. name)
  if value then found[#found + 1] = value end
end
return found
"""


class Renewal(NamedTuple):
    """What the registry said to a node that registered.

    Args:
        displaced: another process has the node's name now; nothing else is said.
        generation: tells the registry from one that has lost its memory.
        seen: number of the last command that the node has carried out.
        commands: those after it, the next few: number and value.
        before: whether the node was registered when it came.
        now: seconds since 1970 by the registry's clock.
        last: when a node of this name registered before that, likewise; 0: never.
        clock_offset_s: by how much this machine's clock is ahead of the registry's.
    """

    displaced: bool
    generation: bytes = b""
    seen: int = 0
    commands: Sequence[tuple[int, bytes]] = ()
    before: bool = False
    now: float = 0.0
    last: float = 0.0
    clock_offset_s: float = 0.0


class Registry:
    """A fleet's registry; thread-safe, every call blocks and ends within its deadline.

    Args:
        client: of the Redis that it is.
        prefix: of all its keys.
    """

    def __init__(self, client: Client, prefix: str) -> None:
        self.client = client
        self.names = Names(prefix)

    @classmethod
    def of(cls, config: Config) -> Registry:
        """The one that is configured.

        Raises:
            ConfigError: there is none, or its client is missing.
        """
        if config.fleet.registry is None:
            raise ConfigError("fleet.registry", "missing; docs/fleet.md says what it is")
        try:
            from kvstrata.tiers.redis.client import Client
        except ModuleNotFoundError as error:
            raise ConfigError(
                "fleet.registry", f"its client is missing ({error}); pip install 'kvstrata[redis]'"
            ) from error
        return cls(Client(config.fleet.registry, 4, TIMEOUT_S), config.fleet.prefix)

    def close(self) -> None:
        """Hang up. Repeatable."""
        self.client.close()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """What is done in it has the time of one call.

        Raises:
            TierUnavailable: the registry cannot be used.
        """
        with self.client.call():
            yield

    def run(self, *command: Any) -> Any:
        """One command, and its reply.

        Raises:
            Incompatible: something else has one of the registry's keys.
        """
        reply = self.client.run(*command)
        if reply is Outcome.FAILED:
            raise Incompatible(f"something else than a registry has the key {command[1]!r}")
        return reply

    def now_ns(self) -> int:
        """Nanoseconds since 1970, by its clock.

        Raises:
            TierUnavailable: the registry cannot be used.
        """
        with self.call():
            seconds, micros = self.run("TIME")
        return (int(seconds) * 10**6 + int(micros)) * 1000

    def script(self, text: str, keys: Sequence[bytes], *arguments: Any) -> Any:
        """A script of the server's, at once for all."""
        return self.run("EVAL", text, len(keys), *keys, *arguments)

    def begin(self, name: str) -> int:
        """The boot of a process that is to be the node of this name.

        Raises:
            TierUnavailable: the registry cannot be used.
        """
        with self.call():
            return int(self.script(_BEGIN, [self.names.member(name), self.names.events(name)]))

    def renew(self, member: Member, lasts_s: float, seen: int | None) -> Renewal:
        """Register a node for a while, and hear what it has to do.

        Args:
            member: the node.
            lasts_s: for how long, in seconds.
            seen: number of the last command that it has carried out; None: the registry knows.
        Raises:
            TierUnavailable: the registry cannot be used.
        """
        names = self.names
        keys = [
            names.member(member.name),
            names.names,
            names.generation,
            names.commands,
            names.seen,
        ]
        keys += [names.held(member.name, member.boot, one.tier) for one in member.tiers]
        before = time.time()
        with self.call():
            now, registered, *rest = self.script(
                _RENEW, keys, member.name, encode_member(member), int(1000 * lasts_s),
                secrets.token_hex(16), -1 if seen is None else seen, int(FORGET_S), HELD_S, BATCH,
            )  # fmt: skip
        there = int(now[0]) + int(now[1]) / 1e6
        offset = (before + time.time()) / 2 - there
        if not registered:
            return Renewal(True)
        generation, seen, entries, known, last = rest
        commands = [(number_of(id), dict(_pairs(fields)).get(b"c", b"")) for id, fields in entries]
        last_s = float(last) if last else 0.0
        return Renewal(False, generation, seen, commands, bool(known), there, last_s, offset)

    def leave(self, member: Member) -> None:
        """End a node's registration, if it is this process's still."""
        with self.call():
            self.script(_LEAVE, [self.names.member(member.name)], b"%016d" % member.boot)

    def members(self) -> list[Member]:
        """The nodes that are registered, by their names.

        Raises:
            TierUnavailable: the registry cannot be used.
        """
        names = self.names
        found = []
        with self.call():
            values = self.script(_MEMBERS, [names.names], names.member(""))
        for value in values:
            with contextlib.suppress(KVStrataError):  # of a release that says it in other words
                found.append(decode_member(value))
        return sorted(found, key=lambda member: member.name)


def born(generation: bytes) -> float:
    """When a registry began with nothing, seconds since 1970 by its clock; 0: it does not say."""
    try:
        return float(generation.rpartition(b":")[2])
    except ValueError:
        return 0.0


def number_of(entry: bytes) -> int:
    """The first half of the id of a stream's entry."""
    return int(entry.partition(b"-")[0])


def _pairs(fields: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    yield from zip(fields[::2], fields[1::2], strict=True)
