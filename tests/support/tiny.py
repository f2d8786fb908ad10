"""Small random models on disk, as `transformers` writes them, with a small tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

TOKENIZER_SIZE = 320
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox thinks about the "
    "other things that a fox thinks about: the sun, the sky, and the hen in the garden. "
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "sdar": Qwen3Config,
}


def tiny_model(
    folder: Path,
    family: str = "llama",
    vocab_size: int = TOKENIZER_SIZE,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random model of ``family`` into ``folder`` and return ``folder``.

    A vocabulary of at least `TOKENIZER_SIZE` gets `tiny_tokenizer` too. ``overrides`` are fields
    of the `transformers` config.
    """
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
    }
    if family == "mistral":
        fields["sliding_window"] = None
    config = CONFIGS[family](**(fields | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            # Biases start at 0 and norms at 1, where mistakes in them would not show.
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family == "sdar":
        _edit(folder / "config.json", model_type="sdar", architectures=["SDARForCausalLM"])
    if vocab_size >= TOKENIZER_SIZE:
        tiny_tokenizer(folder)
    return folder


def tiny_tokenizer(folder: Path, without: bytes = b"") -> Path:
    """Write a byte-level BPE tokenizer of `TOKENIZER_SIZE` tokens with a chat template.

    No token has a byte of ``without``, which must be control characters or first bytes of rare
    characters: the trained vocabularies of some models lack them too.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(set(pre_tokenizers.ByteLevel.alphabet()) - _byte_letters(without)),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == TOKENIZER_SIZE
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_letters(raw: bytes) -> set[str]:
    """The letters that stand for these bytes in a byte-level vocabulary: 0 to 32 come as U+0100
    and up, 0xAE to 0xFF as themselves."""
    return {chr(256 + byte if byte <= 32 else byte) for byte in raw}


def tiny_sentencepiece_tokenizer(folder: Path, decoder: decoders.Decoder | None = None) -> Path:
    """Write a tokenizer in the manner of Llama 2: spaces are ``▁``, other characters bytes.

    ``decoder`` is by default that of Llama 2.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoder or decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fields = json.loads(tokenizer.to_str())
    # The trainer knows byte tokens only as special ones.
    fields["added_tokens"] = fields["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
