"""A node as a service that looks at its own laws all the while: the first broken one ends it.

Run as ``kvstrata serve`` is, with the same arguments.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from unittest.mock import patch

from kvstrata.cli import main
from kvstrata.node.node import Node

CODE = "from tests.engine.checked_node import run; run()"
"""For `Workplace`, as its service."""
EVERY_S = 0.05
BROKEN = 70
"""Exit status of a node that broke a law; its log has the traceback."""


def check(node: Node, contents: bool = False) -> None:
    """End this process unless every byte has one owner."""
    try:
        node.check_integrity(contents)
    except BaseException:
        traceback.print_exc()
        os._exit(BROKEN)


async def look(node: Node) -> None:
    """Check a node again and again, between any two things that it does."""
    while True:
        check(node)
        await asyncio.sleep(EVERY_S)


def run() -> None:
    """Serve, and check."""
    start, stop = Node.start, Node.stop

    async def started(node: Node) -> None:
        await start(node)
        node._tasks.spawn("a look at the laws", look(node))

    async def stopped(node: Node, drain_s: float = 10.0) -> None:
        check(node, contents=True)
        await stop(node, drain_s)

    with patch.object(Node, "start", started), patch.object(Node, "stop", stopped):
        main()
