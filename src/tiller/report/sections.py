"""The sections of a run's page, each a function from what was read to HTML, or None where there is nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tiller import yaml_text
from tiller.report.chart import Line, chart, interval, short
from tiller.report.diagnosis import Finding
from tiller.report.gallery import Gallery
from tiller.report.markup import Child, Markup, join, tag
from tiller.report.record import EVALUATE, Gain, Record, number
from tiller.report.words import UNITS, duration, figures, signed, split_words, summarise

CALLS = "pictures scored"


def section(name: str, title: str, *children: Child) -> Markup:
    """A section with its heading; `name` is its id, and what a live page exchanges it by."""
    return tag("section", tag("h2", title, id=name), *children, aria_labelledby=name, data_part=name)


def legend(lines: Sequence[Line]) -> Markup | None:
    """Which line is which; none for a single one."""
    if len(lines) < 2:
        return None
    entries = [
        tag(
            "li",
            tag("svg", tag("line", x1=0, x2=22, y1=4, y2=4, class_=f"line c{index % 6}"), viewBox="0 0 22 8",
                aria_hidden="true"),
            line.name,
        )
        for index, line in enumerate(lines)
    ]  # fmt: skip
    return tag("ul", *entries, class_="legend")


def plot(title: str, lines: Sequence[Line], x_label: str, zero: bool = False) -> Markup | None:
    """A small chart with its caption and legend."""
    drawn = [line for line in lines if len(line.values)]
    picture = chart(drawn, title, x_label, zero=zero)
    return picture and tag("figure", tag("figcaption", title), picture, legend(drawn))


def charts(*plots: Markup | None) -> Markup | None:
    """Small charts beside each other."""
    there = [one for one in plots if one is not None]
    return tag("div", *there, class_="charts") if there else None


def hero(title: str, lines: Sequence[Line], x_label: str, note: str = "") -> Markup | None:
    """A large chart; on a narrow screen a smaller drawing of it, so that its numbers stay readable."""
    drawn = [line for line in lines if len(line.values)]
    shapes = {"broad": (960, 320), "narrow": (360, 260)}
    pictures = [tag("div", chart(drawn, title, x_label, size), class_=name) for name, size in shapes.items()]
    if not drawn:
        return None
    caption = tag("figcaption", title, tag("span", f" {note}", class_="soft small") if note else None)
    return tag("figure", caption, *pictures, legend(drawn), class_="hero")


def table(caption: Child, head: Sequence[str], rows: Sequence[Sequence[Child]], numbers: bool = True) -> Markup:
    """A table whose first column names the rows; it scrolls by itself where it is too wide."""
    kind = "n" if numbers else "wrap"
    top = [tag("th", text, scope="col", class_=kind if index else None) for index, text in enumerate(head)]
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=None if numbers else "wrap"),
            *(_cell(one, kind) for one in row[1:]),
        )
        for row in rows
    ]
    whole = tag(
        "table", tag("caption", caption) if caption else None, tag("thead", tag("tr", *top)), tag("tbody", *body)
    )
    return tag("div", whole, class_="scroll", tabindex="0", role="group", aria_label="table")


def _cell(content: Child, kind: str) -> Markup:
    return content if isinstance(content, Markup) and content.startswith("<td") else tag("td", content, class_=kind)


def header(record: Record, live: bool) -> Markup:
    """The summary: a headline, four answers, and the numbers one wants first."""
    said = summarise(record)
    wanted = record.setting("train.epochs", "?")
    state = "finished" if record.finished else f"not finished: {record.epochs} of {wanted} epochs"
    answers = {
        "Asked": said.asked,
        "Won": said.won,
        "Lost": said.lost,
        "Believe it?": tag("dd", said.believe, class_="verdict"),
    }
    entries = [
        (tag("dt", name), answer if isinstance(answer, Markup) else tag("dd", answer))
        for name, answer in answers.items()
    ]
    tiles = [tag("div", tag("dt", name), tag("dd", value)) for name, value in figures(record)]
    return tag(
        "header",
        tag("h1", "Run ", tag("b", record.name), tag("span", state, class_="badge"),
            tag("span", "live", class_="badge", id="live-state", role="status") if live else None),
        tag("p", said.headline.replace("95 %", "95\u00a0%"), class_="headline"),
        tag("dl", *entries, class_=f"answers {said.verdict}"),
        tag("dl", *tiles, class_="tiles") if tiles else None,
        data_part="header",
    )  # fmt: skip


def diagnosis(record: Record, findings: Sequence[Finding]) -> Markup:
    """What the rules found."""
    if not record.metrics:
        return section("diagnosis", "Diagnosis", tag("p", "There are no metrics to judge by yet.", class_="soft"))
    if not findings:
        text = f"None of the rules found anything wrong in {len(record.metrics)} epochs."
        return section("diagnosis", "Diagnosis", tag("p", text, class_="soft"))
    entries = [
        tag(
            "li",
            tag("p", tag("span", found.level, class_="level"), found.sentence),
            tag("p", found.cure, " ", tag("code", found.page)),
            class_=found.level,
        )
        for found in findings
    ]
    return section("diagnosis", "Diagnosis", tag("ul", *entries, class_="findings"))


def pictures(record: Record, shown: Gallery) -> Markup | None:
    """The same prompts and noise at every epoch that pictures were kept of, with a slider over these."""
    if not shown:
        return None
    last = len(shown.epochs) - 1
    words = [_stage_words(record, epoch) for epoch in shown.epochs]
    control = tag(
        "div",
        tag("label", "Epoch of the right-hand pictures; the left-hand ones are from before training", for_="stage"),
        tag("input", type="range", id="stage", min=0, max=last, step=1, value=last, aria_valuetext=words[-1],
            data_words=json.dumps(words), autocomplete="off"),
        tag("output", words[-1], for_="stage"),
        class_="control",
    )  # fmt: skip
    kinds: dict[bool, list[Markup]] = {True: [], False: []}
    for shot in shown.shots:  # one noise of every prompt comes first, the others are folded
        kinds[shot.sample == 0].append(_shot(shot.prompt, shot.sample, shot.pictures, words, shown.epochs))
    class_ = "shots pixelated" if shown.pixelated else "shots"
    return section(
        "pictures",
        "Before and after",
        tag("p", "The same prompt and the same noise, drawn with the model's own solver.", class_="soft"),
        control if last else None,
        tag("div", *kinds[True], class_=class_),
        tag("details", tag("summary", "The same prompts from other noise"), tag("div", *kinds[False], class_=class_))
        if kinds[False]
        else None,
    )


def _stage_words(record: Record, epoch: int) -> str:
    """`epoch 15, 960 pictures scored`."""
    calls = next((number(line.get("reward_calls")) for line in record.metrics if line["epoch"] == epoch), 0.0)
    return (
        "before training" if not epoch else f"epoch {epoch}" + (f", {calls:,.0f} pictures scored" if calls > 0 else "")
    )


def _shot(prompt: str, sample: int, uris: Sequence[str | None], words: Sequence[str], epochs: Sequence[int]) -> Markup:
    frames = []
    for index, uri in enumerate(uris):
        named = "before" if not epochs[index] else f"epoch {epochs[index]}"
        if uri is None:
            picture = tag("span", "no picture", data_stage=index, class_=_frame_class(index, len(uris)))
        else:
            alt = f"{prompt}, noise {sample + 1}, {words[index]}"
            picture = tag(
                "span", tag("img", src=uri, alt=alt), named, data_stage=index, class_=_frame_class(index, len(uris))
            )
        frames.append(picture)
    return tag("figure", tag("div", *frames, class_="strip"), tag("figcaption", prompt), class_="shot")


def _frame_class(index: int, count: int) -> str | None:
    return " ".join(filter(None, ["before" * (index == 0), "now" * (index == count - 1)])) or None


def curves(record: Record) -> Markup | None:
    """The reward over the pictures scored, with the spread of an epoch's pictures; and every part of it."""
    x, x_label = axis(record)
    mean, std = record.column("reward/mean"), record.column("reward/std")
    unit = f", {UNITS[record.reward]}" if record.reward in UNITS else ""
    main = hero(
        f"{record.reward or 'reward'}{unit}",
        [Line("mean of an epoch's pictures", x, mean, mean - std, mean + std)],
        x_label,
        "mean of an epoch's pictures, and the band of one standard deviation",
    )
    own = {"reward/mean", "reward/std"}
    parts = [name for name in record.names("reward/") if name.endswith("/mean") and name not in own]
    small = [
        plot(name.removeprefix("reward/").removesuffix("/mean"), [_banded(record, name, x)], x_label) for name in parts
    ]
    if main is None and not any(small):
        return None
    return section("curves", "The reward as it was trained", main, charts(*small), _numbers(record))


def _banded(record: Record, name: str, x: np.ndarray) -> Line:
    mean, std = record.column(name), record.column(name.removesuffix("/mean") + "/std")
    return Line(name, x, mean, mean - std, mean + std)


def axis(record: Record) -> tuple[np.ndarray, str]:
    """What curves are drawn over: pictures scored or, where none are, epochs."""
    calls = record.column("reward_calls")
    fit = len(calls) > 0 and np.isfinite(calls).all() and calls[-1] > 0
    return (calls, CALLS) if fit else (record.column("epoch"), "epochs")


def _numbers(record: Record) -> Markup:
    """The curve as a table, some forty rows of it."""
    columns = {"epoch": "epoch", CALLS: "reward_calls", "mean": "reward/mean", "spread": "reward/std"}
    kept = np.unique(np.linspace(0, len(record.metrics) - 1, min(40, len(record.metrics))).round().astype(int))
    found = {title: record.column(name) for title, name in columns.items()}
    rows = [[short(values[index]) for values in found.values()] for index in kept]
    text = "every epoch" if len(kept) == len(record.metrics) else f"{len(kept)} of {len(record.metrics)} epochs"
    return tag("details", tag("summary", "The numbers"), table(text, list(columns), rows))


def generalisation(record: Record) -> Markup | None:
    """Base against tuned model, split by split, one table per reward."""
    if not record.gains:
        return None
    first = [record.reward] if record.reward else []
    names = list(dict.fromkeys([*first, *(gain.reward for gain in record.gains)]))
    parts = [
        _gains(name, [gain for gain in record.gains if gain.reward == name], name == record.reward) for name in names
    ]
    return section(
        "generalisation",
        "Does it hold elsewhere?",
        tag("p", "Base against tuned model on the same prompts and noise, with 95 % intervals of the difference.",
            class_="soft"),
        *parts,
    )  # fmt: skip


def _gains(reward: str, gains: Sequence[Gain], trained: bool) -> Markup | None:
    if not gains:
        return None
    reach = max(max(abs(gain.low), abs(gain.high), 1e-12) for gain in gains)
    rows = []
    for gain in gains:
        colour = {1: "n up-text", -1: "n down-text", 0: "n"}[gain.direction]
        rows.append(
            [
                split_words(gain.split),
                tag("td", _level(gain.base), class_="n wideonly"),
                tag("td", _level(gain.tuned), class_="n wideonly"),
                tag("td", signed(gain.difference), class_=colour),
                tag("td", interval(gain.low, gain.difference, gain.high, reach), class_="wideonly"),
                tag("td", f"{signed(gain.low)} to {signed(gain.high)}", class_="n"),
                f"{gain.win_rate:.0%}",
                tag("td", f"{gain.count:,}", class_="n wideonly"),
            ]
        )
    unit = f", {UNITS[reward]}" if reward in UNITS else ""
    caption = [tag("b", reward + unit), " the reward that was trained" if trained else " held out from training"]
    made = table(caption, ["prompts", "base", "tuned", "change", "", "95 % interval", "wins", "pictures"], rows)
    for title in ("base", "tuned", "", "pictures"):  # their cells hide on a narrow screen, and so must their headings
        made = Markup(
            made.replace(f'<th scope="col" class="n">{title}<', f'<th scope="col" class="n wideonly">{title}<')
        )
    return made


def _level(value: float) -> str:
    """A mean score with the digits of `signed`, so that columns line up."""
    return signed(value).removeprefix("+")


def over_optimisation(record: Record) -> Markup | None:
    """The optimised reward beside those that were not, and how far the model has gone."""
    x, x_label = axis(record)
    names = record.names("eval/")
    plots = [plot("trained reward, training pictures", [_banded(record, "reward/mean", x)], x_label)] if names else []
    rewards = list(dict.fromkeys(name.split("/", 2)[2] for name in names if name.count("/") >= 2))
    for reward in rewards:
        lines = [
            Line(split_words(name.split("/")[1]), x, record.column(name))
            for name in names
            if name.split("/", 2)[2:] == [reward]
        ]
        plots.append(plot(f"{reward}, fixed prompts and noise", lines, x_label))
    drifted = record.names("drift/") + record.names("policy/kl_")
    plots += [plot(_title(name), [Line(name, x, record.column(name))], x_label, zero="kl" in name) for name in drifted]
    rows = [[_title(name), short(round(value, 4))] for name, value in record.drift.items()]
    told = [gain for gain in record.gains if gain.reward != record.reward]
    if not (rewards or drifted or rows or told or record.monitor):
        return None
    aim = {1: "rose", -1: "fell", 0: "did not change beyond chance"}
    sentences = [
        tag("li", f"{gain.reward} {aim[gain.direction]} on {split_words(gain.split)}: {signed(gain.difference)}.")
        for gain in told
    ]
    return section(
        "over-optimisation",
        "What the reward does not see",
        tag("p", "A reward can rise while pictures get worse. These were not optimised.", class_="soft"),
        tag("ul", *sentences, class_="plain") if sentences else None,
        charts(*plots) if rewards or drifted else None,
        table("At the end, by pictures of the first trained prompts", ["measure", "value"], rows) if rows else None,
        _monitor(record.monitor),
    )


TITLES = {
    "kl_to_base": "KL to the base model, nats per picture",
    "diversity_base": "difference of two pictures of one prompt, base",
    "diversity_tuned": "difference of two pictures of one prompt, tuned",
    "drift/kl_to_base": "KL to the base model, nats per picture",
    "drift/diversity": "difference of two pictures of one prompt",
    "drift/edges": "edges in the pictures",
    "drift/entropy": "entropy of the luminance, bits",
    "drift/saturation": "saturation of the colours",
    "drift/blank": "share of blank blocks",
    "optim/grad_norm": "norm of the gradient",
    "policy/clip_fraction": "share of samples outside the clip range",
    "policy/approx_kl": "KL to the policy that drew the samples",
    "policy/log_ratio_max": "largest log-ratio",
    "policy/loss": "policy loss",
    "reward/zero_spread_groups": "groups without spread",
    "reward/missing": "missing scores",
    "value/explained": "variance that the value network explains",
}


def _title(name: str) -> str:
    if name.startswith("policy/kl_"):
        return f"distance that the KL penalty sees ({name.removeprefix('policy/kl_')})"
    return TITLES.get(name, name.replace("_", " "))


def _monitor(value: Any) -> Markup | None:
    """evaluation/monitor.json: what its rules found and did."""
    if not isinstance(value, Mapping):
        return None
    listed = value.get("findings")
    found = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    best = value.get("best")
    said = f"Best evaluation that lost nothing: epoch {best.get('epoch')}." if isinstance(best, Mapping) else None
    acted = value.get("acted")
    did = f"The rules acted after epoch {', '.join(map(str, acted))}." if isinstance(acted, list) and acted else None
    rows = [[str(one.get("epoch", "")), str(one.get("text") or one.get("rule", ""))] for one in found[:40]]
    return join(
        [
            tag("h3", "Evaluations during the run"),
            tag("p", " ".join(filter(None, [said, did])) or "They found nothing that was lost." * (not rows)),
            table("What they found lost", ["epoch", "finding"], rows, numbers=False) if rows else None,
        ]
    )


def health(record: Record) -> Markup | None:
    """All other metrics, folded."""
    x, x_label = axis(record)
    shown = {"epoch", "reward_calls", "reward/mean", "reward/std", "optim/updates"}
    names = [
        name
        for name in record.names("")
        if name not in shown and not name.startswith(("eval/", "drift/", "policy/kl_"))
        and not (name.startswith("reward/") and name.endswith(("/mean", "/std")))
    ]  # fmt: skip
    plots = [plot(_title(name), [Line(name, x, record.column(name))], x_label) for name in names]
    made = charts(*plots)
    count = f" {sum(one is not None for one in plots)} curves"
    return made and tag("details", tag("summary", "Training metrics", tag("span", count, class_="soft")), made)


def cost(record: Record) -> Markup | None:
    """Time by what it went into, reward calls, memory."""
    rows: list[list[Child]] = []
    names = {"time/sample": "drawing pictures", "time/reward": "waiting for scores", "time/update": "updates",
             "time/data": "loading data", "time/evaluate": "evaluations during the run"}  # fmt: skip
    total = float(record.seconds.sum()) if len(record.seconds) else 0.0
    for name, words in names.items():
        spent = record.timing(name)
        if np.isfinite(spent).any() and total > 0:
            share = np.nansum(spent) / total
            rows.append([words, duration(np.nansum(spent)), f"{share:.0%}", f"{np.nanmean(spent):.2g} s"])
    if rows:
        rows.append(["together", duration(total), "100%", f"{record.seconds.mean():.2g} s"])
    memory = {"memory/gb": "process", "memory/device_gb": "device"}
    held = [
        f"{words} {np.nanmax(values):.2f} GB"
        for name, words in memory.items()
        if np.isfinite(values := record.timing(name)).any()
    ]
    calls = record.column("reward_calls")
    said = [f"{calls[-1]:,.0f} pictures drawn and scored"] if len(calls) and calls[-1] > 0 else []
    said += [f"most memory held: {', '.join(held)}"] if held else []
    looking = np.nansum(record.timing(EVALUATE))
    said += [f"evaluations during the run took {duration(looking)}"] if looking > 0 else []
    if not rows and not said:
        return None
    text = "; ".join(said)
    made = table("Without evaluation and loading", ["part", "time", "share", "an epoch"], rows) if rows else None
    return section(
        "cost", "What it cost", tag("p", text[:1].upper() + text[1:] + ".", class_="soft") if text else None, made
    )


def loading(snippet: str) -> Markup:
    """How to use what was trained, outside of tiller."""
    return section(
        "loading",
        "Use the result",
        tag("pre", tag("code", snippet, id="snippet"), tabindex="0", aria_label="code that loads the result"),
        tag("button", "Copy", type="button", class_="copy", data_of="snippet"),
    )


def details(record: Record, gaps: Sequence[str]) -> Markup:
    """What only some will want: metrics, recipe, environment, and what is missing."""
    recipe = yaml_text.write(_plain(record.config)) if record.config else ""
    return section(
        "details",
        "Details",
        health(record),
        tag("details", tag("summary", "Recipe"), tag("pre", tag("code", recipe), tabindex="0")) if recipe else None,
        _environment(record.environment),
        _gaps(gaps),
    )


def _plain(value: Any) -> Any:
    """JSON-like data as plain lists and mappings, whatever it came as."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _environment(found: Mapping[str, Any]) -> Markup | None:
    if not found:
        return None
    packages = found.get("packages")
    plain = {name: value for name, value in found.items() if name != "packages"}
    plain |= packages if isinstance(packages, Mapping) else {}
    rows = [[str(name), str(value)] for name, value in plain.items()]
    return tag(
        "details", tag("summary", "Environment"), table("As it was when the run last began", ["what", "which"], rows)
    )


def _gaps(gaps: Sequence[str]) -> Markup | None:
    if not gaps:
        return None
    count = tag("span", f" {len(gaps)}", class_="soft")
    return tag(
        "details",
        tag("summary", "What this report could not show", count),
        tag("ul", *(tag("li", gap) for gap in gaps), class_="plain"),
        open=True,
    )
