"""vLLM's KV cache groups as KVStrata sees them: what a boundary needs of each, and in which blocks.

A group is layers that share a block table, and most often a shape. Full attention (and a latent)
needs every chunk of a prefix, a sliding window the chunks that it reaches back to, chunked local
attention those of the piece that the next token lies in, a recurrent state itself alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvstrata.config import Config
from kvstrata.errors import ConfigError, Incompatible
from kvstrata.header import MAX_CHUNK_TOKENS, GroupKind

NULL_BLOCK = 0
"""vLLM's block where a group holds nothing: behind a window, or between two states."""

KINDS: dict[type, tuple[GroupKind, str]] = {
    FullAttentionSpec: ("full", ""),
    MLAAttentionSpec: ("full", ""),
    SlidingWindowSpec: ("sliding", "sliding_window"),
    ChunkedLocalAttentionSpec: ("chunked", "attention_chunk_size"),
    MambaSpec: ("recurrent", ""),
}
"""What a boundary needs of such layers, and where vLLM keeps how far they look back."""


@dataclass(frozen=True)
class Group:
    """One of vLLM's groups, or its layers of one shape.

    Args:
        index: its number: vLLM's; further shapes of vLLM's groups are counted behind these.
        kind: what a boundary needs of it.
        block_tokens: tokens of one of its blocks.
        reach: tokens of a window, or of a piece of chunked attention; else 0.
        replicated: whether all ranks of a tensor-parallel engine hold the same.
        more_of: number of the group of vLLM's that these are layers of, and not its first; None: it
            is one of vLLM's, or the first ones.
    """

    index: int
    kind: GroupKind
    block_tokens: int
    reach: int = 0
    replicated: bool = False
    more_of: int | None = None

    @property
    def table(self) -> int:
        """Number of vLLM's group, in whose block table its blocks are."""
        return self.index if self.more_of is None else self.more_of

    def needs(self, chunk_tokens: int) -> int:
        """How many of the last chunks before a boundary are needed; 0: every one."""
        if self.kind == "full":
            return 0
        if self.kind == "recurrent":
            return 1
        if self.kind == "chunked" and self.reach % chunk_tokens == 0:
            return max(1, self.reach // chunk_tokens - 1)
        return max(1, math.ceil((self.reach - 1) / chunk_tokens))


@dataclass(frozen=True)
class Groups:
    """All of an engine's groups, and the chunks that its prompts are cut into.

    Args:
        each: in vLLM's order.
        chunk_tokens: a whole number of every group's blocks.
        more: layers of further shapes in these, a draft model's; only workers know of them.
    """

    each: tuple[Group, ...]
    chunk_tokens: int
    more: tuple[Group, ...] = ()

    @property
    def prefix_only(self) -> bool:
        """Whether one group needs every chunk, so that any part of a prefix can be loaded.

        With several groups vLLM takes back a failed load as a whole only, and never a synchronous
        one.
        """
        return len(self.each) == 1 and self.each[0].kind == "full"

    @property
    def stateful(self) -> bool:
        """Whether a group has a recurrent state."""
        return any(group.kind == "recurrent" for group in self.each)

    @property
    def num_blocks(self) -> int:
        """Blocks of one chunk, of all groups."""
        return sum(self.width(group) for group in self.each)

    @property
    def full(self) -> Group | None:
        """The first group that needs every chunk."""
        return next((group for group in self.each if group.kind == "full"), None)

    def width(self, group: Group) -> int:
        """Blocks of one chunk of a group: a state is one block, whatever came before it."""
        return 1 if group.kind == "recurrent" else self.chunk_tokens // group.block_tokens

    def column(self, group: Group) -> int:
        """Where among the blocks of a chunk those of a group begin."""
        return sum(self.width(one) for one in self.each[: group.table])

    def targets(
        self, block_ids: Sequence[Sequence[int]], tokens: range, chunks: range
    ) -> list[int]:
        """The blocks that a load of these tokens fills, of all groups, chunk by chunk.

        Args:
            block_ids: of the request, for each group from its first token on.
            tokens: that vLLM does not have itself; they end at the boundary.
            chunks: that hold them.

        Returns:
            `num_blocks` for each chunk; -1 for one that is not to be written.
        """
        columns = [
            self._targets(group, ids, tokens, chunks)
            for group, ids in zip(self.each, block_ids, strict=True)
        ]
        if len(columns) == 1:
            return columns[0]
        return [
            block
            for i in range(len(chunks))
            for group, column in zip(self.each, columns, strict=True)
            for block in column[i * self.width(group) : (i + 1) * self.width(group)]
        ]

    def stored(self, group: Group, ids: Sequence[int], first: int, done: int) -> Iterator[range]:
        """Those of the chunks ``first`` to ``done`` whose blocks a group still has, as runs."""
        width, begin = self.width(group), first
        for number in range(first, done + 1):
            blocks = ids[number * width : (number + 1) * width]
            if number == done or len(blocks) < width or NULL_BLOCK in blocks:
                if begin < number:
                    yield range(begin, number)
                begin = number + 1

    def fresh(self, scheduler_output: Any) -> set[int]:
        """Blocks that this step may overwrite although an earlier step's store reads them."""
        fresh: set[int] = set(scheduler_output.new_block_ids_to_zero or ())
        for new in scheduler_output.scheduled_new_reqs:
            for group, ids in zip(self.each, new.block_ids, strict=True):
                fresh.update(ids[new.num_computed_tokens // group.block_tokens :])
        cached = scheduler_output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if (block_ids := cached.new_block_ids[i]) is not None:
                resumed = request_id in cached.resumed_req_ids
                known = cached.num_computed_tokens[i] if resumed else 0
                for group, ids in zip(self.each, block_ids, strict=True):
                    fresh.update(ids[known // group.block_tokens :])
        for copy in scheduler_output.kv_cache_block_copies or ():
            fresh.add(copy.dst_block_id)
        return fresh

    def _targets(self, group: Group, ids: Sequence[int], tokens: range, chunks: range) -> list[int]:
        size = group.block_tokens
        last = min(-(-tokens.stop // size), len(ids))
        if group.kind == "recurrent":
            # vLLM reads the state of n tokens in the block of the last of them.
            return [*[-1] * (len(chunks) - 1), ids[last - 1]]
        wanted, width = range(tokens.start // size, last), self.width(group)
        return [
            ids[i] if i in wanted and ids[i] != NULL_BLOCK else -1
            for i in range(chunks.start * width, chunks.stop * width)
        ]


def cut_by_shape(kv_cache_config: Any) -> Any:
    """vLLM's configuration with one shape of layers in each group, further ones behind them all.

    vLLM puts layers of one kind into one group although their pages differ, a draft model's and the
    target's, and shows its scheduler the first ones alone.
    """
    first, more = _cut(kv_cache_config)
    return replace(kv_cache_config, kv_cache_groups=[*first, *(group for _, group in more)])


def groups_of(kv_cache_config: Any, config: Config) -> Groups:
    """What vLLM's groups are to KVStrata, and how long its chunks are for them.

    Raises:
        Incompatible: a group is of a kind that is left uncached; the message names it.
        ConfigError: the configured chunk cuts a block.
    """
    first, further = _cut(kv_cache_config)
    each = tuple(_group(i, one) for i, one in enumerate(first))
    more = tuple(_group(i, one, table) for i, (table, one) in enumerate(further, len(each)))
    if not each:
        raise Incompatible("the model keeps no KV")
    block_tokens = math.lcm(*(group.block_tokens for group in each))
    stateful = any(group.kind == "recurrent" for group in each)
    chunk_tokens = chunk_of(config, block_tokens, stateful=stateful)
    if chunk_tokens > MAX_CHUNK_TOKENS:
        raise Incompatible(
            f"its blocks of {block_tokens} tokens are longer than a chunk may be, "
            f"{MAX_CHUNK_TOKENS} tokens"
        )
    return Groups(each, chunk_tokens, more)


def chunk_of(config: Config, block_tokens: int, *, stateful: bool = False) -> int:
    """Tokens of a chunk: as configured; the default is rounded up to whole blocks.

    A prompt leaves a state at its last whole block, so by default a chunk is one block there.
    """
    if "chunk_tokens" in config.sources:
        if config.chunk_tokens % block_tokens:
            raise ConfigError(
                "chunk_tokens",
                f"{config.chunk_tokens} is no multiple of the engine's blocks of {block_tokens} "
                "tokens",
            )
        return config.chunk_tokens
    if stateful:
        return block_tokens
    return math.ceil(config.chunk_tokens / block_tokens) * block_tokens


def _cut(kv_cache_config: Any) -> tuple[list[Any], list[tuple[int, Any]]]:
    """Each group with its first layers' shape alone; and those of other shapes, with its number."""
    cut = [_alike(group) for group in kv_cache_config.kv_cache_groups]
    more = [(table, one) for table, group in enumerate(cut) for one in group[1:]]
    return [group[0] for group in cut], more


def _alike(group: Any) -> list[Any]:
    """A group of vLLM's as one for each shape of its layers, in the order of these."""
    if not isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs):
        return [group]
    specs = group.kv_cache_spec.kv_cache_specs
    if not group.layer_names:  # this stage of a pipeline has none of it
        return [replace(group, kv_cache_spec=next(iter(specs.values())))]
    names: dict[Any, list[str]] = {}
    for name in group.layer_names:
        names.setdefault(specs[name], []).append(name)
    return [replace(group, layer_names=some, kv_cache_spec=shape) for shape, some in names.items()]


def _group(index: int, group: Any, more_of: int | None = None) -> Group:
    spec = group.kv_cache_spec
    layers = group.layer_names
    what = f"KV cache group {index}, of {len(layers)} layers ({', '.join(layers[:2])}, ...),"
    kind, reach = KINDS.get(type(spec), (None, ""))
    if kind is None:
        raise Incompatible(f"{what} is of the kind {type(spec).__name__}, which is not cached")
    if getattr(spec, "non_causal", False):
        raise Incompatible(f"{what} is not causal, so a chunk depends on what follows it")
    if group.host_resident or not (group.enable_kv_transfer and spec.prefix_cacheable):
        raise Incompatible(f"{what} is one that vLLM itself does not share between requests")
    if kind == "recurrent" and spec.mamba_cache_mode != "align":
        raise Incompatible(
            f"{what} keeps its state at no boundary (mamba_cache_mode {spec.mamba_cache_mode!r}): "
            "enable prefix caching"
        )
    if kind == "recurrent" and spec.num_speculative_blocks:
        raise Incompatible(f"{what} has states that speculative decoding moves after a step")
    return Group(
        index=index,
        kind=kind,
        block_tokens=spec.block_size,
        reach=getattr(spec, reach) if reach else 0,
        replicated=type(spec) is MLAAttentionSpec or bool(getattr(spec, "tp_replicated", False)),
        more_of=more_of,
    )
