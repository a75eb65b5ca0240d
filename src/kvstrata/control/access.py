"""Who may use the API: tokens, and what a browser may be made to do.

Tokens are for addresses that others can reach. On loopback any process of this machine may ask, but
no page in a browser: not one of another site, and not one whose name was made to point here.
"""

from __future__ import annotations

import hmac
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kvstrata.config.api import ApiConfig
from kvstrata.errors import ConfigError

VARIABLE = "KVSTRATA_API_TOKEN"
READ, WRITE = "read", "write"
MAY_WRITE = "kvstrata.may_write"
"""Where a request's scope says so."""
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_TOKENS = 64
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,256}")
_LOOPBACK = re.compile(r"(?:127(?:\.[0-9]{1,3}){3}|localhost|\[::1\])(?::[0-9]{1,5})?")


@dataclass(frozen=True)
class Tokens:
    """Those that are known, with what each may do."""

    known: tuple[tuple[bytes, str], ...]

    @classmethod
    def parse(cls, text: str, where: str) -> Tokens:
        """``read:`` or ``write:`` and a token on each line; a bare one may write.

        Raises:
            ConfigError: it is anything else; no token is repeated.
        """
        known = []
        for line in filter(None, map(str.strip, text.splitlines())):
            right, colon, token = (word.strip() for word in line.rpartition(":"))
            if not _TOKEN.fullmatch(token) or (colon and right not in (READ, WRITE)):
                raise ConfigError(
                    where,
                    "holds a line that is no token; expected `read:` or `write:` and 16 to 256 "
                    "letters, digits or ._~+/=- without a space between",
                )
            known.append((token.encode(), right or WRITE))
        if not 0 < len(known) <= MAX_TOKENS:
            raise ConfigError(where, f"holds {len(known)} tokens; expected 1 to {MAX_TOKENS}")
        return cls(tuple(known))

    def right(self, token: str) -> str:
        """`READ` or `WRITE`, empty for a token that is not known; always takes as long."""
        given, found = token.encode(), ""
        for known, right in self.known:
            if hmac.compare_digest(known, given) and found != WRITE:
                found = right
        return found


def load_tokens(config: ApiConfig, environ: Mapping[str, str]) -> Tokens | None:
    """The configured tokens; None where none are needed.

    Raises:
        ConfigError: they are needed and missing, others may read their file, or it holds no tokens.
    """
    if config.token_file is not None:
        return Tokens.parse(_private(config.token_file), str(config.token_file))
    if environ.get(VARIABLE):
        return Tokens.parse(environ[VARIABLE], VARIABLE)
    if not config.is_local:
        raise ConfigError(
            "api.token_file",
            f"missing; on an address that others reach ({config.listen}) the API takes tokens only:"
            f" name a file with them, or set {VARIABLE}",
        )
    return None


def own_token(config: ApiConfig, environ: Mapping[str, str]) -> str | None:
    """The token that a command of this machine shows: one that may write, if there is one."""
    if config.token_file is None and not environ.get(VARIABLE):
        return None
    tokens = load_tokens(config, environ)
    assert tokens is not None
    return min(tokens.known, key=lambda one: one[1] != WRITE)[0].decode()


def _private(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            if (mode := stat.S_IMODE(os.fstat(file.fileno()).st_mode)) & 0o077:
                raise ConfigError(
                    str(path), f"others may read the tokens (mode {mode:04o}); chmod 600 '{path}'"
                )
            return file.read(1 << 16)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot read the tokens: {error}") from error


def misdirected(host: str, local: bool) -> bool:
    """Whether a request came by a name that is not this machine's own: a rebound one."""
    return local and _LOOPBACK.fullmatch(host.lower()) is None


def cross_site(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a browser sends this on behalf of another site's page."""
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is not None and _place(origin) != host.lower():
        return True
    site = headers.get("sec-fetch-site", "none")
    return method not in SAFE_METHODS and site not in ("none", "same-origin")


def _place(origin: str) -> str:
    """Host and port of an origin; of ``null`` and nonsense none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
