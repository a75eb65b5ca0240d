"""Requests to an object store, or to a shared folder in its place: obstore's, with our errors.

Retries, connections, TLS and credentials are obstore's. What is here says when a call may no longer
begin a request, turns what went wrong into our errors, and replaces an object of a folder only if
nobody else has, which obstore does for real stores alone.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import obstore
from obstore import exceptions
from obstore.store import LocalStore, from_url

from kvstrata.errors import ConfigError, TierUnavailable
from kvstrata.tiers.object_store.folder import locked, read_file, unfinished
from kvstrata.tiers.object_store.troubles import told, translated

MAX_SMALL_BYTES = 4 << 20
"""Of an object that is read in one piece: an epoch, a lease, a note."""
REMOVE_BATCH = 256
LIST_BATCH = 1000
VERSION = "kvstrataversion"
"""The attribute that tells two objects of the same bytes apart, where their ETags do not."""

# Parts of a call's time: it begins requests in the first, and each has the rest to end.
_BEGIN, _REQUEST, _RETRY, _PAUSE = 7 / 16, 6 / 16, 2 / 16, 1 / 16

_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)<|bucket does not exist")
_BEYOND_ITS_END = re.compile(r"status code: 416|Requested range was invalid")


class Version(NamedTuple):
    """Of an object, as a condition for replacing it; stores differ in which of them they want."""

    e_tag: str | None
    version: str | None


class Head(NamedTuple):
    """What a store says of an object.

    Args:
        nbytes: its size.
        written_s: when it was written, by the store's clock, Unix seconds.
        condition: for replacing just this one.
        label: like no other's that had its path.
    """

    nbytes: int
    written_s: float
    condition: Version
    label: str


class Listed(NamedTuple):
    """An object of a listing: path under the store's prefix, size, and when it was written."""

    path: str
    nbytes: int
    written_s: float


class Turn:
    """The time of one call of the tier, in whose first part it may begin requests.

    Args:
        begin_s: how long that is; the rest is for those that have begun.
    """

    def __init__(self, begin_s: float) -> None:
        self._begin_s = begin_s
        self._begun = time.monotonic()

    @property
    def left(self) -> bool:
        """Whether there is time for another step of a long work: half of it, so that its
        requests do not find the time over."""
        return time.monotonic() - self._begun < self._begin_s / 2

    def check(self) -> None:
        """Raise `TierUnavailable` once no request may begin."""
        if time.monotonic() - self._begun >= self._begin_s:
            raise TierUnavailable("the store is too slow: no time is left for another request")


class Got:
    """The answer to a read, whose bytes are on their way."""

    def __init__(self, client: ObjectClient, path: str, result: obstore.GetResult | None) -> None:
        self._client, self._path, self._result = client, path, result
        self.head = Head(0, 0.0, Version(None, None), "")
        if result is not None:
            self.head = _head(result.meta, result.attributes)

    def fill(self, into: memoryview) -> bool:
        """Copy the bytes into a buffer; False unless they are as many as it has."""
        if self._result is None:
            return False
        with self._client.asked("read", self._path):
            data = self._result.bytes()
        if len(data) != len(into):
            return False
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))
        return True


class ObjectClient:
    """A store by its URL; thread-safe.

    Args:
        url: ``s3://bucket/prefix``, ``gs://``, ``az://`` or ``file:///path``.
        timeout_s: a call that begins its requests in time (see `turn`) ends within it. A folder's
            file system may hang, and nobody can end that.
        endpoint: of a store that speaks S3, such as ``http://10.0.0.1:9000``; None: the provider's.
        region: None: the provider's default.
    Raises:
        ConfigError: obstore does not take that; with what it says.
    """

    def __init__(
        self, url: str, timeout_s: float, endpoint: str | None = None, region: str | None = None
    ) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self._scheme = url.partition(":")[0]
        options: dict[str, Any] = {
            "timeout": timedelta(seconds=_REQUEST * timeout_s),
            "connect_timeout": timedelta(seconds=_REQUEST / 2 * timeout_s),
        }
        retries = {
            "retry_timeout": timedelta(seconds=_RETRY * timeout_s),
            "backoff": {"max_backoff": timedelta(seconds=_PAUSE * timeout_s)},
        }
        given = {"endpoint": endpoint, "region": region}
        others: dict[str, Any] = {name: value for name, value in given.items() if value}
        if endpoint is not None and endpoint.startswith("http:"):
            options["allow_http"] = True
        try:
            if self._scheme == "file":
                self._store = from_url(url, automatic_cleanup=True)
            else:
                self._store = from_url(url, client_options=options, retry_config=retries, **others)
        except (exceptions.BaseError, ValueError, OSError) as error:
            hint = "; make the folder, below where its file system is mounted"
            problem = f"{url} cannot be used: {told(error)}{hint if self._scheme == 'file' else ''}"
            raise ConfigError("object_store.url", problem) from error
        prefix = self._store.prefix
        self.folder = Path(prefix or "/") if isinstance(self._store, LocalStore) else None

    def turn(self) -> Turn:
        """The time of a call that begins now."""
        return Turn(_BEGIN * self.timeout_s)

    @contextlib.contextmanager
    def asked(self, doing: str, path: str) -> Iterator[None]:
        """Turn obstore's errors into ours; FileNotFoundError and broken conditions pass through.

        Raises:
            TierFull: there is no room, or no quota.
            ReadOnly: the store does not let this node write or delete.
            Refused: it does not let it read or list.
            TierUnavailable: anything else; with what to check.
        """
        try:
            yield
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            raise
        except FileNotFoundError as error:
            if _NO_BUCKET.search(str(error)):
                raise self._no_bucket(error) from error
            raise
        except (exceptions.BaseError, OSError, NotImplementedError) as error:
            raise translated(error, self.url, doing, path) from error

    def _no_bucket(self, error: Exception) -> TierUnavailable:
        return TierUnavailable(
            f"{self.url}: there is no such bucket; make it, or correct object_store.url: "
            f"{told(error)}"
        )

    def head(self, path: str, turn: Turn) -> Head | None:
        """What the store says of an object; None if it is not there."""
        turn.check()
        try:
            with self.asked("look for", path):
                result = obstore.get(self._store, path, options={"head": True})
        except FileNotFoundError:
            return None
        return _head(result.meta, result.attributes)

    def get(
        self,
        path: str,
        turn: Turn,
        part: tuple[int, int] | None = None,
        condition: Version | None = None,
    ) -> Got | None:
        """Begin to read an object; None if it is not there.

        Args:
            path: of the object.
            turn: of the call.
            part: read from the first of these bytes up to the second, or to the object's end if
                that is nearer; where it ends before the first the head says size 0.
            condition: read this version only.
        Raises:
            PreconditionError: there is another version.
        """
        turn.check()
        options: dict[str, Any] = {} if part is None else {"range": part}
        if condition is not None and condition.e_tag:
            options["if_match"] = condition.e_tag
        try:
            with self.asked("read", path):
                try:
                    result = obstore.get(self._store, path, options=options)
                except exceptions.GenericError as error:
                    if _BEYOND_ITS_END.search(str(error)):
                        return Got(self, path, None)
                    raise
        except FileNotFoundError:
            return None
        return Got(self, path, result)

    def read_file(self, path: str, into: memoryview) -> int | None:
        """Of a folder: see `read_file`; None if it is not there."""
        assert self.folder is not None
        try:
            with self.asked("read", path):
                return read_file(self.folder / path, into)
        except FileNotFoundError:
            return None

    def small(self, path: str, turn: Turn) -> tuple[bytes, Head] | None:
        """A small object as a whole, of one that is larger the beginning; None: not there."""
        got = self.get(path, turn, (0, MAX_SMALL_BYTES))
        if got is None:
            return None
        if not got.head.nbytes:
            head = self.head(path, turn)
            return None if head is None else (b"", head)
        data = bytearray(min(got.head.nbytes, MAX_SMALL_BYTES))
        if not got.fill(memoryview(data)):
            raise TierUnavailable(f"{self.url}: {path} was cut off")
        return bytes(data), got.head

    def put(
        self,
        path: str,
        parts: Sequence[bytes | memoryview],
        turn: Turn,
        *,
        create: bool = False,
        label: str = "",
    ) -> bool:
        """Write an object, whole or not at all; False where ``create`` finds one there already.

        Args:
            path: of the object.
            parts: its bytes, one after the other; not copied, so they must keep still.
            turn: of the call.
            create: only if there is none.
            label: like no other's that had this path; a folder has its own.
        """
        labels = {VERSION: label} if label and self.folder is None else None
        return self._put(path, parts, turn, "create" if create else "overwrite", labels)

    def replace(self, path: str, data: bytes, condition: Version, turn: Turn) -> bool:
        """Replace an object if it is still that version; False if not."""
        if self.folder is None:
            mode = {name: value for name, value in condition._asdict().items() if value}
            return self._put(path, [data], turn, mode)
        with locked(self.folder, self.timeout_s):
            head = self.head(path, turn)
            if head is None or head.condition != condition:
                return False
            return self._put(path, [data], turn, "overwrite")

    def _put(
        self,
        path: str,
        parts: Sequence[bytes | memoryview],
        turn: Turn,
        mode: Any,
        labels: Any = None,
    ) -> bool:
        turn.check()
        try:
            with self.asked("write", path):
                obstore.put(
                    self._store, path, [part for part in parts if len(part)],
                    mode=mode, use_multipart=False, attributes=labels,
                )  # fmt: skip
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
            return False
        except FileNotFoundError as error:
            raise self._no_bucket(error) from error
        return True

    def delete(self, path: str, turn: Turn) -> bool:
        """Remove an object; False where a store says that there was none. Some never do."""
        turn.check()
        try:
            with self.asked("delete", path):
                obstore.delete(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def remove(self, paths: Sequence[str], turn: Turn) -> None:
        """Remove objects, `REMOVE_BATCH` at most, whether they are there or not."""
        turn.check()
        try:
            with self.asked("delete", f"{len(paths)} objects"):
                obstore.delete(self._store, paths)
        except FileNotFoundError:  # of some; the others may be there still
            for path in paths:
                self.delete(path, turn)

    def listing(self, prefix: str) -> Iterator[list[Listed]]:
        """What lies under a prefix (a path without its last part; empty: all), a batch a request.

        Whoever takes the next batch sees to it that there is time.
        """
        with self.asked("list", prefix):
            batches = iter(obstore.list(self._store, prefix or None, chunk_size=LIST_BATCH))
        while True:
            with self.asked("list", prefix):
                batch = next(batches, None)
            if batch is None:
                return
            yield [
                Listed(meta["path"], meta["size"], meta["last_modified"].timestamp())
                for meta in batch
            ]

    def unfinished(self, before_s: float) -> Iterator[list[Path]]:
        """Of a folder, files that somebody began before that time and never finished."""
        return unfinished(self.folder, before_s) if self.folder is not None else iter(())


def _head(meta: Any, attributes: Any) -> Head:
    condition = Version(meta["e_tag"], meta["version"])
    label = str(attributes.get(VERSION) or meta["e_tag"] or meta["version"] or "")
    return Head(meta["size"], meta["last_modified"].timestamp(), condition, label)
