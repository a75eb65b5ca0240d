"""Whole objects encrypted, and opened again: AES-256-GCM, as ``docs/format.md`` has it.

The cipher covers the payload; the header page is authenticated with it, so that no field can be
changed and no payload be given to another object. This is the only file that imports
``cryptography``, whose ciphers release the GIL.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvstrata.errors import CorruptObject, Incompatible, UsageError
from kvstrata.header import CHECKSUM_BYTES, NOT_ENCRYPTED, SEALED_BYTES, ObjectHeader
from kvstrata.objects import HEADER_BYTES, checksum, encode

if not hasattr(AESGCM, "encrypt_into"):
    raise ImportError("this cryptography has no AESGCM.encrypt_into: it is older than 47")

KEY_BYTES = 32
KEY_ID_BYTES = 16
NONCE_BYTES = 12
MAX_SEALED = 2**31 - 1
"""Bytes of a payload, nonce and tag included, that the library takes at once."""

_ID_CONTEXT = "KVStrata 1 encryption key ids"
_CIPHER_CONTEXT = "KVStrata 1 sealed payloads"
_MASK_CONTEXT = "KVStrata 1 sealed checksums"
_NOT_AUTHENTICATED = (slice(16, 32), slice(176, 200))
"""Of a header page: its checksum; the stored payload's, and the epoch, which is a tier's stamp."""


class KeyRing:
    """Keys that open objects, of which the first seals them; threads may share it.

    Args:
        keys: 32 bytes each, at least one.
    Raises:
        UsageError: no key, or one of another length.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise UsageError(f"expected keys of {KEY_BYTES} bytes, at least one")
        self._keys = {key.id: key for key in map(_Key, keys)}
        self._sealing = next(iter(self._keys.values()))

    @property
    def ids(self) -> list[bytes]:
        """16 bytes a key, which say nothing of it; that of the sealing key first."""
        return list(self._keys)

    def seal(self, header: ObjectHeader, data: memoryview, into: memoryview) -> ObjectHeader:
        """Encrypt a whole object.

        Args:
            header: of the object; not encrypted.
            data: header page, payload and padding.
            into: other memory, as long as the sealed object is.
        Returns:
            The header that now stands in ``into``.
        Raises:
            UsageError: it is too large to be encrypted.
        """
        stored = header.stored_length + SEALED_BYTES
        if stored > MAX_SEALED:
            raise UsageError(f"a payload of {header.stored_length} bytes is too large to encrypt")
        end, nonce = HEADER_BYTES + stored, os.urandom(NONCE_BYTES)
        sealed = msgspec.structs.replace(
            self._sealing.masked(header, nonce),
            encryption_key=self._sealing.id,
            stored_length=stored,
        )
        into[HEADER_BYTES : HEADER_BYTES + NONCE_BYTES] = nonce
        self._sealing.cipher.encrypt_into(
            nonce,
            data[HEADER_BYTES : HEADER_BYTES + header.stored_length],
            _authenticated(sealed),
            into[HEADER_BYTES + NONCE_BYTES : end],
        )
        into[end:] = bytes(len(into) - end)
        sealed = msgspec.structs.replace(sealed, stored_checksum=checksum(into[HEADER_BYTES:end]))
        into[:HEADER_BYTES] = encode(sealed)
        return sealed

    def open(self, header: ObjectHeader, data: memoryview, into: memoryview) -> ObjectHeader:
        """Undo `seal`.

        Args:
            header: of the object, which has been verified as far as that goes without a key.
            data: header page, payload as stored, and padding.
            into: other memory, as long as the object is when it is not encrypted; holds anything
                after an error.
        Returns:
            The header that now stands in ``into``.
        Raises:
            Incompatible: it is not encrypted, or with a key that is not here.
            CorruptObject: nobody with the key has sealed this under this header.
        """
        assert data is not into
        key = self._key_of(header)
        size = header.stored_length - SEALED_BYTES
        if header.stored_length > MAX_SEALED:
            raise CorruptObject(f"encrypted, but larger than anything is: {size} bytes")
        begin = HEADER_BYTES + NONCE_BYTES
        nonce, payload = bytes(data[HEADER_BYTES:begin]), into[HEADER_BYTES : HEADER_BYTES + size]
        try:
            key.cipher.decrypt_into(
                nonce,
                data[begin : HEADER_BYTES + header.stored_length],
                _authenticated(header),
                payload,
            )
        except InvalidTag:
            raise CorruptObject("header or payload is not what was encrypted") from None
        opened = msgspec.structs.replace(
            key.masked(header, nonce),
            encryption_key=NOT_ENCRYPTED,
            stored_length=size,
            stored_checksum=checksum(payload),
        )
        if problem := opened.problem():
            raise CorruptObject(f"header of what was encrypted: {problem}")
        into[:HEADER_BYTES] = encode(opened)
        into[HEADER_BYTES + size :] = bytes(len(into) - HEADER_BYTES - size)
        return opened

    def _key_of(self, header: ObjectHeader) -> _Key:
        if header.encryption_key == NOT_ENCRYPTED:
            raise Incompatible("not encrypted, in a tier with encryption: anybody may have made it")
        key = self._keys.get(header.encryption_key)
        if key is None:
            name = header.encryption_key.hex()
            raise Incompatible(f"encrypted with the key {name}, not known here")
        return key


class _Key:
    """One key, and what is derived from it: its name, a cipher, and a mask for checksums."""

    def __init__(self, key: bytes) -> None:
        self.id = blake3(key, derive_key_context=_ID_CONTEXT).digest(KEY_ID_BYTES)
        self.cipher = AESGCM(blake3(key, derive_key_context=_CIPHER_CONTEXT).digest())
        self._mask = blake3(key, derive_key_context=_MASK_CONTEXT).digest()

    def masked(self, header: ObjectHeader, nonce: bytes) -> ObjectHeader:
        """The header with its checksums of plain bytes hidden, or back in sight.

        Whoever guesses a text can compute the checksum of its KV, and would see that he was right.
        """
        mask = blake3(nonce, key=self._mask).digest(2 * CHECKSUM_BYTES)
        kept = header.kind == "kept"
        return msgspec.structs.replace(
            header,
            raw_checksum=_xor(header.raw_checksum, mask[:CHECKSUM_BYTES]),
            positions=_xor(header.positions, mask[CHECKSUM_BYTES:]) if kept else header.positions,
        )


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _authenticated(header: ObjectHeader) -> bytes:
    page = bytearray(encode(header))
    for field in _NOT_AUTHENTICATED:
        page[field] = bytes(field.stop - field.start)
    return bytes(page)
