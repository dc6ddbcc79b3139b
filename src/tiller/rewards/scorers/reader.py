"""Models that read a picture and a text (`AutoModelForImageTextToText`): what they answer, and how sure they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, VisionEncoderDecoderModel

from tiller.rewards.loading import kind_of, load_model, load_processor
from tiller.types import ConfigError

HOLE = "{}"  # where a text goes into a template


@dataclass(frozen=True)
class Reader:
    """One such model with its processor; nothing is loaded before it is needed."""

    scorer: str  # who asks, for messages
    model: str
    revision: str | None = None
    layout: str = ""  # the whole text with the model's own image mark, such as "<image>\n{}"; "" is its chat template
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 8

    @cached_property
    def network(self) -> Any:
        """The model, frozen."""
        pair = kind_of(self.model, self.revision) == "vision-encoder-decoder"  # TrOCR and the like
        kind = VisionEncoderDecoderModel if pair else AutoModelForImageTextToText
        return load_model(kind, self.model, self.revision, self.device, self.dtype)

    @cached_property
    def processor(self) -> Any:
        """The model's own, resizing with PIL."""
        return load_processor(AutoProcessor, self.model, self.revision, backend="pil")

    def tokens(self, answer: str) -> list[int]:
        """An answer as tokens, without the marks of a text's beginning and end.

        Raises:
            ConfigError: the tokenizer makes nothing of it.
        """
        tokens = self.processor.tokenizer.encode(answer, add_special_tokens=False)
        if not tokens:
            raise ConfigError(
                f"{self.scorer}: the tokenizer of {self.model!r} makes no token of {answer!r}; name another."
            )
        return tokens

    @torch.no_grad()
    def log_probs(self, images: Sequence[Image.Image], questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """(N, answers) the mean log-probability of each answer's tokens after each question, over the vocabulary.

        Its exponential is the geometric mean of their probabilities.
        """
        tokens = [self.tokens(answer) for answer in answers]
        rows = []
        for part in self._parts(images, questions, "right"):
            if all(len(answer) == 1 for answer in tokens):  # one look at the next token says it all
                [logs] = self._next(part, []).unbind(1)
                rows.append(logs[:, [answer[0] for answer in tokens]])
            else:
                rows.append(torch.stack([self._answered(part, answer) for answer in tokens], dim=1))
        return torch.cat(rows)

    @torch.no_grad()
    def answers(self, images: Sequence[Image.Image], questions: Sequence[str], length: int) -> list[str]:
        """What the model says to each picture and question, greedily, with at most `length` tokens."""
        return [text for part in self._parts(images, questions, "left") for text in self._said(part, length)]

    @torch.no_grad()
    def readings(self, images: Sequence[Image.Image], length: int) -> list[str]:
        """What a model that reads, and is asked nothing, finds written in each picture."""
        texts: list[str] = []
        for i in range(0, len(images), self.batch_size):
            inputs = self.processor(images=list(images[i : i + self.batch_size]), return_tensors="pt")
            texts += self._said(self._placed(inputs), length)
        return texts

    def _parts(self, images: Sequence[Image.Image], questions: Sequence[str], side: str) -> Iterator[dict[str, Any]]:
        """The processor's inputs of each batch, on the model's device, shorter texts filled up on that side."""
        for i in range(0, len(images), self.batch_size):
            inputs = self.processor(
                images=[[image] for image in images[i : i + self.batch_size]],
                text=[self._laid_out(question) for question in questions[i : i + self.batch_size]],
                padding=True,
                padding_side=side,
                return_tensors="pt",
            )
            yield self._placed(inputs)

    def _placed(self, inputs: Any) -> dict[str, Any]:
        """Inputs on the model's device, numbers of its dtype."""
        device, dtype = self.network.device, self.network.dtype
        return {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in inputs.items()
        }

    def _said(self, part: dict[str, Any], length: int) -> list[str]:
        """The texts that the model goes on with."""
        said = self.network.generate(**part, max_new_tokens=length, do_sample=False, eos_token_id=self._ends)
        start = part["input_ids"].shape[1] if "input_ids" in part else 0
        return list(self.processor.batch_decode(said[:, start:], skip_special_tokens=True))

    @cached_property
    def _ends(self) -> list[int]:
        """The tokens at which it stops: its own, and that of a turn's end, where it has one."""
        own = self.network.generation_config.eos_token_id
        ends = [] if own is None else list(own) if isinstance(own, (list, tuple)) else [own]
        turn = self.processor.tokenizer.get_vocab().get("<|im_end|>")
        return ends + [turn] * (turn is not None and turn not in ends)

    def _laid_out(self, question: str) -> str:
        if self.layout:
            return self.layout.replace(HOLE, question)
        if not getattr(self.processor, "chat_template", None):
            raise ConfigError(
                f"{self.scorer}: {self.model!r} has no chat template; set layout to its text around a question, with "
                f"its image mark and {HOLE} for the question."
            )
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def _answered(self, part: dict[str, Any], answer: list[int]) -> Tensor:
        """(B,) the mean log-probability of the answer's tokens, each after those before it."""
        logs = self._next(part, answer[:-1])  # (B, tokens, V)
        chosen = torch.tensor(answer, device=logs.device).expand(len(logs), -1)[..., None]
        return logs.gather(2, chosen)[..., 0].mean(1)

    def _next(self, part: dict[str, Any], given: list[int]) -> Tensor:
        """(B, 1 + given, V) log-probabilities of the next token: after the text, and after each of the given ones."""
        lengths = part["attention_mask"].sum(1)  # (B,) tokens of each text; the filling is on the right
        inputs = _continued(part, lengths, given) if given else part
        width = inputs["input_ids"].shape[1]
        kept = width - int(lengths.min()) + 1  # from the earliest end of a text on
        keeps = "logits_to_keep" in inspect.signature(self.network.forward).parameters
        logits = self.network(**inputs, **({"logits_to_keep": kept} if keeps else {})).logits
        at = lengths[:, None] - 1 + torch.arange(1 + len(given), device=lengths.device) - (width - logits.shape[1])
        rows = torch.arange(len(at), device=at.device)[:, None]
        return logits[rows, at].float().log_softmax(-1)


def _continued(part: dict[str, Any], lengths: Tensor, given: list[int]) -> dict[str, Any]:
    """The same inputs with tokens put behind each text."""
    ids = part["input_ids"]
    more = ids.new_zeros(len(ids), len(given))
    inputs = {  # whatever says something of each token says 0 of the new ones
        name: torch.cat([value, more.to(value)], 1) if value.shape == ids.shape else value
        for name, value in part.items()
    }
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    places = lengths[:, None] + torch.arange(len(given), device=ids.device)
    inputs["input_ids"][rows, places] = torch.tensor(given, device=ids.device)
    inputs["attention_mask"][rows, places] = 1
    return inputs
