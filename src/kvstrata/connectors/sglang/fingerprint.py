"""Which namespace this engine's KV belongs to: everything that decides what the bytes mean.

SGLang's page hashes cover tokens, salt and the id of an adapter, and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from blake3 import blake3

from kvstrata.connectors.identity import cache_file, found, from_anywhere, succeeded
from kvstrata.connectors.sglang.renewals import OF_THIS_PROCESS
from kvstrata.errors import ConfigError, Incompatible
from kvstrata.identity import (
    adapter_identity,
    changed_since,
    model_fingerprint,
    weights_identity,
)
from kvstrata.keys import Namespace
from kvstrata.wire.namespaces import MAX_DETAIL_CHARS, Described

logger = logging.getLogger(__name__)

_SHAPING = (
    "model_impl", "model_loader_extra_config", "modelopt_quant", "quantize_and_serve",
    "rl_on_policy_target", "dllm_algorithm", "mm_process_config",
    "enable_precise_embedding_interpolation", "enable_w4a4_mxfp4_megamoe",
    "flashinfer_mxfp4_moe_precision", "enable_quant_communications",
    "enable_int8_mamba_checkpoint", "enable_mamba_cache_stochastic_rounding",
    "enable_encoder_swa_bounded_replay", "enable_decoder_swa_bounded_replay",
    "prefill_kv_cache_dequant_dtype",
)  # fmt: skip
"""Arguments of SGLang that shape what it computes, beside those that have names of their own."""
_FORMATS_FROM_ELSEWHERE = ("remote_instance", "rdma", "remote", "private", "flash_rl")
_FROM_ELSEWHERE = ("forward_hooks", "kt_weight_path", "modelopt_checkpoint_restore_path")


class Identity:
    """The engine's namespace, found out in the background.

    Args:
        server_args: SGLang's arguments.
        storage_config: what SGLang gave the storage: ranks and their number.
        tenant: as configured.
    """

    def __init__(self, server_args: Any, storage_config: Any, tenant: str) -> None:
        arguments = resolved(server_args)
        self._name = str(arguments.model_path)
        self._storage_config = storage_config
        self._tenant = tenant
        self.shares = False
        """Whether the namespace is one that other engines have, too."""
        self._hashing = ThreadPoolExecutor(1, "kvstrata-identity")
        self._model: Future[dict[str, Any]] = self._hashing.submit(model_of, server_args)
        self._adapter: Future[str] = self._hashing.submit(adapters_of, arguments)

    def wait(self, timeout_s: float) -> None:
        """Wait until everything is known, well or not."""
        try:
            self._adapter.exception(timeout_s)
        except TimeoutError:
            logger.warning("KVStrata: still hashing the weights; nothing is cached until then")

    def namespace(
        self,
        layout: str,
        page_tokens: int,
        generation: str,
        share: Callable[[dict[str, Any]], Namespace] | None = None,
    ) -> Namespace | None:
        """The namespace; None while the weights are being hashed.

        Args:
            layout: logical layout of the KV of this rank, in one canonical text.
            page_tokens: tokens of a page.
            generation: which of the weights that this engine has had.
            share: makes the namespace that other engines have, too, of `model_of` them, where it is
                to be shared; where it cannot be, `Incompatible`.
        Raises:
            ConfigError: an identity cannot be had, so nothing may be cached.
        """
        if not (self._model.done() and self._adapter.done()):
            return None
        model, adapter = found(self._model, "model"), found(self._adapter, "adapter")
        config = self._storage_config
        namespace = Namespace(
            model=model_fingerprint(model["effective"], model["weights"]),
            layout=layout,
            chunk_tokens=page_tokens,
            tensor_parallel=config.tp_size,
            pipeline_parallel=config.pp_size,
            context_parallel=config.attn_cp_size,
            adapter=adapter,
            tenant=self._tenant,
            pages=True,
        )
        self.shares = False
        if share is not None:
            try:
                namespace, self.shares = share(model), not generation
            except Incompatible as error:
                logger.warning("KVStrata shares no KV with other engines: %s", error)
        return replace(namespace, model=namespace.model + generation)

    def describe(self, namespace: Namespace, generation: str) -> Described | None:
        """A namespace, and what its model's fingerprint is made of; None: not known yet."""
        if not succeeded(self._model):
            return None
        model = self._model.result()
        effective = dict(model["effective"])
        configuration = json.dumps(effective.pop("model"), sort_keys=True).encode()
        told = {
            "name": self._name,
            "weights": model["weights"],
            "configuration": blake3(configuration).hexdigest()[:16],
            **effective,
            "reset": generation or "no",
        }
        return Described(namespace, {k: str(v)[-MAX_DETAIL_CHARS:] for k, v in told.items()})

    @property
    def weights(self) -> str:
        """Identity of the weights on disk; empty: not known yet."""
        return str(self._model.result()["weights"]) if succeeded(self._model) else ""

    def close(self) -> None:
        """Hash no more. Repeatable."""
        self._hashing.shutdown(wait=False, cancel_futures=True)


def resolved(server_args: Any) -> Any:
    """SGLang's arguments with what it has decided since, which it keeps beside them: to be read."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    return resolved_view(server_args)


def model_of(server_args: Any) -> dict[str, Any]:
    """What the model computes with, the identity of its weights, and its commit in a hub.

    Raises:
        ConfigError: the weights cannot be identified, so nothing may be cached.
    """
    from sglang.srt.configs.model_config import ModelConfig

    model = ModelConfig.from_server_args(server_args)
    server_args = resolved(server_args)
    if why := from_elsewhere(server_args):
        raise ConfigError("model", f"{why}: what it computes with is not in its folder alone")
    effective: dict[str, Any] = {
        "engine": "sglang",
        "model": _described(model.hf_config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization),
        # LongRoPE picks its factors by it, so keys of one token differ between two lengths.
        "context_length": int(model.context_len),
        "kv_cache_dtype": str(server_args.kv_cache_dtype),
        "arguments": {name: str(getattr(server_args, name, None)) for name in _SHAPING},
    }
    if scales := getattr(server_args, "quantization_param_path", None):
        with open(scales, "rb") as file:
            effective["kv_scales"] = blake3(file.read()).hexdigest()
    if algorithm := getattr(server_args, "speculative_algorithm", None):
        # Its pages are hashed by pairs of tokens, and a draft model's KV may lie beside.
        effective["speculation"] = str(algorithm)
        if draft := getattr(server_args, "speculative_draft_model_path", None):
            effective["draft"] = _weights(draft, None, server_args.load_format)
    weights = _weights(server_args.model_path, model.hf_config, server_args.load_format)
    commit = getattr(model.hf_config, "_commit_hash", None)
    return {"effective": effective, "weights": weights, "commit": commit}


def from_elsewhere(arguments: Any) -> str:
    """The option by which SGLang's weights, or code, come from where nobody can identify them;
    empty: there is none.

    An engine that seeds another may have had its weights exchanged, and hooks are any code at all.

    Args:
        arguments: SGLang's, resolved.
    """
    if (how := str(arguments.load_format)) in _FORMATS_FROM_ELSEWHERE:
        return f"--load-format {how}"
    if getattr(arguments, "weight_cache_mode", "off") == "client":
        return "--weight-cache-mode client"
    for name in _FROM_ELSEWHERE:
        if getattr(arguments, name, None):
            return f"--{name.replace('_', '-')}"
    return ""


def adapters_of(arguments: Any) -> str:
    """What the adapters hold that the engine starts with; empty where there is none.

    Their ids, which SGLang's page hashes cover, are made of name and path. The id of one that is
    loaded later is random, so what it computes is found by nobody else.

    Raises:
        ConfigError: one of them cannot be identified.
    """
    texts = []
    for one in getattr(arguments, "lora_paths", None) or ():
        name, path = one.lora_name, one.lora_path
        if not os.path.exists(path):
            raise ConfigError(f"adapter {name}", f"{path!r} is no local path; download it first")
        texts.append(f"{name}={adapter_identity(path, cache_file())}")
    return blake3("\n".join(sorted(texts)).encode()).hexdigest() if texts else ""


def _described(hf_config: Any) -> Any:
    """A model's configuration, without what does not shape what it computes."""
    described = hf_config.to_dict()
    described.pop("_name_or_path", None)
    described.pop("transformers_version", None)
    return from_anywhere(json.loads(json.dumps(described, default=str)))


def _weights(path: str, hf_config: Any, load_format: str) -> str:
    if load_format == "dummy":
        # Random weights: nobody else has them, not even this engine after a restart.
        return f"dummy:{os.urandom(16).hex()}"
    if os.path.exists(path):
        identity, engine = weights_identity(path, cache_file()), OF_THIS_PROCESS
        # A storage may be attached to an engine that has run for days. Weights that it was given
        # since have a name of their own.
        if engine.loaded_at and not engine.name and (name := changed_since(path, engine.loaded_at)):
            raise ConfigError(
                "model",
                f"{name} in {path!r} has changed since this engine loaded it, so its weights are "
                "not known any more: start it again",
            )
        return identity
    commit = getattr(hf_config, "_commit_hash", None)
    if not commit:
        raise ConfigError(
            "model",
            f"{path!r} is no local path and its hub revision is unknown; name a --revision",
        )
    return f"hub:{path}@{commit}"
