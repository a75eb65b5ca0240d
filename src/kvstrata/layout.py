"""What the bytes of a chunk mean: a portable order, and named permutations of it.

A payload is either *portable*, ``[L, S, H, T, D]`` in C order, or *native*: the pages of whole
blocks exactly as one engine keeps them, ``[L, blocks, page]``. Every native order has a name that
pins all that decides it and is a pure permutation, so any process can convert between the two
without an engine and without knowing what a number means: elements are moved as unsigned integers
of their width.

Letters: L layers, S states (2: key, value; 1: a latent), H KV heads of this rank, T tokens of the
chunk, N tokens of a block, D head_dim, C = S and D side by side as engines write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstrata.errors import Incompatible, LayoutMismatch, UsageError

Bytes: TypeAlias = npt.NDArray[np.uint8]
Elements: TypeAlias = npt.NDArray[Any]

ITEM_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Width of one element, by dtype name as torch spells it."""

WORDS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32}
"""The unsigned integers that elements are moved as, by width in bytes."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share one block table and keep the same shape.

    Args:
        index: position in ``KVLayout.groups``; part of the object id.
        kind: ``full`` needs every chunk of a prefix, ``sliding`` those in its window, ``chunked``
            those of the piece that the next token lies in, ``recurrent`` only the state at the last
            boundary.
        num_layers, num_kv_heads, head_dim: of this rank.
        states: 2 for key and value, 1 for a latent (then head_dim is the latent's width).
        dtype: a key of ``ITEM_BYTES``.
        window: tokens a sliding layer looks back, or of the pieces of a chunked one; 0 for the
            other kinds.
    Raises:
        UsageError: a value outside these.
    """

    index: int
    kind: Literal["full", "sliding", "chunked", "recurrent"]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    states: int
    dtype: str
    window: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("full", "sliding", "chunked", "recurrent"):
            raise UsageError(f"kind {self.kind!r}: expected full, sliding, chunked or recurrent")
        if self.dtype not in ITEM_BYTES:
            raise UsageError(f"dtype {self.dtype!r}: expected one of {', '.join(ITEM_BYTES)}")
        if self.states not in (1, 2):
            raise UsageError(f"states {self.states}: expected 2 (key, value) or 1 (latent)")
        if self.index < 0 or min(self.num_layers, self.num_kv_heads, self.head_dim) < 1:
            raise UsageError(f"sizes of a layer group must be positive: {self}")
        if (self.window > 0) != (self.kind in ("sliding", "chunked")):
            raise UsageError(f"window {self.window} does not fit the kind {self.kind}")

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    def portable_shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        """Shape (L, S, H, T, D) of ``num_tokens`` tokens."""
        return (self.num_layers, self.states, self.num_kv_heads, num_tokens, self.head_dim)


@dataclass(frozen=True)
class KVLayout:
    """The groups of a model on one rank, and the chunk they are cut into."""

    groups: tuple[LayerGroup, ...]
    chunk_tokens: int

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise UsageError(f"chunk_tokens {self.chunk_tokens}: expected at least 1")
        if [group.index for group in self.groups] != list(range(len(self.groups))):
            raise UsageError("layer groups must be numbered 0, 1, 2, ... in order")

    def portable_shape(self, group: int) -> tuple[int, int, int, int, int]:
        """Shape (L, S, H, T, D) of one chunk; T is 1 for a recurrent state."""
        of = self.groups[group]
        return of.portable_shape(1 if of.kind == "recurrent" else self.chunk_tokens)

    def payload_bytes(self, group: int) -> int:
        """Bytes of one chunk's payload; native and portable are equally long."""
        layers, states, heads, tokens, dim = self.portable_shape(group)
        return layers * states * heads * tokens * dim * self.groups[group].item_bytes


@dataclass(frozen=True)
class NativeOrder:
    """How one engine orders the elements inside the page of one block of one layer.

    Args:
        name: what a header stores; see ``native_order``.
        block_tokens: N, tokens of a block.
        dtype: element type; only its width matters here.
        axes: for key and for value, the page's axes from slow to fast. A letter alone has what
            its numbered factors leave: ``D N D16 N2`` cuts D into D/16 x 16 and N into N/2 x 2.

    All methods are pure, and ``pack`` undoes ``unpack`` exactly.
    """

    name: str
    block_tokens: int
    dtype: str
    axes: tuple[str, str]

    @property
    def by_head(self) -> bool:
        """Whether each head of a page is one run of bytes, and heads follow each other."""
        return all(axes.split()[0] == "H" for axes in self.axes)

    def page_bytes(self, group: LayerGroup) -> int:
        """Bytes of one block of one layer.

        Raises:
            LayoutMismatch: this order cannot hold such a group.
        """
        self._check(group)
        elements = group.states * group.num_kv_heads * self.block_tokens * group.head_dim
        return elements * group.item_bytes

    def unpack(self, pages: Bytes, group: LayerGroup) -> Elements:
        """Portable form of consecutive blocks of one layer.

        Args:
            pages: (blocks, page_bytes), uint8.
        Returns:
            (S, H, blocks * N, D), unsigned integers of the element's width.
        Raises:
            LayoutMismatch: the sizes do not fit.
        """
        layers = self.unpack_layers(pages[np.newaxis], group)
        return layers.reshape(layers.shape[1:])

    def pack(self, portable: Elements, group: LayerGroup) -> Bytes:
        """Undo ``unpack``: (S, H, blocks * N, D) to (blocks, page_bytes).

        Raises:
            LayoutMismatch: the sizes do not fit, or the tokens are no whole number of blocks.
        """
        layers = self.pack_layers(portable[np.newaxis], group)
        return layers.reshape(layers.shape[1:])

    def unpack_layers(
        self, payload: Bytes, group: LayerGroup, out: Elements | None = None
    ) -> Elements:
        """Portable form of a native payload, all layers at once.

        Args:
            payload: (layers, blocks, page_bytes), uint8, C-contiguous; usually all L layers.
            out: (layers, S, H, T, D) to write into; made if None.
        Returns:
            ``out``, unsigned integers of the element's width.
        Raises:
            LayoutMismatch: the sizes do not fit.
        """
        page = self.page_bytes(group)
        if payload.ndim != 3 or payload.shape[2] != page or payload.dtype != np.uint8:
            raise LayoutMismatch(
                f"{self.name}: native payload is {payload.dtype} {payload.shape}, "
                f"expected uint8 (layers, blocks, {page})"
            )
        layers, blocks, _ = payload.shape
        shape = (layers, *group.portable_shape(blocks * self.block_tokens)[1:])
        portable = self._portable(out, shape, group)
        native = np.ascontiguousarray(payload).view(WORDS[group.item_bytes])
        for state in range(group.states):
            _copy(*self._views(portable, native, state, group))
        return portable

    def pack_layers(self, portable: Elements, group: LayerGroup, out: Bytes | None = None) -> Bytes:
        """Undo ``unpack_layers``.

        Args:
            portable: (layers, S, H, T, D), any dtype of the element's width.
            out: (layers, blocks, page_bytes), uint8, C-contiguous, to write into; made if None.
        Raises:
            LayoutMismatch: the sizes do not fit, or T is no whole number of blocks.
        """
        page = self.page_bytes(group)
        tokens = portable.shape[3] if portable.ndim == 5 else -1
        if tokens < 0 or tokens % self.block_tokens:
            raise LayoutMismatch(
                f"{self.name}: portable payload is {portable.shape}, expected "
                f"(layers, S, H, T, D) with T a multiple of {self.block_tokens}"
            )
        shape = (portable.shape[0], *group.portable_shape(tokens)[1:])
        source = self._portable(portable, shape, group)
        pages = (portable.shape[0], tokens // self.block_tokens, page)
        if out is None:
            out = np.empty(pages, np.uint8)
        elif out.shape != pages or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise LayoutMismatch(f"{self.name}: cannot pack into {out.dtype} {out.shape}")
        native = out.view(WORDS[group.item_bytes])
        for state in range(group.states):
            here, there = self._views(source, native, state, group)
            _copy(there, here)
        return out

    def blank_behind(self, payload: Bytes, num_tokens: int, group: LayerGroup) -> None:
        """Zero, in place, what a native payload has behind its first tokens.

        Args:
            payload: (layers, blocks, page_bytes), uint8, C-contiguous.
            num_tokens: that stay as they are.
        Raises:
            LayoutMismatch: the sizes do not fit.
        """
        whole, rest = divmod(num_tokens, self.block_tokens)
        payload[:, whole + bool(rest) :] = 0
        if rest:
            last = np.ascontiguousarray(payload[:, whole : whole + 1])
            portable = self.unpack_layers(last, group)
            portable[:, :, :, rest:] = 0
            payload[:, whole : whole + 1] = self.pack_layers(portable, group, last)

    def _check(self, group: LayerGroup) -> None:
        problem = None
        if group.kind == "recurrent":
            problem = "a recurrent state has no tokens"
        elif group.dtype != self.dtype:
            problem = f"the layers hold {group.dtype}"
        elif group.states == 1 and self.axes[0] != self.axes[1]:
            problem = "a latent has no value half"
        else:
            for letter, size in (("N", self.block_tokens), ("D", group.head_dim)):
                for axes in self.axes:
                    inner = _inner(axes, letter)
                    if size % inner:
                        problem = f"{letter} = {size} is not a multiple of {inner}"
        if problem:
            raise LayoutMismatch(f"byte order {self.name} does not fit: {problem}")

    def _portable(
        self, array: Elements | None, shape: tuple[int, ...], group: LayerGroup
    ) -> Elements:
        word = WORDS[group.item_bytes]
        if array is None:
            return np.empty(shape, word)
        if array.shape != shape or array.dtype.itemsize != group.item_bytes:
            raise LayoutMismatch(
                f"{self.name}: portable payload is {array.dtype} {array.shape}, "
                f"expected {group.dtype} {shape}"
            )
        return array.view(word)

    def _views(
        self, portable: Elements, native: Elements, state: int, group: LayerGroup
    ) -> tuple[Elements, Elements]:
        """The same elements of one state seen on both sides, as (layers, H, blocks, N.., D..)."""
        axes = self.axes[state].split()
        whole = {
            "S": group.states,
            "H": group.num_kv_heads,
            "N": self.block_tokens,
            "D": group.head_dim,
        }
        sizes = [
            int(axis[1:]) if axis[1:] else whole[axis] // _inner(self.axes[state], axis)
            for axis in axes
        ]
        layers, blocks, _ = native.shape
        page = native.reshape(layers, blocks, *sizes)
        page = page[(slice(None),) * (2 + axes.index("S")) + (state,)]
        rest = [(axis[0], size) for axis, size in zip(axes, sizes, strict=True) if axis != "S"]
        where = {letter: [i for i, a in enumerate(rest) if a[0] == letter] for letter in "HND"}
        moved = page.transpose(
            0, *(2 + i for i in where["H"]), 1, *(2 + i for i in where["N"] + where["D"])
        )
        # Splitting axes never copies, so this stays a view of the portable side.
        return portable[:, state].reshape(moved.shape), moved


def _copy(to: Elements, source: Elements) -> None:
    """Copy between views of one shape, which numpy does in runs along the target's dense axis.

    Pairs of elements are such runs, too, and slow ones: all first ones go before all second ones.
    """
    dense = next((i for i in reversed(range(to.ndim)) if to.strides[i] == to.itemsize), -1)
    if dense < 0 or to.shape[dense] > 2:
        np.copyto(to, source)
        return
    for i in range(to.shape[dense]):
        at = (slice(None),) * dense + (i,)
        np.copyto(to[at], source[at])


@lru_cache(maxsize=256)
def _inner(axes: str, letter: str) -> int:
    """Product of the numbered factors of a letter."""
    product = 1
    for factor in re.findall(rf"\b{letter}(\d+)", axes):
        product *= int(factor)
    return product


def _strided_orders() -> dict[str, tuple[str, str]]:
    """Every dense order of S, H, N, D, named with C where S and D are side by side."""
    orders = {}
    for letters in permutations("SHND"):
        name = "strided-" + "".join(letters).replace("SD", "C")
        orders[name] = (" ".join(letters), " ".join(letters))
    return orders


_ORDERS: dict[str, tuple[str, str]] = {
    # vLLM's CPU attention without matrix instructions ("vec", "vec16"): the key transposed.
    "cpu-vec": ("H S D N", "H S N D"),
    # With AMX tiles: pairs of what the dot product runs over lie side by side.
    "cpu-amx": ("H S N D N16 D2", "H S D N D16 N2"),
    # CUDA and ROCm backends whose pages are what their tensor's strides say, and SGLang's.
    **_strided_orders(),
}

_NAME = re.compile(r"(?:vllm|sglang)/([a-zA-Z0-9-]+)/b([1-9][0-9]{0,5})/([a-z0-9_]+)")


@lru_cache(maxsize=256)
def native_order(name: str) -> NativeOrder:
    """The order of that name: ``<engine>/<order>/b<block tokens>/<dtype>``.

    For instance ``vllm/cpu-vec/b128/bfloat16`` or ``sglang/strided-SNHD/b128/bfloat16``.

    Raises:
        Incompatible: this build knows no such order.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in _ORDERS or match[3] not in ITEM_BYTES:
        raise Incompatible(f"unknown native byte order {name!r}")
    return NativeOrder(name, int(match[2]), match[3], _ORDERS[match[1]])
