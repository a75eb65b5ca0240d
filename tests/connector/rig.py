"""vLLM's real scheduler and both sides of the connector, around a model that anybody can check.

The model's KV of a token is a digest of all tokens up to it, and the token it samples is one too,
so any wrong byte in any block that a step reads is seen at once. Worker, node and scheduler run in
this process; the node is real, behind a Unix socket.
"""

from __future__ import annotations

import copy
import functools
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
from tests.connector.fake_forward import FakeForward, FakeProof, fronts
from tests.connector.fake_model import (
    BLOCK,
    CHUNK,
    DRAFT,
    NAMES,
    STATE,
    Memory,
    digests,
    heads_of,
    kv_cache_config,
    sampled,
)
from tests.connector.gates import TIMEOUT_S, Gate
from vllm import SamplingParams
from vllm.config import KVTransferConfig
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvstrata.config import Config, load_config
from kvstrata.connectors.link import Link
from kvstrata.connectors.vllm.connector import KVStrataConnector
from kvstrata.connectors.vllm.groups import Group, cut_by_shape, groups_of
from kvstrata.connectors.vllm.messages import StepMetadata
from kvstrata.connectors.vllm.scheduler import SchedulerSide
from kvstrata.connectors.vllm.worker import WorkerSide
from kvstrata.node.node import Node
from kvstrata.node.operating.departures import STEP_S
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.testing import models


@functools.lru_cache(maxsize=1)
def _engine_config() -> Any:
    config = EngineArgs(
        model=str(models.tiny_llama()),
        max_model_len=2048,
        max_num_batched_tokens=2048,
        max_num_seqs=16,
        enable_prefix_caching=True,
        block_size=BLOCK,
        enforce_eager=True,
        async_scheduling=False,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KVStrataConnector",
            kv_connector_module_path="kvstrata.connectors.vllm",
            kv_role="kv_both",
        ),
    ).create_engine_config()
    init_none_hash(sha256)
    return config


def vllm_config(extra: dict[str, Any], num_blocks: int, **scheduling: Any) -> Any:
    """A configuration of vLLM's own making, with small blocks."""
    config = copy.deepcopy(_engine_config())
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = num_blocks
    config.kv_transfer_config.kv_connector_extra_config = extra
    for name, value in scheduling.items():
        setattr(config.scheduler_config, name, value)
    return config


class Rig:
    """An engine of vLLM's scheduler, the connector, and workers whose arithmetic is checkable.

    Args:
        folder: for the socket and the secret.
        num_blocks: vLLM's KV pool.
        ranks: workers.
        extra: KVStrata's configuration.
        pipelined: as with asynchronous scheduling, a step is planned before the last one is heard.
        node: an existing node to share, on ``path``.
        with_node: whether there is a node at all.
        make_node: builds the node, `Node.create` if None.
        events: how vLLM publishes its KV events.
        kinds: of the model's layer groups, see `SPECS`.
        draft: number of the group whose block table `DRAFT` has; None: there is no such layer.
        heads: KV heads of a layer, on all ranks together; one for each if None.
        ends: when a step of a worker ends: `at once`; `late`, as where a model drafts, so that its
            results are taken before; or `never`, as in the first ranks of a pipeline then.
    """

    def __init__(
        self,
        folder: Path,
        num_blocks: int = 64,
        ranks: int = 1,
        extra: dict[str, Any] | None = None,
        pipelined: bool = False,
        node: InProcessNode | None = None,
        path: Path | None = None,
        with_node: bool = True,
        make_node: Callable[[Config], Node] | None = None,
        events: KVEventsConfig | None = None,
        kinds: Sequence[str] = ("full",),
        draft: int | None = None,
        heads: int | None = None,
        ends: Literal["at once", "late", "never"] = "at once",
        **scheduling: Any,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = path or folder / "node.sock"
        self.extra: dict[str, Any] = {
            "node": f"unix:{self.path}",
            "chunk_tokens": CHUNK,
            "secret_file": str(folder.parent / "secret"),
            "host.capacity": "4MiB",
            "host.verify_every": 1,
            # A model of nothing computes sooner than anything can be loaded.
            "planner": "off",
            # Most tests count what is whole; those of what is inside set their own.
            "inside": "off",
            # Long, so that no busy machine decides a test; those about deadlines set their own.
            "deadlines.match": "10s",
            "deadlines.request": "20s",
            **(extra or {}),
        }
        self.config: Config = load_config(environ={}, overrides=self.extra)
        self.owns_node = node is None
        self.node = node
        self._make_node = make_node or Node.create
        if node is None and with_node:
            self.start_node()
        scheduling.setdefault("async_scheduling", pipelined)
        self.vllm_config = vllm_config(self.extra, num_blocks, **scheduling)
        self.vllm_config.kv_events_config = events
        self.ranks = ranks
        self._ends = ends
        self.vllm_config.parallel_config.world_size = ranks
        self.vllm_config.parallel_config.tensor_parallel_size = ranks
        heads = heads or ranks
        self.vllm_config.model_config.model_arch_config.total_num_kv_heads = heads
        caches = kv_cache_config(num_blocks, kinds, draft)
        self.groups = groups_of(caches, self.config)
        if "state" in kinds:
            self.vllm_config.cache_config.mamba_cache_mode = "align"
            self.vllm_config.cache_config.mamba_block_size = BLOCK
        make = AsyncScheduler if pipelined else Scheduler
        self.scheduler = make(
            vllm_config=self.vllm_config,
            kv_cache_config=generate_scheduler_kv_cache_config([caches]),
            structured_output_manager=StructuredOutputManager(self.vllm_config),
            block_size=BLOCK,
            log_stats=True,
        )
        connector = self.scheduler.connector
        assert isinstance(connector, KVStrataConnector)
        self.connector = connector
        # of a worker that computes inside loads
        self.forward: FakeForward
        self.proof: FakeProof
        self.memories = [Memory(num_blocks, heads_of(rank, ranks, heads)) for rank in range(ranks)]
        self.workers = [self._worker(rank, caches) for rank in range(ranks)]
        connector.set_xfer_handshake_metadata_pp_aware(
            {(0, rank): worker.hello() for rank, worker in enumerate(self.workers)}
        )
        assert connector._scheduler is not None
        self.side: SchedulerSide = connector._scheduler
        if with_node:
            self.attach()
        self.depth = 2 if pipelined else 1
        self.tokens: dict[str, list[int]] = {}
        self.prompts: dict[str, int] = {}
        self.answers: dict[str, list[int]] = {}
        self.loaded: list[str] = []
        self.failed: list[str] = []
        self.cut: list[str] = []  # their loads ended early
        self.steps: list[Any] = []
        self._aggregator = KVOutputAggregator(ranks)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._queue: list[tuple[Any, ModelRunnerOutput]] = []
        self._count = 0
        self._closed = False

    # the node

    def start_node(self) -> None:
        """A node on this rig's socket, from nothing."""
        self.node = InProcessNode(self.config, self._make_node)
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        listener.listen(16)
        self.node.run(lambda: self._server().listen(listener))

    def stop_node(self) -> None:
        """As a killed node looks from here: every socket closes."""
        assert self.node is not None
        self.path.unlink(missing_ok=True)
        self.node.close()
        self.node = None

    def attach(self) -> None:
        """Wait until scheduler and workers are attached to the same node."""
        self.until(lambda: self.side._lookups.attached() is not None)
        assert self.side._lookups.client is not None
        node = self.side._lookups.client.hello.node
        for worker in self.workers:
            meta = StepMetadata(node=node)
            self.until(lambda w=worker, m=meta: w._follow(m) or w._node == node)  # type: ignore[misc]
        self.side._worker_nodes = {worker._node for worker in self.workers}

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not true():
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.002)

    def state(self) -> dict[str, Any]:
        """The node's status."""
        assert self.node is not None
        client = self.node.connect()
        try:
            return client.status()
        finally:
            client.close()

    def finish_stores(self) -> None:
        """Wait until all that was handed to the workers is committed."""
        for worker in self.workers:
            for job in worker._transfers.stores._jobs:
                assert job.ended.wait(TIMEOUT_S)
        self.until(lambda: self.state()["leases"]["reservations"] == 0)

    def settle(self) -> dict[str, Any]:
        """Wait until every store has ended and the node holds nothing for this engine."""
        self.finish_stores()
        held: dict[str, Any] = {}

        def free() -> bool:
            held.update(self.state())
            return (held["leases"]["count"], held["leases"]["reservations"]) == (0, 0)

        self.until(free)
        return held

    def gate(self, message: type) -> Gate:
        """Let the node answer messages of this type only once the gate is opened."""
        assert self.node is not None
        return Gate(self.node, message)

    # requests

    def add(self, prompt: Sequence[int], max_tokens: int = 1, **options: Any) -> str:
        """A new request; its id."""
        self._count += 1
        name = f"r{self._count}"
        request = self.request(prompt, max_tokens, name=name, **options)
        self.tokens[name] = list(prompt)
        self.prompts[name] = len(prompt)
        self.answers[name] = []
        self.scheduler.add_request(request)
        return name

    def request(
        self, prompt: Sequence[int] | None, max_tokens: int = 1, name: str = "x", **options: Any
    ) -> Request:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        params.update_from_generation_config({}, 0)
        arguments: dict[str, Any] = {
            "pooling_params": None, "sampling_params": params,
            "block_hasher": self._hasher,
        }  # fmt: skip
        arguments.update(options)
        return Request(
            request_id=name,
            prompt_token_ids=None if prompt is None else list(prompt),
            **arguments,
        )

    def look_up(self, request: Request) -> None:
        """Wait until the connector knows what it has of a request that vLLM does not know."""
        self.until(lambda: self.connector.get_num_new_matched_tokens(request, 0)[0] is not None)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def ask(self, prompt: Sequence[int], max_tokens: int = 1, **options: Any) -> int:
        """Run one request to its end; how many tokens of it came from the node."""
        before = self.num_external
        self.add(prompt, max_tokens, **options)
        self.run()
        return self.num_external - before

    def reset(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.scheduler.reset_prefix_cache(), "blocks are still held"

    @property
    def num_external(self) -> int:
        """Tokens that loads were asked for so far."""
        return sum(step.num_external for step in self.steps)

    def run(self, most: int = 100_000) -> None:
        """Step until nothing is left to do."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.scheduler.has_requests() or self._queue:
            assert time.monotonic() < deadline, f"stuck: {self.scheduler.requests}"
            self.step()
        self.step()

    def step(self) -> Any:
        """One step of the engine, in the order of vLLM's model runner."""
        output = self.scheduler.schedule()
        meta = output.kv_connector_metadata
        meta.num_external = sum(
            sum(block >= 0 for block in load.blocks) * BLOCK
            if self.groups.prefix_only
            else len(load.keys) * self.groups.chunk_tokens
            for load in (*meta.sync_loads, *meta.async_loads)
        )
        meta.has_sync = output.has_sync_kv_loads
        self.steps.append(meta)
        results = [self._execute(rank, output, meta) for rank in range(self.ranks)]
        answer = self._aggregator.aggregate(results) if self.ranks > 1 else results[0]
        assert answer is not None
        heard = answer.kv_connector_output
        assert heard is not None
        self.loaded += sorted(heard.finished_recving or ())
        self.failed += sorted(heard.failed_recving)
        self.cut += sorted(heard.kv_connector_worker_meta.came)
        self._queue.append((output, answer))
        while len(self._queue) >= self.depth or (self._queue and not output.num_scheduled_tokens):
            self._hear()
        return meta

    def blocks_of(self, name: str) -> list[int]:
        """A request's blocks, of the first group."""
        blocks: list[int] = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
        return blocks

    def wrong(self) -> list[str]:
        """Answers that a model without any cache would not have given."""
        return [
            name
            for name, answer in self.answers.items()
            if any(
                token != sampled(self.tokens[name][: self.prompts[name] + i])
                for i, token in enumerate(answer)
            )
        ]

    def warm(self, *prompts: list[int], max_tokens: int = 1) -> None:
        """Have the node know these prompts, and vLLM none of them."""
        for tokens in prompts:
            self.ask(tokens, max_tokens)
        self.settle()
        self.reset()

    def check(self) -> None:
        """No answer is wrong, nothing is held, no block has leaked."""
        assert self.wrong() == []
        self.settle()
        self.reset()
        assert self.side._states == {}
        assert not self.side._loads
        assert not self.side._loading_chunks
        assert self.side._active == self.side._lookups.looking == set()

    def num_leases(self) -> int:
        """Leases that the node counts."""
        count: int = self.state()["leases"]["count"]
        return count

    def drop_host(self) -> None:
        """Only the slower tier has what was stored."""
        assert self.node is not None
        client = self.node.connect()
        client.flush()
        client.clear(tiers=["host"])
        client.close()
        time.sleep(3 * STEP_S)  # the node dates what left to the step; a later request is later

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.scheduler.shutdown()
        for worker in self.workers:
            worker.close()
        if self.node is not None and self.owns_node:
            self.node.check_integrity()
            self.node.close()

    # how

    def _server(self) -> Any:
        assert self.node is not None
        return self.node.server

    def _worker(self, rank: int, caches: KVCacheConfig) -> WorkerSide:
        config = copy.copy(self.vllm_config)
        config.parallel_config = replace_rank(self.vllm_config.parallel_config, rank, self.ranks)
        memory, shapes = self.memories[rank], (*self.groups.each, *self.groups.more)
        # The self-test needs a model; what it proves, tests/engine/test_pages.py shows.
        chunk = self.groups.chunk_tokens
        make = (lambda _: fronts(self, memory, chunk)) if self.config.meet == "on" else None
        with patch.multiple(
            "kvstrata.connectors.vllm.worker",
            describe=lambda *args: memory.pages(shapes[args[-1]]),
            describe_states=lambda *args: memory.pages(shapes[args[-1]]),
            self_test=lambda *_: None,
            prove_states=lambda *_: None,
            attention_layers=lambda *_: {},
        ):
            link = Link(self.config, f"worker {rank}")
            link.start()
            return WorkerSide(
                config, cut_by_shape(caches), {}, link, self.config, self.groups, make
            )

    def _execute(self, rank: int, output: Any, meta: Any) -> ModelRunnerOutput:
        worker, memory = self.workers[rank], self.memories[rank]
        worker.before_step(meta)
        worker.bind(meta)
        self._carry_states(memory, output)  # vLLM does so before any synchronous load
        result = KVConnectorOutput()
        if output.has_sync_kv_loads:
            worker.load_sync()
        names = list(output.num_scheduled_tokens)
        # vLLM writes a layer's new KV before it asks for the layer.
        for name in names:
            self._write(memory, name, output, worker._invalid)
        for layer in (*NAMES, DRAFT):
            worker.load_layer(layer)
        answers = [self._compute(memory, name, output, worker._invalid) for name in names]
        if not output.has_sync_kv_loads:
            worker.load_sync()
        if self._ends == "at once":
            worker.after_forward()
        result.finished_recving, result.failed_recving = worker.loads_ended()
        result.invalid_block_ids = worker.invalid_blocks()
        result.kv_connector_worker_meta = worker.report()
        if self._ends == "late":
            worker.after_forward()
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=answers,
            kv_connector_output=result,
        )

    def _write(self, memory: Memory, name: str, output: Any, invalid: set[int]) -> None:
        """Write what the forward would write."""
        done, start, all_blocks = self._done(name, output)
        for group, blocks in self._blocks_of(all_blocks):
            if group.kind == "recurrent":
                continue
            wanted = memory.wanted(done, group)
            # What attention makes of garbage is garbage.
            written = wanted if invalid.isdisjoint(blocks) else ~wanted
            where, within = _places(blocks, start, len(done))
            memory.of(group)[:, where, within] = written[:, start:]

    def _blocks_of(self, all_blocks: Sequence[list[int]]) -> list[tuple[Group, list[int]]]:
        """Of a request, of each shape of layers."""
        shapes = (*self.groups.each, *self.groups.more)
        return [(group, all_blocks[group.table]) for group in shapes]

    def _done(self, name: str, output: Any) -> tuple[list[bytes], int, tuple[list[int], ...]]:
        """Digests of a request's tokens, the number of the first new one, its blocks."""
        request = self.scheduler.requests[name]
        end, tokens = request.num_computed_tokens, self.tokens[name]
        assert end <= len(tokens)
        done = digests(tokens[:end], (request.cache_salt or "").encode())
        all_blocks = self.scheduler.kv_cache_manager.get_block_ids(name)
        return done, end - output.num_scheduled_tokens[name], all_blocks

    def _compute(self, memory: Memory, name: str, output: Any, invalid: set[int]) -> list[int]:
        """Read what attention would read, sample."""
        done, start, all_blocks = self._done(name, output)
        tokens, end = self.tokens[name], len(done)
        broken = not invalid.isdisjoint(all_blocks[0])
        for group, blocks in self._blocks_of(all_blocks):
            if group.kind == "recurrent":
                self._advance(memory, group, blocks, done, start)
            elif not broken:
                wanted = memory.wanted(done, group)
                read = self._first_read(group, start)
                where, within = _places(blocks, read, end)
                equal = memory.of(group)[:, where, within] == wanted[:, read:]
                right = equal.all(axis=(0, *range(2, equal.ndim)))
                assert right.all(), (
                    f"{name}: wrong KV in group {group.index} at tokens "
                    f"{read + np.flatnonzero(~right)} of {start}"
                )
        if end < len(tokens):
            return []
        if broken:
            return [0]  # vLLM throws it away and computes again
        answer = sampled(tokens)
        if memory is self.memories[-1]:
            tokens.append(answer)
            self.answers[name].append(answer)
        return [answer]

    def _first_read(self, group: Group, start: int) -> int:
        """The first token that layers of a group look back to from token number ``start``."""
        if group.kind == "sliding":
            return max(0, start - group.reach + 1)
        return start // group.reach * group.reach if group.kind == "chunked" else 0

    def _carry_states(self, memory: Memory, output: Any) -> None:
        """As vLLM's runner: a state goes on in the block that this step ends in."""
        for name, count in output.num_scheduled_tokens.items():
            end = self.scheduler.requests[name].num_computed_tokens
            last, now = (end - count - 1) // BLOCK, (end - 1) // BLOCK
            all_blocks = self.scheduler.kv_cache_manager.get_block_ids(name)
            for group, blocks in zip(self.groups.each, all_blocks, strict=True):
                if group.kind == "recurrent" and end > count and last != now:
                    assert blocks[last], "the null block"
                    assert blocks[now], "the null block"
                    memory.blocks()[:, blocks[now]] = memory.blocks()[:, blocks[last]]

    def _advance(
        self, memory: Memory, group: Group, blocks: list[int], done: list[bytes], start: int
    ) -> None:
        """Read the state that a step begins with, write the one that it ends with."""
        place = memory.blocks()[:, blocks[(len(done) - 1) // BLOCK], :STATE]
        if start:
            right = (place == memory.state(done[start - 1], group.index)).all()
            assert right, f"wrong state in group {group.index} after {start} tokens"
        place[:] = memory.state(done[-1], group.index)

    def _hear(self) -> None:
        output, answer = self._queue.pop(0)
        self.scheduler.update_from_output(output, answer)


def _places(blocks: list[int], first: int, end: int) -> tuple[Any, Any]:
    """Block and place in it of each of these tokens."""
    at = np.arange(first, end)
    where = np.array(blocks, np.int64)[at // BLOCK], at % BLOCK
    assert where[0].all(), "the null block"
    return where


def replace_rank(parallel: Any, rank: int, world: int) -> Any:
    """A worker's own view of the parallel configuration."""
    mine = copy.copy(parallel)
    mine.rank, mine.world_size, mine.tensor_parallel_size = rank, world, world
    return mine


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids that no other seed begins with."""
    return [1000 + seed] + [(seed * 7919 + i * 31) % 5000 for i in range(1, length)]
