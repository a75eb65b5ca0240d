"""Native orders are bijections with the golden bytes that real engines wrote."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.errors import Incompatible, LayoutMismatch, UsageError
from kvstrata.layout import ITEM_BYTES, KVLayout, LayerGroup, NativeOrder, native_order

WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32}

STRIDED = ["HNC", "NHC", "SHND", "SNHD", "CHN", "HSND", "NSHD", "DSHN"]


def make_group(
    layers: int = 2, heads: int = 3, dim: int = 32, states: int = 2, dtype: str = "bfloat16"
) -> LayerGroup:
    return LayerGroup(0, "full", layers, heads, dim, states, dtype)


def numbered(order: NativeOrder, group: LayerGroup, blocks: int) -> np.ndarray:
    """A portable payload whose elements are all different (two and four byte elements)."""
    shape = group.portable_shape(blocks * order.block_tokens)
    return np.arange(np.prod(shape)).reshape(shape).astype(WORD[group.item_bytes])


def native_elements(order: NativeOrder, group: LayerGroup, blocks: int = 1) -> np.ndarray:
    portable = numbered(order, group, blocks)
    return order.pack_layers(portable, group).view(WORD[group.item_bytes])


def test_cpu_vec_golden() -> None:
    # One head, two dims, four tokens: the key lies transposed, the value token by token.
    order = native_order("vllm/cpu-vec/b4/bfloat16")
    group = make_group(layers=1, heads=1, dim=2)
    portable = np.arange(16, dtype=np.uint16).reshape(1, 2, 1, 4, 2)
    page = order.pack_layers(portable, group).view(np.uint16).reshape(-1)
    assert page.tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15]


def test_cpu_amx_golden() -> None:
    # 32 tokens and 16 dims. Key: 16 tokens x pairs of dims; value: pairs of tokens x 16 dims.
    order = native_order("vllm/cpu-amx/b32/bfloat16")
    group = make_group(layers=1, heads=1, dim=16)
    page = native_elements(order, group).reshape(2, 32 * 16)
    key = [token * 16 + dim for token in range(4) for dim in (0, 1)]
    assert page[0, :8].tolist() == key
    assert page[0, 32:36].tolist() == [2, 3, 18, 19]  # the next pair of dims of tokens 0 and 1
    assert page[0, 256:258].tolist() == [256, 257]  # token 16 opens the second half
    value = [512 + token * 16 + dim for dim in range(4) for token in (0, 1)]
    assert page[1, :8].tolist() == value
    assert page[1, 32:36].tolist() == [512 + 32, 512 + 48, 512 + 33, 512 + 49]


def amx_by_formula(group: LayerGroup, tokens: int) -> np.ndarray:
    """The AMX order one element at a time, from its address formula alone."""
    heads, dim = group.num_kv_heads, group.head_dim
    page = np.zeros(2 * heads * tokens * dim, np.uint32)
    for head in range(heads):
        for token in range(tokens):
            for d in range(dim):
                base = head * 2 * tokens * dim
                key = (token // 16) * 16 * dim + (d // 2) * 32 + (token % 16) * 2 + d % 2
                value = (d // 16) * 16 * tokens + (token // 2) * 32 + (d % 16) * 2 + token % 2
                page[base + key] = (head * tokens + token) * dim + d
                page[base + tokens * dim + value] = ((heads + head) * tokens + token) * dim + d
    return page


def test_cpu_amx_follows_its_address_formula() -> None:
    group = make_group(layers=1, heads=2, dim=48, dtype="float32")
    order = native_order("vllm/cpu-amx/b64/float32")
    assert np.array_equal(native_elements(order, group).reshape(-1), amx_by_formula(group, 64))


@pytest.mark.parametrize("which", ["cpu-vec", "cpu-amx", *(f"strided-{s}" for s in STRIDED)])
@pytest.mark.parametrize("heads", [2, 3])
def test_a_head_is_a_run_of_bytes_exactly_where_the_order_says_so(which: str, heads: int) -> None:
    order = native_order(f"vllm/{which}/b16/float32")
    group, single = make_group(heads=heads, dtype="float32"), make_group(heads=1, dtype="float32")
    portable = numbered(order, group, 2)
    native = order.pack_layers(portable, group)
    each = native.shape[2] // heads
    runs = [native[..., i * each : (i + 1) * each] for i in range(heads)]
    alone = [order.pack_layers(portable[:, :, i : i + 1].copy(), single) for i in range(heads)]
    assert all(map(np.array_equal, runs, alone)) is order.by_head


@pytest.mark.parametrize(
    ("letters", "axes"),
    [
        ("HNC", ("h", "n", "s", "d")),
        ("NHC", ("n", "h", "s", "d")),
        ("SHND", ("s", "h", "n", "d")),
        ("SNHD", ("s", "n", "h", "d")),
    ],
)
def test_strided_is_a_plain_transpose(letters: str, axes: tuple[str, ...]) -> None:
    group = make_group(layers=1, dtype="float32")
    order = native_order(f"vllm/strided-{letters}/b16/float32")
    portable = numbered(order, group, 1)
    expected = portable[0].transpose(["shnd".index(axis) for axis in axes])
    assert np.array_equal(
        order.pack_layers(portable, group).view(np.uint32)[0, 0], expected.reshape(-1)
    )


@given(
    which=st.sampled_from(["cpu-vec", "cpu-amx", *(f"strided-{s}" for s in STRIDED)]),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    layers=st.integers(1, 3),
    heads=st.integers(1, 4),
    dim=st.sampled_from([16, 32, 80]),
    block=st.sampled_from([16, 32, 48]),
    blocks=st.integers(0, 3),
)
def test_pack_and_unpack_undo_each_other(
    which: str, dtype: str, layers: int, heads: int, dim: int, block: int, blocks: int
) -> None:
    group = make_group(layers, heads, dim, dtype=dtype)
    order = native_order(f"vllm/{which}/b{block}/{dtype}")
    random = np.random.default_rng(0)
    shape = (layers, blocks, order.page_bytes(group))
    native = random.integers(0, 256, shape).astype(np.uint8)
    portable = order.unpack_layers(native, group)
    assert portable.shape == group.portable_shape(blocks * block)
    assert np.array_equal(order.pack_layers(portable, group), native)
    # Pure permutation: the same elements, none lost, none made.
    word = WORD[group.item_bytes]
    assert np.array_equal(np.sort(portable.reshape(-1)), np.sort(native.view(word).reshape(-1)))


@pytest.mark.parametrize("which", ["cpu-vec", "cpu-amx", "strided-NHC"])
def test_one_layer_is_a_slice_of_all(which: str) -> None:
    group = make_group(layers=3)
    order = native_order(f"vllm/{which}/b32/bfloat16")
    native = order.pack_layers(numbered(order, group, 2), group)
    for layer in range(3):
        portable = order.unpack(native[layer], group)
        assert np.array_equal(portable, order.unpack_layers(native, group)[layer])
        assert np.array_equal(order.pack(portable, group), native[layer])


def test_conversion_into_given_memory() -> None:
    group = make_group()
    order = native_order("vllm/cpu-amx/b32/bfloat16")
    portable = numbered(order, group, 2)
    native = np.zeros((2, 2, order.page_bytes(group)), np.uint8)
    assert order.pack_layers(portable, group, out=native) is native
    back = np.zeros_like(portable)
    order.unpack_layers(native, group, out=back)
    assert np.array_equal(back, portable)


@given(
    which=st.sampled_from(["cpu-vec", "cpu-amx", *[f"strided-{letters}" for letters in STRIDED]]),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    num_tokens=st.integers(0, 96),
)
def test_what_is_behind_the_last_token_goes(which: str, dtype: str, num_tokens: int) -> None:
    group = make_group(dtype=dtype)
    order = native_order(f"vllm/{which}/b32/{dtype}")
    random = np.random.default_rng(0)
    native = random.integers(1, 256, (2, 3, order.page_bytes(group))).astype(np.uint8)
    portable = order.unpack_layers(native, group)
    order.blank_behind(native, num_tokens, group)
    blanked = order.unpack_layers(native, group)
    assert np.array_equal(blanked[:, :, :, :num_tokens], portable[:, :, :, :num_tokens])
    assert not blanked[:, :, :, num_tokens:].any()


def test_tokens_stay_in_their_blocks_and_in_order() -> None:
    group = make_group(layers=1, heads=2)
    order = native_order("vllm/cpu-amx/b32/bfloat16")
    portable = numbered(order, group, 2)
    native = order.pack_layers(portable, group)
    second = order.unpack(native[0, 1:], group)
    assert np.array_equal(second, portable[0, :, :, 32:])


def test_equal_bytes_have_one_strided_name() -> None:
    with pytest.raises(Incompatible, match="strided-HNSD"):
        native_order("vllm/strided-HNSD/b16/bfloat16")


def test_sglangs_pages_have_the_heads_of_a_token_side_by_side() -> None:
    group = make_group()
    order = native_order("sglang/strided-SNHD/b32/bfloat16")
    shape = group.portable_shape(32)
    portable = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    native = order.pack_layers(portable, group)
    assert native.tobytes() == portable.transpose(0, 1, 3, 2, 4).tobytes()
    assert np.array_equal(order.unpack_layers(native, group), portable)


def test_latent() -> None:
    group = make_group(heads=1, dim=576, states=1)
    order = native_order("vllm/strided-NHC/b16/bfloat16")
    portable = np.arange(2 * 32 * 576).reshape(2, 1, 1, 32, 576).astype(np.uint16)
    # A latent is one row a token in either form, so the bytes are the same.
    assert order.pack_layers(portable, group).tobytes() == portable.tobytes()
    with pytest.raises(LayoutMismatch, match="latent"):
        native_order("vllm/cpu-vec/b16/bfloat16").page_bytes(group)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "vllm/cpu-neon/b128/bfloat16",
        "vllm/cpu-vec/b0/bfloat16",
        "vllm/cpu-vec/b128/int4",
        "vllm/cpu-vec/b128",
        "vllm/cpu-vec/b128/bfloat16/more",
        "vllm/cpu-vec/b128/bfloat16\n",
        "other/cpu-vec/b128/bfloat16",
        "vllm/strided-HN/b16/bfloat16",
    ],
)
def test_unknown_order_is_refused_by_name(name: str) -> None:
    with pytest.raises(Incompatible) as caught:
        native_order(name)
    assert repr(name) in str(caught.value)


def test_order_that_does_not_fit_the_layers() -> None:
    amx = native_order("vllm/cpu-amx/b24/bfloat16")
    with pytest.raises(LayoutMismatch, match="24 is not a multiple of 16"):
        amx.page_bytes(make_group())
    with pytest.raises(LayoutMismatch, match="the layers hold float16"):
        native_order("vllm/cpu-vec/b32/bfloat16").page_bytes(make_group(dtype="float16"))
    recurrent = LayerGroup(0, "recurrent", 1, 1, 64, 2, "bfloat16")
    with pytest.raises(LayoutMismatch, match="recurrent"):
        native_order("vllm/cpu-vec/b32/bfloat16").page_bytes(recurrent)


def test_wrong_sizes_are_refused() -> None:
    group = make_group()
    order = native_order("vllm/cpu-vec/b32/bfloat16")
    page = order.page_bytes(group)
    with pytest.raises(LayoutMismatch, match="native payload"):
        order.unpack_layers(np.zeros((2, 1, page - 2), np.uint8), group)
    with pytest.raises(LayoutMismatch, match="native payload"):
        order.unpack_layers(np.zeros((2, 1, page), np.uint16), group)
    with pytest.raises(LayoutMismatch, match="multiple of 32"):
        order.pack_layers(np.zeros(group.portable_shape(33), np.uint16), group)
    with pytest.raises(LayoutMismatch, match="portable payload"):
        order.pack_layers(np.zeros(group.portable_shape(32), np.uint8), group)
    with pytest.raises(LayoutMismatch, match="portable payload"):
        order.pack_layers(np.zeros((2, 2, 4, 32, 32), np.uint16), group)
    with pytest.raises(LayoutMismatch, match="cannot pack into"):
        order.pack_layers(
            np.zeros(group.portable_shape(32), np.uint16), group, np.zeros((2, page), np.uint8)
        )


def test_shapes_and_sizes() -> None:
    full = LayerGroup(0, "full", 30, 3, 64, 2, "bfloat16")
    state = LayerGroup(1, "recurrent", 4, 8, 128, 1, "float32")
    layout = KVLayout((full, state), chunk_tokens=128)
    assert layout.portable_shape(0) == (30, 2, 3, 128, 64)
    assert layout.payload_bytes(0) == 30 * 2 * 3 * 128 * 64 * 2
    assert layout.portable_shape(1) == (4, 1, 8, 1, 128)
    assert layout.payload_bytes(1) == 4 * 8 * 128 * 4
    order = native_order("vllm/cpu-vec/b128/bfloat16")
    assert order.page_bytes(full) * full.num_layers == layout.payload_bytes(0)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"dtype": "int4"},
        {"states": 3},
        {"head_dim": 0},
        {"index": -1},
        {"window": 512},
        {"kind": "sliding"},
        {"kind": "chunked"},
    ],
)
def test_impossible_groups_are_refused(change: dict[str, object]) -> None:
    good: dict[str, object] = {
        "index": 0,
        "kind": "full",
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "states": 2,
        "dtype": "bfloat16",
    }
    LayerGroup(**good)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        LayerGroup(**{**good, **change})  # type: ignore[arg-type]


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(UsageError, match="chunk_tokens"):
        KVLayout((make_group(),), 0)
    with pytest.raises(UsageError, match="numbered"):
        KVLayout((make_group(), make_group()), 128)
