"""A CLIP tokenizer with a small vocabulary of whole words.

Byte-pair encoding whose every merge ends at the end of a word: `cat` is c, a, t</w> -> c, at</w> -> cat</w>. At each
moment only the last two symbols of a word can merge, so no word's merges can stand in the way of another's, each known
word ends as one token, and an unknown one as its letters before the longest known ending.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"


def merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges that build these words from their ends: `cat` gives (a, t</w>), (c, at</w>)."""
    pairs: dict[tuple[str, str], None] = {}
    for word in words:
        for at in range(len(word) - 2, -1, -1):
            pairs[(word[at], word[at + 1 :] + "</w>")] = None
    return list(pairs)


def build(words: list[str], length: int, folder: Path) -> CLIPTokenizer:
    """A tokenizer for prompts of at most `length` tokens, by way of its two files in `folder`."""
    letters = sorted(ByteLevel.alphabet())
    pairs = merges(words)
    tokens = [*letters, *(c + "</w>" for c in letters), *dict.fromkeys(a + b for a, b in pairs), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=length, pad_token=END)


def pad_left(tokenizer: CLIPTokenizer, length: int) -> None:
    """Has the tokenizer pad on the left and take up to `length` tokens, also once it is saved and loaded again."""
    tokenizer.padding_side, tokenizer.model_max_length = "left", length
    tokenizer.init_kwargs |= {"padding_side": "left", "model_max_length": length}
    for key in ("is_local", "local_files_only"):  # of how it was loaded; they would be saved
        tokenizer.init_kwargs.pop(key, None)
