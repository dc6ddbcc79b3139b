"""Runs beside each other: what differs in their recipes, their curves on common axes, their pictures from one noise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiller.report.chart import Line
from tiller.report.gallery import BUDGET, Gallery, Shot, gallery
from tiller.report.html import page
from tiller.report.markup import Child, Markup, tag
from tiller.report.record import Gain, Record, number, read
from tiller.report.sections import axis, charts, hero, plot, section, table
from tiller.report.words import UNITS, duration, gain_words, signed, split_words, told

SAME = ("run.output_dir", "run.report_to", "model.device")  # settings that say nothing about what was learned
MOST_PROMPTS = 8
MISSING = "–"  # of a setting that a recipe has not


def render(folders: Sequence[Path]) -> str:
    """The page of several runs.

    Raises:
        RunError: one of the folders holds no run.
    """
    records, shown = named(folders), [gallery(folder, 2, BUDGET // len(folders)) for folder in folders]
    gaps = [f"{one.name}: {gap}" for one, seen in zip(records, shown, strict=True) for gap in (*one.gaps, *seen.gaps)]
    parts: list[Child] = [
        tag(
            "header", tag("h1", "Runs side by side"), tag("p", headline(records), class_="headline"), data_part="header"
        ),
        section("results", "What they came to", *_results(records)),
        _curves(records),
        _pictures(records, shown),
        _differences(records),
        section("details", "Not shown", tag("ul", *(tag("li", gap) for gap in gaps), class_="plain")) if gaps else None,
    ]
    return page(headline(records), parts, first="results", class_="wide")


def named(folders: Sequence[Path]) -> list[Record]:
    """The records, with names that tell them apart.

    Raises:
        RunError: one of the folders holds no run.
    """
    found = [read(folder) for folder in folders]
    names = [record.name for record in found]
    longer = [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]
    return [Record(**{**vars_of(record), "name": name}) for record, name in zip(found, longer, strict=True)]


def vars_of(record: Record) -> dict[str, Any]:
    """The fields of a record."""
    return {name: getattr(record, name) for name in Record.__dataclass_fields__}


def headline(records: Sequence[Record]) -> str:
    """Which run gained most, if they can be compared."""
    best = {record.name: gain for record in records if (gain := _main(record)) is not None}
    if len(best) < 2 or len({(gain.reward, gain.split) for gain in best.values()}) > 1:
        return f"{len(records)} runs, which were not all measured by the same reward on the same prompts."
    name, gain = max(best.items(), key=lambda item: item[1].difference)
    others = [other for other in best.values() if other is not gain]
    clear = gain.low > max(other.high for other in others)
    ahead = "is ahead of the others beyond chance" if clear else "has the largest gain"
    return f"{name} {ahead}: {gain.reward} {gain_words(gain)}."


def _main(record: Record) -> Gain | None:
    return told([gain for gain in record.gains if gain.reward == record.reward])


def summary(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The heading and the rows of the table: one row per measure, one column per run."""
    pairs = dict.fromkeys((gain.reward, gain.split) for record in records for gain in record.gains)
    rows = []
    for reward, split in pairs:
        unit = f", {UNITS[reward]}" if reward in UNITS else ""
        cells = [next((g for g in record.gains if (g.reward, g.split) == (reward, split)), None) for record in records]
        words = ["–" if g is None else f"{signed(g.difference)} ({signed(g.low)} to {signed(g.high)})" for g in cells]
        rows.append([f"{reward}{unit}: {split_words(split)}", *words])
    measures = {
        "diversity kept": _diversity,
        "KL to the base, nats": lambda record: _plain(record.drift.get("kl_to_base")),
        "pictures scored": lambda record: _plain(record.column("reward_calls")[-1:].sum()) if record.metrics else "–",
        "epochs": lambda record: f"{record.epochs} of {record.setting('train.epochs', '?')}",
        "training took": lambda record: duration(float(record.seconds.sum())) if len(record.seconds) else "–",
        "state": lambda record: "finished" if record.finished else "not finished",
    }
    rows += [[title, *(measure(record) for record in records)] for title, measure in measures.items()]
    return ["", *(record.name for record in records)], rows


def _diversity(record: Record) -> str:
    base, tuned = (number(record.drift.get(f"diversity_{which}")) for which in ("base", "tuned"))
    return f"{tuned / base:.0%}" if base > 0 and tuned == tuned else "–"


def _plain(value: Any) -> str:
    return f"{number(value):,.0f}" if number(value) == number(value) else "–"


def _results(records: Sequence[Record]) -> list[Child]:
    head, rows = summary(records)
    made = [[title, *(_stacked(cell) for cell in cells)] for title, *cells in rows]
    return [table("Base to tuned model on the same prompts and noise, with 95 % intervals", head, made)]


def _stacked(cell: str) -> Markup:
    """A number, and under it, smaller, its interval."""
    value, _, rest = cell.partition(" (")
    low = tag("span", rest.removesuffix(")"), class_="soft small under") if rest else None
    return tag("td", value, low, class_="n")


def _curves(records: Sequence[Record]) -> Markup | None:
    """The trained reward of all runs over the pictures scored, and whatever else at least two of them measured."""
    lines = [Line(record.name, axis(record)[0], record.column("reward/mean")) for record in records]
    label = next((axis(record)[1] for record in records if record.metrics), "epochs")
    rewards = sorted({record.reward or "reward" for record in records})
    main = hero(", ".join(rewards), lines, label, "mean of an epoch's pictures")
    names = dict.fromkeys(
        name
        for record in records
        for prefix in ("eval/", "drift/", "policy/kl_", "optim/grad")
        for name in record.names(prefix)
    )
    small = []
    for name in names:
        having = [record for record in records if name in record.names(name)]
        if len(having) > 1:
            small.append(plot(name, [Line(one.name, axis(one)[0], one.column(name)) for one in having], label))
    made = charts(*small)
    more = made and tag("details", tag("summary", "More curves"), made)
    return None if main is None else section("curves", "Curves", main, more)


def _pictures(records: Sequence[Record], shown: Sequence[Gallery]) -> Markup | None:
    """The last pictures of every run, by prompt and noise, beside those from before training."""
    having = [(record, seen) for record, seen in zip(records, shown, strict=True) if seen]
    if len(having) < 2:
        return None
    seeds = {(str(record.setting("train.seed")), record.model) for record, _ in having}
    keys = [{(shot.prompt, shot.sample): shot for shot in seen.shots} for _, seen in having]
    common = [key for key in keys[0] if all(key in other for other in keys[1:])]
    chosen = sorted(common, key=lambda key: key[1])[:MOST_PROMPTS]
    if not chosen:
        return section("pictures", "Pictures", tag("p", "They show no prompt in common.", class_="soft"))
    note = (
        "The same prompt and the same noise."
        if len(seeds) == 1
        else ("The same prompts, but not the same noise: seed or base model differ.")
    )
    first = having[0][1]
    figures = [_row(key, keys, [record.name for record, _ in having], not first.epochs[0]) for key in chosen]
    class_ = "shots pixelated" if first.pixelated else "shots"
    return section("pictures", "Pictures", tag("p", note, class_="soft"), tag("div", *figures, class_=class_))


def _row(key: tuple[str, int], keys: Sequence[Mapping], names: Sequence[str], before: bool) -> Markup:
    prompt, sample = key
    frames: list[tuple[str, str | None]] = []
    if before:
        frames.append(("before", keys[0][key].pictures[0]))
    for name, shots in zip(names, keys, strict=True):
        shot: Shot = shots[key]
        frames.append((name, shot.pictures[-1]))
    cells = [
        tag("span", tag("img", src=uri, alt=f"{prompt}, noise {sample + 1}, {name}") if uri else "no picture", name)
        for name, uri in frames
    ]
    return tag("figure", tag("div", *cells, class_="pair"), tag("figcaption", prompt), class_="shot")


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By dotted key: every run's value, for the settings that are not the same in all."""
    flat = [flattened(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    found = {key: [one.get(key, MISSING) for one in flat] for key in keys if key not in SAME}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def flattened(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys to values as JSON."""
    if isinstance(value, Mapping) and value:
        parts = (flattened(entry, f"{prefix}{name}.") for name, entry in value.items())
        return {key: text for part in parts for key, text in part.items()}
    return {prefix.rstrip("."): json.dumps(value, ensure_ascii=False, default=str)}


def _differences(records: Sequence[Record]) -> Markup:
    found = differences([record.config for record in records])
    if not found:
        return section("differences", "Settings", tag("p", "Their recipes are the same.", class_="soft"))
    head = ["setting", *(record.name for record in records)]
    shared = [[key, *values] for key, values in found.items() if MISSING not in values]
    own = [[key, *values] for key, values in found.items() if MISSING in values]
    only = tag("details", tag("summary", "Settings that only some of them have"), _settings(head, own)) if own else None
    return section("differences", "Settings that differ", _settings(head, shared) if shared else None, only)


def _settings(head: Sequence[str], rows: Sequence[Sequence[Child]]) -> Markup:
    return table(None, head, rows, numbers=False)
