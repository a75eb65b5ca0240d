"""Where a Redis is, and as whom to talk to it: one URL, which is printed without its password."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster")
PORT = 6379
HIDDEN = "***"
FILES = ("ca_file", "cert_file", "key_file")
EXPECTED = (
    '"redis://user:password@host:6379/0"; "rediss://" is with TLS, "redis+cluster://" and '
    '"rediss+cluster://" are a cluster, of which several hosts may be given, with commas'
)


class Place(NamedTuple):
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Address:
    """A Redis, and as whom to talk to it. As a text it has no password; `url` has.

    Args:
        places: where it listens; several are of one cluster.
        cluster: whether it is one.
        tls: whether to encrypt.
        user: of its access list; empty: the default one.
        password: empty: none.
        db: number of the database.
        files: absolute paths of PEM files by their name in `FILES`.
    """

    places: tuple[Place, ...]
    cluster: bool = False
    tls: bool = False
    user: str = ""
    password: str = field(default="", repr=False)
    db: int = 0
    files: tuple[tuple[str, str], ...] = ()

    @property
    def url(self) -> str:
        """The whole of it, password included: for a machine to read."""
        return self._url(quote(self.password, safe=""))

    def __str__(self) -> str:
        return self._url(HIDDEN if self.password else "")

    def _url(self, password: str) -> str:
        scheme = ("rediss" if self.tls else "redis") + ("+cluster" if self.cluster else "")
        who = quote(self.user, safe="") + (f":{password}" if password else "")
        where = ",".join(map(str, self.places)) + (f"/{self.db}" if self.db else "")
        files = f"?{urlencode(self.files, safe='/')}" if self.files else ""
        return f"{scheme}://{who}{'@' if who else ''}{where}{files}"


def parse_address(value: Any) -> Address:
    """The address that a URL names.

    Raises:
        ValueError: it names none; the message repeats nothing of it, for it may hold a password.
    """
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("it is no text of printable characters")
    url = urlsplit(value)
    if url.scheme not in SCHEMES:
        raise ValueError(f"it begins with none of {', '.join(f'{one}://' for one in SCHEMES)}")
    tls, cluster = url.scheme.startswith("rediss"), url.scheme.endswith("+cluster")
    who, _, where = url.netloc.rpartition("@")
    user, _, password = (unquote(one) for one in who.partition(":"))
    if "@" in who:
        raise ValueError("there is more than one @ in it; one in a password is written %40")
    if password == HIDDEN:
        raise ValueError(f"its password is {HIDDEN}, as it is printed; put the real one there")
    places = tuple(_place(one) for one in where.split(","))
    if len(places) > 1 and not cluster:
        raise ValueError("several hosts are for a cluster: redis+cluster://")
    if url.fragment:
        raise ValueError("there is a # in it; one in a password is written %23")
    files = _files(url.query)
    if files and not tls:
        raise ValueError("files are for TLS: rediss://")
    return Address(places, cluster, tls, user, password, _db(url.path, cluster), files)


def _place(text: str) -> Place:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port == 0 or text.endswith(":"):
        raise ValueError(
            "it has no host, or a port that is no number from 1 to 65535; in a password / is "
            "written %2F, : %3A, @ %40, # %23 and ? %3F"
        )
    return Place(host, port or PORT)


def _db(path: str, cluster: bool) -> int:
    number = path.removeprefix("/")
    if not number:
        return 0
    if cluster:
        raise ValueError("a cluster has no numbered databases, so nothing follows its hosts")
    if not (number.isascii() and number.isdigit()) or len(number) > 6:
        raise ValueError("what follows the host is no number of a database, such as /0")
    return int(number)


def _files(query: str) -> tuple[tuple[str, str], ...]:
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        given = [("", "")]
    files = dict(given)
    if len(files) < len(given) or not files.keys() <= set(FILES):
        raise ValueError(f"what follows the ? is not {', '.join(FILES)}, each once with a path")
    if not all(path.startswith("/") for path in files.values()):
        raise ValueError("a file in it has no absolute path")
    if ("cert_file" in files) != ("key_file" in files):
        raise ValueError("cert_file and key_file go together")
    return tuple(sorted(files.items()))
