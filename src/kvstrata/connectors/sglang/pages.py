"""SGLang's host pools as pages: where the bytes of one lie, and what an object of it looks like.

Keys and values of attention are stored with a token's heads side by side, ``[L, S, T, H, D]``, as
all of SGLang's layouts have them, so that a page is few long runs and nobody has to know which one
it was told to keep (``--hicache-mem-layout``); where other engines read them, in the portable order
``[L, S, H, T, D]``. Other pools, states among them, are stored as SGLang's own addresses give them.
What these classes claim is a fact only once `kvstrata.connectors.sglang.proof.prove` has passed.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvstrata.errors import Incompatible
from kvstrata.header import MAX_CHUNK_TOKENS, GroupKind, ObjectHeader
from kvstrata.layout import ITEM_BYTES, Elements, LayerGroup, native_order
from kvstrata.parts import PORTABLE
from kvstrata.wire import protocol as p

Bytes = npt.NDArray[np.uint8]

KV = "kv"
MIN_PAGE_TOKENS = 16
REMEDY = "set --hicache-mem-layout to page_first_direct, page_first or layer_first"

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32}
"""The same in numpy: integers that both know."""


class Pages(ABC):
    """The pages of one host pool.

    Args:
        pool: SGLang's.
        name: SGLang's for it.
        page_tokens: tokens of a page of the prompt, whatever the pool keeps of it.

    Attributes:
        stride: indices that SGLang gives for each page.
        nbytes: of the payload of a page.
        layout: logical layout, in one canonical text: part of the namespace.
        order: the native order's name; empty: portable.
        kind: whether a boundary needs all pages before it, or only the last ones.
    """

    order = ""

    def __init__(self, pool: Any, name: str, page_tokens: int) -> None:
        if not MIN_PAGE_TOKENS <= page_tokens <= MAX_CHUNK_TOKENS:
            raise Incompatible(
                f"its pages have {page_tokens} tokens, not {MIN_PAGE_TOKENS} to "
                f"{MAX_CHUNK_TOKENS}: set --page-size, 128 is recommended"
            )
        self.name = name
        self.page_tokens = page_tokens
        self.stride = int(pool.page_size)
        self.kind = _kind_of(name, self.stride)
        self.num_indices = int(pool.size)
        self.dtype = str(pool.dtype).removeprefix("torch.")
        self.nbytes = 0
        self.shape: tuple[int, ...] = ()
        self.layout = ""

    @property
    def orders(self) -> list[str]:
        """Byte orders of objects that can be read into these pages."""
        return [self.order or PORTABLE]

    def template(self, group: int, producer: str = "") -> p.Template:
        """What the headers of its objects share.

        Args:
            group: the pool's layer group.
            producer: which engine this is.
        """
        looks_back = self.kind in ("sliding", "chunked")
        return p.Template(
            kind="native" if self.order else "portable",
            order=self.order,
            dtype=self.dtype,
            shape=list(self.shape),
            num_tokens=self.page_tokens,
            raw_length=self.nbytes,
            chunk_tokens=self.page_tokens,
            group=group,
            group_kind=self.kind,
            boundary=self.page_tokens if looks_back else 0,
            producer="" if self.order else producer,
        )

    def fits(self, header: ObjectHeader) -> bool:
        """Whether an object's payload is that of such a page."""
        return (
            header.codec == "raw"
            and header.dtype == self.dtype
            and header.num_tokens == self.page_tokens
            and header.raw_length == self.nbytes
            and header.order == self.order
            and header.shape == self.shape
        )

    @abstractmethod
    def read(self, index: int, payload: Bytes) -> None:
        """Copy a page into a payload.

        Args:
            index: SGLang's first index of the page.
            payload: (nbytes,) uint8.
        """

    @abstractmethod
    def write(self, index: int, payload: Bytes, order: str | None = None) -> None:
        """Copy a payload into a page.

        Args:
            index, payload: as of `read`.
            order: of the payload, by the name in its header; None: as `read` has it.
        """


class TokenPages(Pages):
    """Keys and values of each token, or a latent, of layers of one shape.

    Args:
        foreign: byte orders of other engines that are read as well, by name; where there are any,
            others read what is stored here, so it is portable.
    """

    def __init__(self, pool: Any, name: str, page_tokens: int, foreign: tuple[str, ...] = ()):
        super().__init__(pool, name, page_tokens)
        latent = hasattr(pool, "kv_cache_dim")
        if latent:
            heads, dim, states = 1, int(pool.kv_cache_dim), 1
        else:
            heads, dim, states = int(pool.head_num), int(pool.head_dim), 2
            if int(pool.v_head_dim) != dim:
                raise Incompatible("its keys and values have different sizes")
        if self.dtype not in ITEM_BYTES:
            raise Incompatible(f"a KV cache of dtype {self.dtype} is not known")
        self.group = LayerGroup(0, "full", int(pool.layer_num), heads, dim, states, self.dtype)
        self.portable_shape = self.group.portable_shape(page_tokens)
        self.nbytes = prod(self.portable_shape) * self.group.item_bytes
        self._foreign = tuple(one for one in foreign if one.endswith(f"/{self.dtype}"))
        if heads > 1 and not foreign:  # one head is the same bytes either way
            self.order = f"sglang/strided-SNHD/b{page_tokens}/{self.dtype}"
        self.shape = _header_shape(self.portable_shape, self.order)
        self._by_token = pool.layout == "page_first"
        self._cache = _pages_of(pool, self.group, page_tokens)
        self.layout = (
            f"{name}: {self.group.num_layers} layers from {int(pool.start_layer)} "
            f"({int(pool.target_layer_num)} of the target), {states} states, {heads} heads of "
            f"{dim}, {self.dtype}"
        )

    @property
    def orders(self) -> list[str]:
        return [*dict.fromkeys((self.order or PORTABLE, PORTABLE)), *self._foreign]

    def fits(self, header: ObjectHeader) -> bool:
        known = header.order in (self.order, "", *self._foreign)
        return (
            known
            and header.kind == ("native" if header.order else PORTABLE)
            and header.codec == "raw"
            and header.dtype == self.dtype
            and header.num_tokens == self.page_tokens
            and header.raw_length == self.nbytes
            and header.shape == _header_shape(self.portable_shape, header.order)
        )

    def read(self, index: int, payload: Bytes) -> None:
        page = self._page(index)
        if self._in_rows(self.order):
            _copy_rows(self._elements(payload).reshape(page.shape), page, self._by_token)
        else:
            _copy_short(self.portable(payload, self.order), self._by_head(page))

    def write(self, index: int, payload: Bytes, order: str | None = None) -> None:
        order, page = self.order if order is None else order, self._page(index)
        if self._in_rows(order):
            _copy_rows(page, self._elements(payload).reshape(page.shape), self._by_token)
            return
        source, target = self.portable(payload, order), self._by_head(page)
        if not self._by_token:
            _copy_short(target, source)
            return
        # Layer by layer what is read stays in the processor's cache, and numpy is faster where
        # runs of both sides are as short as these: three times as fast in all.
        for to, what in zip(target, source, strict=True):
            np.copyto(to, what)

    def portable(self, payload: Bytes, order: str) -> Elements:
        """A payload in an order, by the name in its header, as (L, S, H, T, D)."""
        elements = self._elements(payload)
        if order:
            native = native_order(order)
            pages = payload.reshape(self.group.num_layers, -1, native.page_bytes(self.group))
            elements = native.unpack_layers(pages, self.group).view(elements.dtype)
        portable: Elements = elements.reshape(self.portable_shape)
        return portable

    def _page(self, index: int) -> Elements:
        """The page as (L, S, T, H * D): SGLang's own memory."""
        number, within = divmod(index, self.page_tokens)
        if within:
            raise Incompatible(f"a page of {self.name} begins in the middle of one, at {index}")
        page: Elements = self._cache[number]
        return page

    def _by_head(self, page: Elements) -> Elements:
        """The same memory as (L, S, H, T, D)."""
        rows = page.reshape(*page.shape[:3], self.group.num_kv_heads, self.group.head_dim)
        heads: Elements = rows.transpose(0, 1, 3, 2, 4)
        return heads

    def _in_rows(self, order: str) -> bool:
        """Whether a payload has its tokens' heads side by side."""
        return order == self.order if order else self.group.num_kv_heads == 1

    def _elements(self, payload: Bytes) -> Elements:
        elements: Elements = payload.view(_SIGNED[self.group.item_bytes])
        return elements


class BytePages(Pages):
    """Pages of any other pool: the bytes at SGLang's own addresses, one after the other."""

    def __init__(self, pool: Any, name: str, page_tokens: int) -> None:
        super().__init__(pool, name, page_tokens)
        self._pool = pool
        try:
            _, lengths = pool.get_page_buffer_meta(torch.arange(self.stride))
        except Exception as error:
            raise Incompatible(f"it tells no addresses of its pages: {error}") from error
        self.nbytes = int(sum(lengths))
        if self.nbytes < 1:
            raise Incompatible("its pages are empty")
        width = ITEM_BYTES.get(self.dtype, 1)
        if self.nbytes % width or self.dtype not in ITEM_BYTES:
            self.dtype, width = "uint8", 1
        self.shape = (1, self.nbytes // width)
        self.order = f"sglang/{name}/{pool.layout}/b{page_tokens}"[:64]
        pieces = ",".join(str(int(length)) for length in lengths)
        self.layout = (
            f"{name}: {type(pool).__name__} {pool.layout}, pieces of {pieces} bytes, {self.dtype}"
        )

    def read(self, index: int, payload: Bytes) -> None:
        at = payload.ctypes.data
        for address, length in self.pieces(index):
            ctypes.memmove(at, address, length)
            at += length

    def write(self, index: int, payload: Bytes, order: str | None = None) -> None:
        at = payload.ctypes.data
        for address, length in self.pieces(index):
            ctypes.memmove(address, at, length)
            at += length

    def pieces(self, index: int) -> list[tuple[int, int]]:
        """Addresses and lengths of a page's bytes.

        Raises:
            Incompatible: they are not what they were at the start.
        """
        indices = torch.arange(index, index + self.stride)
        addresses, lengths = self._pool.get_page_buffer_meta(indices)
        if sum(lengths) != self.nbytes:
            raise Incompatible(f"a page of {self.name} has {sum(lengths)} bytes, not {self.nbytes}")
        return [(int(a), int(n)) for a, n in zip(addresses, lengths, strict=True)]


def describe(pool: Any, name: str, page_tokens: int, foreign: tuple[str, ...] = ()) -> Pages:
    """What the pages of a host pool are.

    Args:
        pool: SGLang's.
        name: SGLang's for it, ``kv`` for the one that all others go with.
        page_tokens: tokens of a page of the prompt.
        foreign: byte orders of other engines that are read as well, by name.
    Raises:
        Incompatible: it is of a kind that is left uncached.
    """
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    if int(getattr(pool, "dcp_size", 1)) > 1:
        raise Incompatible("decode context parallelism spreads a page over ranks")
    if getattr(pool, "_layer_shard_enabled", False):
        raise Incompatible("its layers are spread over ranks")
    plain = type(pool) in (MHATokenToKVPoolHost, MLATokenToKVPoolHost)
    # SGLang keeps all kinds of float8 as bytes; which kind these are is the namespace's to tell.
    plain = plain and pool.dtype != torch.uint8
    if plain and not getattr(pool, "_is_dummy", False) and isinstance(pool.kv_buffer, torch.Tensor):
        return TokenPages(pool, name, page_tokens, foreign if name == KV else ())
    return BytePages(pool, name, page_tokens)


def _kind_of(name: str, stride: int) -> GroupKind:
    """A node promotes an object only for who asks for it as its header says: SGLang asks for the
    last pages alone of these pools."""
    if stride == 1:
        return "recurrent"
    return "sliding" if "swa" in name or name.endswith("_state") else "full"


def _header_shape(portable: tuple[int, ...], order: str) -> tuple[int, ...]:
    """What a header says of a payload in an order, by name; empty: portable."""
    if not order:
        return portable
    layers, states, heads, tokens, dim = portable
    block = native_order(order).block_tokens
    return (layers, tokens // block, states, heads, block, dim)


def _pages_of(pool: Any, group: LayerGroup, tokens: int) -> Elements:
    """A pool's memory as (pages, L, S, T, H * D), integers of the element's width."""
    cache = pool.kv_buffer.view(_INTEGERS[group.item_bytes])
    if group.states == 1:
        cache = cache.unsqueeze(0)
    layout, count = pool.layout, int(pool.size) // tokens
    if layout == "layer_first":  # [S, L, tokens, H, D]
        states, layers = cache.shape[:2]
        rows = cache[:, :, : count * tokens].view(states, layers, count, tokens, -1)
        pages = rows.permute(2, 1, 0, 3, 4)
    elif layout == "page_first":  # [S, tokens, L, H, D]
        states, _, layers = cache.shape[:3]
        rows = cache[:, : count * tokens].view(states, count, tokens, layers, -1)
        pages = rows.permute(1, 3, 0, 2, 4)
    elif layout == "page_first_direct":  # [S, pages, L, T, H, D]
        pages = cache.view(*cache.shape[:4], -1).permute(1, 2, 0, 3, 4)
    else:
        raise Incompatible(f"its layout {layout} is not known: {REMEDY}")
    expected = (group.num_layers, group.states, tokens, group.num_kv_heads * group.head_dim)
    if tuple(pages.shape[1:]) != expected:
        raise Incompatible(f"a page of shape {tuple(pages.shape[1:])}, not {expected}")
    found: Elements = pages.numpy()
    return found


def _copy_rows(target: Elements, source: Elements, by_token: bool) -> None:
    """Copy a page, (L, S, T, H * D): runs of all tokens of a layer, or of one where SGLang's own
    memory has a token's layers side by side."""
    if by_token:
        _copy_short(target, source)
    else:
        np.copyto(target, source)


def _copy_short(target: Elements, source: Elements) -> None:
    """Copy short runs, which torch does faster than numpy."""
    torch.from_numpy(target).copy_(torch.from_numpy(source))
