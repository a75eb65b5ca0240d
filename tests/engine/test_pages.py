"""What the named byte order says is in vLLM's blocks is what transformers computes.

The engine runs in a child process (this file as a script), since vLLM binds threads and keeps
state for the life of its process. A recording connector there does at registration what the real
one does, so the order of vLLM's own initialisation is tested too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

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
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    child = subprocess.run(
        [sys.executable, __file__, json.dumps(asked)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-8000:]
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

    pages = subject.describe(caches, vllm_config, config)
    for cache in caches.values():
        cache.fill_(3)
    subject.self_test(pages, caches, subject.attention_layers(pages, vllm_config))
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
    from kvstrata.errors import LayoutMismatch

    caches, vllm_config, config = allocate(layout)
    pages = accept(caches, vllm_config, config)
    wrong = native_order(f"vllm/strided-{other}/b32/bfloat16")
    layers = subject.attention_layers(pages, vllm_config)
    with pytest.raises(LayoutMismatch, match=f"strided-{other}.*elements are elsewhere"):
        subject.self_test(dataclasses.replace(pages, order=wrong), caches, layers)


def test_self_test_sees_two_swapped_elements() -> None:
    from kvstrata.connectors.vllm import pages as subject
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
        subject.self_test(pages, caches, layers)


def test_engine_that_cannot_be_tested_is_refused() -> None:
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.errors import LayoutMismatch

    caches, vllm_config, config = allocate("LBNHC")
    pages = accept(caches, vllm_config, config)
    layers = subject.attention_layers(pages, vllm_config)
    layers[pages.layer_names[0]].impl = object()
    with pytest.raises(LayoutMismatch, match="no cache write of its own"):
        subject.self_test(pages, caches, layers)

    class Broken(Impl):
        def do_kv_cache_update(self, *args: Any) -> None:
            raise ValueError("wrong arguments")

    layers[pages.layer_names[0]].impl = Broken()
    with pytest.raises(LayoutMismatch, match="failed in the self-test: wrong arguments"):
        subject.self_test(pages, caches, layers)


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_pages_of_several_kernel_blocks(layout: str) -> None:
    pages = accept(*allocate(layout, kernel_block=16))
    assert (pages.block_tokens, pages.order.block_tokens) == (32, 16)
    assert pages.page_bytes == 2 * pages.order.page_bytes(pages.group)
    assert pages.native_shape(64) == (LAYERS, 4, pages.page_bytes // 2)


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


# The child process.


def inspect(kv_caches: Any, vllm_config: Any, kv_cache_config: Any, index: int) -> dict[str, Any]:
    """Describe and test one group, with the claimed order and with wrong ones."""
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.errors import LayoutMismatch

    pages = subject.describe(kv_caches, vllm_config, kv_cache_config, index)
    layers = subject.attention_layers(pages, vllm_config)
    tensors = subject.page_tensors(pages, kv_caches)
    tensors[0][1] = 7
    before = [tensor.clone() for tensor in tensors]

    def outcome(of: Any) -> str | None:
        try:
            subject.self_test(of, kv_caches, layers)
        except LayoutMismatch as error:
            return str(error)
        return None

    accepted = outcome(pages)
    _, claimed, block, dtype = pages.order.name.split("/")
    wrong: dict[str, Any] = {}
    for other in ("cpu-vec", "cpu-amx", "strided-HNC", "strided-NHC", "strided-SHND"):
        if other != claimed and (other != "strided-NHC" or pages.group.num_kv_heads > 1):
            name = f"vllm/{other}/{block}/{dtype}"
            wrong[name] = dataclasses.replace(pages, order=native_order(name))
    value_first = (pages.order.axes[1], pages.order.axes[0])
    wrong["value first"] = dataclasses.replace(
        pages, order=dataclasses.replace(pages.order, axes=value_first)
    )
    bases = pages.bases.copy()
    bases[0], bases[-1] = bases[-1], bases[0]
    wrong["layers swapped"] = dataclasses.replace(pages, bases=bases)
    wrong["last layer off"] = dataclasses.replace(
        pages, bases=pages.bases + np.eye(len(pages.bases), dtype=np.int64)[-1] * -64
    )
    refused = {name: outcome(of) for name, of in wrong.items()}
    restored = all(bool((a == b).all()) for a, b in zip(before, tensors, strict=True))
    tensors[0][1] = 0
    return {
        "order": pages.order.name,
        "group": dataclasses.asdict(pages.group),
        "page_bytes": pages.page_bytes,
        "layer_names": pages.layer_names,
        "spans": pages.spans([4, 5, 7, 2, 3]),
        "self_test": accepted,
        "refused": refused,
        "restored": restored,
    }


def child(asked: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        SupportsHMA,
    )

    seen: dict[str, Any] = {}

    class Recorder(KVConnectorBase_V1, SupportsHMA):
        """Does at registration what the real connector does, and caches nothing."""

        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
            super().__init__(vllm_config, role, kv_cache_config)
            self.configs = (vllm_config, kv_cache_config)

        def register_kv_caches(self, kv_caches: Any) -> None:
            groups = range(len(self.configs[1].kv_cache_groups))
            seen["groups"] = [inspect(kv_caches, *self.configs, index) for index in groups]
            seen["caches"] = (kv_caches, *self.configs)

        def update_state_after_alloc(self, request: Any, blocks: Any, count: int) -> None:
            seen["blocks"] = blocks.get_block_ids()[0]

        def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
            return 0, False

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            return KVConnectorMetadata()

        def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
            return False, None

        def start_load_kv(self, *args: Any, **kwargs: Any) -> None: ...
        def wait_for_layer_load(self, *args: Any, **kwargs: Any) -> None: ...
        def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...
        def wait_for_save(self) -> None: ...

    module = types.ModuleType("kvstrata_recorder")
    module.Recorder = Recorder  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    llm = LLM(
        model=asked["model"],
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        disable_hybrid_kv_cache_manager=False,
        kv_transfer_config={
            "kv_connector": "Recorder",
            "kv_connector_module_path": module.__name__,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
        },
        **asked["engine"],
    )
    llm.generate(
        TokensPrompt(prompt_token_ids=asked["prompt"]),
        SamplingParams(max_tokens=1, temperature=0),
        use_tqdm=False,
    )
    from kvstrata.connectors.vllm import pages as subject

    kv_caches, vllm_config, kv_cache_config = seen["caches"]
    pages = subject.describe(kv_caches, vllm_config, kv_cache_config)
    native = [t[seen["blocks"]].numpy() for t in subject.page_tensors(pages, kv_caches)]
    shape = pages.native_shape(len(seen["blocks"]) * pages.block_tokens)
    np.save(Path(asked["out"]) / "native.npy", np.stack(native).reshape(shape))
    report = {"groups": seen["groups"], "blocks": list(seen["blocks"])}
    (Path(asked["out"]) / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
