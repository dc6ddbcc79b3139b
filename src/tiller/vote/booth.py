"""Who is asked what next, and what they said: contests, raters and votes in one place, whose work does not grow."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Condition
from typing import Literal

from tiller.types import TillerError
from tiller.vote.contest import Contest
from tiller.vote.ledger import Choice, Ledger, Undo, Vote
from tiller.vote.pictures import Picture
from tiller.vote.tally import Tally

Side = Literal["left", "right", "tie", "skip"]
MOST_RATERS = 200
AHEAD = 2  # contests whose pictures a page may fetch before it comes to them


class Refused(TillerError):
    """A vote or an undo that does not fit what is on file; nothing was written."""


@dataclass(frozen=True)
class Ballot:
    """A contest as one rater sees it."""

    id: str
    contest: Contest
    left: Literal["first", "second"]  # which picture is on the left

    @property
    def sides(self) -> tuple[Picture, Picture]:
        """Left and right."""
        pair = (self.contest.first, self.contest.second)
        return pair if self.left == "first" else pair[::-1]


@dataclass
class _Rater:
    """How far someone has come."""

    position: int = 0  # in the list of contests; those before it are voted on, closed, or given back
    given_back: list[Contest] = field(default_factory=list)  # by undo; these come next, the newest first
    done: int = 0  # votes that stand, on contests that are open


class Booth:
    """Open contests and the votes on them. It may be used from several threads.

    Args:
        ledger: the votes file; what it holds counts.
        seed: of which picture is on the left, for each rater and contest.
        enough: votes after which a contest is put to nobody else; None asks every rater about every contest.
    """

    def __init__(self, ledger: Ledger, seed: int = 0, enough: int | None = None):
        self.ledger, self.seed, self.enough = ledger, seed, enough
        self.tally = Tally(ledger.entries)
        self.pictures: dict[str, Picture] = {}  # of all contests ever opened, by id
        self._list: list[Contest] = []  # in the order in which they are asked
        self._open: dict[str, Contest] = {}
        self._raters: dict[str, _Rater] = {}
        self._changed = Condition()
        self._full = 0  # open contests with enough votes
        self._voted: dict[str, float] = {}  # contest -> when it was last voted on, monotonic

    def open(self, contests: Iterable[Contest]) -> None:
        """Put contests to the vote, behind those that are there already."""
        with self._changed:
            for contest in contests:
                if contest.id in self._open:
                    continue
                self._open[contest.id] = contest
                self._list.append(contest)
                self.pictures |= {picture.id: picture for picture in (contest.first, contest.second)}
                self._count(contest.id, 1)

    def close(self, contests: Iterable[Contest]) -> None:
        """Take contests off: their votes have been used, and stand for good."""
        with self._changed:
            for contest in contests:
                if self._open.pop(contest.id, None) is not None:
                    self._count(contest.id, -1)

    def ballots(self, rater: str) -> list[Ballot]:
        """The rater's next contest, and the one or two that are likely to come after it."""
        with self._changed:
            person = self._rater(rater)
            while person.given_back and not self._asks(rater, person.given_back[-1]):
                person.given_back.pop()
            while person.position < len(self._list) and not self._asks(rater, self._list[person.position]):
                person.position += 1
            ahead = self._list[person.position : person.position + 2 * AHEAD]
            wanted = [*reversed(person.given_back[-1 - AHEAD :]), *ahead]
            unique = {contest.id: contest for contest in wanted if self._asks(rater, contest)}
            return [self._ballot(rater, contest) for contest in list(unique.values())[: 1 + AHEAD]]

    def vote(self, rater: str, contest_id: str, ballot: str, side: Side, seconds: float | None = None) -> bool:
        """Record a vote; False if it is on file already. When this returns, it is on the disk.

        Raises:
            Refused: the ballot is not one that the rater has now, or says something else than it did before.
            RunError: the disk is full.
        """
        with self._changed:
            known = self.tally.was_cast(ballot)
            if known is not None and known.rater == rater:
                if known.choice != _choice(side, known.left):
                    raise Refused("this vote is on file with another choice; undo it first.")
                return False
            contest = self._open.get(contest_id)
            if contest is None:
                raise Refused("these pictures are no longer asked about.")
            current = self._ballot(rater, contest)
            if current.id != ballot:
                raise Refused("this is not the ballot that is open for you.")
            entry = self._entry(rater, current, side, seconds)
            self._rater(rater)  # there is room for one more
            self.ledger.append(entry)
            self._count(contest_id, -1)
            self.tally.add(entry)
            self._count(contest_id, 1)
            self._voted[contest_id] = time.monotonic()
            self._changed.notify_all()
            return True

    def undo(self, rater: str, ballot: str) -> bool:
        """Take a rater's last vote back; False if it is taken back already.

        Raises:
            Refused: it is not the last one, or has been used.
        """
        with self._changed:
            known, last = self.tally.was_cast(ballot), self.tally.last(rater)
            if known is None or known.rater != rater:
                raise Refused("there is no such vote of yours.")
            if self.tally.of(known.contest).get(rater) != known:
                return False
            if last != known:
                raise Refused("only the last vote can be undone.")
            contest = self._open.get(known.contest)
            if contest is None:
                raise Refused("the run has used this vote already.")
            entry = Undo(ballot, rater, _now())
            self.ledger.append(entry)
            self._count(contest.id, -1)
            self.tally.add(entry)
            self._count(contest.id, 1)
            self._rater(rater).given_back.append(contest)
            self._changed.notify_all()
            return True

    def last(self, rater: str) -> Vote | None:
        """The vote that the rater can undo."""
        with self._changed:
            vote = self.tally.last(rater)
            return vote if vote is not None and vote.contest in self._open else None

    def progress(self, rater: str) -> tuple[int, int]:
        """How many of the open contests are done, and how many there are.

        Done is what the rater has voted on or skipped; or, where enough votes are enough, what has these.
        """
        with self._changed:
            return self._rater(rater).done if self.enough is None else self._full, len(self._open)

    def wait(self, contests: Sequence[Contest], votes: int, timeout: float | None, pause: float) -> bool:
        """Wait until each of the contests has so many votes (or skips), and none was given for `pause` seconds.

        Returns:
            Whether they came within `timeout` seconds; None waits for ever.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                now = time.monotonic()
                asked = [one for one in contests if len(self.tally.of(one.id)) < votes]
                quiet = max((self._voted.get(one.id, now - pause) for one in contests), default=now) + pause
                if not asked and now >= quiet:
                    return True
                if end is not None and now >= end:
                    return not asked
                until = [at for at in (end, None if asked else quiet) if at is not None]
                self._changed.wait(max(0.0, min(until) - now) if until else None)

    def counts(self, contest: Contest) -> Counter[str]:
        """How often each choice was made in a contest."""
        with self._changed:
            return Counter(vote.choice for vote in self.tally.of(contest.id).values())

    def _rater(self, name: str) -> _Rater:
        if name not in self._raters:
            if len(self._raters) >= MOST_RATERS:
                raise Refused(f"there are {MOST_RATERS} raters already; take one of their names.")
            self._raters[name] = _Rater()
        return self._raters[name]

    def _count(self, contest_id: str, sign: int) -> None:
        """Add or take away what the votes on one open contest count for."""
        votes = self.tally.of(contest_id)
        for name in votes:
            self._raters.setdefault(name, _Rater()).done += sign
        self._full += sign * (self.enough is not None and len(votes) >= self.enough)

    def _asks(self, rater: str, contest: Contest) -> bool:
        votes = self.tally.of(contest.id)
        missing = self.enough is None or len(votes) < self.enough
        return contest.id in self._open and rater not in votes and missing

    def _ballot(self, rater: str, contest: Contest) -> Ballot:
        draw = hashlib.sha256(repr((self.seed, contest.id, rater)).encode()).digest()[0]
        return Ballot(self.tally.next_ballot(rater, contest.id), contest, "first" if draw % 2 else "second")

    def _entry(self, rater: str, ballot: Ballot, side: Side, seconds: float | None) -> Vote:
        contest, folder = ballot.contest, self.ledger.path.parent
        first, second = (os.path.relpath(one.path, folder) for one in (contest.first, contest.second))
        return Vote(
            ballot.id,
            contest.id,
            rater,
            _choice(side, ballot.left),
            contest.prompt,
            first,
            second,
            contest.first.sha256,
            contest.second.sha256,
            contest.first.source,
            contest.second.source,
            ballot.left,
            seconds,
            _now(),
        )


def _choice(side: Side, left: Literal["first", "second"]) -> Choice:
    if side == "tie" or side == "skip":
        return side
    return left if side == "left" else "second" if left == "first" else "first"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
