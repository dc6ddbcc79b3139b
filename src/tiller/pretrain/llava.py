"""A small LLaVA (Liu et al. 2023, arXiv 2304.08485): a CLIP's vision tower, a projector and a language model.

Three phases: the language model alone on text; the projector alone on descriptions (the paper's stage 1); projector
and language model on descriptions and questions (stage 2). The vision tower stays as it is throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import LlavaConfig as LlavaArchitecture

from tiller import emoji
from tiller.emoji import dialogues, wording
from tiller.emoji.scenes import Scene
from tiller.pretrain import chat
from tiller.pretrain.export import load_in_fp32, replace_folder, take_weights
from tiller.pretrain.phases import autocast, device_of
from tiller.pretrain.reader_config import LlavaConfig
from tiller.pretrain.scene_pool import ScenePool
from tiller.pretrain.training import Progress, Training, optimise
from tiller.types import ConfigError

LANGUAGE, PROJECTOR, INSTRUCTION = 6, 7, 8  # keep the phases' random streams apart
LONGEST = 128  # tokens of a dialogue, the picture's included


def vision_tower(name: str) -> CLIPVisionModel:
    """The vision tower of a CLIP folder, or of the CLIP that comes with tiller, in fp32."""
    folder = emoji.path(name) if name in emoji.READERS else Path(name)
    if not (folder / "config.json").exists():
        raise ConfigError(f"clip is {name!r}, which is no CLIP folder; train one with model=clip, or leave it out")
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).vision_model


@cache
def vocabulary() -> list[str]:
    """Texts that hold every word of the dialogues."""
    rng = np.random.default_rng(0)
    return [text for _ in range(8_000) for text in dialogues.turn(wording.any_scene(rng), rng)] + ["USER: ASSISTANT:"]


def build(config: LlavaConfig, tower: CLIPVisionModel, words: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The model with this vision tower and all else untrained, the same for the same seed."""
    ends: dict[str, Any] = {name: getattr(words, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    image: Any = words.convert_tokens_to_ids(chat.IMAGE)
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=config.width,
        intermediate_size=(8 * config.width // 3 + 63) // 64 * 64,
        num_hidden_layers=config.layers,
        num_attention_heads=config.width // config.head_width,
        max_position_embeddings=LONGEST,
        **ends,
    )
    architecture = LlavaArchitecture(
        vision_config=tower.config.to_dict(),
        text_config=text.to_dict(),
        image_token_index=image,
        image_seq_length=places(tower),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,  # what the tower's last layer reads; its own patches are never used by CLIP
        **ends,
    )
    architecture._attn_implementation = "eager"  # faster than the fused one for so few tokens on a CPU
    torch.manual_seed(config.seed)
    model = LlavaForConditionalGeneration(architecture)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


def places(tower: CLIPVisionModel) -> int:
    """How many tokens a picture takes: its patches and the class token."""
    vision: Any = tower.config
    return (vision.image_size // vision.patch_size) ** 2 + 1


def answer_loss(model: LlavaForConditionalGeneration, tokens: chat.Tokens, pictures: Tensor | None) -> Tensor:
    """Mean negative log-likelihood (nats) of the tokens after the first, by their weights; ()."""
    device = model.device
    logits = model(
        input_ids=tokens.ids.to(device),
        attention_mask=tokens.mask.to(device),
        pixel_values=None if pictures is None else pictures.to(device),
        use_cache=False,
    ).logits
    nats = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens.ids[:, 1:].flatten().to(device), reduction="none"
    )
    weights = tokens.weights[:, 1:].flatten().to(device)
    return (nats * weights).sum() / weights.sum()


def only(model: LlavaForConditionalGeneration, *parts: str) -> None:
    """Has the named parts learn, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removeprefix("model.").startswith(parts))


def train_language(
    model: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast, config: LlavaConfig, folder: Path
) -> Iterator[Progress]:
    """The language model alone: every token of dialogues without their pictures."""
    only(model, "language_model", "lm_head")
    training = Training(model, config.lr, config.language_steps)

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, LANGUAGE, step))
        turns = [dialogues.turn(wording.any_scene(rng), rng) for _ in range(config.batch)]
        tokens = chat.encode(words, turns, places=0)
        with autocast(config):
            return answer_loss(model, chat.Tokens(tokens.ids, tokens.mask, tokens.mask.float()), None)

    path = folder / "language.safetensors"
    yield from optimise(training, loss, "language", config.batch, path, config.save_every)


def train_pictures(
    model: LlavaForConditionalGeneration,
    words: PreTrainedTokenizerFast,
    config: LlavaConfig,
    folder: Path,
    pool: ScenePool,
    instruction: bool,
) -> Iterator[Progress]:
    """The projector alone on descriptions, or (`instruction`) the language model too, on every kind of question."""
    only(model, "multi_modal_projector", *(("language_model", "lm_head") if instruction else ()))
    steps = config.steps if instruction else config.projector_steps
    training = Training(model, config.lr, steps, config.ema if instruction else 0.0)
    phase, stream = ("instruction", INSTRUCTION) if instruction else ("projector", PROJECTOR)
    seen = places(model.model.vision_tower)

    def turn(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
        return dialogues.turn(scene, rng) if instruction else (dialogues.DETAILED, dialogues.detailed(scene))

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, stream, step))
        drawn, pictures = pool.batch(rng, config.batch)
        tokens = chat.encode(words, [turn(scene, rng) for scene in drawn], seen)
        with autocast(config):
            return answer_loss(model, tokens, pictures)

    yield from optimise(training, loss, phase, config.batch, folder / f"{phase}.safetensors", config.save_every)
    training.use_average()


def pretrain(config: LlavaConfig) -> Iterator[Progress]:
    """Trains, reporting every 20 steps, and writes model and processor into `config.output/model`."""
    folder = Path(config.output) / "train"
    tower = vision_tower(config.clip)
    words = chat.tokenizer(vocabulary())
    model = build(config, tower, words)
    if config.start is not None:
        take_weights(model, config.start)
    model.to(device_of(config))  # type: ignore[arg-type]  # of transformers' stubs
    if config.start is None:
        yield from train_language(model, words, config, folder)
    pool = ScenePool(config.pool, config.coded, config.seed, folder / "pictures.safetensors")
    if config.start is None:
        yield from train_pictures(model, words, config, folder, pool, instruction=False)
    yield from train_pictures(model, words, config, folder, pool, instruction=True)
    with replace_folder(Path(config.output) / "model") as new:
        export(model, words, config.clip, new)


def export(model: LlavaForConditionalGeneration, words: PreTrainedTokenizerFast, clip: str, folder: Path) -> None:
    """Writes model and processor, fp16 weights that load as fp32."""
    vision: Any = model.config.vision_config
    model.half().save_pretrained(folder)
    load_in_fp32(folder / "config.json")
    source = emoji.path(clip) if clip in emoji.READERS else Path(clip)
    LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(source),
        words,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        chat_template=chat.TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
