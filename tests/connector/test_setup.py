"""What the connector says of itself, and when it refuses to take part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tests.connector.fake_model import SPECS, kv_cache_config
from tests.connector.rig import Rig, prompt, vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, SupportsHMA
from vllm.v1.kv_cache_interface import SinkFullAttentionSpec, UniformTypeKVCacheSpecs

from kvstrata.connectors.vllm import connector as connector_module
from kvstrata.connectors.vllm.connector import KVStrataConnector
from kvstrata.connectors.vllm.groups import chunk_of
from kvstrata.connectors.vllm.messages import Held, WorkerHello
from kvstrata.errors import ConfigError

Make = Callable[..., Rig]


# what the connector says of itself


def test_it_mends_the_failure_policy_and_warns_of_other_versions(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transfer = SimpleNamespace(kv_load_failure_policy="fail")
    connector_module._greet(transfer, "")
    assert transfer.kv_load_failure_policy == "recompute"
    assert "recompute" in caplog.text
    caplog.clear()
    connector_module._greet(transfer, "")
    assert caplog.text == ""
    monkeypatch.setattr("vllm.__version__", "9.9.9")
    connector_module._greet(transfer, "")
    assert "9.9.9" in caplog.text
    assert "0.32.0" in caplog.text


def test_vllm_sees_the_mended_policy(make_rig: Make) -> None:
    assert make_rig().scheduler.recompute_kv_load_failures is True


UNKNOWN = [
    ("full", {"non_causal": True}, "not causal"),
    ("state", {"mamba_cache_mode": "none"}, "enable prefix caching"),
    ("state", {"num_speculative_blocks": 1}, "speculative decoding"),
]


@pytest.mark.parametrize(("kind", "change", "why"), UNKNOWN)
def test_a_group_of_no_use_leaves_the_model_alone_and_is_named(
    caplog: pytest.LogCaptureFixture, kind: str, change: dict[str, Any], why: str
) -> None:
    for before in ([], ["full"]):
        caplog.clear()
        caches = kv_cache_config(64, [*before, kind])
        last = caches.kv_cache_groups[-1]
        last.kv_cache_spec = dataclasses.replace(SPECS[kind], **change)
        why_named = f"KV cache group {len(before)}"
        config = vllm_config({}, 64)
        connector = KVStrataConnector(config, KVConnectorRole.SCHEDULER, caches)
        assert why in caplog.text
        assert why_named in caplog.text
        request: Any = SimpleNamespace(request_id="r")
        connector.on_new_request(request)
        assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
        connector.update_state_after_alloc(request, None, 0)
        meta: Any = connector.build_connector_meta(SimpleNamespace())
        assert (meta.stores, meta.async_loads, meta.sync_loads) == ([], [], [])
        assert connector.request_finished_all_groups(request, ([], [])) == (False, None)
        assert connector.reset_cache() is None
        worker = KVStrataConnector(config, KVConnectorRole.WORKER, caches)
        worker.register_kv_caches({})
        hello: Any = worker.get_handshake_metadata()
        assert hello.problem
        worker.bind_connector_metadata(meta)
        worker.handle_preemptions(meta)
        worker.start_load_kv(None)
        worker.wait_for_save()
        assert worker.get_transfer_results(set()).finished_recving in (None, set())
        connector.shutdown()
        worker.shutdown()


def test_a_worker_says_what_the_scheduler_cannot_see(make_rig: Make) -> None:
    """Of layers that differ vLLM shows the scheduler one alone."""
    full = SPECS["full"]
    shapes = {"a": full, "b": SinkFullAttentionSpec(**vars(full), sink_len=4)}
    caches = kv_cache_config(64, ["full"])
    caches.kv_cache_groups[0].layer_names = list(shapes)
    caches.kv_cache_groups[0].kv_cache_spec = UniformTypeKVCacheSpecs(
        block_size=full.block_size, kv_cache_specs=shapes
    )
    worker = KVStrataConnector(vllm_config({}, 64), KVConnectorRole.WORKER, caches)
    worker.register_kv_caches({})
    hello: Any = worker.get_handshake_metadata()
    assert "of the kind SinkFullAttentionSpec, which is not cached" in hello.problem
    rig = make_rig()
    rig.side.introduce({(0, 0): hello})
    assert rig.ask(prompt(100), 3) == 0
    assert "SinkFullAttentionSpec" in rig.state()["requests"][-1]["miss"]


def test_latents_that_nothing_goes_on_behind_are_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """vLLM's reference kernels on a CPU, for which it switches chunked prefill off."""
    caches = kv_cache_config(64, ["latent"])
    config = vllm_config({}, 64, enable_chunked_prefill=False)
    connector = KVStrataConnector(config, KVConnectorRole.SCHEDULER, caches)
    assert "compute a prompt from the beginning only" in caplog.text
    assert connector._scheduler is None
    caplog.clear()
    KVStrataConnector(vllm_config({}, 64), KVConnectorRole.SCHEDULER, caches).shutdown()
    assert "uncached" not in caplog.text


def test_the_log_says_how_far_apart_states_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kvstrata")
    config = vllm_config({}, 64)
    config.scheduler_config.max_num_batched_tokens = 100
    connector = KVStrataConnector(config, KVConnectorRole.SCHEDULER, kv_cache_config(64, ["state"]))
    connector.shutdown()
    assert "a recurrent state every 96 tokens" in caplog.text
    assert "max_num_batched_tokens 100" in caplog.text


def test_it_keeps_the_hybrid_manager_and_delivers_nothing_for_sure(make_rig: Make) -> None:
    assert issubclass(KVStrataConnector, SupportsHMA)
    assert make_rig().connector.requires_kv_delivery is False


@pytest.mark.parametrize(
    ("hellos", "why"),
    [
        ([WorkerHello(problem="an order nobody knows")], "an order nobody knows"),
        ([WorkerHello((Held(0, "a"),)), WorkerHello((Held(1, "b"),))], "different orders"),
    ],
)
def test_workers_that_cannot_take_part_turn_it_off(
    make_rig: Make, hellos: list[WorkerHello], why: str
) -> None:
    rig = make_rig()
    rig.side.introduce({(0, i): hello for i, hello in enumerate(hellos)})
    assert rig.ask(prompt(100), 3) == 0
    record = rig.state()["requests"][-1]
    assert why in record["miss"]
    assert record["stored_chunks"] == 0
    bypassed, *_ = record["reasons"]
    assert (bypassed["why"], why in bypassed["detail"]) == ("bypassed", True)
    rig.check()


def test_a_model_without_identity_is_not_cached(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig()

    def unknown(layout: str, wait_s: float, slices: int) -> None:
        raise ValueError("a model of no kind")

    monkeypatch.setattr(rig.side._lookups.namespaces, "identify", unknown)
    rig.side.introduce({(0, 0): WorkerHello((Held(0, "x"),))})
    assert rig.ask(prompt(100), 3) == 0
    rig.check()


@pytest.mark.parametrize(
    ("configured", "block", "chunk"), [(None, 16, 128), (None, 48, 144), (96, 48, 96), (64, 16, 64)]
)
def test_a_chunk_is_a_whole_number_of_blocks(
    configured: int | None, block: int, chunk: int
) -> None:
    from kvstrata.config import load_config

    overrides = {} if configured is None else {"chunk_tokens": configured}
    config = load_config(environ={}, overrides=overrides)
    assert chunk_of(config, block) == chunk


def test_a_chunk_that_cuts_a_block_is_refused() -> None:
    from kvstrata.config import load_config

    config = load_config(environ={}, overrides={"chunk_tokens": 64})
    with pytest.raises(ConfigError, match="no multiple of the engine's blocks of 48"):
        chunk_of(config, 48)


def test_resetting_the_cache_forgets_what_was_stored(make_rig: Make) -> None:
    rig = make_rig()
    tokens = prompt(200)
    rig.warm(tokens)
    running = rig.add(tokens, 20)
    rig.step()
    assert rig.connector.reset_cache() is True
    rig.run()
    assert len(rig.answers[running]) == 20
    rig.reset()
    assert rig.ask(tokens) == 0
    rig.settle()
    rig.reset()
    assert rig.ask(tokens) > 0
    rig.check()
