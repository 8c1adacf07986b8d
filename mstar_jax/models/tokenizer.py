"""Tokenizers: loaded from a checkpoint's folder without remote code, or made for a policy from scratch."""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import sentencepiece
import tokenizers
from transformers import PreTrainedTokenizerFast

from mstar_jax.models import hf


def load(folder: pathlib.Path) -> Any:
    """The fast tokenizer of `tokenizer.json`, whatever class the folder names: no remote code.

    Raises:
      ValueError: naming the folder.
    """
    if not (folder / "tokenizer.json").exists():
        raise ValueError(f"{folder}: there is no tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(os.fspath(folder))


def vocabulary(tokenizer: Any, special: Sequence[str], size: int) -> dict[str, int]:
    """{token: id} of a tokenizer that fits a policy.

    Args:
      tokenizer: any of the classes here.
      special: tokens that the family's prompts are made of.
      size: the model's vocabulary.

    Raises:
      ValueError: a special token is missing, or there are more tokens than the model knows.
    """
    known = tokenizer.get_vocab()
    if missing := [token for token in special if token not in known]:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}")
    if len(tokenizer) > size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {size}")
    return known


class SentencePiece:
    """The sentencepiece model of `tokenizer.model` and the tokens that its folder adds; no remote code.

    Text is cut at added tokens first, and sentencepiece reads what lies between them, as transformers'
    slow tokenizers do. An added token may take over the id of a piece.
    """

    def __init__(self, folder: pathlib.Path):
        """Reads tokenizer.model, added_tokens.json and tokenizer_config.json; the latter two may be absent.

        Raises:
          ValueError: naming the file that is missing or damaged.
        """
        path = folder / "tokenizer.model"
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: {error}") from error
        files = [folder / name for name in ("added_tokens.json", "tokenizer_config.json")]
        listed, config = (hf.read_json(path) if path.exists() else {} for path in files)
        described = config.get("added_tokens_decoder", {})
        self._added = listed | {token["content"]: int(i) for i, token in described.items()}
        self._begins = config.get("add_bos_token", True)
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self._names = {i: token for token, i in self._added.items()}

    def __len__(self) -> int:
        return max(len(self._model), *(i + 1 for i in self._names), 0)

    def get_vocab(self) -> dict[str, int]:
        """{token: id}."""
        pieces = (i for i in range(len(self._model)) if i not in self._names)
        return {self._model.id_to_piece(i): i for i in pieces} | self._added

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """{"input_ids": ids}, behind the token that begins a text unless told otherwise."""
        ids = [self._model.bos_id()] if add_special_tokens and self._begins else []
        for number, part in enumerate(self._cut.split(text)):
            ids += [self._added[part]] if number % 2 else self._model.encode(part)
        return {"input_ids": ids}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of these ids; ids beyond the vocabulary have none."""
        text, run = "", list[int]()
        for token in map(int, tokens):
            if token not in self._names and 0 <= token < len(self._model):
                run.append(token)
                continue
            text += self._model.decode(run) + ("" if skip_special_tokens else self._names.get(token, ""))
            run = []
        return text + self._model.decode(run)


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
