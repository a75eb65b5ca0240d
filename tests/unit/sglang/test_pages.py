"""A page of SGLang's is where `pages` says, element by element, and what is not is noticed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.support.host_pools import LAYOUTS, HostPool

from kvstrata.connectors.sglang.pages import BytePages, TokenPages
from kvstrata.connectors.sglang.proof import prove
from kvstrata.errors import Incompatible, LayoutMismatch
from kvstrata.header import ObjectHeader
from kvstrata.layout import native_order

FOREIGN = "vllm/cpu-vec/b8/bfloat16"


def a_payload(pages: TokenPages, seed: int = 0) -> npt.NDArray[Any]:
    return np.random.default_rng(seed).integers(0, 256, pages.nbytes, np.uint8)


def words(pages: TokenPages, payload: npt.NDArray[Any]) -> Any:
    """A payload as (L, S, H, T, D), by what `kvstrata.layout` knows of its order."""
    width = pages.group.item_bytes
    if not pages.order:
        return payload.view(f"u{width}").reshape(pages.portable_shape)
    native = native_order(pages.order)
    layers = payload.reshape(pages.group.num_layers, 1, -1)
    return native.unpack_layers(layers, pages.group)


def payload_of(pages: TokenPages, elements: Any) -> Any:
    """The inverse."""
    if not pages.order:
        return np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
    word = np.ascontiguousarray(elements).view(f"u{pages.group.item_bytes}")
    return native_order(pages.order).pack_layers(word, pages.group).reshape(-1)


def header(pages: TokenPages, **more: Any) -> ObjectHeader:
    fields: dict[str, Any] = {
        "namespace": bytes(32), "key": bytes(32), "parent": bytes(32), "start": 0,
        "num_tokens": pages.page_tokens, "group": 0, "rank": 0, "kind": "portable", "order": "",
        "dtype": pages.dtype, "shape": pages.portable_shape, "codec": "raw",
        "codec_parameters": b"", "epoch": 0, "created_ns": 1,
        "raw_length": pages.nbytes, "stored_length": pages.nbytes,
        "raw_checksum": bytes(16), "stored_checksum": bytes(16), "chunk_tokens": pages.page_tokens,
    }  # fmt: skip
    return ObjectHeader(**{**fields, **more})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("foreign", [(), (FOREIGN,)], ids=["alone", "shared"])
def test_every_element_is_in_its_place(
    foreign: tuple[str, ...], layout: str, states: int, dtype: Any
) -> None:
    pool = HostPool(layout, states=states, dtype=dtype)
    pages = TokenPages(pool, "kv", pool.page_size, foreign)
    assert bool(pages.order) == (states == 2 and not foreign)
    pool.fill(1)
    before = pool.words().copy()
    for page in (0, 2, 3):
        payload = np.zeros(pages.nbytes, np.uint8)
        pages.read(page * pool.page_size, payload)
        found = words(pages, payload)
        for place in product(*(range(n) for n in pages.portable_shape)):
            layer, state, head, token, at = place
            there = before[pool.element(page, layer, state, head, token, at)]
            assert found[place] == there
    assert np.array_equal(pool.words(), before)
    new = a_payload(pages)
    pages.write(2 * pool.page_size, new)
    expected, written = before.copy(), words(pages, new)
    for place in product(*(range(n) for n in pages.portable_shape)):
        layer, state, head, token, at = place
        expected[pool.element(2, layer, state, head, token, at)] = written[place]
    assert np.array_equal(pool.words(), expected), "and nothing else is touched"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_stored_in_the_portable_order_is_read(layout: str) -> None:
    pool = HostPool(layout)
    pages = TokenPages(pool, "kv", pool.page_size)
    payload = a_payload(pages)
    portable = np.ascontiguousarray(words(pages, payload)).reshape(-1).view(np.uint8)
    assert not np.array_equal(portable, payload)
    pages.write(pool.page_size, portable, "")
    found = np.zeros_like(payload)
    pages.read(pool.page_size, found)
    assert np.array_equal(found, payload)
    assert pages.orders == [pages.order, "portable"], "its own is asked for first"
    assert pages.fits(header(pages))
    shape = (2, 1, 2, 3, 16, 8)
    assert pages.fits(header(pages, kind="native", order=pages.order, shape=shape))
    assert pages.template(0).shape == list(shape)


def test_a_page_begins_where_one_begins() -> None:
    pages = TokenPages(HostPool("layer_first"), "kv", 16)
    with pytest.raises(Incompatible, match="in the middle"):
        pages.read(8, a_payload(pages))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_another_engine_wrote_is_unpacked(layout: str) -> None:
    pool = HostPool(layout)
    pages = TokenPages(pool, "kv", pool.page_size, (FOREIGN,))
    order, portable = native_order(FOREIGN), a_payload(pages)
    native = order.pack_layers(words(pages, portable).view(np.uint16), pages.group)
    assert not np.array_equal(native.reshape(-1), portable)
    pages.write(pool.page_size, native.reshape(-1), FOREIGN)
    found = np.zeros_like(portable)
    pages.read(pool.page_size, found)
    assert np.array_equal(found, portable)
    assert pages.orders == ["portable", FOREIGN]


def test_only_what_fits_is_read() -> None:
    pages = TokenPages(HostPool("page_first"), "kv", 16, (FOREIGN,))
    layers, states, heads, tokens, dim = pages.shape
    native = {"kind": "native", "order": FOREIGN, "shape": (layers, 2, states, heads, 8, dim)}
    assert pages.fits(header(pages))
    assert pages.fits(header(pages, **native))
    own = "sglang/strided-SNHD/b16/bfloat16"
    wrong: list[dict[str, Any]] = [
        {"kind": "kept"}, {"codec": "zstd"}, {"dtype": "float16"}, {"num_tokens": 15},
        {"raw_length": pages.nbytes - 2}, {"order": "x"},
        {"shape": (layers, states, tokens, heads, dim)},
        {**native, "codec": "zstd"}, {**native, "order": "vllm/cpu-vec/b16/bfloat16"},
        {**native, "shape": (layers, 1, states, heads, 16, dim)}, {**native, "num_tokens": 8},
        {**native, "raw_length": 2 * pages.nbytes},
        {"kind": "native", "order": own, "shape": (layers, 1, states, heads, tokens, dim)},
    ]  # fmt: skip
    for fields in wrong:
        assert not pages.fits(header(pages, **fields)), fields
    plain = TokenPages(HostPool("page_first"), "kv", 16)
    assert not plain.fits(header(plain, **native)), "nobody has said that it may be read"
    assert not plain.fits(header(plain, kind="native", order=plain.order))


@pytest.mark.parametrize(
    ("what", "value", "why"),
    [
        ("layout", "page_head", "--hicache-mem-layout"),
        ("v_head_dim", 4, "different sizes"),
        ("layer_num", 3, "shape"),
    ],
)
def test_what_no_page_may_be_is_refused(what: str, value: Any, why: str) -> None:
    pool = HostPool("layer_first")
    TokenPages(pool, "kv", 16)
    setattr(pool, what, value)
    with pytest.raises(Incompatible, match=why):
        TokenPages(pool, "kv", 16)


def test_pages_may_be_too_short() -> None:
    with pytest.raises(Incompatible, match="--page-size"):
        TokenPages(HostPool("page_first", page_tokens=8), "kv", 8)


def test_the_namespace_tells_pools_apart() -> None:
    def layout(**more: Any) -> str:
        return TokenPages(HostPool("page_first", **more), "kv", 16).layout

    texts = [layout(), layout(layers=3), layout(heads=1), layout(dim=16), layout(states=1),
             layout(dtype=torch.float16)]  # fmt: skip
    assert len(set(texts)) == len(texts)
    direct = TokenPages(HostPool("page_first_direct"), "kv", 16)
    assert layout() == direct.layout, "portable payloads are the same in every layout"


@pytest.mark.parametrize(
    ("name", "kind"), [("kv", "full"), ("draft", "full"), ("swa", "sliding"),
                       ("draft_swa", "sliding"), ("deepseek_v4_c4_state", "sliding")],
)  # fmt: skip
def test_a_window_is_called_one(name: str, kind: str) -> None:
    template = TokenPages(HostPool("page_first"), name, 16).template(1)
    assert template.group_kind == kind
    assert template.boundary == (16 if kind == "sliding" else 0)


# the self-test

Mutation = Callable[[Any], Any]


def _backwards(axis: int, view: Any) -> Any:
    """The same with the end of an axis first."""
    return torch.stack(list(view.unbind(axis))[::-1], axis)


#: what may be wrong with a page as (L, S, H, T, D), all of them of the right shape
MUTATIONS: dict[str, Mutation] = {
    **{f"axis {axis} backwards": partial(_backwards, axis) for axis in range(5)},
    "heads and layers swapped": lambda v: v.transpose(0, 2),
    "tokens and sizes swapped": lambda v: v.transpose(3, 4),
    "heads and tokens swapped": lambda v: v.transpose(2, 3),
}


class Mutated(TokenPages):
    """Pages that look in the wrong place, in one direction."""

    mutation: Mutation
    reads = writes = False

    def read(self, index: int, payload: Any) -> None:
        super().read(index, payload)
        if self.reads:
            payload[:] = _moved(self, payload, self.mutation)

    def write(self, index: int, payload: Any, order: str | None = None) -> None:
        moved = self.writes and order in (None, self.order)
        super().write(index, _moved(self, payload, self.mutation) if moved else payload, order)


class MutatedPortable(TokenPages):
    """Pages that put what is in the portable order in the wrong place."""

    def write(self, index: int, payload: Any, order: str | None = None) -> None:
        if order == "":
            elements = payload.view(np.int16).reshape(self.portable_shape)
            payload = np.ascontiguousarray(elements[:, :, ::-1]).reshape(-1).view(np.uint8)
        super().write(index, payload, order)


def _moved(pages: TokenPages, payload: Any, mutation: Mutation) -> Any:
    elements = torch.from_numpy(words(pages, payload.copy()).view(np.int16))
    return payload_of(pages, mutation(elements).contiguous().numpy())


@pytest.mark.parametrize("direction", ["reads", "writes", "both"])
@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("foreign", [(), (FOREIGN,)], ids=["alone", "shared"])
def test_a_wrong_place_is_noticed(
    foreign: tuple[str, ...], layout: str, name: str, direction: str
) -> None:
    # Sizes that are swapped are alike, so that no shape gives that away.
    pool = HostPool(layout, pages=2, page_tokens=16, layers=16, heads=16, dim=16)
    pages = Mutated(pool, "kv", 16, foreign)
    prove(pages, pool)
    pages.mutation = MUTATIONS[name]
    pages.reads, pages.writes = direction != "writes", direction != "reads"
    with pytest.raises(LayoutMismatch, match=r"elsewhere|take pages back"):
        prove(pages, pool)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_place_of_what_is_portable_is_noticed(layout: str) -> None:
    pool = HostPool(layout)
    with pytest.raises(LayoutMismatch, match="take pages back"):
        prove(MutatedPortable(pool, "kv", 16), pool)


@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_pool_held_is_there_after_its_test(layout: str, states: int) -> None:
    pool = HostPool(layout, states=states)
    pool.fill(3)
    before = pool.words().copy()
    prove(TokenPages(pool, "kv", 16), pool)
    assert np.array_equal(pool.words(), before)


@pytest.mark.parametrize("states", [1, 2])
def test_another_layout_than_the_pool_has_is_noticed(states: int) -> None:
    """A pool whose memory is in one layout, and who says that it is in another."""
    sizes = {"pages": 16, "page_tokens": 16, "layers": 256, "heads": 1, "dim": 1, "states": states}
    pool, other = HostPool("layer_first", **sizes), HostPool("page_first", **sizes)
    assert pool.kv_buffer.shape == other.kv_buffer.shape, "no shape gives it away"
    prove(TokenPages(pool, "kv", 16), pool)
    pool.layout = "page_first"
    with pytest.raises(LayoutMismatch, match="elsewhere"):
        prove(TokenPages(pool, "kv", 16), pool)


# pages by address


class States:
    """A pool of states in two tensors, each page's bytes at two addresses."""

    layout, page_size, size, dtype = "page_first", 1, 5, torch.bfloat16

    def __init__(self) -> None:
        self.parts = [torch.zeros(5, 6, dtype=torch.bfloat16), torch.zeros(5, 10, dtype=torch.int8)]
        self.swapped = self.shifted = self.short = False

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        (index,) = indices.tolist()
        rows = [part[(index + self.shifted) % 5] for part in self.parts]
        lengths = [row.numel() * row.element_size() for row in rows]
        addresses = [row.data_ptr() for row in rows]
        if self.short:
            return addresses[:1], lengths[:1]
        return (addresses[::-1], lengths[::-1]) if self.swapped else (addresses, lengths)

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        return torch.cat([part[index].view(torch.uint8) for part in self.parts])

    def set_from_flat_data_page(self, index: int, page: Any) -> None:
        self.parts[0][index] = page[:12].clone().view(torch.bfloat16)
        self.parts[1][index] = page[12:].clone().view(torch.int8)


def test_bytes_by_address_go_and_come_back() -> None:
    pool = States()
    pages = BytePages(pool, "mamba", 64)
    prove(pages, pool)
    assert not any(part.view(torch.uint8).any() for part in pool.parts)
    assert (pages.nbytes, pages.kind, pages.stride) == (22, "recurrent", 1)
    payload = np.arange(22, dtype=np.uint8)
    pages.write(3, payload)
    assert pool.get_data_page(3).tolist() == payload.tolist()
    assert not any(part[[0, 1, 2, 4]].view(torch.uint8).any() for part in pool.parts)
    found = np.zeros(22, np.uint8)
    pages.read(3, found)
    assert np.array_equal(found, payload)


@pytest.mark.parametrize("wrong", ["shifted", "short"])
def test_wrong_addresses_are_noticed(wrong: str) -> None:
    pool = States()
    setattr(pool, wrong, True)
    with pytest.raises(LayoutMismatch):
        prove(BytePages(pool, "mamba", 64), pool)


def test_addresses_that_change_are_noticed() -> None:
    pool = States()
    pages = BytePages(pool, "mamba", 64)
    pool.short = True
    with pytest.raises(Incompatible, match="bytes, not 22"):
        pages.read(0, np.zeros(22, np.uint8))


def test_a_pool_without_addresses_is_refused() -> None:
    with pytest.raises(Incompatible, match="no addresses"):
        BytePages(HostPool("page_first"), "mamba", 64)
