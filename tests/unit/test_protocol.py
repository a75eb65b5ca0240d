"""The messages: golden bytes of each, any bytes decode or are refused, frames cut anywhere."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.errors import Incompatible, UsageError
from kvstrata.observe.reasons import Reason, Why
from kvstrata.wire import operating as o
from kvstrata.wire import protocol as p

TEMPLATE = p.Template(
    "native", "a/b", "bfloat16", [2, 3], 128, 4096, 256, 1, "sliding", 7, "sglang", b"d" * 16
)

REASON = Reason(Why.EVICTED, 3, "disk", "x", 0.5)

GOLDEN: list[tuple[p.Request | p.Reply, str]] = [
    (
        p.Hello(2, "0.1.0", 7, b"n", 8192, [b"s"], ["disk"], "a:1"),
        "2300000099a568656c6c6f02a5302e312e3007c4016ecd200091c4017391a46469736ba3613a31",
    ),
    (
        p.Match(
            1,
            b"k",
            [0, 65537],
            ["a/b"],
            [4096, 5],
            bytes(range(16)),
            b"n",
            0.5,
            0.25,
            "a:1",
            1.5,
            [7],
            b"h",
            "00-",
            ["disk"],
            [0, 2],
            True,
        ),
        "65000000dc0012a56d6174636801c4016b9200ce0001000191a3612f6292cd100005c410000102030405"
        "060708090a0b0c0d0e0fc4016ecb3fe0000000000000cb3fd0000000000000a3613a31cb3ff800000000"
        "00009107c40168a330302d91a46469736b920002c3",
    ),
    (
        p.Matched(1, 2, b"\x00\x01", b"o", 3, 0.5, 0.25, 2.0, "no", [REASON], 5, 4),
        "4e0000009da76d6174636865640102c4020001c4016f03cb3fe0000000000000cb3fd0000000000000cb"
        "4000000000000000a26e6f9195a76576696374656403a46469736ba178cb3fe00000000000000504",
    ),
    (
        p.Inside(1, 2, b"m", [0], ["a/b"], [4096], [16], bytes(range(16)), 0.5, ["disk"], [3]),
        "3d0000009ca6696e736964650102c4016d910091a3612f6291cd10009110c410000102030405060708090a0b0c0d0e"
        "0fcb3fe000000000000091a46469736b9103",
    ),
    (
        p.Nearest(1, 2, 3, b"k", 40, 32, 1, b"o"),
        "1500000099a76e656172657374010203c4016b282001c4016f",
    ),
    (p.Await(1, 2, 3, True), "0b00000095a56177616974010203c3"),
    (p.Arrived(1, 2, True, b"o"), "0f00000095a7617272697665640102c3c4016f"),
    (p.Release(1, 2), "0b00000093a772656c656173650102"),
    (
        p.Reserve(
            1,
            b"n",
            b"k",
            0,
            65537,
            TEMPLATE,
            0.5,
            "w",
            bytes(range(16)),
            True,
            "00-",
            -1,
            ["host"],
            b"m",
        ),
        "850000009fa77265736572766501c4016ec4016b00ce000100019ca66e6174697665a3612f62a862666c6f61"
        "743136920203cc80cd1000cd010001a7736c6964696e6707a673676c616e67c4106464646464646464646464"
        "6464646464cb3fe0000000000000a177c410000102030405060708090a0b0c0d0e0fc3a330302dff91a4686f"
        "7374c4016d",
    ),
    (p.Reserved(1, 2, b"o"), "0f00000094a872657365727665640102c4016f"),
    (p.Commit(1, 2, b"c"), "0d00000094a6636f6d6d69740102c40163"),
    (p.Done(1, 2), "0800000093a4646f6e650102"),
    (
        p.Lookup(1, b"k", [0], ["a/b"], b"n"),
        "1600000096a66c6f6f6b757001c4016b910091a3612f62c4016e",
    ),
    (p.Found(1, b"\xff"), "0b00000093a5666f756e6401c401ff"),
    (
        p.Clear(1, None, ["host"], b"o", b"n", 5),
        "1600000097a5636c65617201c091a4686f7374c4016fc4016e05",
    ),
    (p.Pin(1, b"k", b"o", "a", 0.5), "1700000096a370696e01c4016bc4016fa161cb3fe0000000000000"),
    (
        p.Pinned(1, 3, 2, {"host": 2}, {"redis": "no"}),
        "1c00000096a670696e6e656401030281a4686f73740281a57265646973a26e6f",
    ),
    (p.Unpin(1, b"o", "a"), "0d00000094a5756e70696e01c4016fa161"),
    (p.Pins(1, b"o", 2), "0b00000094a470696e7301c4016f02"),
    (
        p.PinPage(1, [p.PinState(b"o", "a", 3, 2, 0.5)], b"p"),
        "2000000094a870696e5f70616765019195c4016fa1610302cb3fe0000000000000c40170",
    ),
    (p.Quota(1, b"o", "host", None), "1100000095a571756f746101c4016fa4686f7374c0"),
    (p.Flush(1), "0800000092a5666c75736801"),
    (p.Status(1), "0900000092a673746174757301"),
    (p.State(1, {"a": 1}), "0c00000093a573746174650181a16101"),
    (p.Metrics(1), "0a00000092a76d65747269637301"),
    (
        p.Measured(
            1, [o.Value("a", {"b": "c"}, 2.0)], [o.Distribution("d", {}, [0.5], [1, 2], 3.0)]
        ),
        "3800000094a86d65617375726564019193a16181a162a163cb40000000000000009195a1648091cb3fe0000000000000920102cb4008000000000000",
    ),
    (p.Record({"a": 1}), "0c00000092a67265636f726481a16101"),
    (p.Records(1, 7, 50), "0c00000094a77265636f726473010732"),
    (
        p.RecordPage(1, [{"number": 6}], 6),
        "1900000094ab7265636f72645f70616765019181a66e756d6265720606",
    ),
    (p.Watch(1, 2, 0.5), "1200000094a577617463680102cb3fe0000000000000"),
    (
        p.Watched(1, 2, True, [p.Change(1, "evicted", b"k", 2)]),
        "1b00000095a7776174636865640102c3919401a765766963746564c4016b02",
    ),
    (
        o.Jobs(1, 2, 3),
        "0900000094a46a6f6273010203",
    ),
    (
        o.JobPage(1, [o.JobState(2, "copy", "a", "done", 3, 3, 4096, 1, ["no"], "n", 0.5, 1.5)], 2),
        "3900000094a86a6f625f7061676501919c02a4636f7079a161a4646f6e650303cd10000191a26e6fa16e"
        "cb3fe0000000000000cb3ff800000000000002",
    ),
    (
        o.Cancel(1, 2),
        "0a00000093a663616e63656c0102",
    ),
    (
        o.Started(1, 2, True),
        "0c00000094a7737461727465640102c3",
    ),
    (
        o.Prefetch(1, b"k", [0], ["a/b"], [4096], b"n", bytes(range(16))),
        "2e00000098a8707265666574636801c4016b910091a3612f6291cd1000c4016ec4100001020304050607"
        "08090a0b0c0d0e0f",
    ),
    (
        o.Copy(1, b"k", "host", "disk", [0], ["a/b"], b"n"),
        "1e00000098a4636f707901c4016ba4686f7374a46469736b910091a3612f62c4016e",
    ),
    (
        o.Move(1, b"k", "host", "disk", [0], ["a/b"], b"n"),
        "1e00000098a46d6f766501c4016ba4686f7374a46469736b910091a3612f62c4016e",
    ),
    (
        o.Send(1, b"k", "a:1", [0], ["a/b"], [4096], b"n"),
        "1c00000098a473656e6401c4016ba3613a31910091a3612f6291cd1000c4016e",
    ),
    (
        o.Transcode(1, "disk", "int4", None, [0], ["a/b"], b"n"),
        "2100000098a97472616e73636f646501a46469736ba4696e7434c0910091a3612f62c4016e",
    ),
    (
        o.Scrub(1, "disk"),
        "0d00000093a5736372756201a46469736b",
    ),
    (
        o.Inspect(1, "disk", b"k", 65537, ["a/b"], b"n"),
        "1f00000097a7696e737065637401a46469736bc4016bce0001000191a3612f62c4016e",
    ),
    (
        o.Inspected(1, 8192, "no", {"rank": 1}),
        "1900000095a9696e7370656374656401cd2000a26e6f81a472616e6b01",
    ),
    (
        o.List(1, "disk", b"k", 2),
        "1000000095a46c69737401a46469736bc4016b02",
    ),
    (
        o.Listed(1, [o.Chunk(b"k", {"disk": 8192}, b"p", 128, 128, b"n", b"o", 0.5)], b"k"),
        "3000000094a66c6973746564019198c4016b81a46469736bcd2000c40170cc80cc80c4016ec4016fcb3f"
        "e0000000000000c4016b",
    ),
    (
        o.Drain(1, True),
        "0900000093a5647261696e01c3",
    ),
    (
        o.Undrain(1),
        "0a00000092a7756e647261696e01",
    ),
    (
        o.Reload(1, {"log": "info"}),
        "1300000093a672656c6f61640181a36c6f67a4696e666f",
    ),
    (
        o.Reloaded(1, ["log"], ["tenant"]),
        "1800000094a872656c6f616465640191a36c6f6791a674656e616e74",
    ),
    (
        p.Explain(1, "r", b"k", b"n", bytes(range(16)), b"h", True),
        "2800000098a76578706c61696e01a172c4016bc4016ec410000102030405060708090a0b0c0d0e0fc40168c3",
    ),
    (
        p.Explained(1, {"a": 1}, b"\x00", [REASON]),
        "2e00000095a96578706c61696e65640181a16101c401009195a76576696374656403a46469736ba178cb"
        "3fe0000000000000",
    ),
    (p.Bye(), "0500000091a3627965"),
    (p.Failed(1, "UsageError", "no"), "1700000094a66661696c656401aa55736167654572726f72a26e6f"),
]
MESSAGES = [message for message, _ in GOLDEN]


def name(value: object) -> str:
    return "" if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=name)
def test_golden_bytes(message: p.Request | p.Reply, golden: str) -> None:
    frame = bytes.fromhex(golden)
    assert p.encode(message) == frame
    (body,) = p.Frames().feed(frame)
    decode = p.decode_request if isinstance(message, p.Request) else p.decode_reply
    assert decode(body) == message


def test_every_message_has_golden_bytes() -> None:
    kinds = {type(message) for message in MESSAGES}
    assert kinds == {*p.Request.__args__, *p.Reply.__args__}


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_more_or_fewer_fields_are_refused(message: p.Request | p.Reply) -> None:
    words = msgspec.msgpack.decode(p.encode(message)[4:])
    decode = p.decode_request if isinstance(message, p.Request) else p.decode_reply
    for wrong in ([*words, 0], [words[0] + "?", *words[1:]], [0, *words[1:]], words[:1], []):
        if wrong == words:
            continue  # `bye` has no fields
        with pytest.raises(Incompatible, match="protocol 2"):
            decode(msgspec.msgpack.encode(wrong))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    for decode in (p.decode_request, p.decode_reply, p.decode_hello):
        try:
            message = decode(body)
        except Incompatible:
            continue
        assert type(message) in {*p.Request.__args__, *p.Reply.__args__}


@settings(deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_messages_are_messages_or_refused(
    message: p.Request | p.Reply, data: st.DataObject
) -> None:
    body = bytearray(p.encode(message)[4:])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for damaged in (bytes(body), bytes(body[:cut]), bytes(body) + b"\0"):
        for decode in (p.decode_request, p.decode_reply, p.decode_hello):
            try:
                decode(damaged)
            except Incompatible:
                continue


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 100_000 + b"\xa3bye",  # deep
        b"\x92\xa6record\x81" + b"\x91" * 5000 + b"\xc0",
        b"\x92\xa6record\x81\xa1x\x81\x80\xc0",  # a map as a map's key
        b"\x92\xa6record\x81\xa1x\x81\x91\x90\xc0",  # a list as a map's key
        b"\x92\xa6record\x81\xa1\xff\xc0",  # no UTF-8
        b"\x92\xa5flush\xcf" + b"\xff" * 7,  # cut
        b"\x92\xa5flush\xcb" + b"\x7f\xf0" + bytes(6),  # infinity
        b"\xdd\xff\xff\xff\xff",  # a list of four thousand million
        b"\xc6\xff\xff\xff\xff",
    ],
)
def test_what_a_decoder_may_stumble_over(body: bytes) -> None:
    for decode in (p.decode_request, p.decode_reply, p.decode_hello):
        try:
            decode(body)
        except Incompatible:
            continue


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8), st.data())
def test_frames_cut_anywhere(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    frames, got = p.Frames(), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += list(frames.feed(stream[start:end]))
    assert got == bodies


def test_frames_that_were_read_are_forgotten_even_if_the_reader_stops() -> None:
    frames = p.Frames()
    for body in frames.feed(p.encode(p.Bye()) + p.encode(p.Flush(7))):
        assert p.decode_request(body) == p.Bye()
        break
    assert [p.decode_request(body) for body in frames.feed(b"")] == [p.Flush(7)]


def test_a_frame_may_have_so_many_bytes_and_no_more() -> None:
    assert list(p.Frames().feed((4 << 20).to_bytes(4, "little"))) == []
    with pytest.raises(Incompatible, match="4194305 bytes"):
        list(p.Frames().feed(((4 << 20) + 1).to_bytes(4, "little")))


@pytest.mark.parametrize("message", MESSAGES, ids=name)
def test_only_messages_with_columns_are_long(message: p.Request | p.Reply) -> None:
    long = type(message).__name__ in ("Match", "Lookup", "Clear", "Pin", "Reserve", "Commit",
                                      "Matched", "Arrived", "Reserved", "Found", "State",
                                      "Measured", "RecordPage", "Watched", "JobPage", "Listed",
                                      "Prefetch", "Copy", "Move", "Send", "PinPage",
                                      "Transcode", "Explain", "Explained")  # fmt: skip
    assert p.max_bytes(p.encode(message)[4:]) == (4 << 20 if long else 64 << 10)


def test_a_message_that_is_too_long_is_neither_sent_nor_read() -> None:
    record = p.Record({"x": "y" * (64 << 10)})
    with pytest.raises(UsageError, match=r"a record of 655\d\d bytes; 65536 at most"):
        p.encode(record)
    with pytest.raises(Incompatible, match=r"a short message of 655\d\d bytes"):
        p.decode_request(msgspec.msgpack.encode(record))
    with pytest.raises(UsageError, match="a match of 419"):
        p.encode(p.Match(1, bytes(4 << 20), [0], []))


@pytest.mark.parametrize("field", [2, 3, 4])
def test_no_list_is_long_enough_to_hold_the_loop(field: int) -> None:
    """The length is looked at before anything in it is."""
    words = ["match", 1, b"", [0], ["x"], [1]]
    words[field + 1 if field > 2 else 3] = [None] * 100_000
    with pytest.raises(Incompatible, match="length <= 4096"):
        p.decode_request(msgspec.msgpack.encode(words))


KEYS = bytes(32 * p.MAX_KEYS)
WIDE = list(range(1, 1 + p.MAX_OBJECTS // p.MAX_KEYS))
TEMPLATE = p.Template("native", "a/b", "uint8", [1], 16, 16)


@pytest.mark.parametrize(
    ("most", "more", "says"),
    [
        (
            p.Clear(1, KEYS),
            p.Clear(1, KEYS + bytes(32)),
            "a clear of 32769 keys; 32768 at most: send",
        ),
        (
            p.Pin(1, KEYS, b"", "a", 1.0),
            p.Pin(1, KEYS + bytes(32), b"", "a", 1.0),
            "a pin of 32769 keys; 32768 at most: send",
        ),
        (
            p.Match(1, KEYS, WIDE, []),
            p.Match(1, KEYS + bytes(32), [0], []),
            "a match of 32769 keys",
        ),
        (
            p.Lookup(1, KEYS, WIDE),
            p.Lookup(1, KEYS, [0, *WIDE]),
            "of 32768 chunks of 9 parts; 262144",
        ),
        (
            p.Clear(1),
            p.Reserve(1, b"", KEYS + bytes(32), 0, 0, TEMPLATE),
            "a reserve of 32769 keys",
        ),
        (
            p.Reserve(1, b"", KEYS, p.MAX_KEYS - p.MAX_RESERVED, 0, TEMPLATE),
            p.Reserve(1, b"", KEYS, p.MAX_KEYS - p.MAX_RESERVED - 1, 0, TEMPLATE),
            "4097 chunks to reserve; 4096 at most: commit some first",
        ),
    ],
)
def test_a_request_may_ask_for_so_much_and_no_more(
    most: p.Request, more: p.Request, says: str
) -> None:
    p.check_limits(most)
    p.encode(most)
    with pytest.raises(UsageError, match=says):
        p.check_limits(more)


def test_the_longest_answers_fit_into_a_frame() -> None:
    p.encode(p.Matched(1 << 60, 1 << 60, bytes(p.MAX_KEYS), bytes(8 * p.MAX_OBJECTS)))
    p.encode(p.Arrived(1 << 60, 1, False, bytes(8 * p.MAX_OBJECTS)))


def test_columns() -> None:
    assert p.split(b"", 32) == []
    assert p.split(bytes(32) + b"\1" * 32, 32) == [bytes(32), b"\1" * 32]
    for length in (p.BLOCK - 1, p.BLOCK, p.BLOCK + 1, 3 * p.BLOCK):
        items = [number.to_bytes(32, "big") for number in range(length)]
        assert p.split(b"".join(items), 32) == items
    with pytest.raises(Incompatible, match="33 bytes is no multiple of 32"):
        p.split(bytes(33), 32)


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1, "\ud800"])
def test_what_cannot_be_encoded_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="a record that cannot be encoded"):
        p.encode(p.Record({"a": value}))
