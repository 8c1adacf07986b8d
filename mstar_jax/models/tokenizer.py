"""Tokenizers: loaded from a checkpoint's folder without remote code, or made for a policy from scratch."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast


def load(folder: pathlib.Path) -> Any:
    """The fast tokenizer of `tokenizer.json`, whatever class the folder names: no remote code.

    Raises:
      ValueError: naming the folder.
    """
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder}: there is no tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(os.fspath(folder))


def make(
    texts: Sequence[str],
    folder: str | os.PathLike,
    vocab_size: int,
    *,
    special: Sequence[str],
    bos: str,
    eos: str,
    unk: str | None = None,
    rstrip: Sequence[str] = (),
) -> None:
    """Trains a small byte-level BPE on `texts` and stores it as an HF folder.

    Deterministic for the same texts in the same order.

    Args:
      texts: what to train on.
      folder: written; `load` reads it.
      vocab_size: most tokens, special ones included.
      special: the special tokens, which get the first ids.
      bos: stands before every text.
      eos, unk: further roles; eos also pads.
      rstrip: special tokens that swallow the white space behind them.

    Raises:
      ValueError: `vocab_size` has no room for the bytes and the special tokens.
    """
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(f"vocab_size = {vocab_size} is too small: bytes and special tokens take {least}")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(t, special=True, rstrip=t in rstrip) for t in special],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, model.token_to_id(bos))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        unk_token=unk,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(os.fspath(folder))
