"""Prompts by a language model: what is kept of its lines, what is held out, and the command, with writers by script."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers

import tiny_parts as parts
from tiller import cli, config, prompts
from tiller.commands.prompts import Wanted, kept_apart
from tiller.prompts import synthesis
from tiller.prompts.closeness import Closeness, Known, edit_distance, meaning, normalised, vectors, wording
from tiller.prompts.synthesis import Rules, Sieve, invent, lines, vary
from tiller.prompts.writer import LocalWriter
from tiller.rewards.judge.encoder import TextEncoder
from tiller.rewards.serving.persistence import Failure
from tiller.types import ConfigError, Prompt
from tiny_bert import tiny_bert
from tiny_viewers import TEXT


@dataclass
class Script:
    """A writer that answers each request with the next of its texts."""

    texts: list
    asked: list = field(default_factory=list)

    def ask(self, images, questions):
        assert images is None
        self.asked += questions
        return [self.texts.pop(0) if self.texts else "" for _ in questions]


# ---- closeness ----


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)],
)
def test_edit_distance(first, second, distance) -> None:
    assert edit_distance(first, second) == distance
    assert edit_distance(second, first) == distance


def test_wording_counts_words() -> None:
    assert normalised("The 2 Cats, on a mat!") == ("two", "cats", "on", "mat")
    assert wording("a cat on a mat", "A cat on a mat.") == 1.0
    assert wording("a cat on a mat", "a dog on a mat") == pytest.approx(4 / 5)
    assert wording("two cats", "2 cats") == 1.0
    assert wording("a cat", "whales swim far") == 0.0


def test_meaning_is_a_cosine_distance_in_units_of_what_is_apart() -> None:
    one = torch.tensor([1.0, 0.0])
    others = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    assert meaning(one, others).tolist() == pytest.approx([0.0, 0.4, 1.0, 1.0])
    assert meaning(one, others, apart=0.8).tolist() == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_a_prompt_is_close_by_words_from_the_share_on() -> None:
    known = Known(Closeness(wording=0.75))
    known.add(["a small red cat sleeps"])
    assert known.closest("The small red cat sleeps!") == "a small red cat sleeps"
    assert known.closest("a small red dog sleeps") == "a small red cat sleeps"  # 3 of 4 words
    assert known.closest("a small blue dog sleeps") is None
    assert Known(Closeness()).closest("anything") is None


def test_a_prompt_is_close_by_meaning_where_there_is_an_encoder(tmp_path) -> None:
    encoder = TextEncoder(tiny_bert(tmp_path), layer=2)
    one, other = vectors(encoder, ["a cat on a mat", "seven whales"])
    distance = float(1 - one @ other)
    assert distance > 0.01
    for limit, close in ((distance + 1e-4, "a cat on a mat"), (distance - 1e-4, None)):
        known = Known(Closeness(wording=1.0, meaning=limit, encoder=encoder))
        known.add(["a cat on a mat"])
        assert known.closest("seven whales") == close


# ---- lines and rules ----


def test_a_models_lines_are_freed_of_what_is_no_prompt() -> None:
    answer = 'Here are some prompts:\n\n1. A cat on a mat.\n- "a dog \x1b[31m at work"\n3) two sheep\n** a bee **\n\n'
    assert list(lines(answer)) == ["A cat on a mat", "a dog [31m at work", "two sheep", "a bee"]
    assert list(lines("2 cats\n4x4 cars")) == ["2 cats", "4x4 cars"]  # a number that counts stays


def test_only_new_well_formed_prompts_far_from_held_out_ones_are_kept() -> None:
    sieve = Sieve(Rules(longest=5, forbidden=("zebra",)), held_out=["a tiger at night"], known=["a cat"])
    offered = {
        "a dog": "",
        "A dog!": "close to another prompt",
        "the cat": "close to another prompt",
        "Tiger at night": "close to a held-out prompt",
        "two zebras": "holds a word that is held out",
        "a very long prompt with many words": "too long",
        "the": "empty",
    }
    for text, objection in offered.items():
        assert sieve.objection(text) == objection
        assert sieve.offer(text, {}) is (not objection)
    assert [prompt.text for prompt in sieve.harvest.prompts] == ["a dog"]
    assert sieve.harvest.refused["close to another prompt"] == 2


def test_inventing_goes_on_until_there_are_enough_and_says_where_from() -> None:
    writer = Script(["a cat\na dog\na cat", Failure("timed out"), "a cow\na bee\na fox"])
    harvest = invent(writer, Sieve(Rules()), "animals", 4, ["a hen"], {"model": "m"}, per_request=3)
    assert [prompt.text for prompt in harvest.prompts] == ["a cat", "a dog", "a cow", "a bee"]
    assert harvest.prompts[2].metadata == {"synthesis": {"model": "m", "topic": "animals", "request": 2}}
    assert harvest.refused == {"close to another prompt": 1, "no answer: timed out": 1}
    assert "Write 3 prompts" in writer.asked[0]
    assert "In the style of: a hen." in writer.asked[0]


def test_inventing_ends_if_nothing_new_comes() -> None:
    writer = Script(["a cat"] * 9)
    assert len(invent(writer, Sieve(Rules()), "animals", 4, rounds=5).prompts) == 1
    assert len(writer.asked) == 5


def test_variations_keep_the_metadata_and_name_their_source() -> None:
    source = [Prompt("a cat on a mat", {"noun": "cat"}), Prompt("a dog", {"noun": "dog"})]
    writer = Script(["A cat on a mat\nA mat with a cat on it\nA cat sits upon a mat\na third one", "a hound"])
    harvest = vary(writer, Sieve(Rules(), known=[p.text for p in source], paraphrases=True), source, 2, {"model": "m"})
    assert [prompt.text for prompt in harvest.prompts] == ["A mat with a cat on it", "A cat sits upon a mat", "a hound"]
    assert harvest.prompts[2].metadata == {"noun": "dog", "synthesis": {"model": "m", "from": "a dog"}}
    assert "a cat on a mat" in writer.asked[0]


def test_variations_may_mean_the_same_as_their_source_but_not_as_what_is_held_out(tmp_path) -> None:
    closeness = Closeness(wording=1.0, meaning=2.0, encoder=TextEncoder(tiny_bert(tmp_path), layer=2))  # all alike
    assert Sieve(Rules(closeness=closeness), known=["a cat"], paraphrases=True).objection("a kitten") == ""
    assert Sieve(Rules(closeness=closeness), known=["a cat"]).objection("a kitten") == "close to another prompt"
    held = Sieve(Rules(closeness=closeness), held_out=["a cat"], paraphrases=True)
    assert held.objection("a kitten") == "close to a held-out prompt"


def test_what_is_written_is_read_again_as_prompts(tmp_path) -> None:
    file = tmp_path / "sub" / "new.jsonl"
    written = [Prompt("a cat “at home”", {"noun": "cat", "synthesis": {"model": "m"}}), Prompt("ein Bär")]
    synthesis.write(written, file)
    assert prompts.load(str(file)) == written
    with pytest.raises(ConfigError, match="is there already"):
        synthesis.write(written, file)
    with pytest.raises(ConfigError, match="no prompt was kept"):
        synthesis.write([], tmp_path / "none.jsonl")


def test_of_a_built_in_set_the_unseen_is_kept_apart_and_the_trained_sample_is_not() -> None:
    texts, forbidden = kept_apart("animal_activities")
    assert "a zebra washing dishes" in texts
    assert "a horse washing dishes" not in texts
    assert {"zebra", "rocket", "playing guitar"} <= set(forbidden)
    assert not {"horse", "washing dishes"} & set(forbidden)
    assert Sieve(Rules(forbidden=tuple(forbidden))).objection("a cat playing guitar") == "holds a word that is held out"


# ---- the command ----


def test_the_command_writes_new_prompts(tmp_path, monkeypatch, capsys) -> None:
    writer = Script(["a fox at work\na zebra at work\na fox at work"])
    monkeypatch.setattr("tiller.commands.prompts.make_writer", lambda *settings: writer)
    file = tmp_path / "new.jsonl"
    words = ["prompts", "new", str(file), "topic=animals at work", "count=1", "model=m", "held_out=animals"]
    assert cli.main(words) == 0
    assert json.loads(file.read_text())["synthesis"]["topic"] == "animals at work"
    assert cli.main(["prompts", "new", str(tmp_path / "b.jsonl"), "topic=x", "count=5", "model=m"]) == 2
    assert "no prompt was kept" in capsys.readouterr().err


def test_the_command_changes_words_without_any_model(tmp_path) -> None:
    file = tmp_path / "contrast.jsonl"
    assert cli.main(["prompts", "contrast", str(file), "source=animal_counts", "per_prompt=3"]) == 0
    read = prompts.load(str(file))
    assert len(read) == len(prompts.load("animal_counts"))
    assert all(len(prompt.metadata["contrast"]) == 3 for prompt in read)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["new", "a.txt", "topic=x", "model=m"], "must end in .jsonl"),
        (["new", "a.jsonl", "model=m"], "need a topic"),
        (["new", "a.jsonl", "topic=x"], "somebody has to write"),
        (["vary", "a.jsonl", "model=m"], "vary needs prompts to start from"),
        (["contrast", "a.jsonl"], "contrast needs prompts to start from"),
        (["new", "a.jsonl", "topik=x"], "did you mean topic?"),
        (["new", "a.jsonl", "topic=x", "count=0"], "must be at least 1"),
    ],
)
def test_the_command_says_what_is_missing(arguments, complaint, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prompts", *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_encoder_is_asked_for_unless_it_is_named() -> None:
    assert Wanted().rules.closeness.encoder is None
    named = config.load(Wanted, None, ["rules.closeness.encoder.model=some/folder", "rules.closeness.encoder.layer=6"])
    assert named.rules.closeness.encoder == TextEncoder("some/folder", layer=6)


# ---- a local model ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of two layers with random weights and a chat template."""
    path = tmp_path_factory.mktemp("writer")
    words = parts.qwen_tokenizer()
    end = words.convert_tokens_to_ids(parts.END)
    config = transformers.LlamaConfig(
        vocab_size=len(words), bos_token_id=end, eos_token_id=end, pad_token_id=end, initializer_range=0.5, **TEXT
    )
    parts.seeded(transformers.LlamaForCausalLM, config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def test_a_local_model_without_temperature_writes_what_plain_generation_does(folder) -> None:
    writer = LocalWriter(str(folder), temperature=0.0, max_new_tokens=8)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    text = "<|im_start|>user\nwrite<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert writer.ask(None, ["write"]) == [tokenizer.decode(ids, skip_special_tokens=True)]


def test_what_a_local_model_draws_depends_on_the_seed_alone(folder) -> None:
    state = torch.get_rng_state()
    first = LocalWriter(str(folder), seed=1, max_new_tokens=8).ask(None, ["a", "a"])
    torch.manual_seed(123)
    assert LocalWriter(str(folder), seed=1, max_new_tokens=8).ask(None, ["a", "a"]) == first
    assert LocalWriter(str(folder), seed=2, max_new_tokens=8).ask(None, ["a", "a"]) != first
    assert first[0] != first[1]
    torch.set_rng_state(state)


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(folder)
    words.chat_template = None
    words.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no chat template"):
        LocalWriter(str(tmp_path)).ask(None, ["a"])
