"""Who computed an object is in its header, through every codec, and in nobody's way."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.nodes import ORDER, RAW, at_once, chunk_keys, on_node
from tests.unit.test_recoding import PORTABLE, an_object, native, slot

from kvstrata.codecs import codec_named
from kvstrata.errors import Incompatible, UsageError
from kvstrata.node.coding.recoding import Encoded, encoded_object, restored_object
from kvstrata.node.coding.scratch import Scratch
from kvstrata.node.node import Node
from kvstrata.node.slots.clients import Client
from kvstrata.objects import HEADER_BYTES, checksum, decode
from kvstrata.producers import MAX_PRODUCER, apart, with_producer
from kvstrata.testing.codecs import kv_like
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

names = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=MAX_PRODUCER)


@given(producer=names, parameters=st.binary(max_size=100).filter(lambda b: b[:1] != b"\xff"))
def test_both_come_apart_again(producer: str, parameters: bytes) -> None:
    assert apart(with_producer(producer, parameters)) == (producer, parameters)


@given(anything=st.binary(max_size=256) | st.binary(max_size=40).map(lambda b: b"\xff" + b))
def test_what_names_nobody_is_left_to_the_codec(anything: bytes) -> None:
    producer, parameters = apart(anything)
    assert with_producer(producer, parameters) == anything


@pytest.mark.parametrize("name", ["x" * 33, "a b", "é", "\n", "\ud800"])
def test_names_that_no_header_holds(name: str) -> None:
    with pytest.raises(UsageError, match="printable ASCII"):
        with_producer(name)


def portable() -> bytes:
    return kv_like(PORTABLE).view(np.uint8).tobytes()


@pytest.mark.parametrize("name", ["lossless", "int8", "fp8", "cachegen-4"])
@pytest.mark.parametrize("producer", ["", "sglang"])
def test_a_producer_comes_back_from_every_codec(name: str, producer: str) -> None:
    codec = codec_named(name)
    whole = an_object(
        portable(), kind="portable", order="", shape=PORTABLE.shape,
        codec_parameters=with_producer(producer),
    )  # fmt: skip
    encoded = cast(Encoded, encoded_object(codec, whole, Scratch(1)))
    assert apart(encoded.header.codec_parameters) == (producer, codec.parameters())
    back = slot(len(whole))
    header = restored_object(encoded.data, encoded.header.object_id, back, None, Scratch(1))
    assert header.codec_parameters == with_producer(producer)
    if codec.lossless:
        assert back == whole


def test_who_does_not_know_of_producers_misses() -> None:
    """As a release before them reads such an object: a codec of a version that it cannot decode."""
    for name in ("lossless", "int8", "int4", "fp8", "cachegen-4"):
        codec = codec_named(name)
        with pytest.raises(Incompatible):
            type(codec).from_parameters(with_producer("sglang", codec.parameters()))


def test_a_native_object_needs_none() -> None:
    encoded = cast(
        Encoded, encoded_object(codec_named("lossless"), an_object(native()), Scratch(1))
    )
    assert apart(encoded.header.codec_parameters)[0] == ""


def test_a_client_says_it_and_the_node_writes_it() -> None:
    async def scenario(node: Node) -> None:
        client = Client("a test")
        for key, producer in zip(chunk_keys(2), ("", "sglang"), strict=True):
            template = p.Template("native", ORDER, "uint8", [RAW], 16, RAW, producer=producer)
            asked = p.Reserve(1, bytes(32), key, 0, 0, template)
            reserved = at_once(node.reserve(client, asked))
            (offset,) = offsets_of(reserved.offsets)
            payload = node.host.pool.view(offset + HEADER_BYTES, RAW)
            payload[:] = bytes(RAW)
            at_once(node.commit(client, p.Commit(1, reserved.reservation, checksum(payload))))
            header = decode(node.host.pool.view(offset, HEADER_BYTES))
            assert header.key == key
            assert header.codec_parameters == with_producer(producer)
        template = p.Template("native", ORDER, "uint8", [RAW], 16, RAW, producer="not one")
        with pytest.raises(UsageError, match="printable ASCII"):
            at_once(node.reserve(client, p.Reserve(9, bytes(32), b"k" * 32, 0, 0, template)))

    on_node(scenario)
