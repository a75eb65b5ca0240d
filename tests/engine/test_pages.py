"""What the named byte order says is in vLLM's blocks is what transformers computes.

The engine runs in a child process (`pages_child.py`), since vLLM keeps state for the life of its
process.
"""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.engine import pages_child
from tests.engine.children import Child, surroundings
from tests.support import products

from kvstrata.layout import LayerGroup, native_order
from kvstrata.quality.corpus import english_text
from kvstrata.testing import models

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

NUM_TOKENS = 300
"""Two full blocks of 128 and a part of a third."""


@dataclasses.dataclass
class Run:
    """What the child saw: a report for each KV cache group, and the prompt's pages of group 0."""

    report: dict[str, Any]
    native: npt.NDArray[np.uint8]
    prompt: list[int]

    @property
    def group(self) -> LayerGroup:
        return LayerGroup(**self.report["groups"][0]["group"])


def run_engine(folder: Path, model: Path, **engine: Any) -> Run:
    tokens = prompt(model)
    asked = {"model": str(model), "out": str(folder), "prompt": tokens, "engine": engine}
    log = folder / "log"
    child = Child(pages_child.run, (asked,), log, surroundings())
    assert child.wait(300.0) == 0, log.read_text(errors="replace")[-12000:]
    report = json.loads((folder / "report.json").read_text())
    return Run(report, np.load(folder / "native.npy"), tokens)


def prompt(model: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = english_text()[: NUM_TOKENS * 10]
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[:NUM_TOKENS]
    assert len(ids) == NUM_TOKENS
    return ids


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_engine(tmp_path_factory.mktemp("plain"), models.smollm2(), dtype="bfloat16")


@pytest.fixture(scope="module")
def reference(plain: Run) -> npt.NDArray[np.float32]:
    """Keys after rotary and values as transformers computes them: (L, S, H, T, D)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models.smollm2(), dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(torch.tensor([plain.prompt]), use_cache=True).past_key_values
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    kv: npt.NDArray[np.float32] = torch.stack(layers).float().numpy()
    return kv


def as_float(bfloat16: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def errors(
    kv: npt.NDArray[np.float32], reference: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Relative error of every layer's key and value, (L, S)."""
    difference = np.square(kv - reference).sum(axis=(2, 3, 4))
    ratio: npt.NDArray[np.float64] = np.sqrt(difference / np.square(reference).sum(axis=(2, 3, 4)))
    return ratio


def test_unpacked_blocks_are_transformers_kv(
    plain: Run, reference: npt.NDArray[np.float32]
) -> None:
    order = native_order(plain.report["groups"][0]["order"])
    portable = order.unpack_layers(plain.native, plain.group)
    assert portable.shape[:3] == reference.shape[:3] == (30, 2, 3)
    seen = errors(as_float(portable[:, :, :, :NUM_TOKENS]), reference)
    # bfloat16 rounding adds up over 30 layers; in the first there is next to nothing yet.
    assert seen[0].max() < 0.005
    assert seen.max() < 0.04


def test_wrong_order_would_be_seen(plain: Run, reference: npt.NDArray[np.float32]) -> None:
    right = plain.report["groups"][0]["order"]
    for other in ("cpu-vec", "cpu-amx", "strided-HNC"):
        name = f"vllm/{other}/b128/bfloat16"
        if name == right:
            continue
        portable = native_order(name).unpack_layers(plain.native, plain.group)
        seen = errors(as_float(portable[:, :, :, :NUM_TOKENS]), reference)
        assert seen[:, 0].min() > 0.3, name


def test_packing_again_gives_the_engine_s_bytes(plain: Run) -> None:
    order = native_order(plain.report["groups"][0]["order"])
    portable = order.unpack_layers(plain.native, plain.group)
    assert np.array_equal(order.pack_layers(portable, plain.group), plain.native)


def test_description(plain: Run) -> None:
    (group,) = plain.report["groups"]
    assert group["order"] in ("vllm/cpu-vec/b128/bfloat16", "vllm/cpu-amx/b128/bfloat16")
    assert group["group"]["num_layers"] == 30
    assert group["page_bytes"] == 2 * 3 * 128 * 64 * 2
    assert group["layer_names"][2].endswith("layers.2.self_attn.attn")
    assert group["layer_names"][10].endswith("layers.10.self_attn.attn")
    assert group["spans"] == [[0, 2], [2, 1], [3, 2]]


def check_self_test(group: dict[str, Any]) -> None:
    assert group["self_test"] is None
    assert group["restored"]
    refused = group["refused"]
    assert len(refused) >= 4
    for name, message in refused.items():
        assert message is not None, f"{name} passed for {group['order']}"
        assert "refuses to start" in message
        assert name in message or not name.startswith("vllm/")


def test_self_test_accepts_the_order_and_no_other(plain: Run) -> None:
    check_self_test(plain.report["groups"][0])


@pytest.mark.skipif(
    not products.ARE_FAST,
    reason="vLLM keeps fp8 KV only where the processor has AVX-512",
)
def test_fp8(tmp_path: Path) -> None:
    run = run_engine(
        tmp_path, models.smollm2(), dtype="bfloat16", kv_cache_dtype="fp8", block_size=64
    )
    (group,) = run.report["groups"]
    assert group["order"].endswith("/b64/float8_e4m3fn")
    check_self_test(group)


def test_groups_of_a_hybrid_model(tmp_path: Path) -> None:
    run = run_engine(tmp_path, models.gemma3(), dtype="bfloat16")
    kinds = {group["group"]["kind"] for group in run.report["groups"]}
    assert kinds == {"full", "sliding"}
    for group in run.report["groups"]:
        check_self_test(group)


# Without a running engine: vLLM's own allocation in each of its layouts, with a stand-in for the
# cache write of CUDA backends, which has no CPU build but writes through the tensor's strides.

LAYERS, HEADS, DIM, BLOCK, BLOCKS = 3, 4, 16, 32, 5


class Impl:
    """Writes as vLLM's CUDA backends do: key and value are the two halves of C."""

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        keys, values = cache.transpose(1, 2).split(cache.shape[-1] // 2, dim=-1)
        block, offset = slots // cache.shape[2], slots % cache.shape[2]
        keys[block, offset] = key.to(cache.dtype)
        values[block, offset] = value.to(cache.dtype)


class Backend:
    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"


@dataclasses.dataclass
class Layer:
    """The part of vLLM's attention layer that pages.py looks at."""

    kv_cache: Any
    impl: Any
    kv_cache_dtype: str = "auto"
    kv_lora_rank: int = 48
    qk_rope_head_dim: int = 16
    _k_scale: float = 1.0
    _v_scale: float = 1.0

    def get_attn_backend(self) -> type[Backend]:
        return Backend


def allocate(layout: str, kernel_block: int = BLOCK, heads: int = HEADS, mla: bool = False) -> Any:
    """(kv_caches, vllm_config, kv_cache_config) as a worker registers them."""
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        MLAAttentionSpec,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    if mla:
        spec = MLAAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
        )
    else:
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=heads, head_size=DIM, dtype=torch.bfloat16
        )
    page = spec.page_size_bytes
    row = page // spec.num_heads
    layer_stride, block_stride = {
        "LB": (page * BLOCKS, page),
        "BL": (page, page * LAYERS),
        "LH": (page * BLOCKS, row),
        "BH": (row, page * LAYERS),
    }[layout[:2]]
    names = [f"model.layers.{index}.self_attn.attn" for index in (2, 10, 9)]
    tensor = KVCacheTensor(
        size=page * BLOCKS * LAYERS,
        layers=sorted(names),
        layer_stride=layer_stride,
        block_stride=block_stride,
    )
    config = KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec([*names, "model.layers.11.self_attn.attn"], spec)],
    )
    caches = allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout[layout], [kernel_block])
    caches["model.layers.11.self_attn.attn"] = caches[names[0]]  # shares, owns nothing
    layers = {name: Layer(cache, Impl()) for name, cache in caches.items()}
    vllm_config = types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context=layers),
        model_config=types.SimpleNamespace(dtype=torch.bfloat16),
        parallel_config=types.SimpleNamespace(decode_context_parallel_size=1),
    )
    return caches, vllm_config, config


def accept(caches: Any, vllm_config: Any, config: Any) -> Any:
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.connectors.vllm.proof import self_test

    pages = subject.describe(caches, vllm_config, config)
    for cache in caches.values():
        cache.fill_(3)
    self_test(pages, caches, subject.attention_layers(pages, vllm_config))
    assert all(bool((cache == 3).all()) for cache in caches.values())
    return pages


@pytest.mark.parametrize(
    ("layout", "order"),
    [("LBNHC", "NHC"), ("LBHNC", "HNC"), ("BLNHC", "NHC"), ("BLHNC", "HNC")],
)
def test_strided_layouts(layout: str, order: str) -> None:
    caches, vllm_config, config = allocate(layout)
    pages = accept(caches, vllm_config, config)
    assert pages.order.name == f"vllm/strided-{order}/b32/bfloat16"
    assert [name.split(".")[2] for name in pages.layer_names] == ["2", "9", "10"]
    tensor = caches[pages.layer_names[1]]
    assert pages.run(1, 4) == (tensor[4].data_ptr(), tensor[4].numel() * 2)
    assert pages.addresses([3, 1])[1].tolist() == [tensor[3].data_ptr(), tensor[1].data_ptr()]
    layers_apart = layout.startswith("L")
    assert pages.spans([1, 2, 4]) == (
        [(0, 2), (2, 1)] if layers_apart else [(0, 1), (1, 1), (2, 1)]
    )
    assert pages.spans([]) == []


@pytest.mark.parametrize(("layout", "other"), [("LBNHC", "HNC"), ("LBHNC", "NHC")])
def test_strided_self_test_refuses_the_other(layout: str, other: str) -> None:
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.connectors.vllm.proof import self_test
    from kvstrata.errors import LayoutMismatch

    caches, vllm_config, config = allocate(layout)
    pages = accept(caches, vllm_config, config)
    wrong = native_order(f"vllm/strided-{other}/b32/bfloat16")
    layers = subject.attention_layers(pages, vllm_config)
    with pytest.raises(LayoutMismatch, match=f"strided-{other}.*elements are elsewhere"):
        self_test(dataclasses.replace(pages, order=wrong), caches, layers)


def test_self_test_sees_two_swapped_elements() -> None:
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.connectors.vllm.proof import self_test
    from kvstrata.errors import LayoutMismatch

    class Swapping(Impl):
        def do_kv_cache_update(self, *args: Any) -> None:
            super().do_kv_cache_update(*args)
            flat = args[3][-1].flatten()
            flat[[5, 9]] = flat[[9, 5]]
            args[3][-1] = flat.view(args[3][-1].shape)

    caches, vllm_config, config = allocate("LBNHC")
    pages = accept(caches, vllm_config, config)
    layers = subject.attention_layers(pages, vllm_config)
    layers[pages.layer_names[-1]].impl = Swapping()
    with pytest.raises(LayoutMismatch, match=r"layers\.10\..*: 2 of 8192 elements are elsewhere"):
        self_test(pages, caches, layers)


def test_engine_that_cannot_be_tested_is_refused() -> None:
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.connectors.vllm.proof import self_test
    from kvstrata.errors import LayoutMismatch

    caches, vllm_config, config = allocate("LBNHC")
    pages = accept(caches, vllm_config, config)
    layers = subject.attention_layers(pages, vllm_config)
    layers[pages.layer_names[0]].impl = object()
    with pytest.raises(LayoutMismatch, match="no cache write of its own"):
        self_test(pages, caches, layers)

    class Broken(Impl):
        def do_kv_cache_update(self, *args: Any) -> None:
            raise ValueError("wrong arguments")

    layers[pages.layer_names[0]].impl = Broken()
    with pytest.raises(LayoutMismatch, match="failed in the self-test: wrong arguments"):
        self_test(pages, caches, layers)


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_pages_of_several_kernel_blocks(layout: str) -> None:
    pages = accept(*allocate(layout, kernel_block=16))
    assert (pages.block_tokens, pages.order.block_tokens) == (32, 16)
    assert pages.page_bytes == 2 * pages.order.page_bytes(pages.group)
    assert pages.native_shape(64) == (LAYERS, 4, pages.page_bytes // 2)


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_pages_of_some_heads_are_where_vllm_has_these_heads(layout: str) -> None:
    caches, vllm_config, config = allocate(layout)
    pages = accept(caches, vllm_config, config)
    for heads in (range(1), range(1, 3), range(3, 4)):
        some = pages.of_heads(heads)
        for layer, name in enumerate(pages.layer_names):
            tensor = caches[name][4, heads.start : heads.stop]
            assert tensor.is_contiguous()
            assert some.run(layer, 4) == (tensor.data_ptr(), tensor.numel() * 2)
        assert some.page_bytes == some.order.page_bytes(some.group)
    assert pages.of_heads(range(HEADS)) is pages


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "LHBNC", "BLHNC"])
def test_one_head_has_one_name(layout: str) -> None:
    pages = accept(*allocate(layout, heads=1))
    assert pages.order.name == "vllm/strided-NHC/b32/bfloat16"


def test_latent_pages() -> None:
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    class LatentImpl:
        def do_kv_cache_update(self, *args: Any) -> None:
            CPUMLAImpl.do_kv_cache_update(None, *args)

    caches, vllm_config, config = allocate("LBNHC", mla=True)
    for layer in vllm_config.compilation_config.static_forward_context.values():
        layer.impl, layer.kv_cache = LatentImpl(), layer.kv_cache.squeeze(1)
    pages = accept(caches, vllm_config, config)
    assert (pages.group.states, pages.group.head_dim) == (1, 64)
    assert pages.order.name == "vllm/strided-NHC/b32/bfloat16"


def refusal(caches: Any, vllm_config: Any, config: Any) -> str:
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.errors import LayoutMismatch

    with pytest.raises(LayoutMismatch) as caught:
        subject.describe(caches, vllm_config, config)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["LHBNC", "BHLNC"])
def test_scattered_blocks_are_refused(layout: str) -> None:
    message = refusal(*allocate(layout))
    assert "not one dense run" in message or "bytes apart" in message
    assert "VLLM_KV_CACHE_LAYOUT" in message


def test_unknown_instruction_set_is_refused_by_name() -> None:
    caches, vllm_config, config = allocate("LBHNC")
    for layer in vllm_config.compilation_config.static_forward_context.values():
        layer.isa = "neon"
        layer.get_attn_backend = lambda: types.SimpleNamespace(get_name=lambda: "CPU_ATTN")
    assert "unknown native byte order 'vllm/cpu-neon/b32/bfloat16'" in refusal(
        caches, vllm_config, config
    )


def test_what_is_not_plain_kv_is_refused() -> None:
    import torch

    caches, vllm_config, config = allocate("LBNHC")
    context = vllm_config.compilation_config.static_forward_context
    spec = config.kv_cache_groups[0].kv_cache_spec
    config.kv_cache_groups[0].kv_cache_spec = dataclasses.replace(spec, num_head_slots=8)
    assert "one key and one value" in refusal(caches, vllm_config, config)
    config.kv_cache_groups[0].kv_cache_spec = spec
    vllm_config.parallel_config.decode_context_parallel_size = 2
    assert "decode_context_parallel_size > 1" in refusal(caches, vllm_config, config)
    vllm_config.parallel_config.decode_context_parallel_size = 1
    last = "model.layers.10.self_attn.attn"
    whole = caches[last]
    caches[last] = whole.view(torch.int16)
    assert "dtype auto (int16)" in refusal(caches, vllm_config, config)
    caches[last] = torch.zeros(BLOCKS, HEADS, BLOCK, 2 * DIM, dtype=torch.bfloat16)
    assert "one group keep different pages" in refusal(caches, vllm_config, config)
    caches[last] = whole
    del context[last]
    assert "did not register layer" in refusal(caches, vllm_config, config)


def test_addresses_outside_the_pool() -> None:
    from kvstrata.errors import UsageError

    pages = accept(*allocate("LBNHC"))
    for block in (-1, BLOCKS):
        with pytest.raises(UsageError, match=r"must lie in 0\.\.4"):
            pages.addresses([0, block])
    with pytest.raises(UsageError, match="no whole number"):
        pages.native_shape(33)
