"""What went wrong in an object store, in our errors: who must act, and what to check."""

from __future__ import annotations

import re

from obstore import exceptions

from kvstrata.errors import ReadOnly, TierFull, TierUnavailable

_FULL = re.compile(
    r"status code: 507|<Code>(QuotaExceeded|StorageFull|XMinioStorageFull|InsufficientStorage)<"
    r"|\(os error (28|122)\)"
)
_REFUSED = re.compile(r"status code: 40[13]|\(os error (1|13|30)\)|169\.254\.169\.254")
_FORBIDDEN = re.compile(r"status code: 403|\(os error (1|13|30)\)")
"""Of those: who asked is known, and may not do that."""
_CAUSE = re.compile(r'\b(?:message|error): "([^"]{1,200})"')

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role of this machine, and that it "
    "may list the bucket and get, put and delete its objects",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or the service account of this machine, and that it "
    "has the role Storage Object User",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or the identity of this "
    "machine, and that it has the role Storage Blob Data Contributor",
    "file": "that this user may read and write the folder",
}


class Refused(TierUnavailable):
    """The store does not let this node read or list, or does not know it."""


def translated(error: Exception, url: str, doing: str, path: str) -> TierUnavailable:
    """Our error for one of obstore's or of the system's.

    Args:
        error: what was raised.
        url: of the store.
        doing: what was asked of it: to write, delete, read, look for or list.
        path: of what.
    """
    what, text = f"{url}: cannot {doing} {path}", str(error)
    if doing == "write" and _FULL.search(text):
        return TierFull(f"{what}, the store has no room: {told(error)}")
    forbidden = isinstance(error, exceptions.PermissionDeniedError) or _FORBIDDEN.search(text)
    unknown = isinstance(error, exceptions.UnauthenticatedError) or _REFUSED.search(text)
    if forbidden or unknown:
        check = _CREDENTIALS.get(url.partition(":")[0], "its credentials")
        kind = ReadOnly if forbidden and doing in ("write", "delete") else Refused
        return kind(f"{what}; check {check}: {told(error)}")
    return TierUnavailable(f"{what}: {told(error)}")


def told(error: Exception) -> str:
    """What a store said, or what became of the connection, in one line."""
    text, _, details = str(error).partition("\n\nDebug source:")
    line = " ".join(text.partition("<?xml")[0].rpartition(" - ")[2].split())
    said = [
        found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>([^<]*)", text))
    ]
    cause = _CAUSE.search(details) if not said else None
    words = " ".join([line[:300], *said, f"({cause[1]})" if cause else ""]).strip()
    if "kind: Connect" in details:
        words += "; is the endpoint right, and can it be reached from here?"
    return words
