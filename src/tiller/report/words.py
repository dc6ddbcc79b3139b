"""What a run came to, in words: what was asked, what was won, what was lost, and whether to believe it."""

from __future__ import annotations

from dataclasses import dataclass

from tiller.report.record import Gain, Record, number

UNITS = {"jpeg_compressibility": "kB", "jpeg_incompressibility": "kB", "kl_to_base": "nats"}
FEW = 30  # pictures, below which an interval is a rough one


@dataclass(frozen=True)
class Summary:
    """Sentences; `verdict` is one of yes, partly, no and open."""

    headline: str
    asked: str
    won: str
    lost: str
    believe: str
    verdict: str


def summarise(record: Record) -> Summary:
    """The summary of a run, finished or not."""
    mine = [gain for gain in record.gains if gain.reward == main_reward(record)]
    others = [gain for gain in record.gains if gain.reward != main_reward(record)]
    believe, verdict = _believe(mine, others)
    return Summary(
        headline=_headline(record, mine, others),
        asked=_asked(record),
        won=_won(record, mine),
        lost=_lost(record, others),
        believe=believe,
        verdict=verdict,
    )


def split_words(split: str) -> str:
    """A split's name as it stands in a sentence."""
    return {"trained": "trained prompts", "held_out": "held-out prompts"}.get(split, split.replace("_", " "))


def signed(value: float, unit: str = "") -> str:
    """A difference with its sign."""
    digits = 0 if abs(value) >= 100 else 3
    text = f"{value:+.{digits}f}".replace("-", "−")
    return f"{text} {unit}".strip()


def gain_words(gain: Gain, interval: bool = True) -> str:
    """`+0.341 kB (95 % +0.286 to +0.398) on unseen animals`."""
    unit = UNITS.get(gain.reward, "")
    span = f" (95 % {signed(gain.low)} to {signed(gain.high)})" if interval else ""
    return f"{signed(gain.difference, unit)}{span} on {split_words(gain.split)}"


def main_reward(record: Record) -> str | None:
    """The trained reward or, where preference pairs were trained on, the first one reported."""
    return record.reward or (record.gains[0].reward if record.gains else None)


def told(gains: list[Gain]) -> Gain | None:
    """The line that says most: on prompts never trained on, if there are any; of these, on those that gained."""
    unseen = [gain for gain in gains if gain.split != "trained"] or gains
    return next((gain for gain in unseen if gain.direction > 0), next(iter(unseen), None))


def duration(seconds: float) -> str:
    """`4.6 min`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size * (2 if unit == "days" else 1):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _verb(gain: Gain) -> str:
    return {1: "rose by", -1: "fell by", 0: "did not change beyond chance:"}[gain.direction]


def _headline(record: Record, mine: list[Gain], others: list[Gain]) -> str:
    best = told(mine)
    if best is None:
        means = record.column("reward/mean")
        known = means[means == means]
        if not len(known):
            return "No reward has been recorded yet."
        unit = UNITS.get(record.reward or "", "")
        return f"The training reward went from {known[0]:.3f} to {known[-1]:.3f} {unit}".strip() + "."
    first = f"The reward {_verb(best)} {gain_words(best)}."
    if best.split.startswith("unseen"):
        first = first.replace("on unseen ", "on ").removesuffix(".") + " never trained on."
    if best.direction > 0 and (rest := _not_risen(mine)):
        first = f"{first.removesuffix('.')}, but not beyond chance on {_list(rest)}."
    fallen = sorted({gain.reward for gain in others if gain.direction < 0})
    if fallen:
        return f"{first} {_list(fallen)} fell."
    stayed = sorted({gain.reward for gain in others})
    return f"{first} {_list(stayed)} stayed." if stayed else first


def _not_risen(mine: list[Gain]) -> list[str]:
    """The splits never trained on where the reward did not rise, though it may have."""
    return [split_words(gain.split) for gain in mine if gain.split != "trained" and gain.direction <= 0]


def _asked(record: Record) -> str:
    made = f"{record.epochs} of {record.setting('train.epochs', '?')} epochs"
    calls = record.column("reward_calls")
    drawn = f", {calls[-1]:,.0f} pictures drawn and scored" if len(calls) and calls[-1] > 0 else ""
    goal = record.reward or (f"the data in {record.setting('data')}" if record.setting("data") else "a reward")
    prompts = f" on the prompts {record.setting('prompts')}" if record.setting("prompts") else ""
    return f"{record.model} towards {goal}{prompts}, by {record.algorithm or 'an algorithm'}: {made}{drawn}."


def _won(record: Record, mine: list[Gain]) -> str:
    if not mine:
        return "Base and tuned model have not been compared yet." if not record.finished else "Nobody measured it."
    return "; ".join(gain_words(gain) for gain in mine) + "."


def _lost(record: Record, others: list[Gain]) -> str:
    said = [f"{gain.reward} {gain_words(gain)}" for gain in others if gain.direction < 0]
    base, tuned = (record.drift.get(f"diversity_{which}", float("nan")) for which in ("base", "tuned"))
    if base > 0 and tuned < 0.95 * base:
        said.append(f"pictures of one prompt are {1 - tuned / base:.0%} more alike")
    elif base > 0 and tuned == tuned:
        said.append("pictures of one prompt differ as much as before")
    if not others:
        said.append("nobody knows what else it cost: no other reward was measured (evaluation.rewards)")
    elif not any(gain.direction < 0 for gain in others):
        said.insert(0, f"nothing beyond chance by {_list(sorted({gain.reward for gain in others}))}")
    text = "; ".join(said)
    sentence = text if any(gain.direction < 0 for gain in others) else text[:1].upper() + text[1:]
    return f"{sentence}."


def _believe(mine: list[Gain], others: list[Gain]) -> tuple[str, str]:
    """The sentence and the verdict."""
    if not mine:
        return "Open: there is no comparison of base and tuned model on the same noise yet.", "open"
    unseen = [gain for gain in mine if gain.split != "trained"]
    risen = [gain for gain in mine if gain.direction > 0]
    fallen = sorted({gain.reward for gain in others if gain.direction < 0})
    count = min(gain.count for gain in mine)
    few = f" The intervals come from as few as {count} pictures." if count < FEW else ""
    if any(gain.direction < 0 for gain in mine):
        where = [split_words(gain.split) for gain in mine if gain.direction < 0]
        return f"No: the reward fell beyond chance on {_list(where)}.{few}", "no"
    if not risen:
        return f"No: every interval holds 0.{few}", "no"
    if unseen and not any(gain.direction > 0 for gain in unseen):
        return f"For the trained prompts only: on others the interval holds 0.{few}", "partly"
    if fallen:
        return (
            f"In part: the gain is beyond chance, but {_list(fallen)} fell beyond chance too, so some of it is "
            f"over-optimisation. Look at the pictures.{few}",
            "partly",
        )
    if unseen and (rest := _not_risen(mine)):
        return f"In part: beyond chance on some prompts never trained on, but not on {_list(rest)}.{few}", "partly"
    if not unseen:
        return f"For the trained prompts: no others were measured.{few}", "partly"
    if not others:
        return f"The gain, yes; what it cost, nobody measured.{few}", "partly"
    return f"Yes: beyond chance on prompts never trained on, and no other reward fell beyond chance.{few}", "yes"


def _list(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def figures(record: Record) -> list[tuple[str, str]]:
    """(name, value) of the numbers that a reader wants first."""
    found: list[tuple[str, str]] = []
    best = told([gain for gain in record.gains if gain.reward == main_reward(record)])
    if best is not None:
        found += [
            (f"reward, {split_words(best.split)}", signed(best.difference, UNITS.get(best.reward, ""))),
            ("pictures that won", f"{best.win_rate:.0%}"),
        ]
    base, tuned, kl = (
        record.drift.get(name, float("nan")) for name in ("diversity_base", "diversity_tuned", "kl_to_base")
    )
    if base > 0 and tuned == tuned:
        found.append(("diversity kept", f"{tuned / base:.0%}"))
    if kl == kl:
        found.append(("KL to the base", f"{kl:,.0f} nats"))
    calls = number(record.metrics[-1].get("reward_calls")) if record.metrics else float("nan")
    if calls == calls:
        found.append(("pictures scored", f"{calls:,.0f}"))
    if len(record.seconds):
        found.append(("training took", duration(float(record.seconds.sum()))))
    return found
