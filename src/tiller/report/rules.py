"""The rules of the diagnosis, one function each; docs/diagnosis.md has a heading for every one of them."""

from __future__ import annotations

import numpy as np

from tiller.report.diagnosis import Finding, Level, Limits, Rule, early, late, trend
from tiller.report.record import Record, number
from tiller.report.words import split_words

GRADIENT = ("draft", "draft_lv", "align_prop", "refl", "adjoint_matching")  # to whom a group means nothing


def broken_off(record: Record, limits: Limits) -> Finding | None:
    """The folder holds what a run leaves that could not go on."""
    if not record.broken_off or record.finished:
        return None
    return Finding(
        "broken_off",
        "problem",
        f"The run ended after {record.epochs} epochs because {record.broken_off}.",
        "The file or folder it left beside the metrics shows where; the same command goes on from the last checkpoint.",
    )


def first_ratio(record: Record, limits: Limits) -> Finding | None:
    """Epochs with a single update compare the policy with itself: the ratio is 1, or recording and replay differ."""
    inner = record.setting("algorithm.inner_epochs", 1)
    single = record.setting("train.updates_per_epoch") == 1 and inner == 1
    if not single or record.setting("algorithm.replay_epochs", 0):
        return None
    largest = np.nanmax(np.append(record.column("policy/log_ratio_max"), -1))
    if largest <= limits.first_log_ratio:
        return None
    return Finding(
        "first_ratio",
        "problem",
        f"The log-ratio reached {largest:.2g} where policy and old policy are the same weights and it must be 0.",
        "Recording and replay differ: switch off dropout and layers that compute differently without gradients, or "
        "set model.dtype=float32 and model.compile=false.",
    )


def gradient_zero(record: Record, limits: Limits) -> Finding | None:
    """No update moves anything."""
    norms = late(record.column("optim/grad_norm"))
    if not len(norms) or norms.max() > 1e-12:
        return None
    return Finding(
        "gradient_zero",
        "problem",
        f"The gradient is zero in all of the last {len(norms)} epochs, so no weight moves.",
        "Look whether all scores of a prompt are the same, and whether an advantage or target cuts everything off.",
    )


def missing_scores(record: Record, limits: Limits) -> Finding | None:
    """Scores that a reward did not give."""
    missing, samples = record.column("reward/missing"), number(record.setting("train.samples_per_epoch"))
    total = float(np.nansum(missing))
    asked = samples * len(missing) if np.isfinite(samples) else record.column("reward_calls")[-1:].sum()
    if not asked > 0 or total / asked <= limits.missing:
        return None
    level: Level = "problem" if total / asked > 0.5 else "warning"
    return Finding(
        "missing_scores",
        level,
        f"{total / asked:.0%} of the scores are missing ({total:.0f} of {asked:.0f} pictures), and teach nothing.",
        "Ask the reward why: the reasons stand beside the scores; a judge may need a longer timeout or a clearer "
        "answer format.",
    )


def skipped_updates(record: Record, limits: Limits) -> Finding | None:
    """Updates left out because their gradient was not finite."""
    if not record.metrics:
        return None
    skipped, made = (float(record.column(name)[-1]) for name in ("optim/skipped", "optim/updates"))
    if not skipped > 0 or skipped / (skipped + made) <= limits.skipped:
        return None
    return Finding(
        "skipped_updates",
        "warning",
        f"{skipped:.0f} of {skipped + made:.0f} updates were left out because their gradient was not finite.",
        "Lower train.learning_rate, or train in float32 (model.mixed_precision=no, model.dtype=float32).",
    )


def gradient_explodes(record: Record, limits: Limits) -> Finding | None:
    """The gradient grows far beyond what it is clipped to."""
    norms = record.column("optim/grad_norm")
    first, last = early(norms), late(norms)
    bound = number(record.setting("train.max_grad_norm", 1.0))
    if len(norms) < 6 or not len(first) or not len(last) or not np.median(first) > 0:
        return None
    times = np.median(last) / np.median(first)
    if times < limits.growth or np.median(last) < bound:
        return None
    return Finding(
        "gradient_explodes",
        "warning",
        f"The gradient's norm grew {times:.0f}-fold, to {np.median(last):.3g}; updates are cut to {bound:g}.",
        "Lower train.learning_rate, or add a KL penalty (algorithm.kl_coefficient) where the algorithm has one.",
    )


def no_spread(record: Record, limits: Limits) -> Finding | None:
    """Groups in which all pictures have one score have no advantage to learn from."""
    counts = late(record.column("reward/zero_spread_groups"))
    if record.algorithm in GRADIENT:
        return None
    if not len(counts) or not record.groups > 0 or counts.mean() / record.groups <= limits.no_spread:
        return None
    share = counts.mean() / record.groups
    return Finding(
        "no_spread",
        "problem" if share > 0.95 else "warning",
        f"{share:.0%} of the groups have no spread: all pictures of a prompt get the same score, and teach nothing.",
        "Raise the noise of the kernel, draw more pictures per prompt (train.group_size), pick prompts that succeed "
        "sometimes, or take a reward with finer steps.",
    )


def clipped(record: Record, limits: Limits) -> Finding | None:
    """Nearly all samples lie outside the clip range."""
    fraction = late(record.column("policy/clip_fraction"))
    rounds = number(record.setting("algorithm.inner_epochs", 1)) * number(record.setting("train.updates_per_epoch", 1))
    others = (rounds - 1) / rounds if rounds > 1 else 1.0  # an epoch's first update is never outside
    if not len(fraction) or fraction.mean() / others <= limits.clip_fraction:
        return None
    return Finding(
        "clipped",
        "warning",
        f"The clip fraction is {fraction.mean():.2f}, where {others:.2f} is the most there can be: nearly every sample "
        "lies outside the clip range and has little or no gradient left.",
        "Lower train.learning_rate or algorithm.inner_epochs, or widen algorithm.clip_range.",
    )


def kl_dominates(record: Record, limits: Limits) -> Finding | None:
    """The KL penalty outweighs the policy term. Only where an update has moved the ratio, which it is measured by."""
    name = next(iter(record.names("policy/kl_")), "")
    weight = number(record.setting("algorithm.kl_coefficient"))
    penalty = late(weight * record.column(name))
    moved = late(np.sqrt(2 * record.column("policy/approx_kl")))  # root mean square of log ρ
    if not len(penalty) or not len(moved) or not moved.mean() > 1e-6:
        return None
    rest = late(record.column("policy/loss") - weight * record.column(name))
    size = max(moved.mean(), np.abs(rest).mean() if len(rest) else 0.0)
    if penalty.mean() / size <= limits.kl_ratio:
        return None
    return Finding(
        "kl_dominates",
        "warning",
        f"The KL term is {penalty.mean() / size:.0f} times the policy term ({penalty.mean():.2g} to {size:.2g}): the "
        "model is held where it was.",
        f"Lower algorithm.kl_coefficient ({weight:g}), or raise train.learning_rate if the KL itself is small.",
    )


def reward_trend(record: Record, limits: Limits) -> Finding | None:
    """The trained reward stands still, or falls, over at least `flat_epochs` epochs."""
    means = record.column("reward/mean")
    told = [gain.direction for gain in record.gains if gain.reward == record.reward]
    t = trend(means)
    if np.isfinite(means).sum() < limits.flat_epochs or not np.isfinite(t) or 1 in told:
        return None
    first, last = early(means).mean(), late(means).mean()
    if t <= limits.falling_t:
        return Finding(
            "reward_falls",
            "problem",
            f"The reward falls, from {first:.4g} in the first third of the epochs to {last:.4g} in the last.",
            "Check the sign of the reward, then lower train.learning_rate.",
        )
    if abs(t) >= limits.flat_t:
        return None
    return Finding(
        "reward_flat",
        "warning",
        f"The reward is flat: {first:.4g} in the first third of {len(means)} epochs, {last:.4g} in the last, within "
        "what chance does.",
        "If no other line says why: raise train.learning_rate by 3 to 10 times, or draw more pictures per prompt.",
    )


def saturated(record: Record, limits: Limits) -> Finding | None:
    """The scores have lost their spread, though they had one."""
    spread = record.column("reward/std")
    first, last = early(spread), late(spread)
    if len(spread) < 6 or not len(first) or not len(last) or not first.mean() > 0:
        return None
    if last.mean() / first.mean() >= limits.saturated:
        return None
    return Finding(
        "saturated",
        "warning",
        f"The scores' spread is down to {last.mean() / first.mean():.1%} of what it was: there is nothing left to tell "
        "apart.",
        "Stop here and look at the pictures; go on only with a reward that still tells them apart.",
    )


def held_out_falls(record: Record, limits: Limits) -> Finding | None:
    """The trained reward rose and another one fell, both beyond chance: over-optimisation."""
    if not record.gains:
        return _falls_meanwhile(record, limits)
    if not any(gain.reward == record.reward and gain.direction > 0 for gain in record.gains):
        return None
    lost = [gain for gain in record.gains if gain.reward != record.reward and gain.direction < 0]
    if not lost:
        return None
    worst = min(lost, key=lambda gain: gain.difference / max(abs(gain.base), 1e-12))
    return Finding(
        "held_out_falls",
        "warning",
        f"The trained reward rose while {worst.reward} fell by {-worst.difference:.3g} on {split_words(worst.split)} "
        f"(95 % {-worst.high:.3g} to {-worst.low:.3g}): the reward is being over-optimised.",
        "Stop earlier, add a KL penalty, or put that score into the reward with a small weight.",
    )


def _falls_meanwhile(record: Record, limits: Limits) -> Finding | None:
    """The same, seen in the evaluations of a run that is not finished yet."""
    if not trend(record.column("reward/mean")) > -limits.falling_t:
        return None
    for name in record.names("eval/"):
        seen = record.column(name)
        known = seen[np.isfinite(seen)]
        _, split, reward = [*name.split("/", 2), "", ""][:3]
        if reward != record.reward and len(known) >= 5 and trend(seen) <= limits.falling_t:
            return Finding(
                "held_out_falls",
                "warning",
                f"The trained reward rises while {reward} falls on {split_words(split)}, from {known[0]:.3g} to "
                f"{known[-1]:.3g}: the reward is being over-optimised.",
                "Stop soon, or let evaluation.monitor do it; a KL penalty slows it down.",
            )
    return None


def not_general(record: Record, limits: Limits) -> Finding | None:
    """What was won on trained prompts is not there on any others."""
    mine = [gain for gain in record.gains if gain.reward == record.reward]
    seen = [gain for gain in mine if gain.split == "trained"]
    unseen = [gain for gain in mine if gain.split != "trained"]
    if not seen or not unseen or seen[0].direction <= 0 or any(gain.direction > 0 for gain in unseen):
        return None
    best = max(unseen, key=lambda gain: gain.difference)
    if any(gain.high > seen[0].difference for gain in unseen):
        return None  # they may well have gained as much
    return Finding(
        "not_general",
        "warning",
        f"The trained prompts gained {seen[0].difference:+.3g}, but no other prompts did: {split_words(best.split)}, "
        f"the best of them, {best.difference:+.3g} (95 % {best.low:+.3g} to {best.high:+.3g}).",
        "Train on more and more varied prompts, with fewer epochs over each.",
    )


def diversity_lost(record: Record, limits: Limits) -> Finding | None:
    """Pictures of one prompt have become alike."""
    base, tuned = (record.drift.get(f"diversity_{name}", float("nan")) for name in ("base", "tuned"))
    if not base > 0 or not tuned / base < limits.diversity:
        return None
    return Finding(
        "diversity_lost",
        "warning",
        f"Pictures of one prompt differ by {tuned:.3f} where they differed by {base:.3f}: {tuned / base:.0%} of the "
        "diversity is left.",
        "Stop earlier, add a KL penalty, or lower train.learning_rate.",
    )


def value_network(record: Record, limits: Limits) -> Finding | None:
    """The baseline adds noise instead of removing it."""
    explained = late(record.column("value/explained"))
    if len(record.metrics) < 5 or not len(explained) or np.median(explained) >= limits.explained:
        return None
    return Finding(
        "value_network",
        "warning",
        f"The value network explains {np.median(explained):.3g} of the rewards' variance: it is worse than their mean.",
        "Raise algorithm.critic.updates, lower algorithm.critic.learning_rate, or leave the network out "
        "(algorithm.critic=null).",
    )


def adjoint_dropped(record: Record, limits: Limits) -> Finding | None:
    """Adjoint matching leaves out paths whose target is too large."""
    dropped = late(record.column("policy/dropped"))
    if not len(dropped) or dropped.mean() <= limits.dropped:
        return None
    return Finding(
        "adjoint_dropped",
        "warning",
        f"{dropped.mean():.0%} of the paths are left out, because their target is larger than algorithm.target_limit.",
        "Lower algorithm.reward_weight until few are.",
    )


def above_target(record: Record, limits: Limits) -> Finding | None:
    """ReFL's pictures are beyond its target, where it has no gradient."""
    below = late(record.column("policy/below_target"))
    if not len(below) or below.mean() >= limits.below_target:
        return None
    return Finding(
        "above_target",
        "warning",
        f"Only {below.mean():.0%} of the pictures score below ReFL's target; the others teach nothing.",
        "Raise algorithm.target, or stop here.",
    )


def reward_waits(record: Record, limits: Limits) -> Finding | None:
    """Scoring is on the critical path: `time/reward` is what is left of it after the next batch has been drawn."""
    waiting, seconds = record.timing("time/reward"), record.seconds
    if not len(seconds) or not np.nansum(seconds) > 0:
        return None
    share = np.nansum(waiting) / np.nansum(seconds)
    if share <= limits.waiting:
        return None
    drawing = np.nansum(record.timing("time/sample")) / len(seconds)
    return Finding(
        "reward_waits",
        "note",
        f"{share:.0%} of the time goes into waiting for scores ({np.nanmean(waiting):.1f} s an epoch; drawing takes "
        f"{drawing:.1f} s).",
        "Give the reward more workers or its own device, or let it score larger batches.",
    )


def memory_creeps(record: Record, limits: Limits) -> Finding | None:
    """The process holds more and more."""
    held = record.timing("memory/gb")
    held = held[np.isfinite(held)]
    tenth = max(1, len(held) // 10)
    if len(held) < 10:
        return None
    first, last = held[tenth : 2 * tenth].mean(), held[-tenth:].mean()
    if last - first <= limits.memory_gb or last / first - 1 <= limits.memory_growth or trend(held) < 3:
        return None
    return Finding(
        "memory_creeps",
        "warning",
        f"The process holds {last:.1f} GB, {last - first:.1f} GB more than after its first epochs, and it goes on.",
        "Most often a reward keeps pictures or results: look there first.",
    )


RULES: tuple[Rule, ...] = (
    broken_off,
    first_ratio,
    gradient_zero,
    no_spread,
    missing_scores,
    skipped_updates,
    gradient_explodes,
    clipped,
    kl_dominates,
    reward_trend,
    saturated,
    held_out_falls,
    not_general,
    diversity_lost,
    value_network,
    adjoint_dropped,
    above_target,
    memory_creeps,
    reward_waits,
)
