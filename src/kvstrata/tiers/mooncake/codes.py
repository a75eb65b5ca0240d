"""The library's answers that mean something here; the others are failures of one object."""

from __future__ import annotations

OK = 0
NO_ROOM = -200
INVALID = -600
NOT_READY = -703
NOT_FOUND = -704
EXISTS = -705
LEASE_EXPIRED = -707
TRANSFER_FAILED = -800

HELD = frozenset({-706, -708, -714})
"""Somebody reads it, or it is being copied: not to be removed now."""
NO_ANSWER = frozenset({-900, -901})
"""The master could not be asked."""
