"""What votes come to. It is kept up with every one of them, so that no question ever goes through all of them again."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tiller.vote.agreement import Agreement
from tiller.vote.ledger import Entry, Undo, Vote


def ballot_id(rater: str, contest: str, undone: int) -> str:
    """The id of a vote: the same vote sent twice has the same; after an undo, the next one has another."""
    return hashlib.sha256(repr((rater, contest, undone)).encode()).hexdigest()[:24]


class Tally:
    """The votes that stand: cast, and not taken back."""

    def __init__(self, entries: Iterable[Entry] = ()):
        self.agreement = Agreement()  # ties are a category of their own; skips are gaps
        self._standing: dict[str, dict[str, Vote]] = {}  # contest -> rater -> vote
        self._cast: dict[str, Vote] = {}  # every vote ever, by id
        self._undone: Counter[tuple[str, str]] = Counter()  # (rater, contest) -> how often
        self._order: dict[str, dict[str, Vote]] = {}  # rater -> the votes that stand, by id, oldest first
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> bool:
        """Count an entry; False if it changes nothing, as a vote or an undo does that is sent again."""
        return self._undo(entry) if isinstance(entry, Undo) else self._vote(entry)

    def _vote(self, vote: Vote) -> bool:
        if vote.vote in self._cast or vote.rater in self._standing.get(vote.contest, {}):
            return False
        self._cast[vote.vote] = vote
        before = self._values(vote.contest)
        self._standing.setdefault(vote.contest, {})[vote.rater] = vote
        self._order.setdefault(vote.rater, {})[vote.vote] = vote
        self.agreement.change(before, self._values(vote.contest))
        return True

    def _undo(self, undo: Undo) -> bool:
        vote = self._order.get(undo.rater, {}).pop(undo.undo, None)
        if vote is None:
            return False
        before = self._values(vote.contest)
        del self._standing[vote.contest][vote.rater]
        self._undone[vote.rater, vote.contest] += 1
        self.agreement.change(before, self._values(vote.contest))
        return True

    def _values(self, contest: str) -> list[str]:
        return [vote.choice for vote in self.of(contest).values() if vote.choice != "skip"]

    def was_cast(self, vote: str) -> Vote | None:
        """The vote of this id, also where it was taken back."""
        return self._cast.get(vote)

    def of(self, contest: str) -> dict[str, Vote]:
        """The votes on a contest that stand, by rater."""
        return self._standing.get(contest, {})

    def last(self, rater: str) -> Vote | None:
        """The rater's newest vote that stands."""
        votes = self._order.get(rater)
        return votes[next(reversed(votes))] if votes else None

    def next_ballot(self, rater: str, contest: str) -> str:
        """The id that the rater's next vote on a contest has."""
        return ballot_id(rater, contest, self._undone[rater, contest])

    @property
    def raters(self) -> list[str]:
        """Who has a vote that stands."""
        return [rater for rater, votes in self._order.items() if votes]

    def contests(self) -> Iterator[dict[str, Vote]]:
        """The votes on each contest that has some."""
        return (votes for votes in self._standing.values() if votes)


@dataclass(frozen=True)
class Preference:
    """What the raters of a contest prefer by majority."""

    vote: Vote  # one of them, for the prompt and the pictures
    first: int  # votes for the first picture
    second: int
    ties: int

    @property
    def choice(self) -> str:
        """first, second, or tie where neither has more votes; skip where all have skipped."""
        if not self.first + self.second + self.ties:
            return "skip"
        return "tie" if self.first == self.second else "first" if self.first > self.second else "second"


def preferences(tally: Tally) -> list[Preference]:
    """The majority of every contest that has votes, in the order in which the first votes on them came."""
    return [
        Preference(next(iter(votes.values())), chosen["first"], chosen["second"], chosen["tie"])
        for votes in tally.contests()
        for chosen in [Counter(vote.choice for vote in votes.values())]
    ]
