"""Recipes: what is accepted, what is refused with which words, and the round trip."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import pytest

from tiller import config, yaml_text
from tiller.choice import Choice, Chosen
from tiller.recipe import ALGORITHMS, KERNELS, Recipe
from tiller.settings import TrainConfig
from tiller.types import ConfigError


@dataclass(frozen=True)
class Square:
    """A class to choose."""

    side: float = 1.0
    name_tag: str | None = None


@dataclass(frozen=True)
class Circle:
    """Another, with a setting that it needs and one that a recipe cannot give."""

    radius: float
    maker: object = None
    shape: Any = None

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ValueError(f"radius is {self.radius}; it must be more than 0.")


SHAPES = Choice({"square": f"{__name__}:Square", "circle": f"{__name__}:Circle"})
SQUARE = SHAPES.pick("square")


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    steps: int = 3
    pair: tuple[float, float] = (0.5, 0.9)


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    flag: bool = False
    word: str = "w"
    number: int | float = 1
    either: int | str | None = None
    mode: Literal["no", "bf16", 8] = "no"
    names: tuple[str, ...] = ()
    nested: tuple[tuple[int, ...], ...] | None = None
    free: dict[str, Any] = field(default_factory=dict)
    shape: Annotated[Chosen, SHAPES] = SQUARE
    other: Annotated[Chosen | None, SHAPES] = None


def from_text(text: str, cls: type = Outer, overrides: tuple[str, ...] = ()) -> Any:
    """Through the same reader as a file."""
    mapping = yaml_text.parse(text, "recipe") or {}
    for override in overrides:
        config._override(cls, mapping, override)
    return config.from_mapping(cls, mapping)


def message(text: str, cls: type = Outer, overrides: tuple[str, ...] = ()) -> str:
    """The error that this text gives."""
    with pytest.raises(ConfigError) as caught:
        from_text(text, cls, overrides)
    return str(caught.value)


# ---- accepted ----


def test_an_empty_recipe_is_the_defaults(tmp_path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert config.load(Outer, tmp_path / "empty.yaml") == Outer()
    assert config.load(Outer, None) == Outer()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("inner: {lr: 1e-4}", "inner.lr", 1e-4),
        ("inner: {lr: 1E+2}", "inner.lr", 100.0),
        ("inner: {lr: 3}", "inner.lr", 3.0),
        ("inner: {lr: .5}", "inner.lr", 0.5),
        ("inner: {lr: -2.}", "inner.lr", -2.0),
        ("inner: {lr: .inf}", "inner.lr", math.inf),
        ("inner: {steps: 1_000}", "inner.steps", 1000),
        ("inner: {pair: [0, 1e-1]}", "inner.pair", (0.0, 0.1)),
        ("maybe: {steps: 5}", "maybe.steps", 5),
        ("maybe: null", "maybe", None),
        ("maybe:", "maybe", None),
        ("flag: true", "flag", True),
        ("word: 'true'", "word", "true"),
        ("word: no", "word", "no"),
        ("word: 1:30", "word", "1:30"),
        ("word: 2026-11-21", "word", "2026-11-21"),
        ("number: 2", "number", 2),
        ("number: 2.5", "number", 2.5),
        ("either: 3", "either", 3),
        ("either: three", "either", "three"),
        ("mode: no", "mode", "no"),
        ("mode: 8", "mode", 8),
        ("names: [a, b]", "names", ("a", "b")),
        ("names: []", "names", ()),
        ("nested: [[1], [], [2, 3]]", "nested", ((1,), (), (2, 3))),
        ("free: {a: 5, b: 1e1, c: {x: [1, null]}}", "free", {"a": 5, "b": 10.0, "c": {"x": [1, None]}}),
        ("shape: circle", "shape", None),
    ],
)  # fmt: skip
def test_values(text: str, key: str, value: Any) -> None:
    if text == "shape: circle":
        assert from_text(text).shape == SHAPES.pick("circle")
        return
    found = from_text(text)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_the_result_is_frozen_and_shares_nothing_with_the_input() -> None:
    mapping = {"free": {"deep": {"x": 1}}}
    outer = config.from_mapping(Outer, mapping)
    mapping["free"]["deep"]["x"] = 2
    assert outer.free == {"deep": {"x": 1}}
    with pytest.raises(FrozenInstanceError):
        outer.flag = True


# ---- refused ----


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("inner: {lrr: 1}", "config error: inner.lrr is unknown; did you mean inner.lr?"),
        ("wrod: x", "config error: wrod is unknown; did you mean word?"),
        ("steps: 3", "config error: steps is unknown; did you mean inner.steps?"),
        ("inner: {flag: true}", "config error: inner.flag is unknown; did you mean flag?"),
        ("inner: {zzz: 1}", "config error: inner.zzz is unknown; inner takes lr, steps, pair."),
        ("maybe: {step: 5}", "config error: maybe.step is unknown; did you mean maybe.steps?"),
        ("3: x", "config error: 3 is unknown; the recipe takes inner, maybe"),
        ("inner: {lr: fast}", "config error: inner.lr is 'fast'; it must be a number."),
        ("inner: {lr: '1e-4'}", "config error: inner.lr is '1e-4'; it must be a number."),
        ("inner: {lr: true}", "config error: inner.lr is True; it must be a number."),
        ("inner: {lr: .nan}", "config error: inner.lr is nan; it must be a number."),
        ("inner: {lr: null}", "config error: inner.lr is None; it must be a number."),
        ("inner: {steps: 3.0}", "config error: inner.steps is 3.0; it must be a whole number."),
        ("inner: {steps: true}", "config error: inner.steps is True; it must be a whole number."),
        ("inner: {steps: 010}", "config error: inner.steps is '010'; it must be a whole number."),
        ("inner: {pair: [1]}", "config error: inner.pair is [1]; it must be a list of 2: a number, a number."),
        ("inner: {pair: [1, x]}", "config error: inner.pair[1] is 'x'; it must be a number."),
        ("inner: 3", "config error: inner is 3; it must be a mapping with lr, steps, pair."),
        ("inner: null", "config error: inner is None; it must be a mapping with"),
        ("maybe: 3", "config error: maybe is 3; it must be a mapping with"),
        ("flag: yes", "config error: flag is 'yes'; it must be true or false."),
        ("flag: 1", "config error: flag is 1; it must be true or false."),
        ("word: 12", "config error: word is 12; it must be text."),
        ("number: x", "config error: number is 'x'; it must be a whole number or a number."),
        ("either: 2.5", "config error: either is 2.5; it must be a whole number or text or null."),
        ("mode: bf61", "config error: mode is 'bf61'; it must be one of no, bf16, 8; did you mean bf16?"),
        ("mode: false", "config error: mode is False; it must be one of no, bf16, 8."),
        ("names: abc", "config error: names is 'abc'; it must be a list of text, such as [a, b]."),
        ("names: [a, 3]", "config error: names[1] is 3; it must be text."),
        ("free: 3", "config error: free is 3; it must be a mapping of settings."),
        ("free: {1: 2}", "config error: free.1 has a name that is no text; quote it."),
        ("shape: {side: 2}", "config error: shape.name is missing; it must be one of square, circle."),
        ("shape: sqare", "one of square, circle, or your own package.module:Class; did you mean square?"),
        ("shape: null", "config error: shape is None; it must be one of square, circle"),
        ("shape: [square]", "config error: shape is ['square']; it must be one of"),
        ("shape: {name: square, sides: 2}", "config error: shape.sides is unknown; did you mean shape.side?"),
        ("shape: {name: square, side: x}", "config error: shape.side is 'x'; it must be a number."),
        ("shape: {name: circle, radius: -1}", "config error: shape: radius is -1.0; it must be more than 0."),
        ("shape: {name: circle, maker: 1, radius: 1}", "config error: shape.maker cannot be set in a recipe"),
        ("shape: {name: circle, shape: 1}", "config error: shape.radius is missing; it must be a number."),
        ("shape: {name: 'nowhere:X', a: 1}", "config error: nowhere:X cannot be loaded: No module named 'nowhere'."),
        ("other: {side: 2}", "config error: other.name is missing"),
        ("word: a\nword: b", "config error: recipe:2: the key 'word' is given twice; keep one."),
        ("inner: {lr: 1, lr: 2}", "config error: recipe:1: the key 'lr' is given twice"),
        ("word: [a", "config error: recipe:1"),
        ("word: a\n\tflag: b", "config error: recipe:2"),
        ("word: !!python/name:os.system x", "config error: recipe:1: could not determine a constructor"),
    ],
)
def test_errors(text: str, says: str) -> None:
    found = message(text)
    assert says in found
    assert "\n" not in found


def test_a_missing_file_and_a_file_that_is_no_mapping(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"there is no recipe .*gone\.yaml"):
        config.load(Outer, tmp_path / "gone.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds a list"):
        config.load(Outer, tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        config.load(Outer, tmp_path / "binary.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(Outer, tmp_path)


# ---- overrides ----


def test_overrides_replace_the_file_and_reach_into_what_it_omits() -> None:
    outer = from_text("inner: {lr: 1}\nfree: {a: 1}", overrides=("inner.lr=1e-4", "maybe.steps=7", "free.b=[1, x]"))
    assert (outer.inner.lr, outer.maybe, outer.free) == (1e-4, Inner(steps=7), {"a": 1, "b": [1, "x"]})


def test_the_last_override_wins_and_a_value_may_hold_an_equals_sign() -> None:
    assert from_text("", overrides=("word=a", "word=b=c")).word == "b=c"
    assert from_text("either: 1", overrides=("either=",)).either is None
    assert from_text("maybe: {lr: 1}", overrides=("maybe=null",)).maybe is None


@pytest.mark.parametrize(
    ("text", "override", "expected"),
    [
        ("", "shape.side=2", {"name": "square", "side": 2}),
        ("shape: square", "shape.side=2", {"name": "square", "side": 2}),
        ("shape: {name: square, name_tag: x}", "shape.side=2", {"name": "square", "name_tag": "x", "side": 2}),
        ("shape: {name: square, side: 1}", "shape=circle", "circle"),
        ("other: circle", "other.radius=1.5", {"name": "circle", "radius": 1.5}),
    ],
)
def test_overrides_of_a_chosen_class(text: str, override: str, expected: Any) -> None:
    key = override.partition(".")[0].partition("=")[0]
    assert config.to_mapping(from_text(text, overrides=(override,)))[key] == expected


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("inner.lrr=1", "inner.lrr is unknown; did you mean inner.lr?"),
        ("inner.lr", "'inner.lr' is no setting; write key=value or key.sub=value."),
        ("=1", "is no setting"),
        ("inner..lr=1", "is no setting"),
        ("flag.x=1", "flag"),
        ("names.0=a", "names"),
        ("word=[a", "setting word:1"),
        ("other.side=1", "other.name is missing"),
    ],
)
def test_bad_overrides(override: str, says: str) -> None:
    assert says in message("flag: true\nnames: [a]", overrides=(override,))


def test_pairs_without_a_schema() -> None:
    assert config.parse_pairs(["scale=1e1", "name=no", "size=[1, 2]"]) == {"scale": 10.0, "name": "no", "size": [1, 2]}


# ---- out again ----


def every_kind() -> Outer:
    return Outer(
        inner=Inner(lr=1e-5, pair=(1.0, 1e22)),
        maybe=Inner(steps=-1),
        flag=True,
        word="1e-4",
        number=0.1,
        either="no",
        mode=8,
        names=("null", "~", "", "a: b", "#", "1_0", "0x1f", "é", "two\nlines", "1.", ".5", "true", "[", "<<"),
        nested=((1, 2), ()),
        free={"1": None, "x": [1, 2.5, "3", {"y": True}], "e": "1e5"},
        shape=SHAPES.pick("square", side=2e-7),
        other=SHAPES.pick(f"{__name__}:Circle", radius=1.0),
    )


@pytest.mark.parametrize("outer", [Outer(), every_kind()])
@pytest.mark.parametrize("complete", [False, True])
def test_round_trip_through_yaml(outer: Outer, complete: bool) -> None:
    again = from_text(config.to_yaml(outer, complete))
    if complete:
        assert config.build(again.shape) == config.build(outer.shape)
        again = replace(again, shape=outer.shape, other=outer.other)
    assert again == outer


def test_complete_writes_the_chosen_classes_defaults_out() -> None:
    assert config.to_mapping(Outer())["shape"] == "square"
    assert config.to_mapping(Outer(), complete=True)["shape"] == {"name": "square", "side": 1.0, "name_tag": None}


def test_what_is_written_means_the_same_to_an_ordinary_yaml_reader() -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(config.to_yaml(every_kind())) == config.to_mapping(every_kind())


def test_build_makes_the_object() -> None:
    assert config.build(SHAPES.pick("circle", radius=2)) == Circle(2.0)
    with pytest.raises(ConfigError, match="radius is missing"):
        config.build(SHAPES.pick("circle"))
    with pytest.raises(KeyError):
        SHAPES.pick("triangle")


# ---- the recipe itself ----


def test_the_default_recipe_goes_round() -> None:
    assert from_text(config.to_yaml(Recipe()), Recipe) == Recipe()


def test_the_message_of_the_manual() -> None:
    assert message("train: {lr: 1}", Recipe) == "config error: train.lr is unknown; did you mean train.learning_rate?"
    assert message("learning_rate: 1", Recipe).endswith("did you mean train.learning_rate?")
    assert "train: samples_per_epoch is 60, which is no multiple of group_size (8); 64 is." in message(
        "train: {samples_per_epoch: 60}", Recipe
    )


@pytest.mark.parametrize("name", KERNELS.options)
def test_every_listed_kernel_builds(name: str) -> None:
    assert type(config.build(KERNELS.pick(name))).__module__ == "tiller.kernels"


@pytest.mark.parametrize("name", ALGORITHMS.options)
def test_every_listed_algorithm_builds_and_its_defaults_go_round(name: str) -> None:
    recipe = Recipe(algorithm=ALGORITHMS.pick(name))
    again = from_text(config.to_yaml(recipe, complete=True), Recipe)
    assert again.algorithm.settings
    assert config.build(again.algorithm) == config.build(recipe.algorithm)


def test_algorithm_settings_are_checked() -> None:
    recipe = from_text("algorithm: {name: ddpo, clip_range: 1e-3}", Recipe)
    assert config.build(recipe.algorithm).clip_range == 1e-3
    assert "algorithm.clip_rnage is unknown; did you mean algorithm.clip_range?" in message(
        "", Recipe, ("algorithm.clip_rnage=1",)
    )
    assert "algorithm.kernel cannot be set in a recipe" in message("algorithm: {name: ddpo, kernel: ddim}", Recipe)


def test_kernel_settings_are_checked() -> None:
    assert config.build(from_text("kernel: {name: ddim, eta: 5e-1}", Recipe).kernel).eta == 0.5
    assert "kernel.etta is unknown; did you mean kernel.eta?" in message("kernel: {name: ddim, etta: 1}", Recipe)
    assert "kernel.variance is 'large'" in message("kernel: {name: ddpm, variance: large}", Recipe)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {group_size: 0}", "group_size is 0; it must be at least 1."),
        ("train: {seed: -1}", "seed is -1; it cannot be negative."),
        ("train: {max_grad_norm: 0}", "max_grad_norm is 0.0"),
        ("train: {betas: [0.9, 1]}", "betas are (0.9, 1.0)"),
        ("train: {ema_decay: 1}", "ema_decay is 1.0"),
        ("train: {batch_size: 48}", "no multiple of batch_size (48); 48 is; train.batch_size=32 or 64 works."),
        (
            "train: {updates_per_epoch: 4}",
            "no multiple of batch_size * updates_per_epoch (128); 128 is; train.batch_size=16 works.",
        ),
        ("model: {lora_rank: 0}", "model: lora_rank is 0; it must be at least 1, or null"),
        ("run: {keep_last: 0}", "run: checkpoint_every and keep_last"),
        ("evaluation: {samples_per_prompt: 0}", "evaluation: "),
    ],
)
def test_sizes_that_cannot_be(text: str, says: str) -> None:
    assert says in message(text, Recipe)


def test_group_of_one_and_full_fine_tuning_are_allowed() -> None:
    recipe = from_text("train: {group_size: 1}\nmodel: {lora_rank: null}", Recipe)
    assert recipe.train.group_size == 1
    assert recipe.model.lora_rank is None


def test_every_field_of_train_is_typed_and_has_a_default() -> None:
    assert {entry.name for entry in fields(TrainConfig)} >= {"epochs", "learning_rate", "seed"}
    assert TrainConfig() == TrainConfig()


def test_a_recipe_is_checked_without_torch() -> None:
    code = (
        "import sys\nfrom tiller import config\nfrom tiller.recipe import Recipe\n"
        "config.load(Recipe, None, ['train.epochs=3', 'kernel=ddim'])\n"
        "try: config.load(Recipe, None, ['train.lrr=1'])\nexcept Exception as e: print(e)\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules), 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "config error: train.lrr is unknown; did you mean train.learning_rate?\n"
