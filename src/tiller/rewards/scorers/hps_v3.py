"""How much people would like a picture for its prompt: HPSv3 (Ma et al. 2025, 2508.03789), a Qwen2-VL and a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from tiller.rewards.loading import fill_model, load_processor, load_tensors
from tiller.rewards.scorers.pixels import rgb
from tiller.types import ConfigError

MARK = "<|Reward|>"  # the token whose state the head reads; it is the one after the tokenizer's own
PROMPT = "{text_prompt}"  # where the prompt goes into the instruction
PIXELS = 256 * 28 * 28  # of every picture, whatever it had: about 256 tokens
WORDS = "language_model.embed_tokens.weight"
HEAD = (0, 3, 5)  # the linear layers of `rm_head`, ReLU between them


@dataclass(frozen=True)
class HPSv3:
    """mu, the mean of the preference that the head predicts; its second number, the spread, is left.

    The head reads a text that the model was trained with. It is not part of tiller: `instruction` is a file with it,
    with `{text_prompt}` where the prompt goes and `<|Reward|>` where the head reads; docs/scorers.md says where to
    get it.
    """

    deterministic: ClassVar[bool] = True

    instruction: str = ""  # a text file
    weights: str = "MizzenAI/HPSv3/HPSv3.safetensors"  # or a local file
    weights_revision: str | None = None  # by default the one that tiller pins
    model: str = "Qwen/Qwen2-VL-7B-Instruct"  # its configuration, tokenizer and image processor
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"  # bfloat16 on a GPU, float32 on the CPU; the head is float32
    batch_size: int = 4  # pictures per forward

    def __post_init__(self) -> None:
        if not self.instruction:
            raise ConfigError(
                "the reward hps_v3 needs instruction, a text file with what the model was trained to read "
                "(docs/scorers.md says how to get it)."
            )

    @cached_property
    def text(self) -> str:
        """The instruction."""
        path = Path(self.instruction).expanduser()
        if not path.is_file():
            raise ConfigError(f"hps_v3: there is no file {path}; a path starts at the working directory.")
        text = path.read_text(encoding="utf-8")
        if PROMPT not in text or text.count(MARK) != 1:
            raise ConfigError(f"hps_v3: {path} must have {PROMPT} in it, and {MARK} once.")
        return text

    @cached_property
    def network(self) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        """The trunk and the head's layers, frozen."""
        trunk, head = from_hps_v3(load_tensors(self.weights, self.weights_revision))
        config = load_processor(Qwen2VLConfig, self.model, self.revision)
        config.text_config.vocab_size = len(trunk[WORDS])
        network = fill_model(Qwen2VLModel, config, trunk, self.weights, self.device, self.dtype)
        return network, [(weight.to(network.device), bias.to(network.device)) for weight, bias in head]

    @cached_property
    def tokenizer(self) -> Any:
        """The trunk's, with the mark as one more token."""
        tokenizer = load_processor(AutoTokenizer, self.model, self.revision)
        if not tokenizer.chat_template:
            raise ConfigError(f"hps_v3: the tokenizer of {self.model!r} has no chat template; name Qwen2-VL's own.")
        tokenizer.add_tokens([MARK], special_tokens=True)
        return tokenizer

    @cached_property
    def image_processor(self) -> Any:
        """The trunk's, for pictures of one number of pixels."""
        size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        return load_processor(AutoImageProcessor, self.model, self.revision, backend="pil", size=size)

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """N means."""
        pictures = rgb(images, "hps_v3")
        scores: list[float] = []
        for i in range(0, len(pictures), self.batch_size):
            scores += self._scores(pictures[i : i + self.batch_size], prompts[i : i + self.batch_size]).tolist()
        return scores

    @torch.no_grad()
    def _scores(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        network, head = self.network
        seen = self.image_processor(images=list(pictures), return_tensors="pt").to(network.device)
        counts = seen["image_grid_thw"].prod(1) // self.image_processor.merge_size**2  # tokens of each picture
        texts = [self._laid_out(prompt, int(count)) for prompt, count in zip(prompts, counts, strict=True)]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").to(network.device)
        ids = tokens["input_ids"]
        vectors = network.get_input_embeddings()(ids)
        patches = network.get_image_features(seen["pixel_values"], seen["image_grid_thw"]).pooler_output
        places = (ids == network.config.image_token_id)[..., None].expand_as(vectors)
        vectors = vectors.masked_scatter(places, torch.cat(patches).to(vectors))
        # it was trained with plain positions, 0 to L - 1, not with the rows and columns of a picture
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, *ids.shape)
        states = network.language_model(
            inputs_embeds=vectors, attention_mask=tokens["attention_mask"], position_ids=positions, use_cache=False
        ).last_hidden_state
        marked = states[ids == self.tokenizer.convert_tokens_to_ids(MARK)]  # (B, D)
        return apply_relu_head(head, marked.float())[:, 0]

    def _laid_out(self, prompt: str, count: int) -> str:
        """The whole text of one picture, with `count` tokens in its place."""
        question = self.text.replace(PROMPT, prompt.replace(MARK, ""))
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        token = self.tokenizer.convert_ids_to_tokens(self.network[0].config.image_token_id)
        return text.replace(token, token * count, 1)


def from_hps_v3(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """A checkpoint of HPSv3 as the weights of a `Qwen2VLModel` and its head's layers, in float32.

    The checkpoint has the names of older releases of transformers, `visual.*` and `model.*`, or those of newer ones,
    `model.visual.*` and `model.language_model.*`. The head over the vocabulary is left.

    Raises:
        ConfigError: the head, or the trunk, is not there.
    """
    trunk: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(("rm_head.", "lm_head.")):
            continue
        name = key.removeprefix("model.")
        if not name.startswith(("visual.", "language_model.")):
            name = f"language_model.{name}"
        trunk[name] = tensor
    try:
        return trunk, [(tensors[f"rm_head.{i}.weight"].float(), tensors[f"rm_head.{i}.bias"].float()) for i in HEAD]
    except KeyError as error:
        raise ConfigError(f"these are no weights of HPSv3: {error.args[0]} is missing.") from error


def apply_relu_head(layers: Sequence[tuple[Tensor, Tensor]], vectors: Tensor) -> Tensor:
    """(N, D) vectors through linear layers with ReLU between them."""
    for index, (weight, bias) in enumerate(layers):
        vectors = F.linear(vectors.relu() if index else vectors, weight, bias)
    return vectors
