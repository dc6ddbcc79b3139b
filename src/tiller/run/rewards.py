"""rewards.json: what the rewards looked like before training, and by what they are normalised from then on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tiller.reward_spec import Scale
from tiller.rewards import Reward
from tiller.rewards.scale import Beside, scales, unmeasured, with_scales
from tiller.run.claim import REWARDS
from tiller.run.files import read_json, replace_file, to_json
from tiller.types import RunError


def write(folder: Path, found: Beside) -> None:
    """Write it, in a run's folder.

    Raises:
        RunError: there is no room.
    """
    replace_file(folder / REWARDS, to_json(found.to_data()))


def restored(folder: Path, reward: Reward) -> Reward:
    """The reward with the scales that the run has measured before its first update.

    Raises:
        RunError: they are not there, or are others than the recipe's own.
    """
    if not unmeasured(reward) and not scales(reward):
        return reward
    path = folder / REWARDS
    if not path.exists():
        if not unmeasured(reward):
            return reward
        raise RunError(
            f"{path} is missing, and with it the scale of {unmeasured(reward)[0]}; put it back, or choose another "
            "run.output_dir."
        )
    try:
        known = {name: one["scale"] and Scale(**one["scale"]) for name, one in read_json(path)["rewards"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); put it back, or choose another run.output_dir.") from error
    for name in (*unmeasured(reward), *scales(reward)):
        own = scales(reward).get(name, known.get(name))
        if own is None or known.get(name) != own:
            raise RunError(
                f"{path} has {known.get(name)} as the scale of {name}, and the recipe {own}; put back what it was, or "
                "choose another run.output_dir."
            )
    return with_scales(reward, {name: scale for name, scale in known.items() if scale})


def fingerprint(reward: Reward) -> str:
    """A hash of the scales, by which a run knows them again."""
    return hashlib.sha256(to_json({name: [one.mean, one.std] for name, one in scales(reward).items()})).hexdigest()
