"""Settings of a learned reward, over six splits of prompts: accuracy on pairs, log loss, best of a prompt's pictures.

    python bench/learned_reward.py runs/pictures

The folder is one of `tiller sample emoji`, with equally many pictures of each prompt side by side.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import binary_cross_entropy_with_logits

from tiller.rewards import resolve, score
from tiller.rewards.learned import HeadSettings
from tiller.rewards.learned.fit import Comparisons, FitSettings, fit, split
from tiller.rewards.scorers.clip import Clip

VARIANTS = {
    "default": (HeadSettings(), FitSettings(members=1)),
    "without CLIP's cosine": (HeadSettings(cosine=0.0), FitSettings(members=1)),
    "linear": (HeadSettings(hidden=(), dropout=0.0), FitSettings(members=1)),
    "30 steps": (HeadSettings(), FitSettings(members=1, steps=30)),
    "decay 1, dropout 0.5": (HeadSettings(dropout=0.5), FitSettings(members=1, weight_decay=1.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--margin", type=float, default=0.1)
    parser.add_argument("--splits", type=int, default=6)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in (arguments.pictures / "pictures.jsonl").open()]
    images = [Image.open(arguments.pictures / row["file"]).convert("RGB") for row in rows]
    texts = [row["prompt"] for row in rows]
    each = texts.count(texts[0])
    truth, gold = (score(resolve(n), images, texts, [{}] * len(rows)).values for n in ("emoji_alignment", "emoji_gold"))
    clip = Clip("bench", "emoji-clip", device="cpu")
    seen, read = clip.pictures(images), clip.texts(texts)
    pairs = np.array([(k + a, k + b) for k in range(0, len(rows), each) for a, b in combinations(range(each), 2)])
    gaps = truth[pairs[:, 0]] - truth[pairs[:, 1]]
    cosine = (seen * read).sum(1).numpy()
    for margin in (0.0, arguments.margin, 1.0):
        kept = np.abs(gaps) > margin
        agreed = (cosine[pairs[:, 0]] > cosine[pairs[:, 1]]) == (gaps > 0)
        print(f"margin {margin}: {kept.sum()} pairs, CLIP's cosine agrees on {agreed[kept].mean():.3f}")
    pairs, gaps = pairs[np.abs(gaps) > arguments.margin], gaps[np.abs(gaps) > arguments.margin]
    first, second = seen[pairs[:, 0]], seen[pairs[:, 1]]
    preferred = torch.from_numpy(gaps > 0).float()
    data = Comparisons(first, second, read[pairs[:, 0]], preferred, [texts[row] for row in pairs[:, 0]])
    for name, (head, settings) in VARIANTS.items():
        right, losses, gains = [], [], []
        for seed in range(arguments.splits):
            fitted, held = split(data.texts, 0.25, seed)
            made = fit(data.take(fitted), head, settings)[0]
            with torch.no_grad():
                scores = made(seen, read)
            difference = scores[pairs[held, 0]] - scores[pairs[held, 1]]
            right += ((difference > 0) == (preferred[held] > 0)).tolist()
            losses.append(binary_cross_entropy_with_logits(difference, preferred[held]).item())
            prompts = {data.texts[row] for row in held}
            groups = [group for group in range(len(rows) // each) if texts[each * group] in prompts]
            by_group, chosen = gold.reshape(-1, each)[groups], scores.view(-1, each)[groups].argmax(1).numpy()
            gains += (by_group[np.arange(len(groups)), chosen] - by_group.mean(1)).tolist()
        spread = 1.96 * np.std(gains) / len(gains) ** 0.5
        print(
            f"{name}: accuracy {np.mean(right):.3f}, log loss {np.mean(losses):.3f}, "
            f"best of {each} is right {np.mean(gains):+.3f} ± {spread:.3f} more often than any",
            flush=True,
        )


if __name__ == "__main__":
    main()
