"""``kvstrata calibrate``: learn a model's keys and values once, for the codec ``kvtc``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvstrata.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvstrata.codecs.kvtc_fit import Fit

CONTEXT_TOKENS = 1536
CONTINUATION_TOKENS = 512
NUM_SINKS = 4
SAMPLES = 2


def run(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The model's folder, its name on the hub, or smollm2 or gemma3.",
        ),
    ],
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", min=2048, help="Tokens to learn from.")
    ] = 8192,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="Text to learn from; UTF-8."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Where the calibration goes."),
    ] = None,
) -> None:
    """Learn a model's keys and values once, so that the codec kvtc can make them small.

    It runs the model on text and writes a calibration of a few megabytes to where nodes of this
    user look for it (--output: elsewhere). Text like that of your users is best; without --text
    it is Python's own documentation.
    """
    from kvstrata.cli.models import model_folder
    from kvstrata.codecs.calibration import default_path, register
    from kvstrata.testing.models import MODELS
    from kvstrata.units import approximate_size

    folder = str(model_folder(model)[0]) if model in MODELS else model
    calibration = learn(folder, tokens, _text(text)).finish()
    register(calibration)
    path = output or default_path(calibration)
    calibration.save(path)
    header, size = calibration.header, approximate_size(path.stat().st_size)
    names = ", ".join(f"kvtc-{level / 2:g}" for level in header.levels)
    typer.echo(f"wrote {path}, {size}, fingerprint {calibration.fingerprint.hex()}")
    typer.echo(
        f"of {header.model}: {header.layers} layers, {header.heads} KV heads of {header.dim}, "
        f"from {header.tokens} tokens; codecs {names}"
    )


def learn(folder: str, num_tokens: int, text: str) -> Fit:
    """Run the model over documents cut from the text.

    Each is a context, whose keys and values are learnt, and a continuation: the gradients of its
    sampled tokens say what an error in the context would do.

    Raises:
        UsageError: a library is missing, the model is of a kind that is not supported, or the
            text is too short.
    """
    from kvstrata.codecs.kvtc_fit import Fit

    transformers, torch = _library("transformers"), _library("torch")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        # float32: gradients of a bfloat16 model are mostly rounding.
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the model {folder}: {error}") from error
    model.eval().requires_grad_(False)
    frequencies = rotary_frequencies(model.config)
    name = Path(folder).resolve().name if Path(folder).exists() else folder
    documents = _documents(tokenizer.encode(text), num_tokens)
    fit: Fit | None = None
    for number, ids in enumerate(documents):
        torch.manual_seed(number)
        kv, gradients = _document(torch, transformers, model, ids)
        if kv.shape[0] != len(frequencies) or kv.shape[-1] != 2 * frequencies.shape[1]:
            raise UsageError(f"kvtc does not know this model's keys and values: {list(kv.shape)}")
        _check_rotation(kv[0, 0], ids[: kv.shape[3]], frequencies[0])
        fit = fit or Fit(name, frequencies, kv.shape[2])
        rest = [sample[:, :, :, NUM_SINKS:] for sample in gradients]
        fit.add(kv[:, :, :, NUM_SINKS:], rest, NUM_SINKS)
        typer.echo(f"document {number + 1} of {len(documents)}", err=True)
    assert fit is not None
    return fit


def rotary_frequencies(config: Any) -> npt.NDArray[np.float64]:
    """Radians a token of each layer's channel pairs, (L, D/2).

    Raises:
        UsageError: the model's positions are of a kind that `kvtc` cannot undo.
    """
    import numpy as np

    config = config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise UsageError("kvtc needs rotary positions; this model's configuration names none")
    kinds = getattr(config, "layer_types", None)
    if kinds and set(kinds) <= set(parameters):
        by_layer = [parameters[kind] for kind in kinds]
    else:
        by_layer = [parameters] * config.num_hidden_layers
    return np.stack([_frequencies(one, dim) for one in by_layer])


def _frequencies(rope: dict[str, Any], dim: int) -> npt.NDArray[np.float64]:
    import numpy as np

    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError("kvtc does not know keys that turn in part of their channels")
    found: npt.NDArray[np.float64] = 1.0 / rope["rope_theta"] ** (
        np.arange(0, dim, 2, dtype=np.float64) / dim
    )
    if kind == "default":
        return found
    if kind == "linear":
        found /= rope["factor"]
        return found
    if kind == "llama3":
        # Long wavelengths are stretched, short ones kept, those between blended.
        original, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * found / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        found *= kept + (1 - kept) / factor
        return found
    raise UsageError(f"kvtc does not know rotary positions of the type {kind!r}")


def _check_rotation(keys: Any, ids: list[int], frequencies: npt.NDArray[np.float64]) -> None:
    """A first layer's key follows from its token alone, once it is turned back to position 0.

    Raises:
        UsageError: it does not: these positions are not those that the configuration seems to say.
    """
    import numpy as np

    from kvstrata.codecs import rope

    heads, count, dim = keys.shape
    angles = rope.angles(frequencies.tobytes(), 0, count)
    turned = np.empty((count, heads, dim), np.float32)
    rope.unrotate(keys, angles.cos, angles.sin, turned)
    first: dict[int, int] = {}
    same = [(first[token], at) for at, token in enumerate(ids) if first.setdefault(token, at) != at]
    if not same:
        return
    one, other = np.array(same).T
    error = float(((turned[one] - turned[other]) ** 2).mean())
    if error > 1e-4 * float((turned**2).mean()):
        raise UsageError("kvtc does not know how the keys of this model turn with their position")


def _document(
    torch: Any, transformers: Any, model: Any, ids: list[int]
) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[np.float32]]]:
    """KV of the context, (L, 2, H, T, D), and gradients of the same shape, by sample."""
    count = len(ids) * CONTEXT_TOKENS // (CONTEXT_TOKENS + CONTINUATION_TOKENS)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(torch.tensor([ids[:count]]), past_key_values=cache, logits_to_keep=1)
    # Gradients to each layer's own tensors: to slices of one tensor they would cost far more.
    context = [(layer.keys.detach(), layer.values.detach()) for layer in cache.layers]
    if len({tensor.shape for pair in context for tensor in pair}) > 1:
        raise UsageError("kvtc does not know a model whose layers have keys of several shapes")
    leaves = [tensor.requires_grad_(True) for pair in context for tensor in pair]
    cache = transformers.DynamicCache()
    for layer, (keys, values) in enumerate(context):
        cache.update(keys, values, layer)
    logits = model(torch.tensor([ids[count:]]), past_key_values=cache).logits[0].log_softmax(-1)
    gradients = []
    for _ in range(SAMPLES):
        sampled = torch.distributions.Categorical(logits=logits.detach()).sample()
        total = logits.gather(1, sampled[:, None]).sum()
        gradients.append(_stacked(torch, torch.autograd.grad(total, leaves, retain_graph=True)))
    return _stacked(torch, [leaf.detach() for leaf in leaves]), gradients


def _stacked(torch: Any, tensors: Sequence[Any]) -> npt.NDArray[np.float32]:
    """Keys and values by turns, (1, H, T, D) each, as one (L, 2, H, T, D)."""
    found: npt.NDArray[np.float32] = torch.cat(list(tensors)).numpy()
    return found.reshape(-1, 2, *found.shape[1:])


def _documents(ids: list[int], num_tokens: int) -> list[list[int]]:
    """Evenly spread over the text, as many as the tokens make."""
    length = CONTEXT_TOKENS + CONTINUATION_TOKENS
    count = -(-num_tokens // length)
    if len(ids) < count * length:
        raise UsageError(f"the text has {len(ids)} tokens; {count * length} are needed")
    stride = len(ids) // count
    return [ids[i * stride : i * stride + length] for i in range(count)]


def _text(path: Path | None) -> str:
    if path is None:
        from kvstrata.quality.corpus import english_text

        # What follows the first half is left for those who measure.
        whole = english_text()
        return whole[: len(whole) // 2]
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {path}: {error}") from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"calibrating needs the package {name}: pip install 'kvstrata[quality]'"
        ) from error
