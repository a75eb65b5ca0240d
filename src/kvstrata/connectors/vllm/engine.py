"""The engine's own forward, for tokens that vLLM has not scheduled: any of a request's, into the
blocks that it has given the request.

The tokens are cut into runs of neighbours. A run from position a up to b is to the kernels a
sequence of its own, b tokens long, of which the last b - a are computed, with the request's block
table. Each layer's KV is written before its attention reads it, so runs of one forward see each
other, and what comes out is what the engine itself would have computed, cut otherwise. It is one
ordinary call of the model, so it works for every architecture and number of ranks, compiled or not.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvstrata.connectors.modules import common_root
from kvstrata.connectors.vllm.pages import Pages
from kvstrata.errors import Incompatible

logger = logging.getLogger(__name__)

Runs = list[tuple[int, int]]
"""Of some tokens: number of the first, and behind the last, of each run of neighbours."""


def refuse(vllm_config: Any, kv_cache_config: Any) -> None:
    """Whether tokens can be computed so at all; both sides of the connector ask.

    Raises:
        Incompatible: the engine is one with which that was not made to work; the reason is
            readable.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    cache, passes = vllm_config.cache_config, vllm_config.compilation_config.pass_config
    groups = kv_cache_config.kv_cache_groups
    reasons = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "expert load balancing": getattr(parallel, "enable_eplb", False),
        "batches that are computed in two halves": parallel.use_ubatching,
        "sequence parallelism": getattr(passes, "enable_sp", False)
        or parallel.use_sequence_parallel_moe,
        "LoRA": vllm_config.lora_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "multimodal models": model.is_multimodal_model or model.uses_mrope,
        "prompt embeddings": model.enable_prompt_embeds,
        "latent attention": model.use_mla,
        "several KV cache groups": len(groups) > 1,
        "layers that are not full attention": not _is_full(groups[0].kv_cache_spec),
        "layers that share another one's KV": cache.kv_sharing_fast_prefill,
        "KV in 8 bits": str(cache.cache_dtype).startswith("fp8"),
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise Incompatible(", ".join(found))


def _is_full(spec: Any) -> bool:
    """Whether such layers look back to every token, in all of their kernels."""
    return (
        type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
    )


def find_model(layers: Sequence[Any]) -> Any:
    """The model of the runner that calls this, which vLLM hands to nobody.

    By the stack: a caller has it. Where none does, by what holds its layers.

    Args:
        layers: some that belong to it.
    Raises:
        Incompatible: neither finds it.
    """
    model = _of_a_caller()
    if model is None:
        model = common_root(layers)
        if not callable(getattr(model, "compute_logits", None)):
            raise Incompatible("the engine's model was not found")
        logger.info("KVStrata found the engine's model by what holds its layers")
    return model


def _of_a_caller() -> Any:
    frame = sys._getframe(1)
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        if hasattr(type(caller), "get_model") and hasattr(caller, "model"):
            return caller.get_model()
        frame = frame.f_back  # type: ignore[assignment]
    return None


class Forward:
    """Computes tokens of one worker; on the engine's main thread, between its own forwards.

    Ranks compute together: each must be asked for the same tokens, in the same order.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: the engine's one group.
        pages: of that.
        model: the engine's.

    Raises:
        Incompatible: it would not work.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, pages: Pages, model: Any) -> None:
        refuse(vllm_config, kv_cache_config)
        group = kv_cache_config.kv_cache_groups[0]
        layers = vllm_config.compilation_config.static_forward_context
        attention = {
            name: one for name, one in layers.items() if isinstance(one, AttentionLayerBase)
        }
        backends = {one.get_attn_backend() for one in attention.values()}
        if set(attention) != set(pages.layer_names) or len(backends) != 1:
            raise Incompatible("its layers are not all of one kind")
        if pages.order.block_tokens != pages.block_tokens:
            raise Incompatible("its kernels take smaller blocks than its scheduler")
        self._config, self._model = vllm_config, model
        self._names, self._block, self._device = pages.layer_names, pages.block_tokens, pages.device
        (self._backend,) = backends
        self._spec = group.kv_cache_spec
        self._builder: Any = None
        scheduler = vllm_config.scheduler_config
        self._most_in_step: int = scheduler.max_num_batched_tokens
        self._most_tokens: int = self._most_in_step
        if scheduler.long_prefill_token_threshold > 0:
            self._most_tokens = min(self._most_tokens, scheduler.long_prefill_token_threshold)
        self._most_runs: int = scheduler.max_num_seqs
        self._world: int = vllm_config.parallel_config.tensor_parallel_size

    def left(self, num_tokens: int) -> int:
        """Tokens that may be computed in a step with so many: no more than of a prompt in chunks.

        So whoever decodes is held up no longer than by another's chunked prefill.
        """
        return min(self._most_tokens, self._most_in_step - num_tokens)

    def compute(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        blocks: Sequence[int],
        cuts: Sequence[int] = (),
        *,
        told_further: int = 0,
        compiled: bool = True,
    ) -> None:
        """Compute the KV of some of a request's tokens; returns when it lies in its blocks.

        What lies before each token must be there, or be computed by this very call.

        Args:
            tokens: ids.
            positions: of each in its prompt, ascending.
            blocks: the request's, all of them up to the last of these.
            cuts: positions at which a run ends in any case.
            told_further: by how much the model takes all positions to be larger than they are.
            compiled: whether the model may run as it was compiled, if it was.
        """
        runs = _runs(positions, set(cuts))
        while runs:
            some: Runs = []
            left = self._most_tokens
            while runs and len(some) < self._most_runs and left > 0:
                start, stop = runs.pop(0)
                if stop - start > left:
                    runs.insert(0, (start + left, stop))
                    stop = start + left
                some.append((start, stop))
                left -= stop - start
            self._forward(tokens, positions, blocks, some, told_further, compiled)

    def agree(self, numbers: list[int]) -> list[int]:
        """The largest of what the ranks say, number by number; each must ask for as many."""
        if self._world == 1 or not numbers:
            return numbers
        from vllm.distributed.parallel_state import get_tp_group

        told = torch.tensor(numbers, dtype=torch.int64)
        torch.distributed.all_reduce(
            told, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().cpu_group
        )
        return [int(number) for number in told.tolist()]

    def add_up(self, numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The sum over the ranks, number by number and to the last bit the same on all of them."""
        if self._world == 1:
            return numbers
        from vllm.distributed.parallel_state import get_tp_group

        mine = torch.from_numpy(numbers)
        every = [torch.empty_like(mine) for _ in range(self._world)]
        torch.distributed.all_gather(every, mine, group=get_tp_group().cpu_group)
        total: npt.NDArray[np.float32] = np.stack([one.numpy() for one in every]).sum(0)
        return total

    def _forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        blocks: Sequence[int],
        runs: Runs,
        told_further: int,
        compiled: bool,
    ) -> None:
        # Kernels expect those that compute least first, as where some decode.
        runs = sorted(runs, key=lambda run: run[1] - run[0])
        order = [i for start, stop in runs for i in range(start, stop)]
        where = torch.tensor([positions[i] for i in order], dtype=torch.int64)
        lengths = torch.tensor([stop - start for start, stop in runs], dtype=torch.int32)
        ends = torch.tensor([positions[stop - 1] + 1 for _, stop in runs], dtype=torch.int32)
        starts = torch.zeros(len(runs) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, out=starts[1:])
        table = torch.tensor(blocks, dtype=torch.int32)
        slots = table.to(torch.int64)[where // self._block] * self._block + where % self._block
        on = self._device
        told, where, slots = (where + told_further).to(on), where.to(on), slots.to(on)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(on),
            query_start_loc_cpu=starts,
            seq_lens=ends.to(on),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(runs),
            num_actual_tokens=len(order),
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            block_table_tensor=table.repeat(len(runs), 1).to(on),
            slot_mapping=slots,
            positions=where,
            is_prefilling=torch.ones(len(runs), dtype=torch.bool),
        )
        if self._builder is None:
            # The runner's own keeps buffers between its steps.
            self._builder = self._backend.get_builder_cls()(
                self._spec, list(self._names), self._config, on
            )
        with torch.inference_mode():
            metadata = self._builder.build(0, common)
            ids = torch.tensor([tokens[i] for i in order], dtype=torch.int32).to(on)
            with set_forward_context(
                dict.fromkeys(self._names, metadata),
                self._config,
                num_tokens=len(order),
                slot_mapping=dict.fromkeys(self._names, slots),
                skip_compiled=not compiled,
            ):
                self._model(
                    input_ids=ids, positions=told, intermediate_tensors=None, inputs_embeds=None
                )
        if on.type == "cuda":
            torch.cuda.current_stream(on).synchronize()


def _runs(positions: Sequence[int], cuts: set[int]) -> Runs:
    """Where neighbours end."""
    if not positions:
        return []
    starts = [0] + [
        i
        for i, (before, now) in enumerate(pairwise(positions), 1)
        if now != before + 1 or now in cuts
    ]
    return list(pairwise([*starts, len(positions)]))
