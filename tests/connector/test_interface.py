"""vLLM's base class of connectors: nothing that it asks or tells is overlooked."""

from __future__ import annotations

import inspect

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA

from kvstrata.connectors.vllm.connector import KVStrataConnector

LEFT_TO_VLLM = {
    "bind_gpu_block_pool": "blocks are vLLM's alone; none is pinned",
    "bind_kv_cache_manager": "the same",
    "clear_connector_metadata": "what the base class keeps, it clears",
    "finish_forward": "what reads the step's blocks are copies, which the next step waits for",
    "get_finished": "`get_transfer_results` answers in its place",
    "get_finished_count": "every rank reports",
    "get_kv_connector_kv_cache_events": "events come from the scheduler's side, by `take_events`",
    "get_loaded_kv_cache_group_ids": "what is found by its key, as the default says",
    "get_mem_pool_context": "the engine's own memory",
    "has_connector_metadata": "what the base class keeps",
    "has_pending_block_frees": "no free is ever delayed",
    "has_pending_push_work": "nothing is pushed to another engine",
    "register_finished_partial_tail": "no free is ever delayed",
    "requires_piecewise_for_cudagraph": "on a GPU loads are done before the forward",
    "reset_capture_state": "capturing changes nothing here",
    "role": "what the base class keeps",
    "set_host_xfer_buffer_ops": "blocks are copied by their addresses",
    "set_xfer_handshake_metadata": "`set_xfer_handshake_metadata_pp_aware` in its place",
    "supports_divergent_local_hybrid_hits": "a load begins where vLLM's own hit ends",
}
"""What the base class does right for us, and why."""

SINCE_0_33 = {"restore_kv_caches", "supports_sleep_mode", "unregister_kv_caches"}


def asked_of_a_connector() -> dict[str, object]:
    """What vLLM may ask of a connector, by name."""
    bases = (KVConnectorBase_V1, SupportsHMA)
    return {name: what for base in bases for name, what in vars(base).items() if name[0] != "_"}


def test_all_that_vllm_may_ask_is_answered_or_left_to_it_on_purpose() -> None:
    theirs, ours = asked_of_a_connector().keys(), vars(KVStrataConnector).keys()
    assert theirs - ours - LEFT_TO_VLLM.keys() == set(), "what does vLLM ask there?"
    assert LEFT_TO_VLLM.keys() - theirs == set(), "vLLM asks it no more"
    assert LEFT_TO_VLLM.keys() & ours == set(), "it is answered"
    assert ours >= SINCE_0_33


@pytest.mark.parametrize("name", sorted(asked_of_a_connector().keys() & vars(KVStrataConnector)))
def test_it_is_answered_as_it_is_asked(name: str) -> None:
    """Another parameter, or another name for one, is seen too."""
    theirs, ours = asked_of_a_connector()[name], vars(KVStrataConnector)[name]
    assert type(ours) is type(theirs), "a property, a class's method or an object's"
    if not isinstance(theirs, property):
        asked, answered = (
            list(inspect.signature(getattr(one, "__func__", one)).parameters)  # type: ignore[arg-type]
            for one in (theirs, ours)
        )
        assert answered == asked
