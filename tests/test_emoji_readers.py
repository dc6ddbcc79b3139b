"""The shipped CLIP and LLaVA: small plain folders of transformers that read most of what is in a scene."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPProcessor

from tiller import emoji
from tiller.emoji import dialogues, scenes
from tiller.emoji.measure_readers import ClipReader, LlavaReader, alternatives, facts_to_tell, fresh, right_facts
from tiller.emoji.scenes import Scene
from tiller.emoji.words import NOUNS, UNSEEN_ACTIVITIES
from tiller.types import TillerError


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_both_together_are_at_most_25_megabytes_and_no_pickle():
    files = [p for name in emoji.READERS for p in emoji.path(name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 25_000_000
    assert {p.suffix for p in files} == {".json", ".jinja", ".safetensors"}


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(TillerError, match="emoji-clip and emoji-llava"):
        emoji.path("emoji-blip")


def test_stock_transformers_loads_clip_as_it_does_the_hubs():
    folder = emoji.path("emoji-clip")
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    texts = ["a cat playing chess", "a dog washing dishes", "three cats", "a cat washing dishes"]
    image = scenes.draw(Scene("cat", activity="washing dishes", colour="blue", jitter=1))
    with torch.inference_mode():
        scores = model(**processor(text=texts, images=image, return_tensors="pt", padding=True)).logits_per_image[0]
    assert scores.argmax() == 3


def test_clip_finds_the_noun_of_most_scenes_and_the_unseen_activity():
    reader = ClipReader(emoji.path("emoji-clip"))
    alone = fresh("alone", 48)
    nouns = reader.choose([scenes.draw(s) for s in alone], [alternatives(s, "noun", NOUNS) for s in alone])
    assert sum(NOUNS[n] == s.noun for n, s in zip(nouns, alone, strict=True)) >= 38  # chance is below 1
    busy = fresh("activity", 48, UNSEEN_ACTIVITIES)
    found = reader.choose(
        [scenes.draw(s) for s in busy], [alternatives(s, "activity", UNSEEN_ACTIVITIES) for s in busy]
    )
    assert sum(UNSEEN_ACTIVITIES[f] == s.activity for f, s in zip(found, busy, strict=True)) >= 38  # chance is 6


def test_stock_transformers_asks_llava_as_it_does_the_hubs():
    folder = emoji.path("emoji-llava")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this image?"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    inputs = processor(text=text, images=scenes.draw(Scene("zebra", count=3, jitter=2)), return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs.input_ids.shape[1] :]
    assert processor.decode(written, skip_special_tokens=True) == "three zebras"


def test_llava_describes_most_scenes_and_answers_yes_and_no():
    reader = LlavaReader(emoji.path("emoji-llava"))
    chosen = fresh("count", 24) + fresh("activity", 24, UNSEEN_ACTIVITIES)
    images = [scenes.draw(scene) for scene in chosen]
    shares = right_facts([facts_to_tell(s) for s in chosen], reader.answers(images, [dialogues.DETAILED] * 48))
    assert min(shares["noun"], shares["activity"], shares["count"], shares["background"]) >= 0.7, shares
    true = reader.margins(images, [scenes.caption(s) for s in chosen])
    false = reader.margins(images, [scenes.caption(Scene("car", count=3)) for s in chosen])
    assert sum(t > f for t, f in zip(true, false, strict=True)) >= 36


def test_the_share_of_right_facts_by_hand():
    wanted = [facts_to_tell(Scene("cat", colour="red")), facts_to_tell(Scene("dog", count=2, colour="blue"))]
    shares = right_facts(wanted, ["a cat on a red background", "three dogs on a blue background"])
    assert shares == {"all": 0.5, "noun": 1.0, "count": 0.5, "background": 1.0}
