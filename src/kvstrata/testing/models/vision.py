"""A small model that looks at images, and needs Pillow but no torchvision."""

from __future__ import annotations

from pathlib import Path

from kvstrata.testing.models.building import built, require
from kvstrata.testing.models.packaged import smollm2

IMAGE_TOKEN = "<image>"
"""Stands in a prompt for an image, and becomes `IMAGE_TOKENS` placeholders."""
IMAGE_SIDE = 56
PATCH = 14
MARKS = ("<fake_token_around_image>", "<global-img>", IMAGE_TOKEN, "<end_of_utterance>")
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2 + 3


def tiny_idefics3(folder: Path | None = None) -> Path:
    """An Idefics 3 of random bfloat16 weights: a tower of 2 layers before a Llama of 2.

    An image of 56 by 56 pixels becomes 16 tokens between three others, anywhere in a prompt. 4
    heads, 2 KV heads, head_dim 64; SmolLM2's tokenizer with four tokens more. The weights are wide,
    so that answers depend on the image.

    Args:
        folder: where to put it; in the cache if None.
    Returns:
        The folder (about 50 MB), complete.
    Raises:
        UsageError: SmolLM2 (for its tokenizer) or transformers is missing.
    """

    def fill(empty: Path) -> None:
        transformers, torch = require("transformers"), require("torch")
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
        tokenizer.add_tokens(list(MARKS), special_tokens=True)
        text = {
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "initializer_range": 0.12,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.eos_token_id,
        }
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIDE,
            "patch_size": PATCH,
            "initializer_range": 0.12,
        }
        config = transformers.Idefics3Config(
            text_config=text,
            vision_config=vision,
            scale_factor=1,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            pad_token_id=tokenizer.eos_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.Idefics3ForConditionalGeneration(config)
            for name, weight in model.named_parameters():
                if "modality_projection" in name:
                    torch.nn.init.normal_(weight, std=0.3)  # an image is to weigh as words do
        model.to(torch.bfloat16).save_pretrained(empty)
        edge = {"longest_edge": IMAGE_SIDE}
        transformers.Idefics3Processor(
            image_processor=transformers.Idefics3ImageProcessorPil(
                size=edge, max_image_size=edge, do_image_splitting=False
            ),
            tokenizer=tokenizer,
            image_seq_len=IMAGE_TOKENS - 3,
        ).save_pretrained(empty)

    return built("tiny-idefics3", folder, fill)
