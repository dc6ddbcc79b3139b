"""Parts of a pipeline folder that a training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from transformers import CLIPTokenizer, PreTrainedModel

from tiller import emoji
from tiller.types import ConfigError


def folder_of(name: str) -> Path:
    """The folder that `PretrainConfig.start` names: a pipeline's, or that of a model that comes with tiller."""
    folder = emoji.path(name) if name in emoji.MODELS else Path(name)
    if not (folder / "model_index.json").exists():
        raise ConfigError(f"start is {name!r}, which is no pipeline folder; give one, or {' or '.join(emoji.MODELS)}")
    return folder


def autoencoder_and_words(name: str) -> tuple[AutoencoderKL, CLIPTokenizer]:
    """The autoencoder in fp32, which is to stay as it is, and the tokenizer."""
    folder = folder_of(name)
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    return vae, CLIPTokenizer.from_pretrained(folder / "tokenizer")


@torch.no_grad()
def word_vectors(name: str, text: PreTrainedModel) -> None:
    """Puts the vectors of the folder's words (V, D) into the text encoder `text`.

    Raises:
        ConfigError: they are of another width.
    """
    held = load_file(folder_of(name) / "text_encoder" / "model.safetensors")
    vectors = next(v for k, v in held.items() if k.endswith(("token_embedding.weight", "embed_tokens.weight")))
    table: Any = text.get_input_embeddings()
    if vectors.shape != table.weight.shape:
        raise ConfigError(f"denoiser.text_width is {table.embedding_dim}, but the words of start have another width")
    table.weight.copy_(vectors)
