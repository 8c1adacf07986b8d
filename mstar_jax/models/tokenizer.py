"""Tokenizers: loaded from a checkpoint's folder without remote code, or trained for a policy from scratch."""

import os
import pathlib
import re
from collections.abc import Sequence

import sentencepiece
import tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from mstar_jax.models import hf


def load(folder: pathlib.Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of `tokenizer.json`, whatever class the folder names: remote code is never run.
    Without that file, Qwen's, of `vocab.json` and `merges.txt`.

    Raises:
      ValueError: the folder has none of these files.
    """
    if (folder / "tokenizer.json").exists():
        return PreTrainedTokenizerFast.from_pretrained(os.fspath(folder))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return Qwen2Tokenizer.from_pretrained(os.fspath(folder))
    raise ValueError(f"{folder}: no tokenizer.json; copy the tokenizer's files there")


def load_with_template(folder: pathlib.Path, default: str) -> PreTrainedTokenizerFast:
    """The folder's tokenizer with its chat template, which may be in chat_template.json; without one, with
    the default template."""
    found = load(folder)
    path = folder / "chat_template.json"
    if found.chat_template is None:
        found.chat_template = hf.read_json(path)["chat_template"] if path.exists() else default
    return found


def vocabulary(
    tokenizer: hf.Tokenizer | PreTrainedTokenizerFast, special: Sequence[str], size: int
) -> dict[str, int]:
    """{token: id} of a tokenizer, checked against the policy.

    Args:
      tokenizer: the policy's tokenizer.
      special: special tokens that the family's prompts use.
      size: the model's vocabulary size.

    Raises:
      ValueError: a special token is missing, or there are more tokens than the model's vocabulary.
    """
    known = tokenizer.get_vocab()
    if missing := [token for token in special if token not in known]:
        raise ValueError(f"the tokenizer has no {', '.join(missing)}; is it the one of this policy?")
    if len(tokenizer) > size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {size}")
    return known


def ids_of_all(
    tokenizer: hf.Tokenizer | PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """The ids of many texts, each tokenised alone: by several threads where the tokenizer can do so."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        some = list(texts)
        return tokenizer(some, add_special_tokens=add_special_tokens)["input_ids"] if some else []
    return [tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"] for text in texts]


def literal(tokenizer: hf.Tokenizer | PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text whose control tokens count: of a config, never of data."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def token_id(tokenizer: hf.Tokenizer | PreTrainedTokenizerFast, token: str) -> int:
    """The id of a token, named as in the vocabulary or by its text.

    Raises:
      ValueError: it is unknown, or several tokens.
    """
    if (known := tokenizer.get_vocab().get(token)) is not None:
        return known
    ids = literal(tokenizer, token)
    if len(ids) != 1 or str(tokenizer.decode(ids)).strip() != token.strip():
        raise ValueError(f"{token!r} is not one token of this vocabulary: its ids are {ids}")
    return ids[0]


class SentencePiece:
    """The sentencepiece model of `tokenizer.model` with the folder's added tokens; runs no remote code.

    As in transformers' slow tokenizers, text is first split at added tokens, and sentencepiece encodes the
    parts between them. An added token may have the id of a piece, and then replaces it.
    """

    def __init__(self, folder: pathlib.Path):
        """Reads tokenizer.model, and added_tokens.json and tokenizer_config.json if they exist.

        Raises:
          ValueError: a file is missing or damaged; the message names it.
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
        self._adds_bos = config.get("add_bos_token", True)
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self._names = {i: token for token, i in self._added.items()}

    def __len__(self) -> int:
        return max(len(self._model), *(i + 1 for i in self._names), 0)

    def get_vocab(self) -> dict[str, int]:
        """{token: id}."""
        pieces = (i for i in range(len(self._model)) if i not in self._names)
        return {self._model.id_to_piece(i): i for i in pieces} | self._added

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """{"input_ids": ids}; the first is BOS if `add_special_tokens` and the folder's config says so."""
        ids = [self._model.bos_id()] if add_special_tokens and self._adds_bos else []
        for number, part in enumerate(self._splitter.split(text)):
            ids += [self._added[part]] if number % 2 else self._model.encode(part)
        return {"input_ids": ids}

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of these ids; ids beyond the vocabulary have none."""
        text = ""
        run: list[int] = []  # consecutive ids of pieces
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
    """Trains a small byte-level BPE tokenizer on `texts` and saves it as a Hugging Face folder.

    Deterministic for the same texts in the same order.

    Args:
      texts: the training texts.
      folder: where it is saved; `load` reads it.
      vocab_size: the most tokens, including special ones.
      special: the special tokens, which get the first ids.
      bos: precedes every text.
      eos, unk: further special roles; eos is also the padding token.
      rstrip: special tokens that absorb the white space after them.

    Raises:
      ValueError: `vocab_size` is too small for the bytes and the special tokens.
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
