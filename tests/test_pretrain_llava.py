"""The embedded LLaVA: its dialogues are true, its batches are the processor's, each phase trains its own parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tiller import cli
from tiller.emoji import dialogues, scenes, wording
from tiller.emoji.judge import stated
from tiller.emoji.scenes import Scene, parse
from tiller.emoji.words import NOUNS, NUMBERS, plural
from tiller.pretrain import chat, clip, kinds, llava, training
from tiller.pretrain.reader_config import ClipConfig, LlavaConfig
from tiller.types import ConfigError

RECIPE = Path(__file__).parents[1] / "recipes" / "pretrain-llava.yaml"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP after one step."""
    output = tmp_path_factory.mktemp("clip")
    config = ClipConfig(output=str(output), width=32, text_width=32, layers=2, text_layers=1, joint_width=16)
    list(clip.pretrain(replace(config, steps=1, batch=2, pool=2, coded=0.0, precision="fp32")))
    return output / "model"


def tiny(clip_folder: Path, output: Path) -> list[str]:
    """Overrides of the recipe: a tiny model, four steps a phase."""
    small = "width=32 layers=1 head_width=32 language_steps=4 projector_steps=4 steps=4 batch=6 pool=32 coded=0"
    return [*small.split(), "save_every=2", "precision=fp32", f"clip={clip_folder}", f"output={output}"]


@pytest.fixture(scope="module")
def words():
    return chat.tokenizer(llava.vocabulary())


def test_claims_are_true_or_false_as_they_say_in_equal_number():
    rng = np.random.default_rng(0)
    said = []
    for _ in range(400):
        scene = wording.any_scene(rng)
        caption, true = dialogues.claim(scene, rng)
        contradicted = any(
            wording.truth(scene).get(fact, index) != index for fact, index in stated(parse(caption)).items()
        )
        assert contradicted != true, (scene, caption)
        said.append(true)
    assert 160 < sum(said) < 240


def test_descriptions_say_what_is_there():
    scene = Scene("mouse", count=3, colour="blue")
    assert dialogues.concise(scene) == "three mice"
    assert dialogues.detailed(scene) == "three mice on a blue background"
    washing = Scene("cat", activity="washing dishes", colour="pink")
    assert dialogues.concise(washing) == "a cat washing dishes"
    assert dialogues.detailed(washing) == "a cat washing dishes on a pink background"


def test_answers_fit_their_questions():
    rng = np.random.default_rng(1)
    kinds_seen = set()
    for _ in range(600):
        scene = wording.any_scene(rng)
        question, answer = dialogues.turn(scene, rng)
        if question.startswith("How many"):
            noun = next(n for n in NOUNS if question.startswith(f"How many {plural(n)} are"))
            number = scene.count if noun == scene.noun else 0
            digits = question.endswith("Answer with a number.")
            assert answer == (str(number) if digits else ("zero", *NUMBERS)[number])
            assert noun != scene.other
        elif question == dialogues.DETAILED:
            assert parse(answer).colour == scene.colour
        elif question in dialogues.CONCISE:
            assert (parse(answer).noun, parse(answer).activity) == (scene.noun, scene.activity)
            assert parse(answer).colour is None
        elif question in dialogues.WHAT_BACKGROUND:
            assert answer == scene.colour
        elif answer not in ("Yes", "No"):
            assert answer in (scene.activity, f"{'an' if scene.noun == 'ant' else 'a'} {scene.noun}")
        kinds_seen.add(answer in ("Yes", "No") or question)
    assert len(kinds_seen) > 20


def test_the_words_know_the_world_and_take_either_case(words):
    text = 'Does this figure show "three mice on the left"? Please answer Yes or No.'
    ids = words(text).input_ids
    assert words.unk_token_id not in ids
    assert ids == words(text.upper()).input_ids
    assert words.decode(words("a Cat washing dishes").input_ids, skip_special_tokens=True) == "a cat washing dishes"
    assert words("a quokka").input_ids[-1] == words.unk_token_id
    for noun in NOUNS:
        assert words.unk_token_id not in words(f"{noun} {plural(noun)}").input_ids, noun


def test_the_command_trains_resumes_bit_for_bit_and_writes_what_stock_code_reads(
    clip_folder, tmp_path, monkeypatch, capsys
):
    command = ["pretrain", "--config", str(RECIPE)]
    assert cli.main([*command, *tiny(clip_folder, tmp_path / "whole")]) == 0
    printed = capsys.readouterr().out
    assert all(f"{phase} 4/4  loss" in printed for phase in ("language", "projector", "instruction"))

    real = training.Training.update
    died = set()

    def dying(self, loss):
        phase = tuple(sorted(self.parameters))
        if self.step == 3 and phase not in died:
            died.add(phase)
            raise KeyboardInterrupt
        real(self, loss)

    monkeypatch.setattr(training.Training, "update", dying)
    codes = [cli.main([*command, *tiny(clip_folder, tmp_path / "broken")]) for _ in range(4)]
    assert codes == [cli.INTERRUPTED] * 3 + [0]
    whole, broken = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)

    tower = load_file(clip_folder / "model.safetensors")
    kept = {name: value for name, value in whole.items() if "vision_tower" in name}
    assert len(kept) > 20
    for name, value in kept.items():
        torch.testing.assert_close(
            value, tower["vision_model." + name.split("vision_tower.")[1].removeprefix("vision_model.")]
        )
    saved = {p: set(load_file(tmp_path / "whole" / "train" / f"{p}.safetensors")) for p in ("language", "projector")}
    assert not any("projector" in name or "vision" in name for name in saved["language"])
    assert all("multi_modal_projector" in name for name in saved["projector"])

    start = f"start={tmp_path / 'whole' / 'model'}"
    assert cli.main([*command, *tiny(clip_folder, tmp_path / "more"), start, "lr=0.0", "seed=1", "steps=1"]) == 0
    more = load_file(tmp_path / "more" / "model" / "model.safetensors")
    assert all(torch.equal(whole[name], more[name]) for name in whole)
    assert not (tmp_path / "more" / "train" / "language.safetensors").exists()

    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole" / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "whole" / "model")
    assert model.dtype == torch.float32
    question = 'Does this figure show "two cats"? Please answer Yes or No.'
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    assert text == f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(text=text, images=scenes.draw(Scene("cat")), return_tensors="pt")
    mine = chat.encode(processor.tokenizer, [(question, "Yes")], llava.places(model.model.vision_tower))
    asked = inputs.input_ids.shape[1]
    assert mine.ids[0, :asked].tolist() == inputs.input_ids[0].tolist()
    yes, end = processor.tokenizer.convert_tokens_to_ids(["yes", chat.END])
    assert mine.ids[0, asked:].tolist() == [yes, end]
    written = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert written.shape[1] in range(asked + 1, asked + 4)


def test_each_answer_weighs_one_and_a_question_only_if_it_is_true(words):
    false, true = chat.encode(words, [("Is it a cat?", "No"), ("Is it a cat?", "Yes")], 3).weights.tolist()
    # start, user, :, three places, five of the question, assistant, :, the answer, the end
    assert false == pytest.approx([0] * 13 + [0.5] * 2)
    assert true == pytest.approx([0] * 6 + [0.2] * 5 + [0] * 2 + [0.5] * 2)


def test_the_answer_sees_the_picture_and_every_answer_counts_as_much(clip_folder, words):
    config = LlavaConfig(clip=str(clip_folder), width=32, layers=1)
    tower = llava.vision_tower(config.clip)
    model = llava.build(config, tower, words).eval()
    tokens = chat.encode(words, [("What is in this image?", "a cat"), ("How many dogs?", "two")], llava.places(tower))
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loss = llava.answer_loss(model, tokens, pictures)
    assert abs(loss.item() - llava.answer_loss(model, tokens, -pictures).item()) > 1e-6
    logits = model(input_ids=tokens.ids, attention_mask=tokens.mask, pixel_values=pictures).logits
    logs = logits.double().log_softmax(-1)
    nats = []
    for row, answer in enumerate(("a cat", "two")):
        end = int(tokens.mask[row].sum())
        places = range(end - len(answer.split()) - 1, end)  # its words and the end
        nats.append(np.mean([-logs[row, i - 1, tokens.ids[row, i]].item() for i in places]))
    assert loss.item() == pytest.approx(np.mean(nats), rel=1e-4)


def test_a_clip_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no CLIP folder"):
        list(llava.pretrain(kinds.load(RECIPE, [f"clip={tmp_path}", f"output={tmp_path}"])))
