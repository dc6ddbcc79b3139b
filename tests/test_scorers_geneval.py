"""GenEval's checks against cases worked by hand; detectors and colours against their networks' raw numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import BertTokenizer, GroundingDinoImageProcessorPil, Owlv2ImageProcessorPil

import plain_clip
import tiny_parts as parts
import tiny_scorers as tiny
from tiller.rewards import score
from tiller.rewards.scorers.clauses import Detection, check, included, iou, kept, relations
from tiller.rewards.scorers.detector import Detector
from tiller.rewards.scorers.geneval import COLOURS, GenEval
from tiller.types import ConfigError, RewardError


def box(x: float, y: float, size: float = 10.0) -> tuple[float, float, float, float]:
    """A square around a point."""
    return (x - size / 2, y - size / 2, x + size / 2, y + size / 2)


def seen(*points: tuple[float, float]) -> list[Detection]:
    return [Detection(box(*point), 0.9) for point in points]


# ---- positions ----


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (box(0, 0), box(100, 0), {"left of"}),
        (box(100, 0), box(0, 0), {"right of"}),
        (box(0, 0), box(0, 100), {"above"}),
        (box(0, 100), box(0, 0), {"below"}),
        # the margin is .1 of both widths, 2 pixels here: at 4 half of the distance is left, and half is not enough
        (box(0, 0), box(3.9, 0), set()),
        (box(0, 0), box(4.0, 0), set()),
        (box(0, 0), box(4.1, 0), {"left of"}),
        (box(0, 0), box(1.9, 0), set()),
        (box(0, 0), box(0, 0), set()),
        # at 45 degrees both count: (100 - 2) / 141 = .69; at 1 : 2.2 only one: (45.5 - 2) / 110 = .40
        (box(0, 0), box(100, 100), {"left of", "above"}),
        (box(0, 0), box(100, 45.5), {"left of"}),
        # a wide one has a wide margin: .1 (100 + 10) = 11 of 21 leaves 10, less than half
        ((-50, -5, 50, 5), box(21, 0), set()),
        ((-50, -5, 50, 5), box(23, 0), {"left of"}),
    ],
)
def test_where_one_box_stands_from_another(first, second, expected) -> None:
    assert relations(first, second) == expected


def test_the_surest_boxes_count_and_each_object_once() -> None:
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((0, 0, 1, 1), (1, 1, 2, 2)) == iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    found = [Detection((0, 0, 2, 2), 0.5), Detection((1, 0, 3, 2), 0.8), Detection((9, 9, 11, 11), 0.3)]
    assert [one.score for one in kept(found, 0.2)] == [0.8, 0.5, 0.3]
    assert [one.score for one in kept(found, 0.3)] == [0.8, 0.5]  # above, not at, the threshold
    assert [one.score for one in kept(found, 0.2, overlap=0.33)] == [0.8, 0.3]
    assert [one.score for one in kept(found, 0.2, overlap=0.34)] == [0.8, 0.5, 0.3]
    many = [Detection(box(20 * i, 0), 0.5 + i / 100) for i in range(20)]
    assert [one.score for one in kept(many, 0.3)] == [many[i].score for i in range(19, 3, -1)]  # 16 of them


# ---- clauses ----


def verdict(metadata, found, colours=()):
    v = check(metadata, found, lambda name, detections: list(colours)[: len(detections)])
    return v.strict, pytest.approx(v.soft), len(v.faults)


@pytest.mark.parametrize(
    ("count", "strict", "soft"),
    [(0, 0, 0.0), (1, 0, 1 / 3), (2, 0, 2 / 3), (3, 1, 1.0), (4, 0, 2 / 3), (5, 0, 1 / 3), (7, 0, -1 / 3)],
)
def test_counting_excludes_too_many(count, strict, soft) -> None:
    metadata = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}]}
    assert verdict(metadata, {"cup": seen(*[(20 * i, 0) for i in range(count)])})[:2] == (strict, soft)


def test_one_object_may_come_with_more_of_it_in_the_strict_score() -> None:
    metadata = {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}
    assert verdict(metadata, {"cup": seen((0, 0), (50, 0))}) == (1, 0.0, 0)


def test_two_objects_are_the_mean_of_two_counts() -> None:
    metadata = {"include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}]}
    assert verdict(metadata, {"cup": seen((0, 0)), "dog": seen((9, 9))}) == (1, 1.0, 0)
    assert verdict(metadata, {"cup": seen((0, 0))}) == (0, 0.5, 1)
    assert verdict(metadata, {}) == (0, 0.0, 2)


@pytest.mark.parametrize(
    ("found", "colours", "expected"),
    [
        (1, ["red"], (1, 1.0, 0)),
        (1, ["blue"], (0, 0.5, 1)),  # count 1, colour 1 - |1 - 0|
        (0, [], (0, 0.0, 1)),  # count 0, colour 0
        (2, ["red", "red"], (1, 0.0, 0)),  # the soft score wants one: count 0, colour 0
        (2, ["blue", "red"], (0, 0.0, 1)),  # only the surest is looked at
    ],
)
def test_colours(found, colours, expected) -> None:
    metadata = {"include": [{"class": "cup", "count": 1, "color": "red"}]}
    assert verdict(metadata, {"cup": seen(*[(20 * i, 0) for i in range(found)])}, colours) == expected


def test_colours_of_several() -> None:
    metadata = {"include": [{"class": "cup", "count": 3, "color": "red"}]}
    found = {"cup": seen((0, 0), (20, 0), (40, 0))}
    assert verdict(metadata, found, ["red", "blue", "red"]) == (0, (1 + 2 / 3) / 2, 1)


POSITION = {"include": [{"class": "dog", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}]}


@pytest.mark.parametrize(
    ("dogs", "cups", "expected"),
    [
        ([(100, 0)], [(0, 0)], (1, 1.0, 0)),
        ([(0, 0)], [(100, 0)], (0, 2 / 3, 1)),  # counts 1 and 1, position 0
        ([], [(0, 0)], (0, 1 / 3, 2)),  # no dog: counts 0 and 1, position 0; both are faults
        ([(100, 0)], [], (0, 1 / 3, 1)),  # no cup: counts 1 and 0, position 0
        ([(100, 0)], [(0, 0), (200, 0)], (1, 1 / 3, 0)),  # strict looks at the surest cup, soft wants one
    ],
)
def test_positions(dogs, cups, expected) -> None:
    assert verdict(POSITION, {"dog": seen(*dogs), "cup": seen(*cups)}) == expected


@pytest.mark.parametrize(
    ("clause", "sentence"),
    [
        ({"class": "cup"}, "clause 1 of include needs a class and a count above 0"),
        ({"count": 1}, "needs a class and a count"),
        ({"class": "cup", "count": 0}, "needs a class and a count"),
        ({"class": "cup", "count": 1, "position": ["near", 0]}, "must be one of left of, right of, above, below"),
        ({"class": "cup", "count": 1, "position": ["above", 1]}, "the number of an earlier clause"),
    ],
)
def test_other_metadata_is_refused(clause, sentence) -> None:
    with pytest.raises(RewardError, match=sentence):
        included({"include": [{"class": "dog", "count": 1}, clause]})


# ---- detectors ----


def owl(folder: Path) -> None:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": tiny.WORDS + 2, "max_position_embeddings": 32, "bos_token_id": tiny.WORDS, **tower}
    text |= {"eos_token_id": tiny.WORDS + 1, "pad_token_id": tiny.WORDS + 1}
    vision = {"image_size": 32, "patch_size": 8, **tower}
    config = transformers.Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)
    tiny.spread(parts.seeded(transformers.Owlv2ForObjectDetection, config)).save_pretrained(folder)
    square = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    transformers.Owlv2Processor(square, parts.clip_tokenizer(length=32)).save_pretrained(folder)


def dino(folder: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz."
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    bert = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1]}
    swin |= {"window_size": 2, "out_features": ["stage1", "stage2", "stage3"]}
    config = transformers.GroundingDinoConfig(
        text_config={"model_type": "bert", "vocab_size": len(words), "max_position_embeddings": 40, **bert},
        backbone_config={"model_type": "swin", **swin},
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=9,
        max_text_len=40,
    )
    tiny.spread(parts.seeded(transformers.GroundingDinoForObjectDetection, config)).save_pretrained(folder)
    pictures = GroundingDinoImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=40)
    transformers.GroundingDinoProcessor(pictures, tokenizer).save_pretrained(folder)


@pytest.mark.parametrize(("make", "wording", "squared"), [(owl, "a photo of a cat", True), (dino, "cat.", False)])
def test_detections_are_the_networks_boxes_in_pixels(tmp_path, make, wording, squared) -> None:
    """Each class is asked for on its own; OWLv2 sees the picture in a square, Grounding DINO as it is."""
    if squared:
        pytest.importorskip("scipy")  # OWLv2's processor resizes with it where there is no torchvision
    make(tmp_path)
    model = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path, backend="pil")
    images = tiny.pictures((32, 32), (64, 48), (40, 64))
    detector = Detector(str(tmp_path), device="cpu", batch_size=1)
    found = detector.find([*images, images[0]], ["cat", "cat", "cat", "dog"])
    for image, detections in zip(images, found, strict=False):
        inputs = processor(images=[image], text=[[wording]] if squared else [wording], return_tensors="pt")
        with torch.no_grad():
            raw = model(**inputs)
        scores = raw.logits[0].sigmoid().max(-1).values
        side = max(image.size)
        wide, high = (side, side) if squared else image.size
        boxes = [
            (wide * (x - w / 2), high * (y - h / 2), wide * (x + w / 2), high * (y + h / 2))
            for x, y, w, h in raw.pred_boxes[0].tolist()
        ]
        expected = [(b, s) for b, s in zip(boxes, scores.tolist(), strict=True) if s > 0.01]
        assert len(expected) > 3
        np.testing.assert_allclose([one.score for one in detections], [s for _, s in expected], atol=1e-5)
        np.testing.assert_allclose([one.box for one in detections], [b for b, _ in expected], atol=1e-3)
    assert found[0] != found[3]  # it listens to the class
    together = Detector(str(tmp_path), device="cpu", batch_size=4).find([images[0]] * 2, ["cat", "dog"])
    for alone, batched in zip((found[0], found[3]), together, strict=True):
        np.testing.assert_allclose([o.score for o in batched], [o.score for o in alone], atol=1e-4)


# ---- the reward ----


class Fixed:
    """A detector that finds a cup left of a dog, the cup twice."""

    def find(self, images, classes):
        cups = [Detection((2, 2, 14, 14), 0.95), Detection((3, 2, 15, 14), 0.8)]
        dogs = [Detection((30, 2, 44, 16), 0.5), Detection((0, 0, 3, 3), 0.2)]
        return [{"cup": cups, "dog": dogs}.get(name, []) for name in classes]


@pytest.fixture
def reward(tmp_path) -> GenEval:
    tiny.clip(tmp_path)
    reward = GenEval(part="both", colour_model=str(tmp_path), device="cpu")
    reward.__dict__["detector"] = Fixed()
    return reward


def test_both_scores_of_a_batch(reward) -> None:
    counting = {"tag": "counting", "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}]}
    cups = {"include": [{"class": "cup", "count": 1}], "exclude": [{"class": "dog", "count": 1}]}
    metadata = [POSITION, counting, {}, cups]
    images = tiny.pictures(*[(48, 32)] * 4)
    scores = score(reward, images, ["a"] * 4, metadata)
    np.testing.assert_array_equal(scores.components["strict"], [1, 0, np.nan, 0])  # a dog at .5 does not count at .9
    np.testing.assert_array_equal(scores.components["soft"], [1, 0.5, np.nan, 1])
    assert "no include" in scores.reasons[2]
    one = GenEval(part="strict", colour_model="unused", overlap=1.0)
    one.__dict__["detector"] = Fixed()
    twice = {"include": [{"class": "cup", "count": 2}]}
    assert [s.value for s in one(images[:1], ["a"], [twice])] == [1]  # without `overlap`, the cup counts twice
    assert [s.value for s in GenEval.__call__(reward, images[:1], ["a"], [twice])["strict"]] == [0]
    with pytest.raises(RewardError, match="geneval scores single pictures, but was given a video of 2 frames"):
        reward([images[:2]], ["a"], [{}])


def test_the_colour_is_clips_likeliest_on_the_crop(reward) -> None:
    """The mean of three wordings at length 1, each normalised before, as GenEval's classifier has it."""
    weights = reward.clip.network.state_dict()
    [image] = tiny.pictures((48, 32), seed=3)
    boxes = [(2, 2, 14, 14), (30.4, 1.6, 60.0, 16.2), (-3.0, -3.0, 0.2, 0.2)]
    expected = []
    for left, top, right, bottom in [(2, 2, 14, 14), (30, 1, 48, 16), (0, 0, 1, 1)]:
        vector = plain_clip.picture(weights, tiny.clip_pixels(image.crop((left, top, right, bottom))))
        likeness = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} cup",
                f"a photo of a {colour}-colored cup",
                f"a photo of a {colour} object",
            ]
            tokens = [tiny.letters(text.replace("-", " - ")) for text in texts]
            tokens = [t if len(t) <= 24 else [*t[:23], t[-1]] for t in tokens]
            mean = sum(plain_clip.text(weights, t) for t in tokens) / 3
            likeness.append(float(vector @ mean / mean.norm()))
        expected.append(COLOURS[int(np.argmax(likeness))])
    assert reward.colours(image, "cup", [Detection(box, 0.9) for box in boxes]) == expected
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert reward([clear], ["a"], [{"include": [{"class": "cup", "count": 1}]}])["strict"][0].value == 1


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="geneval: part is 'hard'; name soft, strict or both"):
        GenEval(part="hard")
    with pytest.raises(ConfigError, match=r"geneval: the query 'a cat' has no \{\}"):
        GenEval(query="a cat")
