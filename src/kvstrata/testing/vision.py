"""A small model that looks at images, as a local folder that any engine can load.

It needs Pillow and no torchvision. Its weights are random and wide, so that answers depend on the
image.
"""

from __future__ import annotations

from pathlib import Path

from kvstrata.testing.models import _built, _require, smollm2

IMAGE_TOKEN = "<image>"
"""Stands in a prompt for an image, and becomes `IMAGE_TOKENS` placeholders."""
IMAGE_SIDE = 56
PATCH = 14
IMAGE_TOKENS = (IMAGE_SIDE // PATCH) ** 2


def tiny_llava(folder: Path | None = None) -> Path:
    """A LLaVA of random bfloat16 weights: a CLIP tower of 2 layers before a Llama of 2.

    Every image becomes 16 tokens, whatever its size. 4 heads, 2 KV heads, head_dim 64; SmolLM2's
    tokenizer with one token more.

    Args:
        folder: where to put it; in the cache if None.
    Returns:
        The folder (about 50 MB), complete.
    Raises:
        UsageError: SmolLM2 (for its tokenizer) or transformers is missing.
    """

    def fill(empty: Path) -> None:
        transformers, torch = _require("transformers"), _require("torch")
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2())
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
        text = transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            initializer_range=0.12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        vision = transformers.CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIDE,
            patch_size=PATCH,
        )
        config = transformers.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=IMAGE_TOKENS,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.LlavaForConditionalGeneration(config)
            for name, weight in model.named_parameters():
                if "projector" in name and "weight" in name:
                    torch.nn.init.normal_(weight, std=0.3)  # so that an image weighs as words do
        model.to(torch.bfloat16).save_pretrained(empty)
        square = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
        transformers.LlavaProcessor(
            image_processor=transformers.CLIPImageProcessorPil(size=square, crop_size=square),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=IMAGE_TOKEN,
        ).save_pretrained(empty)

    return _built("tiny-llava", folder, fill)
