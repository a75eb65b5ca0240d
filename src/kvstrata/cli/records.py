"""``kvstrata records``: what became of each request, a line of JSON each, printed or to a file."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.cli.bounds import seconds
from kvstrata.cli.config import ConfigFile, Settings
from kvstrata.cli.join import NodeOption, configured, fail, join, join_or_exit
from kvstrata.cli.plain import echo, json_text
from kvstrata.errors import DeadlineExceeded, KVStrataError, NodeUnavailable

if TYPE_CHECKING:
    from kvstrata.config import Config
    from kvstrata.wire.client import NodeClient

TIMEOUT_S = 10.0


def run(
    config_file: ConfigFile = None,
    settings: Settings = None,
    node: NodeOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until interrupted.")
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append to this file instead; it may be rotated."),
    ] = None,
    every: Annotated[
        float,
        typer.Option(metavar="SECONDS", callback=seconds(0.05), help="How often --follow asks."),
    ] = 1.0,
) -> None:
    """Print the records of the requests that a node remembers, oldest first, as JSON lines.

    With --follow it outlives the node: it goes on when one answers again. What the node forgot
    before it was asked is a line of its own, as {"missed": 3}.
    """
    config = configured(config_file, settings, node)
    client = join_or_exit(config)
    write = _append(to) if to is not None else _print
    try:
        if follow:
            Follower(config, client, write).run(every)
        else:
            Follower(config, client, write).once()
    except (NodeUnavailable, DeadlineExceeded, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        pass


class Follower:
    """Hands on each record of a node once, as long as there is a node.

    Args:
        config: which names the node.
        client: of it; owned from now on.
        write: takes lines, all of them or none; raises OSError.
    """

    def __init__(
        self, config: Config, client: NodeClient, write: Callable[[list[str]], None]
    ) -> None:
        self._config = config
        self._client: NodeClient | None = client
        self._node = client.hello.node
        self._write = write
        self._last = 0

    def once(self) -> None:
        """Hand on what is new, and let go of the node.

        Raises:
            NodeUnavailable, DeadlineExceeded: it does not answer.
            OSError: the lines cannot be written; they are handed on the next time.
        """
        try:
            self._take()
        finally:
            self._let_go()

    def run(self, every_s: float) -> None:
        """Hand on what comes, until interrupted; says so once where that does not go on."""
        trouble = ""
        try:
            while True:
                try:
                    self._take()
                    trouble = ""
                except (KVStrataError, OSError) as error:
                    if not isinstance(error, OSError):
                        self._let_go()
                    if str(error) != trouble:
                        trouble = str(error)
                        echo(f"kvstrata: {trouble}; trying again", err=True)
                time.sleep(every_s)
        finally:
            self._let_go()

    def _take(self) -> None:
        from kvstrata.wire.explaining import new_records

        client = self._client = self._client or join(self._config)
        if client.hello.node != self._node:  # which counts anew
            self._node, self._last = client.hello.node, 0
        records, missed = new_records(client, self._last, TIMEOUT_S)
        lines: list[dict[str, Any]] = [{"missed": missed}] if missed and self._last else []
        lines += records
        if lines:
            self._write([json_text(line, None) for line in lines])
        if records:
            self._last = records[-1]["number"]

    def _let_go(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def _print(lines: list[str]) -> None:
    typer.echo("\n".join(lines))


def _append(file: Path) -> Callable[[list[str]], None]:
    """Opened for each batch: who rotates it by renaming gets a new file, and needs no signal."""

    def write(lines: list[str]) -> None:
        data = "".join(f"{line}\n" for line in lines).encode()
        with file.open("ab", buffering=0) as out:
            begin = out.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[out.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    out.truncate(begin)  # no half lines on a full disk
                raise

    return write
