"""Token embeddings of texts from one layer of a language model, and BERTScore with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiller.rewards.judge.bertscore import NO_MATCH, Match, bertscore, inverse_document_frequency, rescaled
from tiller.rewards.loading import load_model, load_processor
from tiller.types import ConfigError

DEFAULT_MODEL, DEFAULT_REVISION = "microsoft/deberta-xlarge-mnli", "refs/pr/6"
"""The paper's; its main branch holds a pickle alone, and this pull request the same weights as safetensors."""

LAYERS: dict[str, int] = {
    "microsoft/deberta-xlarge-mnli": 40,
    "microsoft/deberta-large-mnli": 18,
    "microsoft/deberta-base-mnli": 9,
    "microsoft/deberta-v2-xxlarge-mnli": 22,
    "microsoft/deberta-v3-large": 12,
    "microsoft/deberta-v3-base": 9,
    "FacebookAI/roberta-large": 17,
    "FacebookAI/roberta-large-mnli": 19,
    "FacebookAI/roberta-base": 10,
    "google-bert/bert-base-uncased": 9,
    "google-bert/bert-large-uncased": 18,
    "distilbert/distilbert-base-uncased": 5,
    "microsoft/mpnet-base": 8,
}
"""The layer whose scores agreed best with people's on WMT16, by the table of the authors' package."""


class Tokens(NamedTuple):
    """One text as the encoder saw it."""

    embeddings: Tensor  # (K, D) float32
    ids: tuple[int, ...]  # K of them
    weights: Tensor  # (K,) 0 for the tokens that open and close a text, else 1


@dataclass(frozen=True)
class TextEncoder:
    """Any text encoder that transformers' AutoModel loads, or the text tower of a CLIP, read at one layer.

    Raises (when first used):
        ConfigError: the model is not there, its layer is not known, or it has no such layer.
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None  # of a hub model; None is the branch with safetensors for the default model, else main
    layer: int | None = None  # how many layers a text goes through; None where LAYERS knows it
    batch_size: int = 64  # texts at once
    device: str = "auto"

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Each text's tokens. Equal texts are read once; what exceeds the model's length is cut off."""
        different = sorted(dict.fromkeys(text.strip() for text in texts), key=len)
        read: dict[str, Tokens] = {}
        for start in range(0, len(different), self.batch_size):
            batch = different[start : start + self.batch_size]
            read.update(zip(batch, self._read(batch), strict=True))
        return [read[text.strip()] for text in texts]

    @torch.no_grad()
    def _read(self, texts: list[str]) -> Iterator[Tokens]:
        tokenizer, model = self._parts
        inputs = tokenizer(
            texts, padding=True, padding_side="right", truncation=True, max_length=self._length, return_tensors="pt"
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        place = next(model.parameters()).device
        out = model(ids.to(place), attention_mask=mask.to(place), output_hidden_states=True, return_dict=True)
        hidden = out.hidden_states[self._depth].float().cpu()  # (B, K, D)
        silent = torch.tensor(_silent(tokenizer), dtype=ids.dtype)
        for row, there, states in zip(ids, mask.bool(), hidden, strict=True):
            kept = row[there]
            weights = torch.ones(len(kept))
            weights[torch.isin(kept, silent)] = 0.0
            yield Tokens(states[there], tuple(kept.tolist()), weights)

    @property
    def _depth(self) -> int:
        layer = LAYERS.get(self.model) if self.layer is None else self.layer
        if layer is None:
            raise ConfigError(f"which layer of {self.model} to compare texts by is not known; set layer.")
        return layer

    @property
    def _length(self) -> int:
        tokenizer, model = self._parts
        positions = getattr(model.config, "max_position_embeddings", None) or 512
        return min(tokenizer.model_max_length, positions - (2 if model.config.model_type in PADDED_POSITIONS else 0))

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        """The tokenizer, and the model without the layers above the one that is read."""
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        depth = self._depth
        revision = self.revision or (DEFAULT_REVISION if self.model == DEFAULT_MODEL else None)
        tokenizer = load_processor(AutoTokenizer, self.model, revision)
        config = load_processor(AutoConfig, self.model, revision)
        count = getattr(config, "text_config", config).num_hidden_layers
        if not 0 <= depth <= count:
            raise ConfigError(f"{self.model} has {count} layers, so layer cannot be {depth}; give 0 to {count}.")
        kind: Any = AutoModel._model_mapping[type(config)]
        # a pooler is never read, and checkpoints of masked language models have none
        has_pooler = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
        plain: dict[str, Any] = {"add_pooling_layer": False} if has_pooler else {}
        model = load_model(kind, self.model, revision, self.device, **plain)
        model = model.get_encoder() if config.is_encoder_decoder else getattr(model, "text_model", model)
        stack = getattr(getattr(model, "encoder", None), "layer", None)
        if isinstance(stack, nn.ModuleList):  # what lies above is never asked for
            del stack[max(depth, 1) :]
        return tokenizer, model


def _silent(tokenizer: Any) -> list[int]:
    """The tokens that open and close a text; a tokenizer without [CLS] and [SEP] may have others."""
    ends = [token for token in (tokenizer.cls_token_id, tokenizer.sep_token_id) if token is not None]
    return ends or [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]


PADDED_POSITIONS = ("roberta", "xlm-roberta", "mpnet", "camembert")
"""Their positions start behind that of the padding token, so two of them serve no token."""


@dataclass(frozen=True)
class BertScorer:
    """BERTScore of candidate texts against reference texts.

    The defaults are those of Black et al. 2023: DeBERTa-xlarge-MNLI, layer 40, equal weights, no rescaling.
    """

    encoder: TextEncoder = TextEncoder()
    documents: tuple[str, ...] = ()  # texts whose inverse document frequencies weigh the tokens; none: all weigh 1
    baseline: tuple[float, float, float] | None = None  # precision, recall and F1 of unrelated texts

    def score(self, candidates: Sequence[str], references: Sequence[str]) -> list[Match]:
        """N matches of N pairs; NaN where either text is empty."""
        tokens = self.encoder.encode([*candidates, *references])
        pairs = zip(tokens[: len(candidates)], tokens[len(candidates) :], strict=True)
        return [self._match(candidate, reference) for candidate, reference in pairs]

    def _match(self, candidate: Tokens, reference: Tokens) -> Match:
        if not (candidate.weights.any() and reference.weights.any()):
            return NO_MATCH
        match = bertscore(
            candidate.embeddings, reference.embeddings, self._weights(candidate), self._weights(reference)
        )
        return match if self.baseline is None else rescaled(match, self.baseline)

    def _weights(self, tokens: Tokens) -> Tensor:
        if self._frequency is None:
            return tokens.weights
        return torch.tensor([self._frequency(token) for token in tokens.ids])

    @cached_property
    def _frequency(self) -> Callable[[int], float] | None:
        if not self.documents:
            return None
        return inverse_document_frequency(tokens.ids for tokens in self.encoder.encode(self.documents))
