"""Which KV heads a rank holds, and which objects they make.

By default a rank has one object of each layer group, with all of its heads, and another number of
ranks has other objects. Where all of them share (``share = ranks``) the heads of a layer are cut
into slices, as many as the model decides and never the deployment, and a slice is an object: so a
rank has one or more of them. vLLM gives a rank neighbouring heads. Where there are more ranks than
heads several hold the same one, and the first of them stores it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from blake3 import blake3

from kvstrata.connectors.vllm.groups import Group, Groups
from kvstrata.connectors.vllm.pages import Pages, attention_layers
from kvstrata.errors import Incompatible
from kvstrata.layout import LayerGroup

MOST_SLICES = 8
"""As many ranks as share a model's heads; more slices were more and smaller objects for all."""


@dataclass(frozen=True)
class Shard:
    """KV heads of a rank that make one object of each chunk.

    Args:
        rank: the object's rank number.
        heads: of those that the rank holds, counted from 0.
        stores: whether this rank stores it, or another one that holds the same.
    """

    rank: int
    heads: range
    stores: bool = True


@dataclass(frozen=True)
class Slices:
    """How the KV heads of a model are cut for every number of ranks.

    Args:
        num_heads: of a layer, on all ranks together.
        count: of the slices.
    """

    num_heads: int
    count: int

    def shards(self, group: Group, num_heads: int, parallel: Any) -> list[Shard]:
        """What a rank has of a layer group.

        Args:
            num_heads: of a layer, on this rank.
            parallel: vLLM's configuration of the ranks, with this one's number.
        Raises:
            Incompatible: the rank's heads are no whole slices.
        """
        size = parallel.tensor_parallel_size
        stage, place = divmod(parallel.rank, size)
        if group.replicated:
            return [Shard(stage * self.count, range(num_heads), place == 0)]
        each, copies = self.num_heads // self.count, max(1, size // self.num_heads)
        if num_heads * size != self.num_heads * copies:
            raise Incompatible(
                f"each of {size} ranks has {num_heads} KV heads of a layer, where the model has "
                f"{self.num_heads}"
            )
        if num_heads % each:
            raise Incompatible(
                f"{size} ranks do not share its {self.num_heads} KV heads in {self.count} slices"
            )
        first = stage * self.count + place // copies * num_heads // each
        return [
            Shard(first + i, range(i * each, (i + 1) * each), place % copies == 0)
            for i in range(num_heads // each)
        ]


@dataclass(frozen=True)
class Cut:
    """A worker's objects of each chunk.

    Args:
        objects: of which layer group, which heads, and where these are.
        layout: logical layout of the layers, in one canonical text.
        slices: into how many a layer's heads are cut for every number of ranks; 0: they are not.
        why_alone: why not, where they were to be.
    """

    objects: list[tuple[Group, Shard, Pages]]
    layout: str
    slices: int = 0
    why_alone: str = ""


def cut(vllm_config: Any, groups: Groups, pages: Mapping[Group, Pages], *, shared: bool) -> Cut:
    """Cut a worker's KV into objects.

    Args:
        vllm_config: the engine's configuration.
        groups: all of its layer groups.
        pages: of those that this worker has layers of, all heads of them.
        shared: whether for every number of ranks, if that can be.
    """
    why_alone = ""
    if shared:
        try:
            return _shared(vllm_config, groups, pages)
        except Incompatible as error:
            why_alone = str(error)
    parallel = vllm_config.parallel_config
    objects: list[tuple[Group, Shard, Pages]] = []
    for group, whole in pages.items():
        first = parallel.rank
        if group.replicated:
            first -= first % parallel.tensor_parallel_size
        heads = range(whole.group.num_kv_heads)
        objects.append((group, Shard(first, heads, first == parallel.rank), whole))
    layout = " + ".join(_layout(whole.group, whole.order.name) for whole in pages.values())
    return Cut(objects, layout, why_alone=why_alone)


def slices_of(vllm_config: Any, groups: Groups) -> Slices:
    """How a model's heads are cut.

    Raises:
        Incompatible: numbers of ranks cannot share its KV.
    """
    model, drafts = vllm_config.model_config, vllm_config.speculative_config
    num_heads = model.get_total_num_kv_heads()
    if groups.stateful:
        raise Incompatible("ranks cut a recurrent state by rules of their own")
    by_layer = getattr(model.model_arch_config, "per_layer_overrides", None) or ()
    if any("total_num_kv_heads" in one for one in by_layer):
        raise Incompatible("its layers have different numbers of KV heads")
    draft = None if drafts is None else drafts.draft_model_config
    if draft is not None and (
        draft.get_total_num_kv_heads() != num_heads
        or drafts.draft_parallel_config.tensor_parallel_size
        != vllm_config.parallel_config.tensor_parallel_size
    ):
        raise Incompatible("ranks cut the heads of the model that drafts otherwise")
    if all(group.replicated for group in groups.each):
        return Slices(num_heads, 1)
    return Slices(num_heads, math.gcd(num_heads, MOST_SLICES))


def _shared(vllm_config: Any, groups: Groups, pages: Mapping[Group, Pages]) -> Cut:
    """The same for every number of ranks.

    Raises:
        Incompatible: that cannot be.
    """
    slices = slices_of(vllm_config, groups)
    objects: list[tuple[Group, Shard, Pages]] = []
    layouts: list[str] = []
    for group, whole in pages.items():
        kept = whole.group
        for shard in slices.shards(group, kept.num_kv_heads, vllm_config.parallel_config):
            objects.append((group, shard, whole.of_heads(shard.heads)))
        if not group.replicated:
            kept = replace(kept, num_kv_heads=slices.num_heads)
        layouts.append(_layout(kept, whole.order.name) + _scales(whole, vllm_config))
    return Cut(objects, " + ".join(layouts), slices.count)


def _layout(group: LayerGroup, order: str) -> str:
    """The logical layout of one group, in one canonical text."""
    about = (
        f"{group.kind} {group.num_layers} layers, {group.states} states, "
        f"{group.num_kv_heads} heads of {group.head_dim}, {group.dtype}"
    )
    if group.kind == "recurrent":
        return f"{about}, {order}"
    return f"{about}, {group.window} tokens" if group.window else about


def _scales(pages: Pages, vllm_config: Any) -> str:
    """What the numbers of quantised KV are multiplied with, as the end of a layout's text.

    Raises:
        Incompatible: each head has scales of its own.
    """
    if pages.group.item_bytes > 1:
        return ""
    scales = [
        scale
        for layer in attention_layers(pages, vllm_config).values()
        for scale in (layer._k_scale, layer._v_scale)
    ]
    if any(scale.numel() != 1 for scale in scales):
        raise Incompatible("its quantised KV has scales for each head")
    digest = blake3(repr([float(scale) for scale in scales]).encode()).hexdigest()
    return f", scales {digest[:16]}"
