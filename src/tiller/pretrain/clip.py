"""A small CLIP (Radford et al. 2021, arXiv 2103.00020), trained from scratch on the scenes of the embedded world."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig as CLIPArchitecture
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from tiller.emoji import scenes, wording
from tiller.emoji.scenes import Scene
from tiller.pretrain import tokenizer
from tiller.pretrain.export import load_in_fp32, replace_folder, take_weights
from tiller.pretrain.phases import autocast, device_of
from tiller.pretrain.reader_config import ClipConfig
from tiller.pretrain.scene_pool import SIZE, ScenePool
from tiller.pretrain.training import Progress, Training, optimise

CAPTION_TOKENS = 24
LOWEST_TEMPERATURE = 0.01  # its inverse is clipped at 100, as in the paper
PREFIXES = ("a picture of ", "a photo of ", "an image of ")
CLIP = 5  # keeps this phase's random stream apart


def info_nce(pictures: Tensor, captions: Tensor, log_scale: Tensor, negative: Tensor) -> Tensor:
    """The symmetric InfoNCE loss (Radford et al. 2021, section 2.3, figure 3), in nats; ().

    With s_ij = exp(log_scale) <pictures_i, captions_j>, it is the mean over i of -log p(caption i | picture i) and
    -log p(picture i | caption i), halved, where each softmax runs over the true partner and the negatives alone.
    The first N captions belong to the pictures; further ones are negatives that no picture has (NegCLIP, Yuksekgonul
    et al. 2023).

    Args:
        pictures: (N, D) of unit length.
        captions: (M, D) of unit length, M >= N.
        log_scale: () the logarithm of the inverse temperature.
        negative: (N, M) bool, whether caption j is false of picture i; its diagonal is not read.
    """
    count = len(pictures)
    scores = log_scale.exp() * pictures @ captions.T  # (N, M)
    partner = torch.eye(*scores.shape, dtype=torch.bool, device=scores.device)
    scores = scores.masked_fill(~(negative | partner), -math.inf)
    target = torch.arange(count, device=scores.device)
    by_picture = F.cross_entropy(scores, target)
    by_caption = F.cross_entropy(scores[:, :count].T, target)
    return (by_picture + by_caption) / 2


@cache
def vocabulary() -> list[str]:
    """Every word that a caption of the embedded world may have, in a fixed order."""
    rng = np.random.default_rng(0)
    texts = [scenes.caption(wording.said(wording.any_scene(rng), rng)) for _ in range(6_000)]
    return sorted({word for text in (*texts, *PREFIXES) for word in text.split()})


def build(config: ClipConfig, words: CLIPTokenizer) -> CLIPModel:
    """An untrained model, the same for the same seed; its temperature starts at 0.07."""
    end = words.eos_token_id
    architecture = CLIPArchitecture(
        projection_dim=config.joint_width,
        logit_scale_init_value=math.log(1 / 0.07),
        text_config={
            "projection_dim": config.joint_width,
            "vocab_size": len(words),
            "hidden_size": config.text_width,
            "intermediate_size": 4 * config.text_width,
            "num_hidden_layers": config.text_layers,
            "num_attention_heads": config.text_width // config.head_width,
            "max_position_embeddings": CAPTION_TOKENS,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config={
            "projection_dim": config.joint_width,
            "hidden_size": config.width,
            "intermediate_size": 4 * config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.width // config.head_width,
            "image_size": SIZE,
            "patch_size": config.patch,
            "hidden_act": "gelu",
        },
    )
    architecture._attn_implementation = "eager"  # faster than the fused one for so few tokens on a CPU
    torch.manual_seed(config.seed)
    return CLIPModel(architecture)


def unit_vectors(model: CLIPModel, pictures: Tensor, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 64, 64) in [-1, 1] and tokens (M, L) as vectors of unit length, (N, D) and (M, D) float32."""
    seen = model.visual_projection(model.vision_model(pixel_values=pictures).pooler_output)
    read = model.text_projection(model.text_model(**tokens).pooler_output)
    return F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)


def captions_of(drawn: list[Scene], rng: np.random.Generator) -> tuple[list[Scene], list[str]]:
    """For N scenes, 2 N captions as scenes and as text: true of each in its turn, then false of each in one fact."""
    true = [wording.said(scene, rng) for scene in drawn]
    stated = [*true, *(wording.wrong(scene, rng) for scene in true)]
    texts = [scenes.caption(scene) for scene in stated]
    return stated, [str(rng.choice(PREFIXES)) + t if rng.random() < 0.15 else t for t in texts]


def train(model: CLIPModel, words: CLIPTokenizer, config: ClipConfig, folder: Path) -> Iterator[Progress]:
    """Trains both towers; at the end the model holds the averaged weights."""
    pool = ScenePool(config.pool, config.coded, config.seed, folder / "pictures.safetensors")
    training, device = Training(model, config.lr, config.steps, config.ema), device_of(config)

    def loss(step: int) -> Tensor:
        with torch.no_grad():
            model.logit_scale.clamp_(max=-math.log(LOWEST_TEMPERATURE))
        rng = np.random.default_rng((config.seed, CLIP, step))
        drawn, pictures = pool.batch(rng, config.batch)
        stated, texts = captions_of(drawn, rng)
        tokens = words(texts, padding=True, return_tensors="pt").to(device)
        negative = wording.contradictions(drawn, stated).to(device)
        with autocast(config):
            seen, read = unit_vectors(model, pictures.to(device), dict(tokens))
        return info_nce(seen, read, model.logit_scale, negative)

    yield from optimise(training, loss, "clip", config.batch, folder / "clip.safetensors", config.save_every)
    training.use_average()


def pretrain(config: ClipConfig) -> Iterator[Progress]:
    """Trains, reporting every 20 steps, and writes model and processor into `config.output/model`."""
    folder = Path(config.output) / "train"
    words = tokenizer.build(vocabulary(), CAPTION_TOKENS, folder)
    model = build(config, words)
    if config.start is not None:
        take_weights(model, config.start)
    model.to(device_of(config))  # type: ignore[arg-type]  # of transformers' stubs
    yield from train(model, words, config, folder)
    with replace_folder(Path(config.output) / "model") as new:
        model.half().save_pretrained(new)
        load_in_fp32(new / "config.json")
        CLIPProcessor(image_processor(), words).save_pretrained(new)


def image_processor() -> CLIPImageProcessorPil:
    """Pictures of any size to (3, 64, 64) in [-1, 1]; this one does without torchvision."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
