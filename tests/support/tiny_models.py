"""Tiny random language models with a byte tokenizer, made on the spot: no download, milliseconds to run."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<pad>", "<bos>", "<eos>")
VOCAB = 320  # 256 bytes, the special tokens, and a few ids that no text has
MAX_CONTEXT = 512

# Weights far larger than usual at the start: otherwise a random model repeats one token for ever, and any two
# engines agree.
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_CONTEXT,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_DECODER, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**_DECODER, num_key_value_heads=2, head_dim=16),
    "mistral": lambda: tf.MistralConfig(**_DECODER, num_key_value_heads=2, sliding_window=8),
    "gemma2": lambda: tf.Gemma2Config(
        **_DECODER, num_key_value_heads=2, head_dim=8, sliding_window=8, tie_word_embeddings=False
    ),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_CONTEXT, initializer_range=0.4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=MAX_CONTEXT, init_std=0.4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "t5": lambda: tf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, initializer_factor=3.0,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    ),
    "mamba": lambda: tf.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
}  # fmt: skip


@functools.cache
def model_folder(name: str) -> Path:
    """The folder of the random model `name`, made once per test session."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_model(name, folder)


def make_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Saves the random model `name` (a key of CONFIGS) and the byte tokenizer; gives the folder back."""
    config = CONFIGS[name]()
    auto = tf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else tf.AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One token per byte (ids 3 to 258), after <pad> 0, <bos> 1 and <eos> 2; with a plain chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast
