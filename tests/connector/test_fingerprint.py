"""Whose KV it is: found out in the background, and never taken for another's."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy as copy_of
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.connector.rig import Rig, prompt, vllm_config
from vllm.lora.request import LoRARequest
from vllm.transformers_utils.configs.eagle import EAGLEConfig

from kvstrata.connectors.vllm import fingerprint
from kvstrata.connectors.vllm.fingerprint import Namespaces, engine_namespace
from kvstrata.errors import ConfigError
from kvstrata.keys import Namespace
from kvstrata.wire.client import NodeClient

WAIT_S = 30.0

Make = Callable[..., Rig]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces(vllm_config({}, 8), 128, "default")
    yield made
    made.close()


def request(path: Path | None = None, number: int = 1) -> Any:
    adapter = None if path is None else LoRARequest(path.name, number, str(path))
    return SimpleNamespace(lora_request=adapter)


def adapter(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(b'{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(weights * 100)
    return folder


def settled(namespaces: Namespaces, asked: Any) -> bytes:
    for future in list(namespaces._adapters.values()):
        future.exception(WAIT_S)
    found = namespaces.of(asked)
    if found is None:
        return settled(namespaces, asked)
    return found


def test_nothing_is_cached_before_the_weights_are_known(
    namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="still being hashed"):
        namespaces.of(request())
    gate = threading.Event()
    real = fingerprint.engine_namespace

    def slow(*arguments: Any) -> Any:
        gate.wait(WAIT_S)
        return real(*arguments)

    monkeypatch.setattr(fingerprint, "engine_namespace", slow)
    namespaces.identify("layout", 0.01)
    with pytest.raises(ConfigError, match="still being hashed"):
        namespaces.of(request())
    gate.set()
    assert namespaces._engine is not None
    namespaces._engine.result(WAIT_S)
    assert namespaces.of(request())


def test_an_identity_that_cannot_be_had_is_a_storage_failure_whatever_it_was(
    namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Any other exception would end the engine's core, long after its start."""
    gate = threading.Event()

    def broken(*_: Any) -> Any:
        gate.wait(WAIT_S)
        raise MemoryError("of the hashing thread")

    monkeypatch.setattr(fingerprint, "engine_namespace", broken)
    namespaces.identify("layout", 0.01)
    gate.set()
    assert namespaces._engine is not None
    namespaces._engine.exception(WAIT_S)
    with pytest.raises(ConfigError, match="of the hashing thread"):
        namespaces.of(request())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    namespaces.identify("layout", WAIT_S)
    monkeypatch.setattr(fingerprint, "adapter_identity", broken)
    with pytest.raises(ConfigError, match="of the hashing thread"):
        settled(namespaces, request(tmp_path / "nowhere"))


def test_everything_that_decides_the_bytes_decides_the_namespace(tmp_path: Path) -> None:
    def of(layout: str = "layout", chunk: int = 128, tenant: str = "a", **changes: Any) -> bytes:
        config = vllm_config({}, 8)
        for path, value in changes.items():
            part, name = path.split("__")
            setattr(getattr(config, part), name, value)
        return engine_namespace(config, layout, chunk, tenant).digest()

    rope = vllm_config({}, 8).model_config.hf_config
    rope.rope_theta = 12345.0
    import torch

    different = [
        of(),
        of(layout="other"),
        of(chunk=256),
        of(tenant="b"),
        of(model_config__dtype=torch.float16),
        of(model_config__quantization="fp8"),
        of(model_config__hf_config=rope),
        of(cache_config__cache_dtype="fp8"),
        of(parallel_config__tensor_parallel_size=2),
        of(parallel_config__pipeline_parallel_size=2),
        of(parallel_config__decode_context_parallel_size=2),
        of(load_config__load_format="dummy"),
        of(load_config__load_format="dummy"),
    ]
    assert len(set(different)) == len(different)
    assert of() == of() == different[0]


def test_a_draft_model_decides_too(tmp_path: Path) -> None:
    """Its KV lies in the same objects: another one's would be right, and of no use."""
    one, other = adapter(tmp_path / "one"), adapter(tmp_path / "other", b"weighty")
    copy = adapter(tmp_path / "copy")

    def of(folder: Path | str | None, **changes: Any) -> bytes:
        config = vllm_config({}, 8)
        if folder is not None:
            drafts = copy_of(config.model_config)
            drafts.model = str(folder)
            for name, value in changes.items():
                setattr(drafts.hf_config, name, value)
            config.speculative_config = SimpleNamespace(draft_model_config=drafts)
        return engine_namespace(config, "layout", 128, "a").digest()

    itself = vllm_config({}, 8).model_config.model
    assert of(itself) == of(None), "drafts out of the prompt name the model itself"
    assert of(copy) == of(one)
    assert len({of(None), of(one), of(other), of(one, rope_theta=12345.0)}) == 4


def test_where_a_head_lies_decides_nothing(tmp_path: Path) -> None:
    """vLLM's configuration of an EAGLE head has the one in it that it was read from."""

    def of(folder: Path) -> bytes:
        config = vllm_config({}, 8)
        draft = copy_of(config.model_config)
        draft.model = draft.hf_config._name_or_path = str(adapter(folder))
        draft.hf_config = EAGLEConfig(draft.hf_config, method="eagle", model_type="eagle")
        config.speculative_config = SimpleNamespace(draft_model_config=draft)
        assert str(folder) in json.dumps(draft.hf_config.to_dict(), default=str)
        return engine_namespace(config, "layout", 128, "a").digest()

    assert of(tmp_path / "one") == of(tmp_path / "two")


def test_weights_that_are_nowhere_have_no_identity() -> None:
    config = vllm_config({}, 8)
    config.model_config.model = "somebody/something"
    config.model_config.hf_config._commit_hash = None
    with pytest.raises(ConfigError, match="revision"):
        engine_namespace(config, "layout", 128, "a")
    config.model_config.hf_config._commit_hash = "abc"
    one = engine_namespace(config, "layout", 128, "a").digest()
    config.model_config.hf_config._commit_hash = "abd"
    assert engine_namespace(config, "layout", 128, "a").digest() != one


def test_adapters_are_told_apart_by_their_content(namespaces: Namespaces, tmp_path: Path) -> None:
    namespaces.identify("layout", WAIT_S)
    base = settled(namespaces, request())
    one = settled(namespaces, request(adapter(tmp_path / "one"), 1))
    same = settled(namespaces, request(adapter(tmp_path / "same"), 2))
    other = settled(namespaces, request(adapter(tmp_path / "other", b"weighty"), 3))
    assert one == same
    assert len({base, one, other}) == 3


def test_an_adapter_that_is_replaced_where_it_lies_is_another(
    namespaces: Namespaces, tmp_path: Path
) -> None:
    namespaces.identify("layout", WAIT_S)
    folder = adapter(tmp_path / "one")
    before = settled(namespaces, request(folder, 1))
    (folder / "adapter_model.safetensors").write_bytes(b"weighty" * 100)
    assert settled(namespaces, request(folder, 2)) != before, "a new load of the same path"


def test_a_reset_begins_a_namespace_that_nobody_had(namespaces: Namespaces) -> None:
    namespaces.identify("layout", WAIT_S)
    found = {namespaces.of(request())}
    for _ in range(3):
        namespaces.renew()
        found.add(namespaces.of(request()))
    assert len(found) == 4


def test_a_node_is_told_once_what_each_namespace_is_made_of(
    make_rig: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told_of: list[Any] = []
    record = NodeClient.record

    def noted(client: NodeClient, one: dict[str, Any]) -> None:
        told_of.append(one.get("namespace"))
        record(client, one)

    monkeypatch.setattr(NodeClient, "record", noted)
    rig = make_rig(extra={"tenant": "a"})
    namespaces = rig.side._lookups.namespaces
    rig.ask(prompt(100), 3)
    rig.ask(prompt(90), 3)
    (told,) = rig.state()["namespaces"]
    digest = namespaces.of(request())
    assert digest is not None
    assert told["digest"] == digest.hex()
    assert told["parts"]["tenant"] == "a"
    assert told["parts"]["chunk_tokens"] == rig.config.chunk_tokens
    assert told["model"]["name"] == rig.vllm_config.model_config.model
    assert told["model"]["weights"] == namespaces.weights_of(request())
    assert told["model"]["max_model_len"] == "2048"
    assert told["model"]["reset"] == "no"
    assert told["orders"] == rig.side._lookups.orders
    assert told["objects"] == rig.side._lookups.parts == [0]
    assert len(rig.state()["requests"]) == 2, "it is no request's record"
    assert [one is not None for one in told_of] == [True, False, False]
    rig.connector.reset_cache()
    rig.ask(prompt(80), 3)
    again = rig.state()["namespaces"][-1]
    assert again["model"].pop("reset") != told["model"].pop("reset")
    assert again["model"] == told["model"]
    assert again["parts"] != told["parts"]
    rig.stop_node()
    rig.ask(prompt(60), 3)
    rig.start_node()
    rig.attach()
    rig.ask(prompt(70), 3)
    assert [one["digest"] for one in rig.state()["namespaces"]] == [again["digest"]]
    rig.check()


def test_nothing_is_told_before_the_weights_are_known(namespaces: Namespaces) -> None:
    assert namespaces.describe(Namespace("m", "l", 128)) is None


def test_what_is_told_of_a_model_is_what_its_fingerprint_is_made_of() -> None:
    def of(**changes: Any) -> dict[str, str]:
        config = vllm_config({}, 8)
        for path, value in changes.items():
            part, name = path.split("__")
            setattr(getattr(config, part), name, value)
        made = Namespaces(config, 128, "a")
        made.identify("layout", WAIT_S)
        assert made._weights is not None
        made._weights.result(WAIT_S)
        parts = made.parts_of(request())
        assert parts is not None
        described = made.describe(parts)
        assert described is not None
        made.close()
        return described.model

    rope = vllm_config({}, 8).model_config.hf_config
    rope.rope_theta = 12345.0
    plain = of()
    for name, changes in {
        "quantization": {"model_config__quantization": "fp8"},
        "configuration": {"model_config__hf_config": rope},
        "kv_cache_dtype": {"cache_config__cache_dtype": "fp8"},
        "max_model_len": {"model_config__max_model_len": 512},
        "weights": {"load_config__load_format": "dummy"},
    }.items():
        other = of(**changes)
        assert {key for key in plain if plain[key] != other[key]} == {name}
