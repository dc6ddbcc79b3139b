"""Votes: their file survives a kill at any byte, a vote counts once, and agreement is what the textbook says."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from tiller.pairs import open_pairs
from tiller.types import ConfigError, RunError
from tiller.vote.agreement import Agreement, alpha
from tiller.vote.booth import Booth, Refused
from tiller.vote.contest import find, rounds
from tiller.vote.ledger import Ledger, Undo, Vote, decode, encode, read
from tiller.vote.summary import summary, wilson
from tiller.vote.tally import Tally, ballot_id, preferences
from votes import contests, paint


def vote(rater: str, contest: str, choice: str = "first", undone: int = 0) -> Vote:
    return Vote(ballot_id(rater, contest, undone), contest, rater, choice, "p", "a.png", "b.png", "0", "1")


def cast(booth: Booth, rater: str, choice: str) -> str:
    """The rater's next contest is decided for its first or second picture; the vote's id."""
    ballot = booth.ballots(rater)[0]
    side = choice if choice in ("tie", "skip") else "left" if ballot.left == choice else "right"
    booth.vote(rater, ballot.contest.id, ballot.id, side)
    return ballot.id


@pytest.fixture
def booth(tmp_path: Path) -> Booth:
    ledger = Ledger(tmp_path / "votes.jsonl", lambda sentence: None)
    booth = Booth(ledger)
    booth.open(contests(tmp_path, 4))
    return booth


# ---- agreement ----


def test_krippendorffs_own_examples() -> None:
    """Krippendorff 2011, *Computing Krippendorff's Alpha-Reliability*, sections A, B and C: .095, .692 and .743."""
    two = list(zip("0100000010", "1110010000", strict=True))
    assert alpha(two) == pytest.approx(0.095, abs=5e-4)
    nominal = list(zip("aabbdcccedda", "babbbcccedd" + "d", strict=True))
    assert alpha(nominal) == pytest.approx(0.692, abs=5e-4)
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[value for value in unit if value != "."] for unit in zip(*rows, strict=True)]
    assert alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_as_its_definition_by_pairs_and_step_by_step() -> None:
    """1 - D_o / D_e, both as mean disagreements of pairs, found by going through all of them; as votes come and go."""
    random_ = random.Random(4)
    units: dict[int, list[str]] = {unit: [] for unit in range(12)}
    kept = Agreement()
    for _ in range(120):
        unit = random_.randrange(12)
        before = list(units[unit])
        if before and random_.random() < 0.3:
            units[unit].pop(random_.randrange(len(before)))
        else:
            units[unit].append(random_.choice("aab" if unit % 2 else "bbt"))
        kept.change(before, units[unit])
    paired = [values for values in units.values() if len(values) > 1]
    everyone = list(itertools.chain(*paired))
    observed = sum(
        sum(one != other for one, other in itertools.permutations(values, 2)) / (len(values) - 1) for values in paired
    ) / len(everyone)
    expected = sum(one != other for one, other in itertools.permutations(everyone, 2)) / (
        len(everyone) * (len(everyone) - 1)
    )
    assert kept.alpha == pytest.approx(1 - observed / expected, abs=1e-12)
    assert kept.alpha == pytest.approx(alpha(units.values()), abs=1e-12)
    assert kept.units == len(paired)


def test_alpha_is_not_defined_without_disagreement_to_expect() -> None:
    assert alpha([["a", "a"], ["a", "a", "a"], ["b"]]) is None
    assert alpha([]) is None
    assert alpha([["a", "a"], ["b", "b"]]) == 1


# ---- the file ----


def test_a_line_is_json_and_its_checksum_notices_every_flipped_bit() -> None:
    line = encode(vote("änn", "c1"))
    assert json.loads(line)["rater"] == "änn"
    assert decode(line) == vote("änn", "c1")
    for at in range(len(line) * 8):
        damaged = bytearray(line)
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(ValueError, match="checksum"):
            decode(bytes(damaged))


def test_a_kill_at_any_byte_of_the_last_line_loses_that_vote_alone(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    whole = [encode(vote("ann", "c1")), encode(vote("ann", "c2", "tie"))]
    told: list[str] = []
    for length in range(len(whole[1])):
        path.write_bytes(whole[0] + whole[1][:length])
        assert [entry.contest for entry in read(path)[0]] == ["c1"]
        if length % 64 > 1:  # what follows is synced to the disk
            continue
        ledger = Ledger(path, told.append)
        ledger.append(vote("ann", "c3"))
        ledger.close()
        assert [entry.contest for entry in read(path)[0]] == ["c1", "c3"]
        assert path.read_bytes().startswith(whole[0])
    assert len(told) == sum(length % 64 <= 1 for length in range(1, len(whole[1])))
    assert "is cut off" in told[0]


def test_damage_before_the_last_line_and_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    lines = [encode(vote("ann", f"c{number}")) for number in range(3)]
    damaged = lines[0] + lines[1].replace(b"first", b"worst") + lines[2]
    for content, line in ((damaged, 2), (b"my notes", 1), (b'{"prompt": "a"}\n', 1)):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"votes\.jsonl, line {line}: no vote"):
            Ledger(path)
        assert path.read_bytes() == content


def test_two_pages_cannot_write_one_file(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "votes.jsonl")
    with pytest.raises(RunError, match="in use by another voting page"):
        Ledger(tmp_path / "votes.jsonl")
    first.close()
    Ledger(tmp_path / "votes.jsonl").close()


# ---- the tally ----


def test_votes_and_undos_sent_again_change_nothing() -> None:
    entries = [vote("ann", "c1"), vote("bob", "c1", "second"), Undo(ballot_id("ann", "c1", 0), "ann")]
    entries += [vote("ann", "c1", "tie", undone=1)]
    tally = Tally(entries)
    for entry in entries:
        assert not tally.add(entry)
    assert {rater: one.choice for rater, one in tally.of("c1").items()} == {"ann": "tie", "bob": "second"}
    assert Tally(entries + entries).of("c1") == tally.of("c1")
    assert not tally.add(Undo(ballot_id("bob", "c1", 0), "ann"))  # somebody else's
    assert tally.agreement.units == 1


def test_majorities() -> None:
    words = {
        "c1": "first first second",
        "c2": "first second tie",
        "c3": "tie tie first",
        "c4": "skip second",
        "c5": "skip",
    }
    tally = Tally([vote(f"r{at}", key, word) for key, line in words.items() for at, word in enumerate(line.split())])
    found = {one.vote.contest: one.choice for one in preferences(tally)}
    assert found == {"c1": "first", "c2": "tie", "c3": "first", "c4": "second", "c5": "skip"}


# ---- the booth ----


def test_a_rater_goes_through_all_contests_and_back(booth: Booth) -> None:
    asked = [booth.ballots("ann")[0].contest.prompt]
    for choice in ("first", "tie", "skip"):
        cast(booth, "ann", choice)
        asked.append(booth.ballots("ann")[0].contest.prompt)
    assert asked == ["scene 0", "scene 1", "scene 2", "scene 3"]
    assert booth.progress("ann") == (3, 4)
    assert booth.progress("bob") == (0, 4)
    for prompt in ("scene 2", "scene 1"):
        last = booth.last("ann")
        assert booth.undo("ann", last.vote)
        assert not booth.undo("ann", last.vote)  # sent again
        assert booth.ballots("ann")[0].contest.prompt == prompt
    assert booth.progress("ann") == (1, 4)
    for _ in range(3):
        cast(booth, "ann", "second")
    assert booth.ballots("ann") == []
    assert booth.progress("ann") == (4, 4)


def test_a_vote_is_recorded_once_and_survives_a_restart(booth: Booth, tmp_path: Path) -> None:
    asked = booth.ballots("ann")[0]
    assert booth.vote("ann", asked.contest.id, asked.id, "left", 1.5)
    size = booth.ledger.path.stat().st_size
    assert not booth.vote("ann", asked.contest.id, asked.id, "left", 9.9)
    with pytest.raises(Refused, match="another choice"):
        booth.vote("ann", asked.contest.id, asked.id, "right")
    with pytest.raises(Refused, match="not the ballot"):
        booth.vote("bob", asked.contest.id, booth.ballots("ann")[0].id, "left")
    assert booth.ledger.path.stat().st_size == size
    undone = cast(booth, "ann", "tie")
    booth.undo("ann", undone)
    assert not booth.vote("ann", "whatever", undone, "tie")  # an old ballot does not bring the vote back
    booth.ledger.close()
    again = Booth(Ledger(booth.ledger.path))
    again.open(contests(tmp_path, 4))
    assert again.progress("ann") == (1, 4)
    assert again.ballots("ann")[0].contest.prompt == "scene 1"
    assert again.ballots("ann")[0].id != undone
    (only,) = again.tally.of(asked.contest.id).values()
    assert (only.choice, only.left, only.seconds) == (asked.left, asked.left, 1.5)


def test_sides_are_even_and_the_same_again(tmp_path: Path) -> None:
    asked = contests(tmp_path, 100)
    booth = Booth(Ledger(tmp_path / "votes.jsonl"))
    booth.open(asked)
    sides = {rater: [booth._ballot(rater, one).left for one in asked] for rater in ("ann", "bob")}
    assert sides["ann"] == [booth._ballot("ann", one).left for one in asked]
    assert sides["ann"] != sides["bob"]
    other = Booth(booth.ledger, seed=1)
    assert [other._ballot("ann", one).left for one in asked] != sides["ann"]
    assert 30 < Counter(sides["ann"])["first"] < 70  # ± 4 standard deviations of a fair coin


def test_what_has_been_used_cannot_be_undone(booth: Booth) -> None:
    ballot = booth.ballots("ann")[0]
    cast(booth, "ann", "first")
    booth.close([ballot.contest])
    assert booth.last("ann") is None
    with pytest.raises(Refused, match="used this vote"):
        booth.undo("ann", ballot.id)
    assert booth.progress("ann") == (0, 3)


def test_the_work_of_a_vote_does_not_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hundred times the votes on file, a vote reads no file and runs as many lines of Python."""
    import sys

    def lines_run(votes: int) -> int:
        path = tmp_path / f"{votes}.jsonl"
        path.write_bytes(b"".join(encode(vote(f"r{at % 7}", f"old{at // 7}")) for at in range(votes)))
        booth = Booth(Ledger(path))
        booth.open(asked)
        cast(booth, "ann", "first")
        monkeypatch.setattr("tiller.vote.ledger.read", None)  # whoever reads the file again fails
        count = 0

        def trace(frame: object, event: str, argument: object) -> object:
            nonlocal count
            count += event == "line"
            return trace

        sys.settrace(trace)
        try:
            cast(booth, "ann", "second")
            booth.undo("ann", booth.last("ann").vote)
            booth.tally.agreement.alpha  # noqa: B018
            booth.progress("ann")
        finally:
            sys.settrace(None)
            monkeypatch.undo()
        return count

    asked = contests(tmp_path, 30)
    few, many = lines_run(40), lines_run(4000)
    assert many <= few + 20


# ---- what is compared ----


def test_rounds_are_a_round_robin() -> None:
    for count in range(8):
        pairs = [frozenset(pair) for one in rounds(range(count)) for pair in one]
        assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    assert list(rounds("abcd")) == [[("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")], [("a", "c"), ("b", "d")]]


def test_a_run_sets_base_against_tuned_and_keeps_what_was_voted_on(tmp_path: Path) -> None:
    lines = []
    for at in range(4):
        for name, shade in (("first", 0), ("last", 100)):
            paint(tmp_path / "images" / name / f"{at}.png", shade + at)
            model = "base" if name == "first" else "tuned"
            lines.append({"file": f"{name}/{at}.png", "prompt": f"p{at // 2}", "model": model})
    (tmp_path / "images" / "pictures.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = find(tmp_path, keep=tmp_path / "kept")
    assert [one.prompt for one in found] == ["p0", "p1", "p0", "p1"]  # a prompt comes again when all have come
    assert {(one.first.source, one.second.source) for one in found} == {("base", "tuned")}
    reds = [[Image.open(side.path).getpixel((9, 9))[0] for side in (one.first, one.second)] for one in found]
    assert reds == [[0, 100], [2, 102], [1, 101], [3, 103]]  # pictures of the same noise meet
    before = found[0].second.path.read_bytes()
    paint(tmp_path / "images" / "last" / "0.png", 200)  # the run goes on
    assert found[0].second.path.read_bytes() == before


def test_samples_meet_within_a_prompt_and_two_folders_meet_each_other(tmp_path: Path) -> None:
    for folder, shade in (("one", 0), ("two", 100)):
        for at in range(6):
            paint(tmp_path / folder / f"{at // 3:04d}-a-cat-{at % 3}.png", shade + at)
        paint(tmp_path / folder / "sheet.png", 7)
    alone = find(tmp_path / "one")
    assert len(alone) == 3 * 5  # both prompts have the slug "a cat", so that 6 pictures meet
    across = find(tmp_path / "one", tmp_path / "two")
    assert len(across) == 6
    assert all((one.first.path.name, one.prompt) == (one.second.path.name, "a cat") for one in across)
    assert {one.second.source for one in across} == {str(tmp_path / "two")}


def test_pairs_of_a_file_in_its_columns(tmp_path: Path) -> None:
    for at in range(4):
        paint(tmp_path / f"{at}.png", at)
    lines = [
        {"prompt": "a", "chosen": "0.png", "rejected": "1.png"},
        {"prompt": "b", "first": "2.png", "second": "3.png"},
        {"caption": "c", "jpg_0": "1.png", "jpg_1": "2.png", "label_0": 0.5},
        {"prompt": "a", "chosen": "1.png", "rejected": "0.png"},  # as the first one
        {"prompt": "d", "chosen": "1.png", "rejected": "1.png"},  # nothing to compare
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert sorted(one.prompt for one in find(path)) == ["a", "b", "c"]
    assert [one.prompt for one in find(path, seed=0)] == [one.prompt for one in find(path, seed=0)]
    assert len({tuple(one.prompt for one in find(path, seed=seed)) for seed in range(20)}) > 3
    path.write_text(path.read_text() + '\n{"prompt": "e", "chosen": "0.png"}')
    with pytest.raises(ConfigError, match="line 6: each line needs"):
        find(path)


def test_nothing_to_compare_says_what_to_do(tmp_path: Path) -> None:
    paint(tmp_path / "0000-a-cat-0.png", 1)
    with pytest.raises(ConfigError, match="draw some with tiller sample"):
        find(tmp_path)
    with pytest.raises(ConfigError, match="there is no"):
        find(tmp_path / "nowhere")


# ---- what votes are good for ----


def test_a_votes_file_is_data_as_it_is(booth: Booth, tmp_path: Path) -> None:
    """Majorities only: no tie, no skip, nothing undone; the preferred picture first."""
    said = {"ann": "first second tie first", "bob": "second second skip skip", "cid": "first first tie first"}
    for rater, choices in said.items():
        for choice in choices.split():
            cast(booth, rater, choice)
    booth.undo("cid", booth.last("cid").vote)
    pairs = open_pairs(booth.ledger.path, 16)
    assert [pair.prompt for pair in pairs.pairs] == ["scene 0", "scene 1", "scene 3"]
    reds = [[round(float(value)) for value in (pairs.pictures([at])[:, 0, 8, 8] + 1) * 127.5] for at in range(3)]
    assert reds == [[0, 120], [121, 1], [3, 123]]  # scene 1 went to the second picture


def test_a_votes_file_whose_pictures_changed_is_refused(booth: Booth, tmp_path: Path) -> None:
    cast(booth, "ann", "tie")
    with pytest.raises(ConfigError, match="no pair on which a majority"):
        open_pairs(booth.ledger.path, 16)
    cast(booth, "ann", "first")
    assert len(open_pairs(booth.ledger.path, 16)) == 1
    paint(tmp_path / "1-tuned.png", 222)
    with pytest.raises(ConfigError, match="is not the picture that was voted on"):
        open_pairs(booth.ledger.path, 16)
    (tmp_path / "1-tuned.png").unlink()
    with pytest.raises(ConfigError, match="there is no picture"):
        open_pairs(booth.ledger.path, 16)


def test_the_summary(booth: Booth) -> None:
    for choice in ("second", "second", "first", "tie"):
        cast(booth, "ann", choice)
    lines = list(summary(booth.tally))
    assert lines[0] == "4 votes on 4 pairs (1 tie, 0 skips) of ann (4)"
    assert lines[1].startswith("tuned is preferred over base in 2 of 3 decided pairs (67%, 95 % interval 21% to 94%)")
    assert list(summary(Tally())) == ["no votes yet"]


def test_wilsons_interval() -> None:
    """Its ends solve (p - share)² = z² p (1 - p) / n."""
    low, high = wilson(7, 20)
    for end in (low, high):
        assert (end - 7 / 20) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 20)
    assert low < 7 / 20 < high
