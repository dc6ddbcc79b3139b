"""The words and the form of a dialogue about a picture: a tokenizer of whole words, and LLaVA's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, START, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""`USER: <image>\\n{question} ASSISTANT: {answer}</s>`, the form of LLaVA 1.5."""


def tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each word and each sign of the texts, upper and lower case alike; any other word is unknown."""
    split = pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text.lower())}
    vocabulary = {token: i for i, token in enumerate((PAD, START, END, UNKNOWN, IMAGE, *sorted(words)))}
    made = Tokenizer(models.WordLevel(vocabulary, UNKNOWN))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = split
    made.decoder = decoders.WordPiece(prefix="##")  # words with spaces between, none before a sign
    made.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        chat_template=TEMPLATE,
        model_max_length=128,
    )


@dataclass(frozen=True)
class Tokens:
    """A batch of dialogues of one question each, padded on the right."""

    ids: Tensor  # (N, L)
    mask: Tensor  # (N, L) 1 where there is a token
    weights: Tensor  # (N, L) float32, how much each token is learned; those of an answer sum to 1


def encode(words: PreTrainedTokenizerFast, turns: Sequence[tuple[str, str]], places: int) -> Tokens:
    """`USER: <image> ... question ASSISTANT: answer</s>` with `places` tokens for the picture; 0 leaves it out.

    The answer is what is learned. Where it is Yes, the question is learned as much, for it says what is in the
    picture: a model that expects each next word of a true caption is surprised by the wrong word of a false one.
    """
    count = len(turns)
    texts = ["USER:", "ASSISTANT:", "Yes", *(q for q, _ in turns), *(a for _, a in turns)]
    user, assistant, yes, *rest = words(texts, add_special_tokens=False).input_ids
    start, end, image = words.bos_token_id, words.eos_token_id, words.convert_tokens_to_ids(IMAGE)
    rows, weights = [], []
    for question, answer in zip(rest[:count], rest[count:], strict=True):
        opening, answered = [start, *user, *[image] * places], [*answer, end]
        rows.append([*opening, *question, *assistant, *answered])
        asked = 1 / len(question) if answer == yes else 0.0
        row = [0.0] * len(opening) + [asked] * len(question) + [0.0] * len(assistant)
        weights.append(row + [1 / len(answered)] * len(answered))
    length = max(map(len, rows))
    ids = torch.tensor([row + [words.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Tokens(ids, mask, torch.tensor([row + [0.0] * (length - len(row)) for row in weights]))
