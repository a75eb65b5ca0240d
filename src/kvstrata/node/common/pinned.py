"""Which chunks of one tier stay there, within the bounds on what may be pinned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class Pinned:
    """Chunks that are not evicted from one tier.

    Args:
        most_bytes: what they may weigh together.
        most_of_owner: what those of one owner may.
    """

    def __init__(self, most_bytes: int = 0, most_of_owner: int = 0) -> None:
        self.most_bytes = most_bytes
        self.most_of_owner = most_of_owner
        self.nbytes = 0
        self._chunks: dict[bytes, tuple[bytes, int]] = {}  # whose pin it is, and its bytes
        self._of_owner: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)

    def of_owner(self, owner: bytes) -> int:
        """Bytes of the chunks that are pinned for one."""
        return self._of_owner.get(owner, 0)

    def hold(self, key: bytes, owner: bytes, nbytes: int) -> bool:
        """Keep a chunk of so many bytes; False if that is too much, and it is not kept."""
        self.let_go(key)
        if (
            self.nbytes + nbytes > self.most_bytes
            or self.of_owner(owner) + nbytes > self.most_of_owner
        ):
            return False
        self._chunks[key] = owner, nbytes
        self._of_owner[owner] = self.of_owner(owner) + nbytes
        self.nbytes += nbytes
        return True

    def let_go(self, key: bytes) -> bool:
        """Keep a chunk no longer; whether it was kept."""
        owner, nbytes = self._chunks.pop(key, (b"", -1))
        if nbytes < 0:
            return False
        self.nbytes -= nbytes
        left = self._of_owner.pop(owner) - nbytes
        if left:
            self._of_owner[owner] = left
        return True

    def clear(self) -> None:
        """Keep none of them any longer."""
        self._chunks, self._of_owner, self.nbytes = {}, {}, 0

    def check_integrity(self, there: Mapping[bytes, int]) -> None:
        """Raise AssertionError unless what is pinned is there, and within its bounds.

        Args:
            there: bytes of each pinned chunk, as the tier has them.
        """
        assert there == {key: nbytes for key, (_, nbytes) in self._chunks.items()}, (
            "what is pinned is not there"
        )
        assert self.nbytes == sum(there.values()) <= self.most_bytes
        assert self.nbytes == sum(self._of_owner.values())
        assert all(0 < nbytes <= self.most_of_owner for nbytes in self._of_owner.values())
