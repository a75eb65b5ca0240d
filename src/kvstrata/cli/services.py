"""What the doctor looks at beside the node: clocks of stores, the registry, the HTTP API."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvstrata.cli.checks import Check
from kvstrata.cli.fleet import MOST_SKEW_S
from kvstrata.errors import ConfigError, KVStrataError, NodeUnavailable

if TYPE_CHECKING:
    from kvstrata.config import Config
    from kvstrata.fleet.members import Member
    from kvstrata.tiers.redis.client import Client

ANSWER_S = 3.0
OF_STORE = (
    "where the fleet has no registry a clear by age, and one that a node has not heard of, go by "
    "the nodes' own clocks with a margin of 60 s: it misses what one further ahead has stored"
)
OF_REGISTRY = (
    "what is stored is dated by the registry's, so that no clear misses any of it, but pins end by "
    "this machine's"
)

Clock = Callable[[], float]


def check_services(
    config: Config, state: Mapping[str, Any], clock: Clock = time.time
) -> Iterator[Check]:
    """All that is configured of these.

    Args:
        config: of the node.
        state: its status.
        clock: seconds since 1970.
    """
    from kvstrata.config import RedisConfig

    for part in config.tiers:
        if isinstance(part, RedisConfig):
            yield from _of_redis(part, clock)
    if config.fleet.registry is not None:
        yield from _of_registry(config, state, clock)
    if config.api.listen is not None:
        yield check_api(config, state)


def check_clock(
    name: str, ask: Callable[[], float], clock: Clock = time.time, matters: str = OF_STORE
) -> Check:
    """By how much this machine's clock and a server's differ.

    Args:
        name: the server's.
        ask: its time, in seconds since 1970.
        clock: ours.
        matters: what comes of it where they differ.
    """
    before = clock()
    there = ask()
    after = clock()
    # It read its clock between these two moments of ours.
    skew_s = max(there - after, before - there, 0.0)
    measured = {"skew_s": round(skew_s, 3)}
    if skew_s <= MOST_SKEW_S:
        return Check(f"{name} clock", "ok", f"ours and its differ by {skew_s:.1f} s", measured)
    ahead = "ahead of" if there > after else "behind"
    return Check(
        f"{name} clock",
        "warn",
        f"it is {skew_s:.1f} s {ahead} ours: {matters}, and logs cannot be compared. Let both "
        "follow one time server (chronyc tracking says what this machine follows)",
        measured,
    )


def _time_of(client: Client) -> float:
    with client.call():
        seconds, micros = client.run("TIME")
    return int(seconds) + int(micros) / 1e6


def _of_redis(part: Any, clock: Clock) -> Iterator[Check]:
    """Of the `[redis]` tier; whether it answers at all its own state says."""
    try:
        from kvstrata.tiers.redis.client import Client
    except ModuleNotFoundError:
        return
    client = Client(part.url, 1, ANSWER_S)
    try:
        yield check_clock("redis", lambda: _time_of(client), clock)
    except KVStrataError as error:
        yield Check("redis clock", "warn", f"not known: {error}")
    finally:
        client.close()


def _of_registry(config: Config, state: Mapping[str, Any], clock: Clock) -> Iterator[Check]:
    from kvstrata.fleet.registry import Registry

    name = str((state.get("fleet") or {}).get("name", ""))
    try:
        registry = Registry.of(config)
    except ConfigError as error:
        yield Check("registry", "FAIL", str(error))
        return
    try:
        yield _check_members(registry.members(), name)
        yield check_clock("registry", lambda: registry.now_ns() / 1e9, clock, OF_REGISTRY)
    except KVStrataError as error:
        yield Check(
            "registry",
            "FAIL",
            f"{error}; until it is back the node uses no shared tiers and no peers. Is it up, and "
            "is that its address (fleet.registry)?",
        )
    finally:
        registry.close()


def _check_members(members: Sequence[Member], name: str) -> Check:
    """The node is there, and the others run and keep what it does."""
    ours = next((one for one in members if one.name == name), None)
    if ours is None:
        return Check(
            "registry",
            "FAIL",
            f"it answers, but the node ({name or 'of another configuration'}) is not registered "
            "there: it was started without this fleet.registry or fleet.prefix, or lost it; its "
            "log says which",
        )
    others = [one for one in members if one is not ours]
    wrong = [f"{one.name} runs {one.release[:32]}" for one in others if one.release != ours.release]
    used = {one.namespace for one in ours.models}
    wrong += [
        f"{one.name} has no namespace in common with this node"
        for one in others
        if used and one.models and used.isdisjoint(model.namespace for model in one.models)
    ]
    if wrong:
        return Check(
            "registry",
            "warn",
            f"{'; '.join(wrong)}: install one release on all; which part of a namespace differs "
            "says `kvstrata doctor --against` with that node's `kvstrata status --json`",
        )
    more = f", with {len(others)} others" if others else ", alone"
    return Check("registry", "ok", f"{name} is a {ours.state} of the fleet{more}")


def check_api(config: Config, state: Mapping[str, Any]) -> Check:
    """The HTTP API answers with our token, is this node's, and of its release."""
    try:
        from kvstrata.cli.asking import api_url
        from kvstrata.control import Client
        from kvstrata.control.access import own_token
    except ModuleNotFoundError as error:
        missing = f"needs {error.name}; run: pip install 'kvstrata[control]'"
        return Check("api", "FAIL", missing)
    url = api_url(config.api)
    try:
        token = own_token(config.api, os.environ)
        with Client(url, token, ANSWER_S, config.api.tls_certificate) as client:
            found = client.version()
    except NodeUnavailable as error:
        return Check(
            "api",
            "FAIL",
            f"nobody answers at {url} ({error}): `kvstrata serve --api` starts it with the node, "
            "`kvstrata api` beside it",
        )
    except KVStrataError as error:
        return Check("api", "FAIL", f"{url}: {error}")
    if found.node_pid != state["pid"]:
        return Check(
            "api",
            "FAIL",
            f"{url} is the API of another node (pid {found.node_pid}): give each node its own "
            "api.listen",
        )
    if found.release != state["release"]:
        return Check(
            "api",
            "warn",
            f"{url} runs KVStrata {found.release}, the node {state['release']}: restart it",
        )
    return Check("api", "ok", f"answers at {url}")
