"""GenEval's checks (Ghosh et al. 2023, 2310.11513), from what a detector found: objects, counts, colours, positions.

A prompt's metadata has the columns of GenEval's own file: `tag`, `include` (a list of clauses with `class`, `count`,
and perhaps `color`, or `position` as [relation, number of an earlier clause]) and perhaps `exclude`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiller.types import RewardError

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
RELATIONS = ("left of", "right of", "above", "below")
MOST = 16  # objects of one class that count
MARGIN = 0.1  # of two boxes' sizes, within which they stand beside nobody


@dataclass(frozen=True)
class Detection:
    """One object that was found."""

    box: Box
    score: float  # between 0 and 1


@dataclass(frozen=True)
class Verdict:
    """What one picture is worth."""

    strict: float  # 1 where all is right, else 0: what GenEval reports
    soft: float  # the mean over the clauses
    faults: tuple[str, ...]  # what was not right


Colours = Callable[[str, Sequence[Detection]], Sequence[str]]
"""The colour of each of some detections of a class."""


def kept(found: Sequence[Detection], threshold: float, overlap: float = 1.0, most: int = MOST) -> list[Detection]:
    """The surest `most` of those above the threshold, none of which overlaps a surer one by more than `overlap`."""
    chosen: list[Detection] = []
    for one in sorted(found, key=lambda detection: -detection.score):
        if one.score > threshold and all(iou(one.box, other.box) <= overlap for other in chosen):
            chosen.append(one)
    return chosen[:most]


def iou(first: Box, second: Box) -> float:
    """The area that two boxes share, over the area that they cover together."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0) * max(height, 0)
    both = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - shared
    return shared / both if both > 0 else 0.0


def relations(first: Box, second: Box, margin: float = MARGIN) -> set[str]:
    """Where the first box stands from the second.

    Along each axis the distance of their centres is shortened by the margin times the sum of their sizes; the axis
    counts if what is left is more than half the distance of the centres.
    """
    offsets, rests = [], []
    for axis in (0, 1):
        offset = (first[axis] + first[axis + 2] - second[axis] - second[axis + 2]) / 2
        sizes = first[axis + 2] - first[axis] + second[axis + 2] - second[axis]
        rest = max(abs(offset) - margin * sizes, 0.0)
        offsets.append(offset)
        rests.append(rest if offset > 0 else -rest)
    distance = (offsets[0] ** 2 + offsets[1] ** 2) ** 0.5
    if max(map(abs, rests)) < 1e-3:
        return set()
    names = (("left of", "right of"), ("above", "below"))
    return {names[axis][rest > 0] for axis, rest in enumerate(rests) if abs(rest) / distance > 0.5}


def check(metadata: Mapping[str, Any], found: Mapping[str, Sequence[Detection]], colours: Colours) -> Verdict:
    """Strict and soft score of one picture.

    Strict, as GenEval's own evaluation: of each included class at least its count; the surest of them have the colour
    and stand where they should from those of the earlier clause; of each excluded class fewer than its count.
    Soft, as Flow-GRPO trains on: the mean of one number per demand. Count: 1 - |wanted - found| / wanted. Colour: the
    same of those that have it. Position: 1 if all pairs stand right. After a wrong count, colour and position are 0.

    Args:
        found: per class what counts as found, the surest first.

    Raises:
        RewardError: the metadata is not GenEval's.
    """
    faults: list[str] = []
    values: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    exact: list[Sequence[Detection] | None] = []
    for clause in included(metadata):
        name, count = clause["class"], clause["count"]
        seen = found.get(name, ())
        values.append(1 - abs(count - len(seen)) / count)
        enough, right = len(seen) >= count, len(seen) == count
        if not enough:
            faults.append(f"{count} {name} wanted, {len(seen)} found")
        if "color" in clause:
            shown = list(colours(name, seen)) if seen else []
            values.append(1 - abs(count - shown.count(clause["color"])) / count if right else 0.0)
            right = right and shown.count(clause["color"]) == count
            if enough and shown[:count].count(clause["color"]) < count:
                enough = False
                faults.append(f"{count} {clause['color']} {name} wanted, found {', '.join(shown[:count])}")
        if "position" in clause:
            relation, target = clause["position"]
            values.append(float(right and _stand(seen, exact[target], relation)))
            right = right and bool(values[-1])
            if enough and not _stand(seen[:count], groups[target], relation):
                enough = False
                faults.append(f"{name} is not {relation} {metadata['include'][target]['class']}")
        groups.append(seen[:count] if enough else None)
        exact.append(seen if right else None)
    faults += [
        f"fewer than {clause['count']} {clause['class']} wanted, {len(found[clause['class']])} found"
        for clause in metadata.get("exclude") or ()
        if len(found.get(clause["class"], ())) >= clause["count"]
    ]
    return Verdict(float(not faults), sum(values) / len(values), tuple(faults))


def included(metadata: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The clauses of a prompt, looked through; none if it has no such column.

    Raises:
        RewardError: one of them lacks something, or names a relation or an earlier clause that there is not.
    """
    clauses = metadata.get("include") or ()
    for index, clause in enumerate(clauses):
        count = clause.get("count")
        if not clause.get("class") or not isinstance(count, int) or count < 1:
            raise RewardError(f"geneval: clause {index} of include needs a class and a count above 0, but is {clause}")
        if "position" in clause:
            relation, target = clause["position"]
            if relation not in RELATIONS or target not in range(index):
                raise RewardError(
                    f"geneval: the position of clause {index} must be one of {', '.join(RELATIONS)} and the number of "
                    f"an earlier clause, but is {clause['position']}"
                )
    return clauses


def _stand(these: Sequence[Detection], those: Sequence[Detection] | None, relation: str) -> bool:
    """Whether each of these stands so from each of those; not, where those are not there."""
    return those is not None and all(relation in relations(one.box, other.box) for one in these for other in those)
