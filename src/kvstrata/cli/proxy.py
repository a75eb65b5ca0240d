"""``kvstrata proxy``: before engines that answer, or some that compute and some that decode."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Annotated

import typer

from kvstrata.errors import ConfigError
from kvstrata.routing import POLICIES
from kvstrata.routing.cache_aware import CACHE_TOKENS, CacheAware

DEFAULT_ROUTE = "cache-aware"


def run(
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", metavar="URL", help="Answers whole requests; repeatable."),
    ] = None,
    route: Annotated[
        str, typer.Option("--route", metavar="|".join(POLICIES), help="Which --engine to ask.")
    ] = DEFAULT_ROUTE,
    cache_tokens: Annotated[
        int,
        typer.Option(
            "--cache-tokens", min=1, help="What one engine's caches hold, for cache-aware."
        ),
    ] = CACHE_TOKENS,
    prefill: Annotated[
        list[str] | None,
        typer.Option("--prefill", metavar="URL", help="Computes prompts; repeatable."),
    ] = None,
    decode: Annotated[
        list[str] | None,
        typer.Option("--decode", metavar="URL", help="Goes on with them; repeatable."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
) -> None:
    """Run a proxy for OpenAI clients until SIGTERM or ctrl-C.

    Before engines that each answer whole requests (--engine): a prompt goes where most of it is,
    unless that engine is too busy (docs/routing.md). Or each request is computed by one engine
    (--prefill) and decoded by another (--decode), which loads what the first one computes from its
    node (docs/disaggregation.md). An engine that is down is passed over. Prints "proxy on ..." once
    it listens.
    """
    if bool(engine) == bool(prefill or decode) or (prefill and not decode):
        raise ConfigError("proxy", "expected --engine, or --prefill and --decode")
    if route not in POLICIES:
        raise ConfigError("--route", f"{route!r} is none of {', '.join(POLICIES)}")
    try:
        from kvstrata.proxy.apart import Apart
        from kvstrata.proxy.routed import Routed
        from kvstrata.proxy.server import Proxy
    except ModuleNotFoundError as error:
        raise ConfigError(
            "proxy", f"needs {error.name}; run: pip install 'kvstrata[proxy]'"
        ) from error
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if engine:
        policy = CacheAware(cache_tokens) if route == DEFAULT_ROUTE else POLICIES[route]()
        proxy = Proxy(Routed(engine, policy))
    else:
        proxy = Proxy(Apart(prefill or [], decode or []))
    try:
        asyncio.run(_run(proxy, host, port))
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
