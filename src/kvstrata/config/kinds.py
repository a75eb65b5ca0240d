"""What one configuration value may be: each kind parses, prints and describes itself.

Every source writes values the same way, so a number may also be text: the environment and the
command line have nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from kvstrata import units
from kvstrata.errors import UsageError, did_you_mean

MIN_CAPACITY = 1 << 20

# A Unix socket's address holds 108 bytes, the last of them zero.
MAX_SOCKET_PATH = 107
MAX_COARSER = 15
MIN_EVERY_S = 1.0
HINTS = ("max_load_tokens", "max_store_tokens", "store", "load",
         "session", "pin", "priority", "tiers", "blend")  # fmt: skip
"""What clients may say with a request, see docs/hints.md; `kvstrata.connectors.hints` reads it."""
SHARED = ("engines", "ranks")
"""In what engines may differ that share KV all the same, see docs/sharing.md."""
NO_LOSSY_CODEC = ("raw", "lossless", "exact", "auto")


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch("-?[0-9]{1,20}", value) else value


class Kind(NamedTuple):
    """How values of one kind are parsed (ValueError if wrong), written, and described.

    ``show`` is how they are printed for people, where that is not all of it: a secret is left out,
    and the message of ``parse`` repeats nothing of the value.
    """

    parse: Callable[[Any], Any]
    format: Callable[[Any], str | int]
    expected: str
    show: Callable[[Any], str] | None = None


def whole(low: int, high: int, multiple: int = 1) -> Kind:
    def parse(value: Any) -> int:
        value = _number(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is not a whole number")
        if not low <= value <= high or value % multiple:
            raise ValueError(f"{value} is not accepted")
        return value

    step = f"multiple of {multiple}" if multiple > 1 else "whole number"
    return Kind(parse, int, f"a {step} from {low} to {high}")


def one_of(names: Sequence[str]) -> Kind:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"{value!r} is not known{did_you_mean(str(value), names)}")
        return str(value)

    return Kind(parse, str, "one of " + ", ".join(names))


def _size(value: Any) -> int:
    # The bound catches `8` where "8GiB" was meant.
    if (size := units.parse_size(_number(value))) < MIN_CAPACITY:
        raise ValueError(f"{value!r} is less than {units.format_size(MIN_CAPACITY)}")
    return size


def _share(value: Any) -> Fraction:
    share = units.parse_fraction(value)
    if share == 0:
        raise ValueError(f"{value!r} leaves nothing")
    return share


def _size_or_share(value: Any) -> int | Fraction:
    return _share(value) if isinstance(value, str) and "%" in value else _size(value)


def _format_size_or_share(value: int | Fraction) -> str:
    return units.format_fraction(value) if isinstance(value, Fraction) else units.format_size(value)


def _wait(value: Any) -> float:
    seconds = units.parse_duration(value)
    if seconds == 0:
        raise ValueError(f"{value!r} leaves no time")
    return seconds


def _every(value: Any) -> float:
    if value == "off":
        return 0.0
    if (seconds := units.parse_duration(value)) < MIN_EVERY_S:
        raise ValueError(f"{value!r} is too often")
    return seconds


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value) <= 128:
        raise ValueError(f"{value!r} is not a name")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value).isprintable():
        raise ValueError(f"{value!r} is not a path")
    path = os.path.normpath(os.path.expanduser(value))
    if not os.path.isabs(path):
        raise ValueError(f"{str(value)!r} is not absolute")
    return Path(path)


def _codec(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a name")
    if value in NO_LOSSY_CODEC:
        return value
    from kvstrata.codecs import codec_named  # large: only where another one is named

    try:
        return codec_named(value).name
    except UsageError as error:
        raise ValueError(str(error)) from error


def _codecs(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if names == ["none"]:
        return ()
    if not isinstance(names, list | tuple) or not 0 < len(names) <= MAX_COARSER:
        raise ValueError(f"{value!r} is no list of at most {MAX_COARSER} names")
    chosen = tuple(_codec(name.strip() if isinstance(name, str) else name) for name in names)
    for name in chosen:
        if name in NO_LOSSY_CODEC:
            raise ValueError(f"{name!r} is no lossy codec")
    return chosen


def _some_of(value: Any, known: Sequence[str], what: str) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or len(names) > len(known):
        raise ValueError(f"{value!r} is no list of {what}")
    return tuple(one_of(known).parse(n.strip() if isinstance(n, str) else n) for n in names)


def _hints(value: Any) -> tuple[str, ...]:
    if value in ("all", "none"):
        return HINTS if value == "all" else ()
    return _some_of(value, HINTS, "hints")


def _format_hints(value: tuple[str, ...]) -> str:
    return "all" if value == HINTS else _format_names(value)


def _shared(value: Any) -> tuple[str, ...]:
    return () if value == "none" else _some_of(value, SHARED, "what engines share")


def _format_names(value: tuple[str, ...]) -> str:
    return ", ".join(value) or "none"


def _bound(value: Any) -> str:
    if value == "none":
        return "none"
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    from kvstrata.quality.bound import Bound

    return str(Bound.parse(value))


def _node(value: Any) -> str:
    if value == "auto":
        return "auto"
    if not isinstance(value, str) or not value.startswith("unix:"):
        raise ValueError(f"{value!r} is not known")
    path = _path(value.removeprefix("unix:"))
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(f"{str(path)!r} is longer than a socket's {MAX_SOCKET_PATH} bytes")
    return f"unix:{path}"


def _encryption(value: Any) -> str:
    # What was given may be a key by mistake, so that no error repeats it.
    if value == "none":
        return "none"
    kind, _, where = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not where.isprintable():
        raise ValueError("what it is given is not printable")
    if kind == "file":
        path = os.path.normpath(os.path.expanduser(where))
        if not os.path.isabs(path):
            raise ValueError("the path of its file is not absolute")
        return f"file:{path}"
    if kind == "env":
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", where):
            raise ValueError("what follows env: is no name of a variable")
        if re.fullmatch("[0-9a-fA-F]{64}", where):
            raise ValueError("what follows env: is a key, not the name of a variable that holds it")
        if where.startswith("KVSTRATA_"):
            raise ValueError("variables that begin with KVSTRATA_ are options: name another one")
        return f"env:{where}"
    if kind == "command":
        if not shlex.split(where):
            raise ValueError("what follows command: is empty")
        return f"command:{where}"
    raise ValueError("what it is given is no source of keys")


SIZE = Kind(_size, units.format_size, 'a size of at least 1MiB, such as "8GiB" or "512MB"')
SIZE_OR_SHARE = Kind(
    _size_or_share, _format_size_or_share, 'a size such as "8GiB", or a share such as "20%"'
)
SHARE = Kind(_share, units.format_fraction, 'a percentage above 0%, such as "50%"')
DURATION = Kind(units.parse_duration, units.format_duration, 'a duration such as "250ms" or "5s"')
WAIT = Kind(_wait, units.format_duration, 'a duration above 0, such as "250ms" or "5s"')
EVERY = Kind(
    _every,
    lambda value: units.format_duration(value) if value else "off",
    '"off", or a duration of at least 1s, such as "1min"',
)
RATE = Kind(units.parse_rate, units.format_rate, 'a rate such as "32MiB/s", or 0')
TEXT = Kind(_text, str, "1 to 128 printable characters")
PATH = Kind(_path, str, "an absolute path, or one that starts with ~")
CODEC = Kind(_codec, str, "the name of a codec, such as lossless or int8")
CODECS = Kind(_codecs, _format_names, '"none", or lossy codecs such as "cachegen-2, cachegen-5"')
HINT_NAMES = Kind(_hints, _format_hints, f'"all", "none", or some of {", ".join(HINTS)}')
SHARING = Kind(_shared, _format_names, '"none", or some of ' + ", ".join(SHARED))
BOUND = Kind(_bound, str, '"none", or a bound such as "kl <= 0.01 and agreement >= 98%"')
ENCRYPTION = Kind(
    _encryption, str, '"none", "file:" and an absolute path, "env:" and a name, or "command:"'
)
NODE = Kind(_node, str, '"auto", or "unix:" and the absolute path of a socket')
