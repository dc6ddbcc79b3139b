"""The run folder.

config.yaml         the resolved recipe
identity.json       hashes of the base model, the prompt file and the reward's source
environment.json    versions, threads, device
metrics.jsonl       one line per epoch, byte for byte the same whenever the same run is made again
timings.jsonl       seconds per epoch
scores.jsonl        every score of every picture drawn
rewards.json        the rewards' scales, their correlations, and by what they are normalised
reward_cache.sqlite scores of rewards that say they are deterministic
checkpoints/        epoch-000010/ ...: state.safetensors, state.json, manifest.json
images/             whatever the caller puts there
not-finite-epoch-000003/  an update whose gradient was not finite, if that ended the run
stacks.txt          where all threads stood when a reward did not answer
finished.json       once all is done
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from PIL.Image import Image

from tiller import yaml_text
from tiller.rewards.scale import scales
from tiller.run import checkpoints, lines, scores
from tiller.run.checkpoints import Damaged, Snapshot
from tiller.run.claim import CONFIG, FINISHED, METRICS, TIMINGS, claim, epochs, finished, identify, note_environment
from tiller.run.files import replace_file, sync, to_json, writing
from tiller.run.identity import fingerprint
from tiller.run.lock import Lock
from tiller.run.rewards import fingerprint as fingerprint_of_scales
from tiller.state import TrainState
from tiller.types import RunError, TillerError

if TYPE_CHECKING:
    from tiller.distributed import World
    from tiller.policy import Policy
    from tiller.rewards import Reward
    from tiller.trackers import Tracker
    from tiller.training import Report

T = TypeVar("T")
LARGEST_KEPT = 4 << 30  # bytes of a state that is copied after every epoch, to be saved when a signal comes
SHOWN = 8  # pictures per epoch that trackers get


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr)


class Run:
    """A run folder, open for writing. Made by `Run.open`; of several processes, only the main one writes.

    run = Run.open(folder, config.to_mapping(recipe, complete=True))
    run.check_model(policy)
    state = TrainState(policy, config)
    run.restore(state)
    with run, Interrupts(run.save_last) as interrupts:
        for report in interrupts.over(train(..., state=state)):
            run.log(report)
            if report.epoch % 5 == 0:
                run.save(report.state)
        run.finish()
    """

    def __init__(
        self, folder: Path, recipe: Mapping[str, Any], keep_last: int, world: World | None, tell: Callable[[str], None]
    ):
        self.folder, self.recipe, self.keep_last = folder, recipe, keep_last
        self.trackers: list[Tracker] = []  # they mirror what `log` writes
        self._world, self._tell = world, tell
        self._lock = Lock(folder / ".lock")
        self._last: Snapshot | None = None  # the last epoch logged, as long as it is not saved

    @classmethod
    def open(
        cls,
        folder: str | Path,
        recipe: Mapping[str, Any],
        *,
        keep_last: int = 2,
        resume: bool = False,
        world: World | None = None,
        tell: Callable[[str], None] = _tell,
    ) -> Run:
        """Begin a run, or go on with the one in the folder if it has the same recipe.

        Args:
            recipe: plain mappings, lists and scalars: `config.to_mapping(recipe, complete=True)`.
            keep_last: how many checkpoints to keep.
            resume: there must be a checkpoint to go on from.
            tell: gets a sentence about what is worth knowing, such as a damaged checkpoint that was passed over.

        Raises:
            RunError: the folder cannot be written, is in use, holds something else, another or a finished run, or
                (with `resume`) no checkpoint.
        """
        run = cls(Path(folder), yaml_text.parse(yaml_text.write(dict(recipe)), CONFIG), keep_last, world, tell)
        run._on_main(lambda: run._claim(resume))
        return run

    @property
    def images_dir(self) -> Path:
        """Where pictures go."""
        path = self.folder / "images"
        with writing(path):
            path.mkdir(exist_ok=True)
        return path

    @property
    def finished(self) -> bool:
        """Whether everything that the recipe asks for is done."""
        return finished(self.folder, self.recipe)

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return checkpoints.listed(self.folder / "checkpoints")

    def latest(self) -> Path | None:
        """The newest checkpoint."""
        return next(reversed(self.checkpoints()), None)

    def check_model(self, policy: Policy) -> None:
        """Refuse to go on with another base model than the run began with. Call it before `restore`.

        Raises:
            RunError: the weights differ.
        """
        self._on_main(lambda: identify(self.folder, self.recipe, {"model": fingerprint(policy)}))

    def check_scales(self, reward: Reward) -> None:
        """Refuse to go on with other scales of the rewards than the run began with.

        Raises:
            RunError: they differ.
        """
        if scales(reward):
            self._on_main(lambda: identify(self.folder, self.recipe, {"scales": fingerprint_of_scales(reward)}))

    def restore(self, state: TrainState) -> bool:
        """Put the newest sound checkpoint into `state`, and cut the metrics off behind it; False if there is none.

        A damaged checkpoint is told of, put aside as `damaged-epoch-...`, and the one before it is taken.

        Raises:
            RunError: all checkpoints are damaged, or do not fit the model.
        """
        chosen = self._on_main(self._choose)
        if chosen is None:
            return False
        try:
            snapshot = checkpoints.load(chosen)
        except Damaged as error:
            raise RunError(f"{error} in this process; all processes must see the same run folder.") from error
        state.load(snapshot.tensors, snapshot.data)
        return True

    def log(self, report: Report, more: Mapping[str, float] | None = None) -> None:
        """Write an epoch's metrics, with `more` of the caller's own, and its timings. Call it before `save`."""
        if not self._writes:
            return
        metrics = {**report.metrics, **(more or {})}
        self.record(report.epoch, metrics)
        lines.append(self.folder / TIMINGS, {"epoch": report.epoch, **report.timings})
        if report.scores is not None:
            scores.append(self.folder, report.epoch, report.asked, report.samples, report.scores)
        for tracker in self.trackers:
            pictures = [picture for picture in report.pictures[:SHOWN] if isinstance(picture, Image)]
            tracker.log(report.epoch, {**metrics, **report.timings}, pictures)
        size = sum(value.nbytes for value in report.state.tensors().values())
        self._last = Snapshot.of(report.state) if size <= LARGEST_KEPT else None

    def record(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write a line of metrics that belongs to no report, such as those of the model before training (epoch 0)."""
        if self._writes:
            lines.append(self.folder / METRICS, {"epoch": epoch, **metrics})

    def save(self, state: TrainState) -> None:
        """Write a checkpoint; when this returns, it is on the disk.

        Raises:
            RunError: there is no room, or no permission. Earlier checkpoints are untouched.
        """
        if self._writes:
            kept = self._last if self._last is not None and self._last.epoch == state.epoch else None
            self._write(kept or Snapshot.of(state))

    def save_last(self) -> None:
        """Write a checkpoint of the last epoch logged, unless it is there already: what to do when a signal comes."""
        if self._writes and self._last is not None:
            self._write(self._last)

    def finish(self) -> None:
        """Note that everything is done: training, evaluation, whatever the caller does besides."""
        if self._writes:
            replace_file(self.folder / FINISHED, to_json({"epochs": epochs(self.recipe)}))

    def close(self) -> None:
        """Let go of the folder and the trackers."""
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []
        self._lock.release()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Close; after an error, what it broke off is saved as of the last epoch first."""
        try:
            if error is not None:
                with suppress(RunError):  # the first error is the one to tell
                    self.save_last()
        finally:
            self.close()

    @property
    def _writes(self) -> bool:
        return self._world is None or self._world.is_main

    def _on_main(self, work: Callable[[], T]) -> T:
        """`work()`, done by the main process; what came of it, answer or error, in all of them."""
        if self._world is None or self._world.size == 1:
            return work()
        outcome: tuple[Any, TillerError | None] = (None, None)
        if self._world.is_main:
            try:
                outcome = (work(), None)
            except TillerError as error:
                outcome = (None, error)
        answer, failure = self._world.gather([outcome])[0]
        if failure is not None:
            raise failure
        return answer  # type: ignore[no-any-return]

    def _claim(self, resume: bool) -> None:
        """Take the folder, if it is fit for this recipe."""
        with writing(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise RunError(f"{self.folder} is a file; choose another run.output_dir.")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        try:
            claim(self.folder, self.recipe, bool(self.checkpoints()), resume)
            note_environment(self.folder, self._world.size if self._world else 1, self._tell)
        except BaseException:
            self._lock.release()
            raise

    def _choose(self) -> Path | None:
        """The newest sound checkpoint; damaged ones before it are put aside, and the metrics cut off behind it."""
        damaged: dict[Path, Damaged] = {}
        for path in reversed(self.checkpoints()):
            try:
                checkpoints.load(path)
            except Damaged as error:
                damaged[path] = error
                continue
            for bad, why in damaged.items():
                checkpoints.put_aside(bad)
                self._tell(f"{why}, so {bad.name} is passed over; the run goes on from {path.name}.")
            self._cut(checkpoints.epoch_of(path))
            return path
        if damaged:
            raise RunError(
                f"no checkpoint in {self.folder} is sound ({'; '.join(map(str, damaged.values()))}); choose another "
                "run.output_dir to begin again."
            )
        self._cut(None)
        return None

    def _cut(self, epoch: int | None) -> None:
        for name in (METRICS, TIMINGS):
            lines.cut(self.folder / name, epoch)
        scores.cut(self.folder, epoch)

    def _write(self, snapshot: Snapshot) -> None:
        metrics = self.folder / METRICS
        with writing(metrics):
            if metrics.exists():
                sync(metrics)  # a checkpoint never comes to the disk before the lines up to it
        scores.flush(self.folder)
        checkpoints.save(self.folder / "checkpoints", snapshot, self.keep_last)
        self._last = None
