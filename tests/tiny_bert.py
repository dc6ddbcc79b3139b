"""A BERT of three layers with random weights and one token per letter, in a folder."""

from __future__ import annotations

from pathlib import Path

import transformers

import tiny_parts as parts

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_bert(folder: Path) -> str:
    """It is saved as a masked language model, without a pooler, as RoBERTa's checkpoints are."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = transformers.BertTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, do_lower_case=True, model_max_length=64
    )
    config = transformers.BertConfig(vocab_size=len(pieces), initializer_range=0.5, **SIZES)
    parts.seeded(transformers.BertForMaskedLM, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
