"""SGLang's host pools as pages: where the bytes of one lie, and what an object of it looks like.

Keys and values of attention are stored in the portable order ``[L, S, H, T, D]``, so that nobody
has to know the order that SGLang was told to keep (``--hicache-mem-layout``). Other pools, states
among them, are stored as SGLang's own addresses give them. What these classes claim is a fact only
once `kvstrata.connectors.sglang.proof.prove` has passed.
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
from kvstrata.layout import ITEM_BYTES, LayerGroup, native_order
from kvstrata.objects import MAX_CHUNK_TOKENS, GroupKind, ObjectHeader
from kvstrata.parts import PORTABLE
from kvstrata.wire import protocol as p

Bytes = npt.NDArray[np.uint8]

KV = "kv"
MIN_PAGE_TOKENS = 16
REMEDY = "set --hicache-mem-layout to page_first_direct, page_first or layer_first"

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


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
    def write(self, index: int, payload: Bytes, order: str = "") -> None:
        """Copy a payload into a page.

        Args:
            index, payload: as of `read`.
            order: of the payload, by the name in its header.
        """


class TokenPages(Pages):
    """Keys and values of each token, or a latent, of layers of one shape; portable.

    Args:
        foreign: byte orders of other engines that are read as well, by name.
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
        self.shape = self.group.portable_shape(page_tokens)
        self.nbytes = prod(self.shape) * self.group.item_bytes
        self._foreign = tuple(one for one in foreign if one.endswith(f"/{self.dtype}"))
        self._by_layer = pool.layout == "page_first"
        self._cache = _by_state(pool, self.group)
        self.layout = (
            f"{name}: {self.group.num_layers} layers from {int(pool.start_layer)} "
            f"({int(pool.target_layer_num)} of the target), {states} states, {heads} heads of "
            f"{dim}, {self.dtype}"
        )

    @property
    def orders(self) -> list[str]:
        return [PORTABLE, *self._foreign]

    def fits(self, header: ObjectHeader) -> bool:
        if header.kind == "native" and header.order in self._foreign:
            order = native_order(header.order)
            blocks = self.page_tokens // order.block_tokens
            expected = (*self.shape[:1], blocks, *self.shape[1:3], order.block_tokens,
                        self.shape[4])  # fmt: skip
            return (
                header.codec == "raw"
                and header.raw_length == self.nbytes
                and header.shape == expected
                and header.num_tokens == self.page_tokens
            )
        return super().fits(header)

    def view(self, index: int) -> torch.Tensor:
        """The page as (L, S, H, T, D), integers of the element's width: SGLang's own memory."""
        return self._cache(index)

    def read(self, index: int, payload: Bytes) -> None:
        self._elements(payload).copy_(self.view(index))

    def write(self, index: int, payload: Bytes, order: str = "") -> None:
        if order:
            native = native_order(order)
            pages = payload.reshape(self.group.num_layers, -1, native.page_bytes(self.group))
            unpacked = native.unpack_layers(pages, self.group)
            payload = unpacked.reshape(-1).view(np.uint8)
        source, page = self._elements(payload), self.view(index)
        if not self._by_layer:
            page.copy_(source)
            return
        # Layer by layer what is read stays in the processor's cache, and numpy is faster where runs
        # are as short as these: three times as fast in all.
        target, elements = page.numpy(), source.numpy()
        for layer in range(len(target)):
            target[layer] = elements[layer]

    def _elements(self, payload: Bytes) -> torch.Tensor:
        flat = torch.from_numpy(payload).view(_INTEGERS[self.group.item_bytes])
        return flat.view(self.shape)


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

    def write(self, index: int, payload: Bytes, order: str = "") -> None:
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


def _by_state(pool: Any, group: LayerGroup) -> Any:
    """A function from a page's first index to the page as (L, S, H, T, D)."""
    tokens = int(pool.page_size)
    cache = pool.kv_buffer.view(_INTEGERS[group.item_bytes])
    if group.states == 1:
        cache = cache.unsqueeze(0)
    views = {
        # [S, L, tokens, H, D]
        "layer_first": lambda i: cache[:, :, i : i + tokens].permute(1, 0, 3, 2, 4),
        # [S, tokens, L, H, D]
        "page_first": lambda i: cache[:, i : i + tokens].permute(2, 0, 3, 1, 4),
        # [S, pages, L, tokens of a page, H, D]
        "page_first_direct": lambda i: cache[:, i // tokens].permute(1, 0, 3, 2, 4),
    }
    if pool.layout not in views:
        raise Incompatible(f"its layout {pool.layout} is not known: {REMEDY}")
    expected = group.portable_shape(tokens)
    found = tuple(views[pool.layout](0).shape)
    if found != expected:
        raise Incompatible(f"a page of shape {found}, not {expected}")
    return views[pool.layout]
