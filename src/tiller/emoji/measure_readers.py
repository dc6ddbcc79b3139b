"""Measures the models that read pictures of the embedded world, on fresh scenes and on pictures that a model drew.

python -m tiller.emoji.measure_readers [--clip FOLDER] [--llava FOLDER] [--count 500] [--drawn 128]

A CLIP chooses among captions that differ in one fact; a LLaVA describes, says Yes or No, and counts. Of pictures that
the model `emoji` drew, the gold judge's reading stands for the truth.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from tiller import emoji
from tiller.emoji import dialogues, measure, scenes, wording
from tiller.emoji.judge import CLASSES, Judge, stated, truth
from tiller.emoji.scenes import Scene
from tiller.emoji.words import ACTIVITIES, ANIMALS, COLOURS, NOUNS, UNSEEN_ACTIVITIES, plural

SEED = 12_345  # of the fresh scenes, which no training draws


def fresh(kind: str, count: int, activities: tuple[str, ...] = wording.EVERY_ACTIVITY) -> list[Scene]:
    """Scenes of one kind that no training saw, the same each time."""
    rng = np.random.default_rng((SEED, list(scenes.KINDS).index(kind), len(activities)))
    return [scenes.sample(rng, kind, activities) for _ in range(count)]


class ClipReader:
    """Scores of captions by a CLIP."""

    def __init__(self, folder: str | Path) -> None:
        self.model: Any = CLIPModel.from_pretrained(folder).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.known: dict[str, Tensor] = {}  # caption -> (D,)

    @torch.inference_mode()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) of unit length."""
        pixels = self.processor.image_processor(list(images), return_tensors="pt").pixel_values
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    @torch.inference_mode()
    def captions(self, texts: Sequence[str]) -> Tensor:
        """(N, D) of unit length."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for start in range(0, len(new), 256):
            part = new[start : start + 256]
            tokens = self.processor.tokenizer(part, padding=True, return_tensors="pt")
            vectors = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
            self.known.update(zip(part, vectors, strict=True))
        return torch.stack([self.known[text] for text in texts])

    def choose(self, images: Sequence[Image.Image], choices: Sequence[Sequence[str]]) -> list[int]:
        """For each picture the index of its best caption."""
        seen = self.pictures(images)
        return [int((self.captions(texts) @ vector).argmax()) for vector, texts in zip(seen, choices, strict=True)]


def alternatives(scene: Scene, fact: str, values: Sequence[object]) -> list[str]:
    """The scene's caption with each of these values of one fact, the background named if it is that."""
    told = replace(scene, colour_said=fact == "colour", numeral=fact == "count" or scene.count > 1)
    return [scenes.caption(replace(told, **{fact: value})) for value in values]  # type: ignore[arg-type]


TESTS: dict[str, tuple[str, str, tuple[object, ...], tuple[str, ...]]] = {
    "noun (of 69)": ("alone", "noun", NOUNS, ()),
    "background (of 8)": ("colour", "colour", COLOURS, ()),
    "count (of 4)": ("count", "count", (1, 2, 3, 4), ()),
    "animal that does something (of 45)": ("activity", "noun", ANIMALS, wording.EVERY_ACTIVITY),
    "activity drawn by emoji (of 11)": ("activity", "activity", wording.EVERY_ACTIVITY, ACTIVITIES),
    "activity unseen by emoji (of 11)": ("activity", "activity", wording.EVERY_ACTIVITY, UNSEEN_ACTIVITIES),
}
"""What a CLIP chooses: kind of scene, fact, its values, activities."""


def choosing(reader: ClipReader, count: int) -> Iterator[tuple[str, float]]:
    """Share of fresh scenes of which the CLIP prefers the true caption, for every test."""
    for name, (kind, fact, values, activities) in TESTS.items():
        chosen = fresh(kind, count, activities or wording.EVERY_ACTIVITY)
        best = reader.choose([scenes.draw(s) for s in chosen], [alternatives(s, fact, values) for s in chosen])
        yield name, float(np.mean([values[b] == getattr(s, fact) for s, b in zip(chosen, best, strict=True)]))
    rng = np.random.default_rng(SEED)
    true = [wording.said(wording.any_scene(rng), rng) for _ in range(count)]
    pairs = [(scenes.caption(s), scenes.caption(wording.wrong(s, rng))) for s in true]
    best = reader.choose([scenes.draw(s) for s in true], pairs)
    yield "caption against one with a fact changed (of 2)", float(np.mean([b == 0 for b in best]))


class LlavaReader:
    """Answers of a LLaVA."""

    def __init__(self, folder: str | Path) -> None:
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Any:
        """A batch for the model, one question for each picture."""
        parts = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
        texts = [
            self.processor.apply_chat_template([{"role": "user", "content": part}], add_generation_prompt=True)
            for part in parts
        ]
        return self.processor(text=texts, images=list(images), return_tensors="pt", padding=True)

    @torch.inference_mode()
    def answers(self, images: Sequence[Image.Image], questions: Sequence[str], tokens: int = 16) -> list[str]:
        """Greedy answers."""
        found: list[str] = []
        for start in range(0, len(images), 64):
            part = slice(start, start + 64)
            inputs = self.inputs(images[part], questions[part])
            written = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            found += self.processor.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return found

    @torch.inference_mode()
    def margins(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """log P(Yes) - log P(No) when asked whether the picture shows its caption."""
        yes, no = (self.processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        found: list[float] = []
        for start in range(0, len(images), 64):
            questions = [dialogues.TRUE_OR_FALSE[0].format(text) for text in captions[start : start + 64]]
            logits = self.model(**self.inputs(images[start : start + 64], questions)).logits[:, -1]
            found += (logits[:, yes] - logits[:, no]).tolist()
        return found


FACTS = {"first": "noun", "second": "activity", "count": "count", "colour": "background"}


def right_facts(wanted: Sequence[dict[str, int]], texts: Sequence[str]) -> dict[str, float]:
    """Share of texts that state each wanted fact rightly, and ("all") all of them together."""
    hits: dict[str, list[bool]] = {"all": []}
    for facts, text in zip(wanted, texts, strict=True):
        told = stated(scenes.parse(text))
        right = {name: told.get(fact) == facts[fact] for fact, name in FACTS.items() if fact in facts}
        hits["all"].append(all(right.values()))
        for name, value in right.items():
            hits.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in hits.items()}


def facts_to_tell(scene: Scene) -> dict[str, int]:
    """{fact: class} that a full description of the scene states."""
    facts = truth(scene)
    if not scene.activity:
        facts.pop("second", None)
    return facts


def reading(reader: LlavaReader, count: int) -> Iterator[tuple[str, dict[str, float]]]:
    """What a LLaVA gets right of fresh scenes: descriptions by kind, Yes or No, and counting."""
    kinds = {
        "alone": fresh("alone", count),
        "background": fresh("colour", count),
        "count": fresh("count", count),
        "activity drawn by emoji": fresh("activity", count, ACTIVITIES),
        "activity unseen by emoji": fresh("activity", count, UNSEEN_ACTIVITIES),
    }
    for name, chosen in kinds.items():
        texts = reader.answers([scenes.draw(s) for s in chosen], [dialogues.DETAILED] * count)
        yield f"describes: {name}", right_facts([facts_to_tell(s) for s in chosen], texts)
    yield "Yes or No", yes_or_no(reader, count)
    chosen = fresh("count", count)
    questions = [dialogues.HOW_MANY_DIGITS.format(plural(s.noun)) for s in chosen]
    found = reader.answers([scenes.draw(s) for s in chosen], questions)
    yield "counts", {"right": float(np.mean([a == str(s.count) for a, s in zip(found, chosen, strict=True)]))}


def yes_or_no(reader: LlavaReader, count: int) -> dict[str, float]:
    """Accuracy on true captions and on false ones with a single fact changed, as many of each, and on their order.

    "ranked" is the share of pictures of which the true caption has the higher log P(Yes) - log P(No).
    """
    rng = np.random.default_rng(SEED)
    chosen = [wording.said(wording.any_scene(rng), rng) for _ in range(count)]
    images = [scenes.draw(scene) for scene in chosen]
    true = np.array(reader.margins(images, [scenes.caption(scene) for scene in chosen]))
    false = np.array(reader.margins(images, [scenes.caption(wording.wrong(scene, rng)) for scene in chosen]))
    yes, no = float((true > 0).mean()), float((false <= 0).mean())
    return {"true captions": yes, "false captions": no, "both": (yes + no) / 2, "ranked": float((true > false).mean())}


def drawn(count: int) -> Iterator[tuple[str, list[Image.Image], list[Scene], list[dict[str, int]]]]:
    """For three kinds of prompt: pictures by the model `emoji`, what was asked for, and what the judge sees."""
    pipe, judge = measure.load("emoji"), Judge.load()
    for kind in ("colour", "count", "activity"):
        prompts = measure.prompts_of(kind, count)
        images = measure.paint(pipe, prompts, guidance=4.0, steps=20)
        read = {fact: logs.argmax(-1).tolist() for fact, logs in judge.facts(images).items()}
        told = ("first", "second", "count", "colour") if kind == "activity" else ("first", "count", "colour")
        facts = [{fact: read[fact][i] for fact in told} for i in range(count)]
        yield kind, images, [asked(prompt) for prompt in prompts], facts


def asked(prompt: str) -> Scene:
    """A scene with the noun, the count and the activity that a prompt of this world names."""
    facts = scenes.parse(prompt)
    return Scene(facts.noun or "cat", facts.count or 1, facts.activity)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", default="emoji-clip", help="emoji-clip, a folder, or none")
    parser.add_argument("--llava", default="emoji-llava", help="emoji-llava, a folder, or none")
    parser.add_argument("--count", type=int, default=500, help="scenes of each kind")
    parser.add_argument("--drawn", type=int, default=128, help="pictures of the model emoji, of each kind; 0 for none")
    options = parser.parse_args()
    folders = {n: emoji.path(n) if n in emoji.READERS else n for n in (options.clip, options.llava) if n != "none"}
    clip = ClipReader(folders[options.clip]) if options.clip in folders else None
    llava = LlavaReader(folders[options.llava]) if options.llava in folders else None
    if clip:
        for name, share in choosing(clip, options.count):
            print(f"{name:50}{100 * share:.1f} %", flush=True)
    if llava:
        for name, shares in reading(llava, options.count):
            _show(name, shares)
    for kind, images, wanted, facts in drawn(options.drawn) if options.drawn else ():
        if clip:
            nouns = clip.choose(images, [alternatives(scene, "noun", NOUNS) for scene in wanted])
            same = float(np.mean([CLASSES["first"][f["first"]] == NOUNS[n] for f, n in zip(facts, nouns, strict=True)]))
            _show(f"drawn, {kind}: CLIP's noun is the judge's", {"noun": same})
        if llava:
            told = llava.answers(images, [dialogues.DETAILED] * len(images))
            _show(f"drawn, {kind}: LLaVA describes as the judge", right_facts(facts, told))


def _show(name: str, shares: dict[str, float]) -> None:
    print(f"{name:50}" + "  ".join(f"{key} {100 * share:.1f} %" for key, share in shares.items()), flush=True)


if __name__ == "__main__":
    main()
