"""What a store brought, with the checksum of its payload where it made one on the way."""

from __future__ import annotations


class Brought(int):
    """The size of an object in bytes, as a store gives it, that says its payload's checksum too.

    Args:
        nbytes: the whole object's.
        checksum: XXH3-128 of the payload, made of the bytes that are where they were asked for.
    """

    checksum: bytes

    def __new__(cls, nbytes: int, checksum: bytes) -> Brought:
        """That many bytes, with that checksum."""
        self = super().__new__(cls, nbytes)
        self.checksum = checksum
        return self


def checksum_of(nbytes: int) -> bytes | None:
    """The checksum that came with a size; None: nobody has made one."""
    return nbytes.checksum if isinstance(nbytes, Brought) else None
