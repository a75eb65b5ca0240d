"""Objects on their way between host memory and a tier that keeps them encoded.

Host memory holds objects raw, so that a client copies them without asking how. Going down, an
object is encoded with the tier's codec where that makes it smaller, and then encrypted if the tier
has keys; coming up it is opened, and decoded by what its own header says, so objects of an earlier
configuration stay readable. All of it runs in the tier's threads and touches nothing of the node's
state. What codecs need is imported with the first of them: it is much, and a node without any is
the better off.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from kvstrata.errors import CorruptObject, Incompatible, LayoutMismatch, UsageError
from kvstrata.header import GROUP_BITS, NOT_ENCRYPTED, SEALED_BYTES, ObjectHeader
from kvstrata.layout import ITEM_BYTES, Bytes, LayerGroup, native_order
from kvstrata.node.coding.scratch import Scratch
from kvstrata.objects import HEADER_BYTES, checksum, encode, stored_bytes, verify_object
from kvstrata.objects import decode as decode_header
from kvstrata.parts import PERHAPS_LOSSY
from kvstrata.producers import apart, with_producer

if TYPE_CHECKING:
    from kvstrata.codecs import Codec
    from kvstrata.node.coding.sealing import KeyRing


NO_CODEC = (ImportError, OSError, RuntimeError)
"""What a machine raises on which codecs do not work: numba is broken, or finds no folder to keep
what it compiled in."""


def warm_up(codec: Codec) -> None:
    """Encode and decode a little of everything, so that no first use has to compile on the way."""
    from kvstrata.codecs import Payload
    from kvstrata.codecs.framing import decode, encode, encoded_bound

    scratch = Scratch(1)
    for dtype in ITEM_BYTES:
        payload = Payload((1, 2, 1, 128, 64), dtype)
        with contextlib.suppress(LayoutMismatch):
            codec.check(payload)
            raw = np.zeros(payload.nbytes, np.uint8)
            with scratch.buffer(encoded_bound(codec, payload)) as out:
                encoded = np.frombuffer(out, np.uint8)
                size = encode(codec, payload, raw, encoded)
                decode(codec, payload, encoded[:size], raw)


def get_ready_to_decode(family: str, parameters: bytes) -> None:
    """Warm up the codec of such objects; where there is none, whoever reads one says so."""
    from kvstrata.codecs import stored_codec

    with contextlib.suppress(Incompatible, UsageError, *NO_CODEC):
        warm_up(stored_codec(family, parameters))


def stamped(page: memoryview, epoch: int) -> bytes:
    """A header page out of a slot, as a tier of this epoch has it.

    Raises:
        CorruptObject: it is damaged.
    """
    return encode(msgspec.structs.replace(_own_header(page), epoch=epoch))


class Encoded(NamedTuple):
    """An object as a tier keeps it; ``buffer`` holds its bytes, for `Scratch.give` afterwards."""

    data: memoryview
    header: ObjectHeader
    buffer: mmap.mmap


def encoded_object(
    codec: Codec, data: memoryview, scratch: Scratch, level: int = 0
) -> Encoded | None:
    """A whole object as a tier with this codec keeps it.

    Args:
        codec: the tier's.
        data: header page, raw payload and padding.
        scratch: where the result is made.
        level: 0, or which of the tier's coarser copies this is.
    Returns:
        None where the object should be kept as it is: encoding cannot make it smaller.
    Raises:
        CorruptObject: ``data`` is not what its writer made a checksum of. What is encoded gets a
            checksum of its own, so nobody could tell afterwards.
    """
    from kvstrata.node.coding.forms import form_of

    header = _own_header(data[:HEADER_BYTES])
    if codec.family == "raw" or header.codec != "raw" or header.dtype not in ITEM_BYTES:
        return None
    if header.is_tail and header.kind == "native" and not codec.lossless:
        return None  # what is empty behind its last token would be measured with the rest
    raw = np.frombuffer(data, np.uint8, header.raw_length, HEADER_BYTES)
    if checksum(raw.data) != header.raw_checksum:
        raise CorruptObject("payload checksum does not match")
    try:
        if not codec.lossless:
            header, raw = _portable(header, raw)
        form = form_of(header, codec)
        bound = form.bound(raw)
    except (Incompatible, UsageError):
        return None
    buffer = scratch.take(HEADER_BYTES + bound)
    try:
        whole = memoryview(buffer)
        size = form.encode(raw, np.frombuffer(whole, np.uint8, offset=HEADER_BYTES))
        end, padded = HEADER_BYTES + size, stored_bytes(size)
        if padded >= len(data):
            scratch.give(buffer)
            return None
        whole[end:padded] = bytes(padded - end)
        producer, _ = apart(header.codec_parameters)
        stored = msgspec.structs.replace(
            header,
            group=header.group | level << GROUP_BITS,
            codec=codec.family,
            codec_parameters=with_producer(producer, codec.parameters()),
            stored_length=size,
            stored_checksum=checksum(whole[HEADER_BYTES:end]),
        )
        whole[:HEADER_BYTES] = encode(stored)
    except BaseException:
        scratch.give(buffer)
        raise
    return Encoded(whole[:padded], stored, buffer)


def sealed_object(keys: KeyRing, data: memoryview, scratch: Scratch) -> Encoded:
    """A whole object as a tier with encryption keeps it.

    Args:
        keys: the tier's.
        data: header page, payload and padding; encoded or raw.
        scratch: where the result is made.
    Raises:
        CorruptObject: its header is damaged.
        UsageError: it is too large to be encrypted.
    """
    header = _own_header(data[:HEADER_BYTES])
    size = stored_bytes(header.stored_length + SEALED_BYTES)
    buffer = scratch.take(size)
    try:
        whole = memoryview(buffer)[:size]
        header = keys.seal(header, data, whole)
    except BaseException:
        scratch.give(buffer)
        raise
    return Encoded(whole, header, buffer)


def restored_object(
    data: memoryview,
    object_id: bytes,
    into: memoryview,
    keys: KeyRing | None,
    scratch: Scratch,
    made: bytes | None = None,
) -> ObjectHeader:
    """Check a whole object as a tier kept it, and write it raw into a slot.

    Args:
        data: header page, payload as stored, and padding.
        object_id: the 36 bytes it was asked for by.
        into: the slot; perhaps ``data`` itself, where that is as long as the slot and the tier
            has no keys.
        keys: of a tier with encryption.
        scratch: where an object lies between being opened and being decoded.
        made: as of `verify_object`.
    Returns:
        The header that now stands in the slot.
    Raises:
        CorruptObject: a check failed.
        Incompatible: a format, codec, key or calibration that this build or process does not have;
            or not encrypted, where there are keys.
        UsageError: a good object, but too long or too short for the slot.
    """
    header = verify_object(data, object_id, made)
    if keys is None:
        if header.encryption_key != NOT_ENCRYPTED:
            name = header.encryption_key.hex()
            raise Incompatible(f"encrypted with the key {name}, not known here")
        return _decoded(header, data, into)
    size = stored_bytes(header.stored_length - SEALED_BYTES)
    if header.codec == "raw" and size == len(into):
        return keys.open(header, data, into)
    with scratch.buffer(size) as opened:
        return _decoded(keys.open(header, data, opened), opened, into)


def checked_object(
    data: memoryview, object_id: bytes, keys: KeyRing | None, scratch: Scratch
) -> ObjectHeader:
    """Check a whole object as far as it goes without decoding it; arguments as above.

    Raises:
        CorruptObject, Incompatible: as `restored_object`.
    """
    header = verify_object(data, object_id)
    if keys is None:
        return header
    with scratch.buffer(stored_bytes(header.stored_length - SEALED_BYTES)) as opened:
        return keys.open(header, data, opened)


def _decoded(header: ObjectHeader, data: memoryview, into: memoryview) -> ObjectHeader:
    """Write an object that is good and not encrypted raw into a slot."""
    if stored_bytes(header.raw_length) != len(into):
        raise UsageError(f"an object of {header.raw_length} bytes, for a slot of {len(into)}")
    if header.codec == "raw":
        if data is not into:
            into[:] = data
        return header
    if len(data) >= len(into):
        raise CorruptObject(f"{header.codec} made {len(into)} bytes no smaller: {len(data)}")
    from kvstrata.codecs import stored_codec
    from kvstrata.node.coding.forms import form_of

    producer, parameters = apart(header.codec_parameters)
    codec = stored_codec(header.codec, parameters)
    try:
        form = form_of(header, codec)
    except UsageError as error:
        raise CorruptObject(f"header: {error}") from error
    end = HEADER_BYTES + header.raw_length
    stored = np.frombuffer(data, np.uint8, header.stored_length, HEADER_BYTES)
    raw = np.frombuffer(into, np.uint8, header.raw_length, HEADER_BYTES)
    form.decode(stored, raw)
    digest = checksum(into[HEADER_BYTES:end])
    if codec.lossless and digest != header.raw_checksum:
        raise CorruptObject(f"{codec.name} gave back other bytes than were stored")
    header = msgspec.structs.replace(
        header,
        group=header.group & (1 << GROUP_BITS) - 1,
        codec="raw",
        codec_parameters=with_producer(producer),
        stored_length=header.raw_length,
        raw_checksum=digest,
        stored_checksum=digest,
    )
    into[:HEADER_BYTES] = encode(header)
    into[end:] = bytes(len(into) - end)
    return header


def _own_header(page: memoryview) -> ObjectHeader:
    """The header of a slot, which this very node wrote: a strange version is damage too."""
    try:
        return decode_header(page)
    except Incompatible as error:
        raise CorruptObject(f"header: {error}") from error


def _portable(header: ObjectHeader, raw: Bytes) -> tuple[ObjectHeader, Bytes]:
    """The same object in the portable order, or of kept tokens: what lossy codecs work on."""
    if header.kind in PERHAPS_LOSSY:
        return header, raw
    if len(header.shape) != 6:
        raise LayoutMismatch(f"a native payload {header.shape} tells no heads from channels")
    layers, blocks, states, heads, _, dim = header.shape
    group = LayerGroup(0, "full", layers, heads, dim, states, header.dtype)
    order = native_order(header.order)
    pages = raw.reshape(layers, blocks, -1)
    portable = order.unpack_layers(pages, group)
    flat: Bytes = portable.reshape(-1).view(np.uint8)
    changed = msgspec.structs.replace(
        header, kind="portable", order="", shape=portable.shape, raw_checksum=checksum(flat.data)
    )
    return changed, flat
