"""``kvstrata proxy``: before engines that compute prompts and engines that decode them."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Annotated

import typer

from kvstrata.errors import ConfigError


def run(
    decode: Annotated[
        list[str],
        typer.Option("--decode", metavar="URL", help="Goes on with them; repeatable."),
    ],
    prefill: Annotated[
        list[str] | None,
        typer.Option("--prefill", metavar="URL", help="Computes prompts; repeatable."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
) -> None:
    """Run a proxy for OpenAI clients until SIGTERM or ctrl-C.

    Each request is computed by one engine and decoded by another, which loads what the first one
    computes from its node (docs/disaggregation.md). An engine that is down is passed over; what
    is left answers whole, as all do in turn without --prefill. Prints "proxy on ..." once it
    listens.
    """
    try:
        from kvstrata.proxy.server import Proxy
    except ModuleNotFoundError as error:
        raise ConfigError(
            "proxy", f"needs {error.name}; run: pip install 'kvstrata[proxy]'"
        ) from error
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(_run(Proxy(prefill or [], decode), host, port))
    except OSError as error:
        raise ConfigError("proxy", f"cannot listen on {host}:{port}: {error}") from error


async def _run(proxy: object, host: str, port: int) -> None:
    from kvstrata.proxy.server import Proxy, serve

    assert isinstance(proxy, Proxy)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    runner = await serve(proxy, host, port)
    try:
        bound = runner.addresses[0]
        typer.echo(f"proxy on http://{bound[0]}:{bound[1]}")
        await ended.wait()
    finally:
        await runner.cleanup()
