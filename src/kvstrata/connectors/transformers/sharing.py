"""What a model in Python shares with engines, where ``share`` has ``engines``.

Engines compute with what lies in the checkpoint. So a model shares whose weights and whose
configuration are just that, and both are compared before it does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from kvstrata.connectors.identity import (
    cache_file,
    checkpoint_folder,
    shared_layout,
    shared_namespace,
)
from kvstrata.connectors.transformers.fingerprint import code_of, described
from kvstrata.connectors.transformers.kinds import Kinds
from kvstrata.connectors.transformers.witness import settings
from kvstrata.errors import Incompatible
from kvstrata.identity import weights_identity
from kvstrata.keys import Namespace


def engines_namespace(
    model: Any, kinds: Kinds, tenant: str, context_tokens: int | None
) -> tuple[Namespace, str]:
    """The namespace that a model shares with engines, and the identity of its weights.

    Reads all of the checkpoint.

    Args:
        kinds: of the model's layers.
        tenant: as configured.
        context_tokens: the longest context that engines are told; None: the model's own.
    Raises:
        Incompatible: it shares with none; the message says why.
        ConfigError: the checkpoint cannot be read.
    """
    group = kinds.each[0].group
    if len(kinds.each) > 1 or group.kind != "full":
        raise Incompatible("not all of its layers are full attention of one shape")
    if getattr(model.config, "quantization_config", None) is not None:
        raise Incompatible("its weights are quantized, by each engine in its own way")
    if code_of(model):
        raise Incompatible("its code is its own")
    name, commit = str(model.name_or_path), getattr(model.config, "_commit_hash", None)
    folder = checkpoint_folder(name, commit)
    if _computed_with(model.config) != _computed_with(AutoConfig.from_pretrained(folder)):
        raise Incompatible("its configuration is not the checkpoint's alone")
    _compare(model, Path(folder))
    local = os.path.isdir(name)
    weights = weights_identity(folder, cache_file()) if local else f"hub:{name}@{commit}"
    text = model.config.get_text_config(decoder=True)
    namespace = shared_namespace(
        folder,
        weights,
        str(model.dtype).removeprefix("torch."),
        group.dtype,
        context_tokens or int(text.max_position_embeddings),
        shared_layout(
            group.num_layers, group.states, group.num_kv_heads, group.head_dim, group.dtype
        ),
        kinds.chunk_tokens,
        tenant=tenant,
    )
    return namespace, weights


def _computed_with(config: Any) -> Any:
    """A configuration without the dtype, which the namespace names beside it."""
    plain = described(config)
    return {name: value for name, value in plain.items() if name not in ("dtype", "torch_dtype")}


@torch.no_grad()
def _compare(model: Any, folder: Path) -> None:
    """Refuse a model one of whose tensors is not the checkpoint's."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Incompatible(
            "its checkpoint has no safetensors that its weights could be compared with"
        )
    tensors = model.state_dict(keep_vars=True)
    seen = set()
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no mapping
                mine = tensors.get(name)
                if mine is None:
                    raise Incompatible(f"it has no tensor {name}, which its checkpoint has")
                if not torch.equal(stored.get_tensor(name).to(mine.dtype), mine.cpu()):
                    raise Incompatible(f"its tensor {name} is not the checkpoint's")
                seen.add(id(mine))
    for name, mine in tensors.items():
        if id(mine) not in seen:
            raise Incompatible(f"its tensor {name} is not in its checkpoint")
    _compare_made(model)


def _compare_made(model: Any) -> None:
    """Refuse what no checkpoint has, where it is not what the configuration makes it."""
    with torch.device("meta"):
        fresh = dict(type(model)(model.config).named_modules())
    for where, module in model.named_modules():
        if where not in fresh or _settings(module) != _settings(fresh[where]):
            raise Incompatible(f"its module {where} is not what its configuration makes")
        names = sorted(module._non_persistent_buffers_set)
        made = _made_again(where, module) if names else {}
        for name in names:
            mine, other = getattr(module, name), made.get(name)
            if (
                other is None
                or (mine.dtype, mine.shape) != (other.dtype, other.shape)
                or not torch.allclose(mine.cpu(), other, 1e-5, 0.0)
            ):
                raise Incompatible(f"its tensor {where}.{name} is not what its configuration makes")


def _settings(module: Any) -> dict[str, Any]:
    return {name: value for name, value in settings(module) if not name.startswith("_")}


def _made_again(where: str, module: Any) -> dict[str, torch.Tensor]:
    """The buffers of a new module of that class, by their names."""
    try:
        return dict(type(module)(module.config).named_buffers(recurse=False))
    except Exception as error:
        raise Incompatible(
            f"what {where} makes for itself cannot be made again: {error}"
        ) from error
