"""Tiny random models whose heads can be divided by four, of the families that tensor parallelism is tried on."""

from __future__ import annotations

from pathlib import Path

import tiny_models
import torch
import transformers as tf

_SIZES = {**tiny_models._DECODER, "num_key_value_heads": 4, "num_attention_heads": 8}
_EXPERTS = {"num_experts_per_tok": 2, "head_dim": 8}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=False),
    "mistral": lambda: tf.MistralConfig(**{**_SIZES, "vocab_size": 317}, sliding_window=8),
    "gemma2": lambda: tf.Gemma2Config(**_SIZES, head_dim=8, sliding_window=8, tie_word_embeddings=False),
    "phi3": lambda: tf.Phi3Config(**_SIZES),
    "gpt_oss": lambda: tf.GptOssConfig(**_SIZES, **_EXPERTS, num_local_experts=4, sliding_window=8),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_SIZES, **_EXPERTS, num_experts=4, moe_intermediate_size=32),
    "mixtral": lambda: tf.MixtralConfig(**_SIZES, **_EXPERTS, num_local_experts=4),
}


def make_model(name: str, folder: Path) -> Path:
    """Saves the random model, biases and attention sinks too, and the byte tokenizer; gives the folder back."""
    config = CONFIGS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for weight_name, weight in model.named_parameters():
            if weight_name.endswith(("bias", "sinks")):
                torch.nn.init.normal_(weight, std=0.4)
    model.save_pretrained(folder)
    tiny_models.make_tokenizer().save_pretrained(folder)
    return folder
