"""What the connector's two sides tell each other, through vLLM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstrata.errors import Incompatible
from kvstrata.header import NOBODY


@dataclass(frozen=True)
class Held:
    """What the scheduler's side must know of one of a worker's objects of a chunk.

    Args:
        part: which object of a chunk it is.
        order: name of the byte order its payloads have.
        payload_bytes: of one chunk.
        needs: how many of the last chunks a boundary needs of it; 0: every one.
        table: number of vLLM's group that it is of.
    """

    part: int
    order: str
    payload_bytes: int = 0
    needs: int = 0
    table: int = 0


@dataclass(frozen=True)
class WorkerHello(KVConnectorHandshakeMetadata):
    """What the scheduler must know of a worker's KV, once, at start.

    Args:
        held: its objects of a chunk.
        layout: logical layout of its layers, in one canonical text.
        node: identity of the node it is attached to; empty if to none.
        problem: why the worker cannot take part; empty if it can.
        slices: into how many a layer's KV heads are cut for every number of ranks; 0: they are not.
        why_alone: why not, where they were to be.
        no_fronts: why it computes nothing of loads, where it was to.
        no_blends: why it blends nothing, where it was to.
    """

    held: tuple[Held, ...] = ()
    layout: str = ""
    node: bytes = b""
    problem: str = ""
    slices: int = 0
    why_alone: str = ""
    no_fronts: str = ""
    no_blends: str = ""


@dataclass(frozen=True)
class Front:
    """What it takes to compute a load from the front while it arrives from the end.

    Args:
        tokens: of the prompt, up to the load's end.
        table: the request's blocks up to there, also those that are not loaded.
        start: tokens that vLLM has itself, a whole number of blocks.
    """

    tokens: list[int]
    table: list[int]
    start: int


@dataclass(frozen=True)
class Trial:
    """The beginning of a prompt that a step computes, to be computed once more; see `trial`.

    Args:
        tokens: whole blocks of them.
        blocks: that the step writes them to.
    """

    tokens: list[int]
    blocks: list[int]


@dataclass(frozen=True)
class Load:
    """Copy chunks out of leased slots into a request's blocks.

    Args:
        request_id: whose blocks.
        node: identity of the node whose pool the slots are in.
        lease: the lease that holds the slots still; the scheduler's side releases it.
        first_chunk: number of the first chunk to copy, counted from the start of the prompt.
        offsets: for each chunk to copy, the slot of each part; `ARRIVING` while it is on its way,
            `NEEDLESS` where the boundary does not need it.
        keys: the chunks' keys; none: nothing can be loaded, and vLLM has to hear that it failed.
        blocks: target blocks, chunk by chunk, in each chunk those of each layer group; -1 for one
            that must not be written: vLLM has it already, or no layer looks back to it.
        parts: what makes up a chunk, as ``offsets`` has it.
        whole: whether it has failed if any of it does not come.
        tail_tokens: of the last object, where it is no whole chunk of the prompt: the prompt's end,
            or something that begins as the prompt goes on; 0: all are whole chunks.
        tail_marks: with which that object must begin; none: its key says all.
        followed: whether they are still being computed elsewhere, so that its deadline is one for
            each of them.
        front: what the workers may compute meanwhile; None: nothing, it arrives head first.
    """

    request_id: str
    node: bytes
    lease: int
    first_chunk: int
    offsets: list[list[int]]
    keys: list[bytes]
    blocks: list[int]
    parts: list[int]
    whole: bool = False
    tail_tokens: int = 0
    tail_marks: bytes = b""
    followed: bool = False
    front: Front | None = None


@dataclass(frozen=True)
class Source:
    """Stored chunks that one lease holds.

    Args:
        lease: that holds them still; the scheduler's side releases it.
        keys: of its chunks, from the lease's first one on, whether a piece needs them or not.
        offsets: as of `Load`: for each, the slot of each part; `ARRIVING` while it is on its way.
    """

    lease: int
    keys: list[bytes]
    offsets: list[list[int]]


@dataclass(frozen=True)
class Piece:
    """Rows of one stored chunk, and where in a prompt they go.

    Args:
        source: number of the source that has the chunk.
        chunk: number of the chunk in that.
        row: the first of its tokens.
        count: how many.
        position: of the first of them in this prompt.
        was: of the first of them in the prompt that it was computed in.
    """

    source: int
    chunk: int
    row: int
    count: int
    position: int
    was: int


@dataclass(frozen=True)
class Blend:
    """Put a prompt together: what was computed elsewhere in it, turned, and the rest computed.

    To vLLM it is one load in the background, from ``start`` to the end of ``tokens``.

    Args:
        request_id: whose blocks.
        node: identity of the node whose pool the slots are in.
        sources: all that is copied out of.
        pieces: by ascending position, none over another; the exact head's too, which have ``was``
            == ``position`` and end at ``first`` at the latest. What no piece covers is computed,
            and so is one whose source does not come in time.
        tokens: of the prompt, up to the load's end: a whole number of blocks.
        table: the request's blocks up to there.
        start: tokens that vLLM has itself, a whole number of blocks.
        first: position of the first token that is not exact.
        plan: one of `kvstrata.blend.PLANS`: which of the reused tokens are computed anew.
        ratio: the part of the reused tokens, 0 to 1.
        parts: what makes up a chunk, as the sources' ``offsets`` have it.
        seed: for the plan ``random``.
        bound: for the plan ``deviation``, as of `kvstrata.blend.choose`.
        beside: of each piece, the same rows of the same text as other prompts had them, which are
            mixed with it; none: a piece is all that there is. A piece of which one of these does
            not come is computed.
        weights: of each source, how much its rows count where several are mixed.
    """

    request_id: str
    node: bytes
    sources: list[Source]
    pieces: list[Piece]
    tokens: list[int]
    table: list[int]
    start: int
    first: int
    plan: str
    ratio: float
    parts: list[int]
    seed: int = 0
    bound: float | None = None
    beside: list[list[Piece]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Store:
    """Copy a request's full blocks into slots that the worker reserves.

    Args:
        namespace: what the KV belongs to.
        prefix: keys of the prompt's chunks from the first to the last one to store.
        first: number of the first chunk to store.
        blocks: the source blocks of the chunks ``first`` and later.
        group: which layer group's.
        weights: identity of what computed it; "": unknown, or not the model alone.
        owner: `kvstrata.keys.owner_digest` of who it was computed for.
        tail_tokens: of the one object to store, where that is a prompt's end; 0: it is not.
        lend: whether another engine's node will come for it.
        given: leading chunks of the prompt that were not computed for this request.
        trace: traceparent of the request; empty: it is not traced.
        priority: what it matters more or less than others.
        tiers: names of those it may be written behind to; none: all.
        marks: of the objects, equally many bytes of each; none: they get none.
    """

    namespace: bytes
    prefix: list[bytes]
    first: int
    blocks: list[int]
    group: int = 0
    weights: str = ""
    owner: bytes = NOBODY
    tail_tokens: int = 0
    lend: bool = False
    given: int = 0
    trace: str = ""
    priority: int = 0
    tiers: list[str] = field(default_factory=list)
    marks: bytes = b""

    def computed(self) -> Store:
        """The same without what was not computed; perhaps nothing."""
        count = len(self.prefix) - self.first
        first = min(max(self.first, self.given), len(self.prefix))
        gone = first - self.first
        return replace(
            self,
            first=first,
            blocks=self.blocks[gone * len(self.blocks) // count :],
            marks=self.marks[gone * len(self.marks) // count :],
        )


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What a worker has to do in one step.

    Args:
        node: identity of the node that the scheduler is attached to; empty if to none.
        sync_loads: done before and during this step's forward.
        async_loads: done in the background; each is reported exactly once.
        blends: the same.
        called_off: requests that have ended, whose loads need not wait for what has not come.
        stores: copied after this step's forward.
        late_stores: of requests that have ended; copied before anything in this step is written.
        fresh_blocks: blocks that this step may overwrite.
        num_tokens: tokens computed in this step.
        trial: what of these to compute once more; None: nothing.
    """

    node: bytes = b""
    sync_loads: list[Load] = field(default_factory=list)
    async_loads: list[Load] = field(default_factory=list)
    blends: list[Blend] = field(default_factory=list)
    called_off: set[str] = field(default_factory=set)
    stores: list[Store] = field(default_factory=list)
    late_stores: list[Store] = field(default_factory=list)
    fresh_blocks: set[int] = field(default_factory=set)
    num_tokens: int = 0
    trial: Trial | None = None


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What the workers have to say after a step.

    Args:
        nodes: the nodes that the workers are attached to.
        sync_loaded: how many workers have ended each synchronous load.
        came: of loads that ended early, the first chunk that did not come, of the prompt's.
        copy_rate: bytes per second that the slowest worker copies; 0: none has copied yet.
        origins: of what one of the workers has begun to load, tokens by the engine that computed
            them; only where engines share.
        met: of loads that were computed from the front, the first chunk that was not, of the
            prompt's.
        tried: why nothing can be computed besides the engine's steps, "" if it can be; None: it
            was not tried in this step. All ranks say the same.
        blended: of blends that have ended well, how many tokens were computed: gaps, and what the
            plan chose. Once each.
        turned: why no keys can be turned to other positions, "" if they can be; None: it was not
            tried in this step. It is tried on what ``tried`` is tried on. All ranks say the same.
    """

    nodes: set[bytes] = field(default_factory=set)
    sync_loaded: dict[str, int] = field(default_factory=dict)
    came: dict[str, int] = field(default_factory=dict)
    copy_rate: float = 0.0
    origins: dict[str, Counter[str]] = field(default_factory=dict)
    met: dict[str, int] = field(default_factory=dict)
    tried: str | None = None
    blended: dict[str, int] = field(default_factory=dict)
    turned: str | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        """Both reports in one."""
        assert isinstance(other, WorkerReport)
        counts = dict(self.sync_loaded)
        for request_id, count in other.sync_loaded.items():
            counts[request_id] = counts.get(request_id, 0) + count
        came = dict(self.came)
        for request_id, first in other.came.items():
            came[request_id] = min(first, came.get(request_id, first))
        rates = [rate for rate in (self.copy_rate, other.copy_rate) if rate]
        return WorkerReport(
            self.nodes | other.nodes,
            counts,
            came,
            min(rates, default=0.0),
            self.origins or other.origins,
            {**self.met, **other.met},
            other.tried if self.tried is None else self.tried,
            {**self.blended, **other.blended},
            other.turned if self.turned is None else self.turned,
        )


def _differing_orders(hellos: Sequence[WorkerHello]) -> list[str]:
    """The byte orders of a layer group that not all workers keep alike; none: they do."""
    orders: dict[int, set[str]] = {}
    for hello in hellos:
        for held in hello.held:
            orders.setdefault(held.part >> 16, set()).add(held.order)
    return next((sorted(names) for names in orders.values() if len(names) > 1), [])


def layout_of(hellos: Mapping[tuple[int, int], WorkerHello]) -> str:
    """The logical layout of the KV of all workers, in one canonical text.

    Args:
        hellos: by stage of the pipeline, and rank.
    Raises:
        Incompatible: one of them cannot take part, or they do not agree.
    """
    ranked = [hellos[rank] for rank in sorted(hellos)]
    if problem := next((hello.problem for hello in ranked if hello.problem), ""):
        raise Incompatible(problem)
    if orders := _differing_orders(ranked):
        raise Incompatible(f"the workers keep KV in different orders: {orders}")
    if not any(hello.slices for hello in ranked):
        return "; ".join(hello.layout for hello in ranked)
    if len({hello.slices for hello in ranked}) > 1:
        alone = next((hello.why_alone for hello in ranked if not hello.slices), "")
        raise Incompatible(f"the workers cut their KV heads differently ({alone})")
    stages: dict[int, str] = {}
    for stage, rank in sorted(hellos):
        layout = hellos[stage, rank].layout
        if stages.setdefault(stage, layout) != layout:
            raise Incompatible(f"ranks keep different KV: {stages[stage]} and {layout}")
    return "; ".join(stages.values())
