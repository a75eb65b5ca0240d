"""The HTTP API beside a node: where it listens, and who may use it there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstrata.config import kinds
from kvstrata.config.named import is_loopback
from kvstrata.config.network import FILE
from kvstrata.config.parts import option
from kvstrata.errors import ConfigError
from kvstrata.transfer.tcp import Address

UNIX = "unix:"


def _listen(value: Any) -> Address | Path | None:
    if value == "none":
        return None
    if isinstance(value, str) and value.startswith(UNIX):
        path: Path = kinds.PATH.parse(value.removeprefix(UNIX))
        if len(os.fsencode(path)) > kinds.MAX_SOCKET_PATH:
            raise ValueError(f"{str(path)!r} is longer than a socket's {kinds.MAX_SOCKET_PATH}")
        return path
    return Address.parse(value)


def _format(value: Address | Path | None) -> str:
    return f"{UNIX}{value}" if isinstance(value, Path) else str(value or "none")


LISTEN = kinds.Kind(
    _listen, _format, '"none", an address such as "127.0.0.1:7780", or "unix:" and a path'
)


@dataclass(frozen=True)
class ApiConfig:
    """The HTTP API, a process of its own beside the node; see docs/api.md."""

    listen: Address | Path | None = option(  # noqa: RUF009 - it calls field()
        LISTEN,
        "none",
        "Where it listens; `none`: there is none. Of an on-demand node: as who starts it says.",
    )
    token_file: Path | None = option(  # noqa: RUF009 - it calls field()
        FILE,
        "none",
        "A file with tokens, of mode 0600: `read:` or `write:` and a token on each line. Needed "
        "on any address but loopback and a Unix socket, or `KVSTRATA_API_TOKEN` is.",
    )
    tls_certificate: Path | None = option(  # noqa: RUF009 - it calls field()
        FILE, "none", "Its certificate, for HTTPS; PEM."
    )
    tls_key: Path | None = option(  # noqa: RUF009 - it calls field()
        FILE, "none", "The certificate's private key; PEM."
    )

    @property
    def is_local(self) -> bool:
        """Whether only processes of this machine can reach it."""
        return not isinstance(self.listen, Address) or is_loopback(self.listen.host)

    def check(self) -> None:
        """Raise `ConfigError` where options do not go together."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_certificate"
            raise ConfigError(f"api.{missing}", "missing; HTTPS needs a certificate and its key")
