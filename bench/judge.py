"""How well text scores tell right from wrong in the embedded world: BERTScore by layer, and `contrast` by temperature.

    python bench/judge.py layers
    python bench/judge.py contrast
    python bench/judge.py embedded

`layers`: recall of a prompt's statement by the prompt itself and by another prompt, with emoji-clip's text tower.
`contrast`: drawn scenes scored with their caption, and with one whose word is changed, by emoji-clip.
`embedded`: the three judges with emoji-llava, on drawn scenes with their own captions and with those of other scenes.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np

from tiller.emoji import scenes
from tiller.prompts import load
from tiller.prompts.contrast import contrasted
from tiller.rewards import resolve, score
from tiller.rewards.judge.describe import VLMAlignment
from tiller.rewards.judge.encoder import BertScorer, TextEncoder
from tiller.rewards.judge.questions import VLMCounting, VLMQuestions
from tiller.types import Prompt


def wins(right: np.ndarray, wrong: np.ndarray) -> float:
    """How often a right one scores above a wrong one, of all pairs."""
    return float((right[:, None] > wrong[None]).mean())


def layers() -> None:
    """One line per statement and layer."""
    chance = random.Random(0)
    sets = ("animals_all", "animal_activities_all", "animal_counts_all")
    prompts = [prompt.text for name in sets for prompt in chance.sample(load(name), 40)]
    others = [chance.choice([other for other in prompts if other != prompt]) for prompt in prompts]
    for statement in ("{prompt}", "The image contains {prompt}"):
        stated = [statement.format(prompt=prompt) for prompt in prompts]
        for layer in range(3):
            scorer = BertScorer(TextEncoder("emoji-clip", layer=layer))
            right, wrong = (np.array([match.recall for match in scorer.score(x, stated)]) for x in (prompts, others))
            print(
                f"{statement:27} layer {layer}: {right.mean():.3f} against {wrong.mean():.3f}, {wins(right, wrong):.1%}"
            )


def contrast(count: int = 200) -> None:
    """clip_score alone, then the softmax over three changed prompts, by temperature."""
    rng = np.random.default_rng(0)
    made = {scenes.caption(scene): scene for scene in (scenes.sample(rng) for _ in range(count))}
    prompts = contrasted([Prompt(caption) for caption in made], 3)
    images = [scenes.draw(made[prompt.text]) for prompt in prompts]
    right = [prompt.text for prompt in prompts]
    changed = [[entry["prompt"] for entry in prompt.metadata["contrast"]] for prompt in prompts]
    wrong = [others[0] for others in changed]
    swapped = [{"contrast": [true, *others[1:]]} for true, others in zip(right, changed, strict=True)]
    metadata = [{"contrast": others} for others in changed]
    inner = resolve("clip_score", {"model": "emoji-clip"})
    values = [score(inner, images, texts, [{}] * len(images)).values for texts in (right, wrong)]
    print(f"{len(images)} pictures; clip_score {values[0].mean():.3f} and {values[1].mean():.3f}, {wins(*values):.2%}")
    for temperature in (0.01, 0.03, 0.1, 0.3):
        reward = resolve("contrast", {"reward": inner, "temperature": temperature})
        values = [score(reward, images, *pair).values for pair in ((right, metadata), (wrong, swapped))]
        between = ((values[0] > 0.02) & (values[0] < 0.98)).mean()
        print(f"temperature {temperature}: {wins(*values):.2%}; {between:.0%} of the right ones between .02 and .98")


def embedded(count: int = 100) -> None:
    """One line per judge: how often the right caption scores above another one, of all pairs; seconds per picture."""
    settings = {
        "vlm_alignment": {"statement": "{prompt}", "text": TextEncoder("emoji-clip", layer=0)},
        "vlm_counting": {},
        "vlm_questions": {},
    }
    for name, given in settings.items():
        made = {
            prompt.text: prompt
            for prompt in load("animal_counts_all" if name == "vlm_counting" else "animal_activities_all")
        }
        prompts = random.Random(0).sample(list(made.values()), count)
        images = [scenes.draw(_scene(prompt)) for prompt in prompts]
        turned = prompts[1:] + prompts[:1]
        kind = {"vlm_alignment": VLMAlignment, "vlm_counting": VLMCounting, "vlm_questions": VLMQuestions}[name]
        judge = kind(model="emoji-llava", **given)
        start = time.perf_counter()
        found = [
            score(judge, images, [p.text for p in asked], [p.metadata for p in asked]) for asked in (prompts, turned)
        ]
        seconds = (time.perf_counter() - start) / 2 / count
        right, wrong = (scores.values for scores in found)
        missing = np.isnan(right).sum() + np.isnan(wrong).sum()
        print(
            f"{name}: {np.nanmean(right):.3f} against {np.nanmean(wrong):.3f}, {wins(right, wrong):.1%}, "
            f"{missing} missing, {seconds:.2f} s per picture; such as {next(iter(found[0].notes.values()))!r}"
        )


def _scene(prompt: Prompt) -> scenes.Scene:
    known = prompt.metadata
    return scenes.Scene(known["noun"], known.get("count", 1), known.get("activity"))


if __name__ == "__main__":
    {"layers": layers, "contrast": contrast, "embedded": embedded}[sys.argv[1]]()
