"""A model as it was when it was looked at: what it keeps, and who it is."""

from __future__ import annotations

import logging
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from kvstrata.config import Config
from kvstrata.connectors.identity import found
from kvstrata.connectors.orders import foreign_orders
from kvstrata.connectors.transformers.causality import prove_causal
from kvstrata.connectors.transformers.fingerprint import details, own_namespace
from kvstrata.connectors.transformers.kinds import Kinds, kinds_of
from kvstrata.connectors.transformers.proof import prove
from kvstrata.connectors.transformers.sharing import engines_namespace
from kvstrata.connectors.transformers.witness import Witness, hooked, witness
from kvstrata.errors import Incompatible
from kvstrata.parts import PORTABLE
from kvstrata.wire.namespaces import Described

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """A model that may be cached.

    Args:
        seen: by which it is known that it has not been changed since.
        kinds: of its layers.
        orders: the byte orders that are read into its cache.
        named: its namespace, found out in the background.
    """

    seen: Witness
    kinds: Kinds
    orders: tuple[str, ...]
    named: Future[Described]

    def wait(self, timeout_s: float) -> None:
        """Wait until it is known who it is, well or not."""
        try:
            self.named.exception(timeout_s)
        except FutureTimeout:
            logger.warning("KVStrata: still hashing the weights; nothing is cached until then")

    def described(self) -> Described | None:
        """Its namespace; None while its weights are being hashed.

        Raises:
            ConfigError: it cannot be identified, so nothing may be cached.
        """
        if not self.named.done():
            return None
        kinds = self.kinds
        return replace(
            found(self.named, "model"),
            orders=list(self.orders),
            objects=[kind.part for kind in kinds.each],
            needs=kinds.needs,
            lengths=[kind.nbytes for kind in kinds.each],
        )


def look_at(
    model: Any, config: Config, hashing: Executor, context_tokens: int | None = None
) -> Subject:
    """Look at a model, and begin to find out who it is.

    Runs a few tokens through it. Nothing else may use it meanwhile.

    Args:
        config: KVStrata's.
        hashing: where its weights are read.
        context_tokens: as of `engines_namespace`.
    Raises:
        Incompatible: it is left uncached, in words.
    """
    if why := refused(model):
        raise Incompatible(why)
    seen = witness(model)
    kinds = kinds_of(model, config.chunk_tokens)
    prove(model, kinds)
    prove_causal(model)
    named = hashing.submit(_identify, model, kinds, config, context_tokens)
    foreign: tuple[str, ...] = ()
    if "engines" in config.share:
        dtype = kinds.each[0].group.dtype
        foreign = foreign_orders(kinds.chunk_tokens, dtype, kinds.device.type)
    return Subject(seen, kinds, (PORTABLE, *foreign), named)


def _identify(model: Any, kinds: Kinds, config: Config, context_tokens: int | None) -> Described:
    """The namespace of a model: that of engines where it may share with them, or its own."""
    if "engines" in config.share:
        try:
            named = engines_namespace(model, kinds, config.tenant, context_tokens)
            return Described(named[0], details(model, *named))
        except Incompatible as error:
            logger.warning("KVStrata shares no KV with other engines: %s", error)
    named = own_namespace(model, kinds, config.tenant)
    return Described(named[0], details(model, *named))


def refused(model: Any) -> str:
    """Why a model is not to be cached, whatever its layers are; "": it may be."""
    from transformers import GenerationMixin, PreTrainedModel

    name = type(model).__name__
    if not (isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)):
        return (
            f"a {name} is no model of transformers' own that generates; of one that is wrapped "
            "(PEFT, torch.compile) attach the model inside, with its adapter merged"
        )
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return f"{name} does not generate from a prompt of tokens alone"
    if not type(model)._supports_default_dynamic_cache():
        return f"{name} has a cache of its own"
    if model.training:
        return "it is in training mode: call its eval() first"
    adapted = any(type(one).__module__.startswith("peft.") for one in model.modules())
    if adapted or getattr(model, "_hf_peft_config_loaded", False):
        return "it has adapters, which may be switched between two calls: merge them first"
    if getattr(model, "_tp_size", None) not in (None, 1):
        return "it is spread over ranks"
    if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
        return "it is spread over devices"
    if any(one.device.type == "meta" for one in model.parameters()):
        return "some of its weights are not in memory"
    if where := hooked(model):
        return f"hooks on a {where} may change what it computes"
    return ""
