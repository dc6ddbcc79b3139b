"""BERTScore: closed forms, the definition written out token by token, and real architectures of transformers."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

import tiny_parts as parts
from tiller.rewards.judge.bertscore import Match, bertscore, inverse_document_frequency, rescaled
from tiller.rewards.judge.encoder import DEFAULT_MODEL, BertScorer, TextEncoder
from tiller.types import ConfigError
from tiny_bert import SIZES, tiny_bert

CANDIDATES = ["a cat rides a bike", "a dog", "The image shows two sheep playing chess on a table."]
REFERENCES = ["The image contains a cat riding a bike", "a dog", "The image contains a bee"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def deberta(tmp_path_factory) -> str:
    """A DeBERTa of three layers with disentangled attention, as the default model is built."""
    folder = tmp_path_factory.mktemp("deberta")
    letters = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *parts.LETTERS]
    tokenizer = transformers.DebertaTokenizer(
        vocab={letter: index for index, letter in enumerate(letters)}, merges=[], model_max_length=64
    )
    config = transformers.DebertaConfig(
        vocab_size=len(letters), relative_attention=True, pos_att_type=["c2p", "p2c"], initializer_range=0.5, **SIZES
    )
    parts.seeded(transformers.DebertaForSequenceClassification, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A CLIP, of which the text tower is read; its tokenizer has no [CLS] and [SEP]."""
    folder = tmp_path_factory.mktemp("clip")
    words = parts.clip_tokenizer()
    text = {**SIZES, "vocab_size": len(words), "eos_token_id": words.eos_token_id, "initializer_range": 0.5}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={"image_size": 8, "patch_size": 4, **SIZES}, projection_dim=8
    )
    parts.seeded(transformers.CLIPModel, config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    """A T5, of which the encoder is read."""
    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2)
    parts.seeded(transformers.T5ForConditionalGeneration, config).save_pretrained(folder)
    parts.t5_tokenizer().save_pretrained(folder)
    return str(folder)


# ---- the formula ----


def test_two_tokens_against_three_by_hand() -> None:
    candidate = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    reference = torch.tensor(
        [[1.0, 0.0], [3.0, 4.0], [-1.0, 0.0]]
    )  # cosines with the first: 1, .6, -1; second: 0, .8, 0
    found = bertscore(candidate, reference, torch.ones(2), torch.ones(3))
    assert found.precision == pytest.approx((1 + 0.8) / 2)
    assert found.recall == pytest.approx((1 + 0.8 + 0) / 3)
    assert found.f1 == pytest.approx(2 * 0.9 * 0.6 / 1.5)


def test_a_token_without_weight_may_be_matched_but_does_not_count() -> None:
    candidate = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    reference = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    found = bertscore(candidate, reference, torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert found.recall == pytest.approx(1.0)  # the reference's only counting token meets the candidate's silent one
    assert found.precision == pytest.approx(math.sqrt(0.5))
    found = bertscore(candidate, reference, torch.zeros(2), torch.tensor([1.0, 0.0]))
    assert (found.recall, math.isnan(found.precision), math.isnan(found.f1)) == (pytest.approx(1.0), True, True)


def test_rescaling_moves_the_baseline_to_zero_and_one_to_one() -> None:
    assert rescaled(Match(0.6, 1.0, 0.8), (0.6, 0.5, 0.4)) == pytest.approx((0.0, 1.0, 2 / 3))


def test_inverse_document_frequency_is_smoothed_by_one() -> None:
    weight = inverse_document_frequency([[1, 2, 2, 3], [1, 3], [1]])
    assert [weight(token) for token in (1, 2, 3, 4)] == pytest.approx([0, math.log(2), math.log(4 / 3), math.log(4)])


# ---- with models ----


def written_out(tokenizer, model, layer: int, candidate: str, reference: str) -> tuple[float, float, float]:
    """The paper's equations with loops over tokens; one text at a time, so nothing is padded."""
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    ends = ends if any(ends) else (tokenizer.bos_token_id, tokenizer.eos_token_id)

    def read(text: str):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[layer][0].double()
        ids = inputs["input_ids"][0].tolist()
        return [(token not in ends, state) for token, state in zip(ids, states, strict=True)]

    def cosine(a, b) -> float:
        return float((a * b).sum() / math.sqrt(float((a * a).sum()) * float((b * b).sum())))

    ours, theirs = read(candidate), read(reference)
    best = [max(cosine(a, b) for _, b in theirs) for counts, a in ours if counts]
    precision = sum(best) / len(best)
    best = [max(cosine(a, b) for _, a in ours) for counts, b in theirs if counts]
    recall = sum(best) / len(best)
    return precision, recall, 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("kind", ["bert", "deberta", "clip", "t5"])
@pytest.mark.parametrize("layer", [1, 3])
def test_scores_equal_the_definition_written_out(kind, layer, request) -> None:
    folder = request.getfixturevalue(kind)
    scorer = BertScorer(TextEncoder(folder, layer=layer, batch_size=2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = {"clip": lambda: model.text_model, "t5": model.get_encoder}.get(kind, lambda: model)()
    for match, pair in zip(scorer.score(CANDIDATES, REFERENCES), zip(CANDIDATES, REFERENCES, strict=True), strict=True):
        assert match == pytest.approx(written_out(tokenizer, model, layer, *pair), abs=1e-5)


def test_identical_texts_score_one_and_blanks_around_do_not_count(bert) -> None:
    same = BertScorer(TextEncoder(bert, layer=2)).score([" a dog "], ["a dog"])[0]
    assert same == pytest.approx((1, 1, 1), abs=1e-6)


def test_an_empty_text_has_no_score(bert) -> None:
    scorer = BertScorer(TextEncoder(bert, layer=2))
    assert all(map(math.isnan, scorer.score([""], ["a dog"])[0]))
    assert all(map(math.isnan, scorer.score(["a dog"], [" "])[0]))


def test_layers_above_are_dropped(bert) -> None:
    encoder = TextEncoder(bert, layer=2)
    assert len(encoder._parts[1].encoder.layer) == 2


def test_frequencies_weigh_the_tokens(bert) -> None:
    """With one text known to hold everything but "b", only "b" counts, so recall is the best match of "b" alone."""
    plain = TextEncoder(bert, layer=2)
    weighted = BertScorer(plain, documents=("a",)).score(["a"], ["a b"])[0]
    candidate, reference = plain.encode(["a", "a b"])
    cosines = torch.nn.functional.cosine_similarity(candidate.embeddings, reference.embeddings[2][None])
    assert weighted.recall == pytest.approx(float(cosines.max()), abs=1e-6)
    assert math.isnan(weighted.precision)  # nothing of the candidate weighs anything
    assert math.isnan(BertScorer(plain, documents=("a b",)).score(["a"], ["a b"])[0].recall)


def test_long_texts_are_cut_to_what_the_model_takes(bert) -> None:
    tokens = TextEncoder(bert, layer=1).encode(["a " * 500])[0]
    assert len(tokens.ids) == 64


def test_a_layer_must_be_known_and_there(bert) -> None:
    with pytest.raises(ConfigError, match="set layer"):
        TextEncoder(bert).encode(["a"])
    with pytest.raises(ConfigError, match=r"has 3 layers, so layer cannot be 4; give 0 to 3"):
        TextEncoder(bert, layer=4).encode(["a"])


def test_the_defaults_are_the_papers() -> None:
    encoder = BertScorer().encoder
    assert (encoder.model, encoder._depth) == (DEFAULT_MODEL, 40)
    assert DEFAULT_MODEL == "microsoft/deberta-xlarge-mnli"
