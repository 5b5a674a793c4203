"""A model's tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from batchrun.errors import ModelError, first_line
from batchrun.job.settings import ModelSettings
from batchrun.model.files import chosen, read_json
from batchrun.model.folder import ModelFolder
from batchrun.model.light import import_tokenizers, without_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# One of these has every tokenizer.
_VOCABULARIES = (
    "*.tiktoken",
    "*.model",
    "merges.txt",
    "tekken.json",
    "tokenization*.py",
    "tokenizer.json",
    "vocab*",
)


def load_tokenizer(folder: ModelFolder, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, without a word to the network.

    Raises:
        ModelError: there is none, it has no vocabulary, or transformers cannot load it.
    """
    import_tokenizers(with_torch=settings.trust_remote_code)
    from transformers import AutoTokenizer

    try:
        with without_warnings():
            tokenizer = AutoTokenizer.from_pretrained(
                folder.tokenizer_path, trust_remote_code=settings.trust_remote_code, local_files_only=True
            )
        # Of a folder without one, transformers makes an empty tokenizer: no text would have any token.
        found = not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    except Exception as error:
        # Whatever a tokenizer's files make transformers and its helpers raise.
        if chosen(os.listdir(folder.tokenizer_path), _VOCABULARIES):
            raise ModelError(
                f"its tokenizer cannot be loaded ({first_line(error)})",
                folder.tokenizer_path,
                "restore its files, or set model.tokenizer to another folder",
            ) from None
        found = False
    if not found:
        raise ModelError(
            "the folder has no tokenizer",
            folder.tokenizer_path,
            "add its tokenizer.json, or set model.tokenizer to another folder",
        )
    return tokenizer


def stop_token_ids(folder: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer, ascending: those of generation_config.json, config.json and the
    tokenizer."""
    config = read_json(Path(folder.path) / "config.json")
    sources = (
        read_json(Path(folder.path) / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        (config.get("text_config") or {}).get("eos_token_id"),
        tokenizer.eos_token_id,
    )
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list) else [source] if source is not None else [])
    return tuple(sorted(ids))
