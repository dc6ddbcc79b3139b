"""The shipped judge against scenes whose truth is known, and the two rewards made of it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tiller.emoji import judge as judging
from tiller.emoji import scenes
from tiller.emoji.judge import CLASSES, Judge, alignment, as_tensor, gold_accuracy, stated, truth
from tiller.emoji.scenes import Facts, Scene, draw
from tiller.emoji.words import NOUNS
from tiller.rewards import gradient, resolve, score
from tiller.rewards.contract import reward_name

needs_font = pytest.mark.skipif(not scenes.FONT.exists(), reason="the emoji font is not installed")
COUNT = 400


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fresh():
    """Scenes that no training saw, their pictures (N, 3, 64, 64), their truths."""
    rng = np.random.default_rng(20_260_000)
    kinds = list(scenes.KINDS)
    drawn = [scenes.sample(rng, kinds[i % len(kinds)]) for i in range(COUNT)]
    return as_tensor([draw(s) for s in drawn]), [truth(s) for s in drawn]


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    small = F.interpolate(pictures, size=36, mode="bilinear", antialias=True)
    return F.interpolate(small, size=64, mode="bilinear")


def noisy(pictures: torch.Tensor) -> torch.Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(3))
    return (pictures + 0.15 * noise).clamp(-1, 1)


@needs_font
@pytest.mark.parametrize("spoil", [lambda x: x, noisy, blurred], ids=["clean", "noisy", "blurred"])
def test_at_least_99_percent_of_each_fact_is_read_right(fresh, spoil):
    pictures, truths = fresh
    with torch.inference_mode():
        read = {fact: logs.argmax(-1) for fact, logs in Judge.load()(spoil(pictures)).items()}
    for fact in CLASSES:
        hits = [int(read[fact][i]) == t[fact] for i, t in enumerate(truths) if fact in t]
        assert len(hits) >= 20, fact
        assert np.mean(hits) >= 0.99, f"{fact}: {np.mean(hits):.4f} of {len(hits)}"


@needs_font
def test_accuracy_is_1_for_the_truth_and_0_for_each_false_statement():
    cats = draw(Scene("cat", count=3, colour="blue", jitter=4))
    prompts = {
        "three cats on a blue background": 1.0,
        "three dogs": 0.0,
        "two cats": 0.0,
        "three cats on a red background": 0.0,
        "a unicorn": None,
    }
    scores = gold_accuracy([cats] * 5, list(prompts), [{}] * 5)
    assert scores == list(prompts.values())
    logs = alignment([cats] * 5, list(prompts), [{}] * 5)
    assert logs[4] is None
    assert logs[0] > -0.1
    assert all(logs[i] < logs[0] - 1 for i in (1, 2, 3))
    assert all(value >= judging.FLOOR for value in logs[:4])


@needs_font
def test_two_nouns_are_read_whichever_is_named_first():
    picture = draw(Scene("dog", other="cat", relation="left of", jitter=2))
    prompts = ["a dog left of a cat", "a cat right of a dog", "a cat left of a dog", "a dog above a cat"]
    assert gold_accuracy([picture] * 4, prompts, [{}] * 4) == [1.0, 1.0, 0.0, 0.0]


@needs_font
def test_an_unseen_activity_is_the_animal_with_the_object():
    picture = draw(Scene("fox", activity="playing guitar", jitter=1))
    assert gold_accuracy([picture, picture], ["a fox playing guitar", "a fox playing chess"], [{}, {}]) == [
        1.0,
        0.0,
    ]


@needs_font
def test_pictures_of_any_size_and_none_at_all():
    scene = Scene("tiger", colour="green", jitter=9)
    large = draw(scene, size=64).resize((128, 128), Image.Resampling.BICUBIC).convert("RGBA")
    assert gold_accuracy([large], ["a tiger on a green background"], [{}]) == [1.0]
    assert gold_accuracy([], [], []) == []


def test_labels_are_canonical():
    one = stated(Facts("dog", 1, other="cat", relation="left of"))
    two = stated(Facts("cat", 1, other="dog", relation="right of"))
    assert one == two == {"first": NOUNS.index("cat"), "second": NOUNS.index("dog"), "relation": 1, "count": 0}
    assert stated(Facts()) == {}
    assert stated(Facts("cat", 1, activity="reading a book"))["second"] == NOUNS.index("book")
    seen = truth(Scene("cat", colour="red"))
    assert seen["second"] == CLASSES["second"].index("nothing")
    assert (seen["size"], seen["place"]) == (2, 4)
    assert "size" not in truth(dataclasses.replace(Scene("cat"), count=2))


def test_the_judge_is_small():
    assert judging.WEIGHTS.stat().st_size <= 3_000_000


# ---- the alignment reward of tensors, with a gradient ----

SCENES = [
    (Scene("cat", count=3, colour="blue", jitter=4), "three cats on a blue background"),
    (Scene("dog", other="cat", relation="left of", jitter=2), "a cat left of a dog"),
    (Scene("fox", activity="playing guitar", jitter=1), "a fox playing chess"),
    (Scene("fox", jitter=1), "nothing that is known"),
]


@needs_font
@pytest.mark.parametrize("size", [48, 64, 100, 128])
def test_tensors_are_scored_as_pictures_are(size):
    pictures = [draw(scene).resize((size, size)) for scene, _ in SCENES]
    prompts = [prompt for _, prompt in SCENES]
    as_pictures = alignment(pictures, prompts, [{}] * 4)
    as_tensors = alignment(gradient.as_tensor(pictures), prompts, [{}] * 4)
    assert as_pictures[3] is None
    assert math.isnan(as_tensors[3])
    # one pixel in thousands differs by one level: PIL resizes in fixed point
    assert as_tensors[:3].tolist() == pytest.approx(as_pictures[:3], abs=1e-5 if size == 64 else 1e-3)
    scores = score(alignment, pictures, prompts, [{}] * 4)
    assert scores.values[:3].tolist() == as_tensors[:3].tolist()
    assert not scores.valid[3]


@needs_font
@pytest.mark.parametrize("size", [64, 128])
def test_tensors_are_resized_as_pil_does(size):
    picture = draw(SCENES[0][0], size=64).resize((size, size), Image.Resampling.BICUBIC)
    ours = judging.fitted(gradient.as_tensor([picture])) * 255
    theirs = (as_tensor([picture]) + 1) * 127.5
    assert float((ours - theirs).abs().max()) <= 1.001
    assert float((ours - theirs).abs().mean()) < 0.01


@needs_font
def test_the_gradient_of_alignment_is_the_finite_difference():
    """Along its own direction, in a half-tone picture that is sure of nothing."""
    pictures = (gradient.as_tensor([draw(SCENES[1][0])]) * 0.3 + 0.3).requires_grad_()
    prompts = [SCENES[1][1]]
    alignment(pictures, prompts, [{}]).sum().backward()
    direction = pictures.grad / pictures.grad.norm()
    with torch.no_grad():
        up, down = (float(alignment(pictures + size * direction, prompts, [{}])) for size in (1e-2, -1e-2))
    assert float(pictures.grad.norm()) == pytest.approx((up - down) / 2e-2, rel=0.05)


def test_alignment_says_that_it_has_a_gradient():
    assert gradient.differentiable(resolve("emoji_alignment"))
    assert reward_name(alignment) == "alignment"
    assert alignment([], [], []) == []
