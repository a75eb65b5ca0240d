"""What the doctor checks between two nodes: whether they meet, and why they do not share.

One function a question, one `Check` each, as in `kvstrata.cli.checks`.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from kvstrata import __version__
from kvstrata.cli.checks import Check
from kvstrata.errors import ConfigError, Incompatible, PeerRefused
from kvstrata.wire.namespaces import Shown

if TYPE_CHECKING:
    from kvstrata.secret import Secrets
    from kvstrata.transfer.tcp import Address

ANSWER_S = 3.0
MOST_SKEW_S = 2.0
MAX_STATUS_BYTES = 16 << 20
MAX_SHOWN_CHARS = 48


class Tier(msgspec.Struct, frozen=True):
    """Of a tier's status, what two nodes may have in common."""

    name: str
    state: str
    shared: bool = False
    written: bool = True
    epoch: str | None = None


class Status(msgspec.Struct, frozen=True):
    """Of ``kvstrata status --json``, what two nodes can be compared by."""

    release: str
    tiers: list[Tier]
    secret_checks: list[str] = []
    namespaces: list[Shown] = []

    @property
    def stores(self) -> dict[str, Tier]:
        """The tiers that a fleet writes to, by name."""
        return {tier.name: tier for tier in self.tiers if tier.shared and tier.written}


def read_status(file: Path) -> Status:
    """What another node's ``kvstrata status --json`` printed.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        with file.open("rb") as opened:
            return msgspec.json.decode(opened.read(MAX_STATUS_BYTES), type=Status)
    except OSError as error:
        raise ConfigError(str(file), f"cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            str(file), f"is not what `kvstrata status --json` prints: {error}"
        ) from error


def status_of(state: dict[str, Any]) -> Status:
    """The same of a node of this release."""
    return msgspec.convert(state, Status)


def check_peer(address: Address, known: Secrets, tls: ssl.SSLContext | None) -> Check:
    """Another node answers, knows a secret of ours, has the same release and the same time."""
    from kvstrata.transfer import tcp
    from kvstrata.transfer.peers import Ping

    name = f"peer {address}"
    began = time.time()
    try:
        channel = tcp.connect(address, known, ANSWER_S, tls)
    except (OSError, Incompatible, PeerRefused) as error:
        return Check(name, "FAIL", _why_not(error, address, tls))
    ended = time.time()
    try:
        channel.begin(ANSWER_S)
        since = time.perf_counter()
        tcp.ask(channel, Ping(), str(address))
        round_trip_ms = (time.perf_counter() - since) * 1e3
    except (OSError, Incompatible, PeerRefused) as error:
        return Check(name, "FAIL", f"it welcomed us and then failed: {error}")
    finally:
        channel.close()
    assert channel.hello is not None
    # It read its clock between these two moments of ours.
    skew_s = max(channel.hello.now - ended, began - channel.hello.now, 0.0)
    measured = {"round_trip_ms": round(round_trip_ms, 3), "skew_s": round(skew_s, 3)}
    if skew_s > MOST_SKEW_S:
        ahead = "ahead of" if channel.hello.now > ended else "behind"
        return Check(
            name,
            "warn",
            f"its clock is {skew_s:.1f} s {ahead} ours: the logs of the two cannot be compared, "
            "without a registry a clear may miss what the one ahead has stored, and an object "
            "store refuses requests with a time that is far off; let both follow one time server",
            measured,
        )
    if channel.hello.release != __version__:
        return Check(
            name,
            "warn",
            f"it runs KVStrata {channel.hello.release[:32]}, this is {__version__}: they speak one "
            "protocol; install one release on both",
            measured,
        )
    return Check(
        name,
        "ok",
        f"KVStrata {__version__} with the same secret, answers in {round_trip_ms:.1f} ms",
        measured,
    )


def _why_not(error: Exception, address: Address, tls: ssl.SSLContext | None) -> str:
    """What to do about a peer that could not be connected to."""
    match error:
        case PeerRefused() | Incompatible():
            return str(error)
        case ssl.SSLCertVerificationError():
            return (
                f"its certificate is not accepted: {error.verify_message}; it must be signed by "
                f"network.authority, and be for {address.host}"
            )
        case ssl.SSLError():
            return (
                f"TLS fails ({error.reason or error}): either it has none, or it does not accept "
                "network.certificate; configure [network] alike on both"
            )
        case socket.gaierror():
            return f"the name {address.host} is not known here: {error.strerror}"
        case ConnectionRefusedError():
            return "nobody listens there: is its node up, and is that its network.listen?"
        case TimeoutError():
            return (
                f"no answer within {ANSWER_S:g} s: a firewall between, another machine's address, "
                "or a node that hangs"
                + (", or one that has no TLS, as this configuration has" if tls else "")
            )
        case ConnectionError() if tls is None:
            return (
                "it hung up before it said who it is: it wants TLS, which this configuration does "
                "not have, or it is no node"
            )
    return f"{error} ({type(error).__name__})"


def compare(here: Status, there: Status) -> Iterator[Check]:
    """Why two nodes do not share, by what their statuses say."""
    yield _compare_releases(here, there)
    yield _compare_secrets(here, there)
    yield from _compare_stores(here, there)
    yield _compare_namespaces(here.namespaces, there.namespaces)


def _compare_releases(here: Status, there: Status) -> Check:
    if here.release != there.release:
        return Check(
            "version",
            "warn",
            f"KVStrata {here.release} here, {there.release[:32]} there: install one release on "
            "both; what one stores the other reads only if the pages Keys and Stored format of "
            "the two say the same version",
        )
    return Check("version", "ok", f"KVStrata {here.release} on both")


def _compare_secrets(here: Status, there: Status) -> Check:
    if not there.secret_checks or not here.secret_checks:
        return Check("secret", "warn", "that status does not say which secret its node has")
    ours, theirs = here.secret_checks[0], there.secret_checks[0]
    if set(here.secret_checks).isdisjoint(there.secret_checks):
        return Check(
            "secret",
            "FAIL",
            "the two have different secrets, so no key of one is a key of the other; copy "
            "secret_file of one machine to the other, and restart its node",
        )
    lost = [
        f"what is stored {where} by {_clip(used)} is not found {elsewhere}"
        for used, known, where, elsewhere in (
            (ours, there.secret_checks, "here", "there"),
            (theirs, here.secret_checks, "there", "here"),
        )
        if used not in known
    ]
    if lost:
        return Check(
            "secret",
            "warn",
            f"{'; '.join(lost)}: copy secret_file of the machine that was changed last to the "
            "other, and restart its node",
        )
    if ours != theirs:
        return Check(
            "secret",
            "ok",
            f"{ours} is stored by here, {_clip(theirs)} there; each looks up the other's, too",
        )
    more = len(here.secret_checks) + len(there.secret_checks) > 2
    return Check("secret", "ok", "the same on both" + (", and another one known" if more else ""))


def _compare_stores(here: Status, there: Status) -> Iterator[Check]:
    names = list({**here.stores, **there.stores})
    if not names and any(tier.shared for tier in [*here.tiers, *there.tiers]):
        yield Check("stores", "ok", "none; they share as peers, which `doctor --peer` tries")
    elif not names:
        yield Check(
            "stores",
            "FAIL",
            "neither has a store that both could use, nor peers: configure one tier that a fleet "
            "shares, or peers, on both",
        )
    for name in names:
        one, other = here.stores.get(name), there.stores.get(name)
        if one is None or other is None:
            where = "here" if one is None else "there"
            yield Check(name, "FAIL", f"there is no such tier {where}; configure it alike on both")
        elif not one.epoch or not other.epoch:
            what = f"{one.state} here, {other.state[:200]} there"
            yield Check(name, "FAIL", f"not in use on both: {what}")
        elif one.epoch != other.epoch:
            yield Check(
                name,
                "FAIL",
                f"epoch {one.epoch} here, {_clip(other.epoch)} there: the two do not use the same "
                "store (compare its address and prefix in `kvstrata config`), or it was cleared "
                "between the two statuses",
            )
        else:
            yield Check(name, "ok", f"epoch {one.epoch} on both: the same store")


def _compare_namespaces(here: Sequence[Shown], there: Sequence[Shown]) -> Check:
    """What one engine stores another finds only if every part of its namespace is equal."""
    if not here or not there:
        where = "here" if not here else "there"
        return Check(
            "namespaces",
            "warn",
            f"no engine has asked the node {where} yet, so its namespaces are not known; send an "
            "engine a request and try again",
        )
    known = {one.parts for one in here}
    common = [one for one in there if one.parts in known]
    others = [one for one in there if one.parts not in known]
    result: Literal["ok", "warn", "FAIL"] = "ok" if not others else "warn" if common else "FAIL"
    words = [f"{len(common)} in common"] if common else ["none in common"]
    words += [_nearest(other, here) for other in others]
    return Check("namespaces", result, "; ".join(words))


def _nearest(other: Shown, here: Sequence[Shown]) -> str:
    """How a namespace differs from the one of ours that is most like it."""
    differences = min((_differences(one, other) for one in here), key=len)
    name = _clip(other.model.get("name", "a model"))
    return f"{name} differs in " + ", ".join(differences)


def _differences(one: Shown, other: Shown) -> list[str]:
    found = []
    theirs = asdict(other.parts)
    for part, value in asdict(one.parts).items():
        if value == theirs[part]:
            continue
        if part != "model":
            found.append(f"{part} ({_clip(value)} here, {_clip(theirs[part])} there)")
            continue
        details = [
            f"model {detail} ({_clip(one.model.get(detail))} here, "
            f"{_clip(other.model.get(detail))} there)"
            for detail in {**one.model, **other.model}
            if detail != "name" and one.model.get(detail) != other.model.get(detail)
        ]
        found += details or ["model"]
    return found


def _clip(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."
