"""The child's side of `tests.engine.engine`: one vLLM, and what a test may ask of it.

Requests and replies are lines of JSON on a connected socket. It steps the engine itself, so that a
test can stop between two steps, and looks into the engine where it runs in this process: which
blocks hold a prompt, which requests were preempted.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.products import make_products_fast

Reply = dict[str, Any]


class Child:
    """An ``LLM`` in this process, unless vLLM was told to use more of them."""

    def __init__(self, options: Reply) -> None:
        import vllm
        from vllm.config import KVEventsConfig

        make_products_fast()
        self._vllm = vllm
        if events := options.pop("kv_events_config", None):
            options["kv_events_config"] = KVEventsConfig(**events)
        self._llm = vllm.LLM(**options)
        self._engine = self._llm.llm_engine
        self._number = 0
        self._num_preempted = 0
        self._outputs: dict[str, Reply] = {}
        self._begin_loads: Callable[..., None] | None = None
        self._detached: tuple[Any, Any] | None = None
        self._inside = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
        if self._inside:
            self._watch_preemption()

    @property
    def _core(self) -> Any:
        return self._engine.engine_core.engine_core

    def about(self) -> Reply:
        config = self._engine.vllm_config
        about: Reply = {
            "num_blocks": config.cache_config.num_gpu_blocks,
            "block_tokens": config.cache_config.block_size,
            "hybrid_off": config.scheduler_config.disable_hybrid_kv_cache_manager,
        }
        if self._inside:
            scheduler = self._core.scheduler
            about["num_groups"] = len(scheduler.kv_cache_config.kv_cache_groups)
        return about

    # answering

    def add(self, requests: list[Reply]) -> Reply:
        """Hand in requests; returns their ids."""
        ids = [self._add(request) for request in requests]
        return {"ids": ids}

    def step(self, count: int = 1) -> Reply:
        """Take some steps; returns the ids of unfinished requests and all outputs so far."""
        for _ in range(count):
            self._step()
        return {"unfinished": self._unfinished(), "outputs": self._outputs}

    def finish(self) -> Reply:
        """Step until everything is answered; returns all outputs since the last `finish`."""
        deadline = time.monotonic() + 240.0
        while self._engine.has_unfinished_requests() or (
            # A serving engine goes on by itself after the answer: it frees blocks, stores late.
            self._inside and self._core.scheduler.has_requests()
        ):
            self._step()
            if time.monotonic() > deadline:
                return {"error": f"it hangs: {self._unfinished()} of {sorted(self._outputs)}"}
        outputs, self._outputs = self._outputs, {}
        return {"outputs": outputs}

    def ask(self, requests: list[Reply], in_turn: bool) -> Reply:
        """Answer requests, one after the other or all at once."""
        if not in_turn:
            ids = self.add(requests)["ids"]
            outputs = self.finish()["outputs"]
            return {"answers": [outputs[number] for number in ids]}
        answers: list[Reply] = []
        for request in requests:
            answers += self.ask([request], in_turn=False)["answers"]
        return {"answers": answers}

    def abort(self, ids: list[str]) -> Reply:
        """Abort requests, as a client that hangs up does."""
        self._engine.abort_request(ids)
        return {}

    def abort_soon(self, requests: list[Reply], steps: list[int]) -> Reply:
        """Hand each request in, abort it after so many steps (-1: never), and finish the rest."""
        for request, count in zip(requests, steps, strict=True):
            number = self._add(request)
            if count >= 0:
                for _ in range(count):
                    self._step()
                self._engine.abort_request([number])
        return self.finish()

    def embed(self, prompts: list[list[int]]) -> Reply:
        """What a model that pools makes of these prompts, one after the other."""
        vectors = []
        for prompt in prompts:
            (output,) = self._llm.embed({"prompt_token_ids": prompt}, use_tqdm=False)
            vectors.append(output.outputs.embedding)
        return {"vectors": vectors}

    def drafts(self) -> Reply:
        """How many tokens were drafted and how many accepted, as vLLM has counted so far."""
        counted = {metric.name: metric for metric in self._llm.get_metrics()}
        return {
            name: counted[f"vllm:spec_decode_num_{name}_tokens"].value
            for name in ("draft", "accepted")
        }

    def try_reset(self) -> Reply:
        """Reset vLLM's prefixes and the connector once, whatever holds blocks; whether it did."""
        return {"done": self._llm.reset_prefix_cache(reset_connector=True)}

    def reset(self, connector: bool = False, tries: int = 200) -> Reply:
        """vLLM's own prefix cache, forgotten; says how often that was refused."""
        for refused in range(tries):
            if self._llm.reset_prefix_cache(reset_connector=connector):
                return {"refused": refused}
            if self._inside:
                self._engine.step()
            time.sleep(0.01)
        return {"error": "vLLM's prefix cache cannot be reset: blocks have leaked"}

    # looking inside

    def blocks(self) -> Reply:
        """Free blocks, and how many there are when nothing runs."""
        pool = self._core.scheduler.kv_cache_manager.block_pool
        return {"free": pool.get_num_free_blocks(), "all": pool.num_gpu_blocks - 1}

    def preempted(self) -> Reply:
        """How often a request was preempted since the last call."""
        count, self._num_preempted = self._num_preempted, 0
        return {"count": count}

    def kv(self, tokens: list[int], path: str) -> Reply:
        """Write what vLLM's prefix cache holds of these tokens: layer by layer, block by block."""
        import torch

        ids = self._held(tokens)
        runner = self._core.model_executor.driver_worker.worker.model_runner
        layers = [layer[ids].contiguous().view(torch.uint8).reshape(-1) for layer in
                  runner.kv_caches]  # fmt: skip
        Path(path).write_bytes(b"".join(layer.numpy().tobytes() for layer in layers))
        return {"blocks": len(ids), "layers": len(layers)}

    def evict(self, tokens: list[int], keep: int) -> Reply:
        """Make vLLM forget all of these tokens' blocks but the first ``keep``."""
        self._core.scheduler.kv_cache_manager.block_pool.evict_blocks(
            set(self._held(tokens)[keep:])
        )
        return {}

    def evict_others(self, tokens: list[int]) -> Reply:
        """Make vLLM forget what it holds of these tokens besides full attention."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        groups = self._core.scheduler.kv_cache_config.kv_cache_groups
        held = self._held_by_group(tokens)
        others = {
            number
            for group, numbers in zip(groups, held, strict=True)
            if not isinstance(group.kv_cache_spec, FullAttentionSpec)
            for number in numbers
        }
        self._core.scheduler.kv_cache_manager.block_pool.evict_blocks(others)
        return {"count": len(others)}

    def keys(self, tokens: list[int], salt: str = "") -> Reply:
        """Keys of the whole chunks of these tokens, as the connector makes them."""
        from kvstrata.keys import KeyChain

        side = self._core.scheduler.connector._scheduler
        namespace = side._lookups.namespaces.of(types.SimpleNamespace(lora_request=None))
        chain = KeyChain(side._lookups.attached().hello.secret, namespace, side._chunk, salt)
        return {"keys": [key.hex() for key in chain.keys(tokens)]}

    def stop_at_load(self, pid: int) -> Reply:
        """Stop a process (the node) at the moment the next asynchronous load begins."""
        from kvstrata.connectors.vllm.transfers import Transfers

        begin = self._begin_loads = Transfers.begin_loads

        def stopping(transfers: Any, *how: Any) -> None:
            os.kill(pid, signal.SIGSTOP)
            self.stop_no_more()
            begin(transfers, *how)

        Transfers.begin_loads = stopping  # type: ignore[assignment, method-assign]
        return {}

    def stop_no_more(self) -> Reply:
        """Undo `stop_at_load`, if no load has begun since."""
        from kvstrata.connectors.vllm.transfers import Transfers

        if self._begin_loads is not None:
            Transfers.begin_loads = self._begin_loads  # type: ignore[method-assign]
        self._begin_loads = None
        return {}

    def detach(self) -> Reply:
        """Take the connector out: a plain vLLM with everything else alike."""
        from vllm.distributed.kv_transfer import kv_transfer_state

        scheduler = self._core.scheduler
        self._detached = scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT
        scheduler.connector = kv_transfer_state._KV_CONNECTOR_AGENT = None
        return {}

    def attach(self) -> Reply:
        """Undo `detach`."""
        from vllm.distributed.kv_transfer import kv_transfer_state

        assert self._detached is not None
        self._core.scheduler.connector, kv_transfer_state._KV_CONNECTOR_AGENT = self._detached
        return {}

    # how

    def _add(self, request: Reply) -> str:
        self._number += 1
        number = str(self._number)
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=request["max_tokens"], ignore_eos=True
        )
        if regex := request.get("regex"):
            from vllm.sampling_params import StructuredOutputsParams

            params.structured_outputs = StructuredOutputsParams(regex=regex)
        if count := request.get("logprobs"):
            params.logprobs = count
        if transfer := request.get("transfer"):
            params.extra_args = {"kv_transfer_params": transfer}
        prompt: Reply = {"prompt_token_ids": request["prompt"]}
        if request.get("embeds"):
            prompt = {"prompt_embeds": self._embed(request["prompt"])}
        if images := request.get("images"):
            prompt["multi_modal_data"] = {"image": [self._draw(seed) for seed in images]}
        if request.get("salt"):
            prompt["cache_salt"] = request["salt"]
        lora = None
        if name := request.get("lora"):
            from vllm.lora.request import LoRARequest

            lora = LoRARequest(name, abs(hash(name)) % 2**31 + 1, name)
        self._engine.add_request(number, prompt, params, lora_request=lora)
        return number

    def _step(self) -> None:
        for output in self._engine.step():
            self._outputs[output.request_id] = {
                "tokens": list(output.outputs[0].token_ids),
                "cached": output.num_cached_tokens,
                "transfer": output.kv_transfer_params,
                "finished": output.finished,
                "logprobs": [
                    {token: one.logprob for token, one in step.items()}
                    for step in output.outputs[0].logprobs or ()
                ],
            }

    def _unfinished(self) -> list[str]:
        states = self._engine.output_processor.request_states
        return [state.external_req_id for state in states.values()]

    def _draw(self, seed: int) -> Any:
        """An image that no other seed draws."""
        import numpy as np
        from PIL import Image

        return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8))

    def _embed(self, tokens: list[int]) -> Any:
        import torch
        from safetensors.torch import load_file

        weights = load_file(Path(self._engine.model_config.model) / "model.safetensors")
        return weights["model.embed_tokens.weight"][torch.tensor(tokens)]

    def _held(self, tokens: list[int]) -> list[int]:
        """The blocks of the first group in vLLM's prefix cache that hold these tokens."""
        return self._held_by_group(tokens)[0]

    def _held_by_group(self, tokens: list[int]) -> list[list[int]]:
        """The same of every group, without the places that hold nothing."""
        hashes = self._request(tokens).block_hashes
        manager = self._core.scheduler.kv_cache_manager
        found = manager.coordinator.find_longest_cache_hit(hashes, len(tokens))
        return [[block.block_id for block in blocks if not block.is_null] for blocks in found[0]]

    def _request(self, tokens: list[int]) -> Any:
        from vllm.v1.request import Request

        return Request(
            request_id="probe",
            prompt_token_ids=tokens,
            sampling_params=self._vllm.SamplingParams(max_tokens=1),
            pooling_params=None,
            block_hasher=self._core.request_block_hasher,
        )

    def _watch_preemption(self) -> None:
        scheduler = self._core.scheduler
        preempt = scheduler._preempt_request

        def counting(*arguments: Any, **options: Any) -> None:
            self._num_preempted += 1
            preempt(*arguments, **options)

        scheduler._preempt_request = counting


def serve(connected: socket.socket) -> None:
    """Answer until the other end hangs up."""
    with connected, connected.makefile("rw") as pipe:

        def say(message: Reply) -> None:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()

        child = Child(json.loads(pipe.readline()))
        say(child.about())
        for line in pipe:
            request = json.loads(line)
            verb: Callable[..., Reply] = getattr(child, request.pop("verb"))
            say(verb(**request))
