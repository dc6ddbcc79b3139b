"""Trains small models from scratch: text-to-image into a plain pipeline folder, CLIP and LLaVA into a model folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn
from transformers import CLIPTokenizer

from tiller.pretrain import autoencoder, clip, data, llava, phases, start, tokenizer
from tiller.pretrain.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, FlowConfig, PretrainConfig
from tiller.pretrain.denoiser import PROMPT_TOKENS, Denoiser
from tiller.pretrain.export import export
from tiller.pretrain.flow import LONGEST, FlowDenoiser
from tiller.pretrain.reader_config import ClipConfig, LlavaConfig
from tiller.pretrain.training import Progress

__all__ = [
    "AutoencoderConfig",
    "ClipConfig",
    "DecoderConfig",
    "DenoiserConfig",
    "FlowConfig",
    "LlavaConfig",
    "PretrainConfig",
    "Progress",
    "pretrain",
    "run",
]


def pretrain(config: PretrainConfig) -> Iterator[Progress]:
    """Trains, reporting every 20 steps, and writes the pipeline into `config.output`.

    Its state is in `config.output/train`; the same call after an interruption goes on from the last save.
    """
    folder = Path(config.output) / "train"
    source = data.open_source(config.data, config.size)
    vae, model, words = build(config, source, folder)
    if config.start is None:
        yield from phases.train_autoencoder(vae, source, config, folder)
    pool = phases.Pool(vae, partial(model.tokenise, words), source, config, folder)
    yield from phases.train_denoiser(model, pool, config, folder)
    if config.start is None:
        yield from phases.train_decoder(vae, source, config, folder)
    export(model.pipeline(vae, words), Path(config.output) / "pipeline")


def build(
    config: PretrainConfig, source: data.Source, folder: Path
) -> tuple[AutoencoderKL, Denoiser | FlowDenoiser, CLIPTokenizer]:
    """The parts, untrained or from `config.start`; the same for the same seed."""
    if config.start is None:
        words = tokenizer.build(data.vocabulary(source.texts(), config.words), PROMPT_TOKENS, folder)
        torch.manual_seed(config.seed)
        vae = autoencoder.build(config.autoencoder, config.size)
    else:
        vae, words = start.autoencoder_and_words(config.start)
    side = config.check_size(2 ** (len(vae.config["block_out_channels"]) - 1))
    torch.manual_seed(config.seed + 1)
    sizes = (vae.config["latent_channels"], side, len(words), words.eos_token_id)
    flow = config.denoiser.flow
    model: Denoiser | FlowDenoiser
    if flow is None:
        model = Denoiser(config.denoiser, *sizes)
    else:
        tokenizer.pad_left(words, LONGEST)
        model = FlowDenoiser(config.denoiser, flow, config.size, *sizes)
    if config.start is not None:
        start.word_vectors(config.start, model.text)
    parts: list[nn.Module] = [vae, model]
    for part in parts:
        part.to(phases.device_of(config))
    return vae, model, words


def run(config: PretrainConfig | ClipConfig | LlavaConfig) -> Path:
    """Trains to the end with plain lines of progress; the folder of what was trained."""
    folder = Path(config.output) / ("pipeline" if isinstance(config, PretrainConfig) else "model")
    for p in _training(config):
        if p.step % 100 == 0 or p.step == p.steps:
            print(
                f"{p.phase} {p.step}/{p.steps}  loss {p.loss:.4f}  {p.images_per_second:.0f} images/s",
                flush=True,
            )
    return folder


def _training(config: PretrainConfig | ClipConfig | LlavaConfig) -> Iterator[Progress]:
    if isinstance(config, ClipConfig):
        return clip.pretrain(config)
    if isinstance(config, LlavaConfig):
        return llava.pretrain(config)
    return pretrain(config)
