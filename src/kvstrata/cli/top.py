"""``kvstrata top``: a node as it works, in the terminal."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.cli.bounds import seconds
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.counting import total
from kvstrata.cli.join import NodeOption, configured, fail, join
from kvstrata.cli.plain import plain, shown
from kvstrata.errors import DeadlineExceeded, NodeUnavailable
from kvstrata.observe.records import number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvstrata.config import Config
    from kvstrata.wire.client import NodeClient
    from kvstrata.wire.operating import Chunk

SHOWN = 8
NUM_CHUNKS = 2000
"""That are looked at for the prefixes with the latest uses."""
ID_CHARS = 24


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    every: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            callback=seconds(0.2, 60.0),
            help="Seconds from one look to the next.",
        ),
    ] = 2.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one look, and end: for scripts.")
    ] = False,
) -> None:
    """Watch a running node: tiers, tenants, hit rate, bandwidth, prefixes, the slowest requests.

    Ctrl-C ends it. It never starts a node; one that ends is waited for, and its successor shown.
    With --once: exit status 1 and one line on stderr if none answers.
    """
    from rich.console import Console, Group
    from rich.live import Live

    config, console = configured(config_file, settings, node), Console()
    watch = Watch(config)
    try:
        if once:
            try:
                console.print(Group(*watch.look()))
            except (NodeUnavailable, DeadlineExceeded) as error:
                fail(error)
            return
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    parts = watch.look()
                except (NodeUnavailable, DeadlineExceeded) as error:
                    parts = [shown(f"no node: {error}", "yellow")]
                live.update(Group(*parts), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        pass
    finally:
        watch.close()


class Watch:
    """Looks at a node, and remembers the look before.

    Args:
        config: says which node.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._client: NodeClient | None = None
        self._before: tuple[float, Mapping[str, Any]] | None = None

    def look(self) -> list[RenderableType]:
        """The node now, and its rates since the look before.

        Raises:
            NodeUnavailable, DeadlineExceeded: none answers; the next look joins anew.
        """
        from kvstrata.wire.operator import Operator

        try:
            if self._client is None:
                self._client = join(self._config)
            now, state = time.monotonic(), self._client.status()
            chunks = [*itertools.islice(Operator(self._client).chunks(), NUM_CHUNKS)]
        except (NodeUnavailable, DeadlineExceeded):
            self.close()
            raise
        before = self._before
        self._before = (now, state)
        if before is None or before[1]["pid"] != state["pid"]:
            return render(state, state["uptime_s"], None, chunks)
        return render(state, now - before[0], before[1]["counters"], chunks)

    def close(self) -> None:
        """Let go of the node. Repeatable."""
        client, self._client, self._before = self._client, None, None
        if client is not None:
            client.close()


def render(
    state: Mapping[str, Any],
    seconds: float,
    before: Mapping[str, float] | None,
    chunks: Sequence[Chunk],
) -> list[RenderableType]:
    """One look.

    Args:
        state: the answer of `NodeClient.status`.
        seconds: since ``before``.
        before: the counters then; None: since the node started.
        chunks: some of what it holds.
    """
    rates = Rates(state["counters"], before or {}, max(seconds, 1e-3))
    since = "since it started" if before is None else f"in {seconds:.1f} s"
    parts: list[RenderableType] = [
        shown(f"KVStrata {state['release']} · pid {state['pid']} · {rates.words()} {since}"),
        _tiers(state, rates),
    ]
    if tenants := _tenants(state):
        parts.append(tenants)
    if chunks:
        parts.append(_prefixes(chunks))
    if records := [one for one in state["requests"] if number(one, "seconds")]:
        parts.append(_requests(records))
    return parts


class Rates:
    """Counters a second.

    Args:
        now, before: counters.
        seconds: between them.
    """

    def __init__(
        self, now: Mapping[str, float], before: Mapping[str, float], seconds: float
    ) -> None:
        self._rises = {name: value - before.get(name, 0) for name, value in now.items()}
        self._seconds = seconds

    def of(self, name: str, *labels: str) -> float:
        """Of one counter, over all labels or those that have these values."""
        return total(self._rises, name, *labels) / self._seconds

    def words(self) -> str:
        """How it hits."""
        asked, own = self.of("asked_tokens_total"), self.of("engine_tokens_total")
        hit = self.of("hit_tokens_total")
        share = f"{hit / (asked - own):.0%} hit" if asked > own else "nothing asked"
        return f"{self.of('requests_total'):.1f} requests/s, {asked:.0f} tokens/s, {share}"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="ellipsis")
    return table


def _tiers(state: Mapping[str, Any], rates: Rates) -> RenderableType:
    from kvstrata.units import approximate_size

    def speed(name: str, tier: str) -> str:
        return f"{approximate_size(int(rates.of(name, tier)))}/s"

    table = _table("tiers", "tier", "used", "of", "read", "written", "evicted/s", "state")
    host = state["host"]
    used, capacity = host["allocated_bytes"], host["capacity_bytes"]
    evicted = rates.of("left_objects_total", "host", "evicted")
    sizes = approximate_size(used), approximate_size(capacity)
    table.add_row("host", *sizes, "", "", f"{evicted:.1f}", "ok")
    for tier in state["tiers"]:
        name = tier["name"]
        sizes = ("", "the fleet's")
        if not tier.get("shared"):
            sizes = approximate_size(tier["used_bytes"]), approximate_size(tier["capacity_bytes"])
        evicted = rates.of("left_objects_total", name, "evicted")
        table.add_row(
            shown(name), *sizes, speed("tier_read_bytes_total", name),
            speed("tier_write_bytes_total", name), f"{evicted:.1f}", shown(tier["state"]),
        )  # fmt: skip
    return table


def _tenants(state: Mapping[str, Any]) -> RenderableType | None:
    from kvstrata.units import approximate_size

    held: dict[str, dict[str, int]] = {}
    for tier in (dict(state["host"], name="host"), *state["tiers"]):
        for one in tier.get("owners", ()):
            held.setdefault(one["owner"] or "unknown", {})[tier["name"]] = one["bytes"]
    if len(held) < 2:
        return None
    names = ["host", *(tier["name"] for tier in state["tiers"] if "owners" in tier)]
    table = _table("tenants", "owner", *map(plain, names))
    most = sorted(held, key=lambda owner: -sum(held[owner].values()))[:SHOWN]
    for owner in most:
        sizes = (approximate_size(held[owner].get(name, 0)) for name in names)
        table.add_row(shown(owner[:ID_CHARS]), *sizes)
    return table


def _prefixes(chunks: Sequence[Chunk]) -> RenderableType:
    from kvstrata.units import approximate_size

    parents = {one.key: one.parent for one in chunks}
    heads: dict[bytes, bytes] = {}
    sums: dict[bytes, list[float]] = {}
    for one in chunks:
        path, head = [one.key], one.key
        # No longer than there are chunks: what is told of parents may be anything.
        while head not in heads and parents[head] in parents and len(path) <= len(parents):
            head = parents[head]
            path.append(head)
        heads |= dict.fromkeys(path, heads.get(head, head))
        entry = sums.setdefault(heads[one.key], [0, 0, 0.0])
        entry[0] += 1
        entry[1] += sum(one.tiers.values())
        entry[2] = max(entry[2], one.used)
    table = _table("prefixes, used last", "begins with", "chunks", "bytes", "used")
    for key, (count, nbytes, used) in sorted(sums.items(), key=lambda one: -one[1][2])[:SHOWN]:
        ago = f"{max(0.0, time.time() - used):.0f} s ago" if used else "unknown"
        table.add_row(key.hex()[:12], f"{count:.0f}", approximate_size(int(nbytes)), ago)
    return table


def _requests(records: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = _table(
        "slowest of the last requests", "request", "s", "tokens", "loaded", "why not more"
    )
    for one in sorted(records, key=lambda record: -number(record, "seconds"))[:SHOWN]:
        reasons = [str(reason.get("why", "")) for reason in one.get("reasons", ())]
        table.add_row(
            shown(str(one.get("request", ""))[:ID_CHARS]), f"{one['seconds']:.2f}",
            shown(one.get("prompt_tokens", "")), shown(one.get("loaded_tokens", "")),
            shown(", ".join(dict.fromkeys(reasons))),
        )  # fmt: skip
    return table
