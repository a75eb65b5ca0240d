"""A node that checks its own conservation laws every few seconds, and ends if one is broken."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys

from kvstrata.config import load_config
from kvstrata.node.node import Node
from kvstrata.node.process import run

BROKEN = 3
EVERY_S = 5.0


class Checked(Node):
    """A `Node` that checks its integrity every few seconds."""

    async def start(self) -> None:
        await super().start()
        self._checking = asyncio.ensure_future(self._check())

    async def _check(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                self.check_integrity()
            except Exception:  # one that the checks themselves end with is found, too
                logging.exception("a law is broken")
                os._exit(BROKEN)
            count += 1
            print(f"checked {count}", flush=True)


def main() -> None:
    """Serve as the JSON on standard input says."""
    config = load_config(environ={}, overrides=json.load(sys.stdin))
    logging.basicConfig(level="WARNING")
    setattr(run, "Node", Checked)  # noqa: B010
    run.run(config, on_api=lambda url: print(f"API on {url}", flush=True))


if __name__ == "__main__":
    main()
