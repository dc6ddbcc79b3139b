"""A vision-language model in this process: whatever transformers' AutoModelForImageTextToText loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image

from tiller.rewards.judge.stills import processor_kind
from tiller.rewards.judge.viewer import Failure
from tiller.rewards.loading import folder_of, load_model, load_processor
from tiller.types import ConfigError

PLAIN: dict[str, str] = {
    "BlipForConditionalGeneration": "",  # it only captions: the question is not asked
    "BlipForQuestionAnswering": "{question}",
    "Blip2ForConditionalGeneration": "Question: {question} Answer:",
    "InstructBlipForConditionalGeneration": "{question}",
}
"""How to ask models without a chat template, by architecture."""


@dataclass(frozen=True)
class LocalViewer:
    """Answers greedily. Questions whose inputs have the same shape go through the model together, so nothing is padded
    and an answer does not depend on what else was asked.

    Raises (when first asked):
        ConfigError: the model is not there, or it is not known how to ask it.
    """

    model: str
    revision: str | None = None  # of a hub model
    template: str | None = None  # "{question}" within what the model is given; None: its chat template, or PLAIN's
    max_new_tokens: int = 64
    batch_size: int = 8  # questions at once
    device: str = "auto"
    dtype: str = "auto"  # bfloat16 on a GPU

    def ask(self, images: Sequence[Image], questions: Sequence[str]) -> list[str | Failure]:
        """The model's answer to each question about its picture, in order; at most `max_new_tokens` long."""
        asked = [self._inputs(image, question) for image, question in zip(images, questions, strict=True)]
        answers: dict[int, str | Failure] = {}
        for batch in _alike(asked, self.batch_size):
            answers.update(zip(batch, self._answer([asked[index] for index in batch]), strict=True))
        return [answers[index] for index in range(len(asked))]

    def _inputs(self, image: Image, question: str) -> dict[str, torch.Tensor]:
        """One picture and one question as the model takes them, each tensor with a batch of one, or of patches."""
        processor, _, _ = self._parts
        words = self._words(question)
        settings: dict[str, Any] = {"text": [words]} if words else {}
        opening = processor.tokenizer.bos_token
        if opening and words.startswith(opening):
            settings["add_special_tokens"] = False  # the template has written them already
        return dict(processor(images=[image.convert("RGB")], return_tensors="pt", **settings))

    def _words(self, question: str) -> str:
        processor, _, architecture = self._parts
        template = PLAIN.get(architecture) if self.template is None else self.template
        if template is not None:
            return template.replace("{question}", question)
        if not getattr(processor, "chat_template", None):
            raise ConfigError(
                f"{self.model} has no chat template, so how to ask it is not known; set template, with its "
                'sign for the picture and {question} in it, such as "USER: <image>\\n{question} ASSISTANT:".'
            )
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.no_grad()
    def _answer(self, asked: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
        processor, model, _ = self._parts
        together = {key: torch.cat([one[key] for one in asked]) for key in asked[0]}
        inputs = {
            key: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for key, value in together.items()
        }
        written = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens)
        given = inputs.get("input_ids")
        if given is not None and torch.equal(written[:, : given.shape[1]], given):
            written = written[:, given.shape[1] :]  # some models repeat what they were given
        return processor.tokenizer.batch_decode(written, skip_special_tokens=True)

    @cached_property
    def _parts(self) -> tuple[Any, Any, str]:
        """The processor, the model, and the name of its architecture."""
        import transformers

        config = load_processor(transformers.AutoConfig, self.model, self.revision)
        architecture = (config.architectures or [""])[0]
        kind: Any = transformers.AutoModelForImageTextToText
        if architecture == "BlipForQuestionAnswering":  # transformers loads BLIP as a captioner otherwise
            kind = transformers.BlipForQuestionAnswering
        folder = folder_of(self.model, self.revision)
        processor = load_processor(processor_kind(folder), self.model, self.revision)
        return processor, load_model(kind, self.model, self.revision, self.device, self.dtype), architecture


def _alike(asked: Sequence[Mapping[str, torch.Tensor]], most: int) -> Iterator[list[int]]:
    """Indices of inputs of one shape, `most` at a time."""
    groups: dict[Any, list[int]] = {}
    for index, inputs in enumerate(asked):
        groups.setdefault(tuple((key, value.shape) for key, value in inputs.items()), []).append(index)
    for group in groups.values():
        yield from (group[start : start + most] for start in range(0, len(group), most))
