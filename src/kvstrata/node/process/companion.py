"""The HTTP API beside a node: a process of its own, begun and ended with the node.

It is named as a program, not imported: the node knows nothing of it but where it says it listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvstrata.config import Config
from kvstrata.errors import ConfigError, DeadlineExceeded

logger = logging.getLogger(__name__)

PROGRAM = "kvstrata.control.run"
START_S = 60.0
END_S = 8.0
PAUSES_S = (1.0, 60.0)
"""Before it is started again after an end that nobody wished: at first, and at most."""


class Companion:
    """The API's process. It ends when its standard input does, so it never outlives the node.

    Args:
        config: the node's.
        path: of the node's socket.
        on_pid: told the pid of each process that is started.
    """

    def __init__(self, config: Config, path: Path, on_pid: Callable[[int], None]) -> None:
        self.url = ""
        self._config = replace(config, node=f"unix:{path}")
        self._on_pid = on_pid
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Start it, and start it again whenever it ends; its URL.

        Raises:
            ConfigError: it cannot listen there, or with these tokens or certificates.
            DeadlineExceeded: it does not come up.
        """
        await self._start()
        self._watching = asyncio.ensure_future(self._watch())
        return self.url

    async def close(self) -> None:
        """End it, and wait for that. Repeatable."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), END_S)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()

    async def _start(self) -> None:
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            PROGRAM,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
        self._on_pid(process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(self._config.to_dict()).encode() + b"\n")
        try:
            line = await asyncio.wait_for(process.stdout.readline(), START_S)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
            raise DeadlineExceeded(f"the API does not come up within {START_S:.0f} s") from None
        words = json.loads(line or b"{}")
        if "url" not in words:
            await process.wait()
            raise ConfigError(
                words.get("path", "api"),
                words.get(
                    "problem",
                    f"the API did not start (exit status {process.returncode}); its words are in "
                    "the log, and it needs: pip install 'kvstrata[control]'",
                ),
            )
        self.url = words["url"]

    async def _watch(self) -> None:
        pause = PAUSES_S[0]
        while True:
            assert self._process is not None
            status = await self._process.wait()
            logger.error("the API ended with exit status %s; it is started again", status)
            while True:
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSES_S[1])
                with contextlib.suppress(OSError):
                    try:
                        await self._start()
                        break
                    except (ConfigError, DeadlineExceeded) as error:
                        logger.error("the API cannot be started again yet: %s", error)
