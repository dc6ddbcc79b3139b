"""The words of the embedded world: nouns, activities, colours, articles and plurals. Plain Python, no torch.

The 45 animals and the first three activities are those of Black et al. 2023 (DDPO, arXiv 2305.13301).
"""

_ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard
    beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig
    turkey fly llama camel bat gorilla hedgehog kangaroo"""
ANIMALS: tuple[str, ...] = tuple(_ANIMALS.split())

_OBJECTS = """apple banana pizza cake cup car bus boat rocket chair clock umbrella guitar drum trumpet book ball balloon
    camera key hat flower tree mushroom"""
OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())

NOUNS: tuple[str, ...] = ANIMALS + OBJECTS

ACTIVITIES: tuple[str, ...] = ("washing dishes", "playing chess", "riding a bike")
"""The activities that the shipped model saw in training."""

UNSEEN_ACTIVITIES: tuple[str, ...] = (
    "playing guitar",
    "reading a book",
    "driving a car",
    "eating an apple",
    "holding an umbrella",
    "playing ball",
    "holding a balloon",
    "eating pizza",
)
"""Activities that no training caption contains; what they are done with (a guitar, a book ...) it saw alone."""

PROPS: dict[str, str] = {
    "washing dishes": "dishes",
    "playing chess": "chess",
    "riding a bike": "bike",
    "playing guitar": "guitar",
    "reading a book": "book",
    "driving a car": "car",
    "eating an apple": "apple",
    "holding an umbrella": "umbrella",
    "playing ball": "ball",
    "holding a balloon": "balloon",
    "eating pizza": "pizza",
}
"""What is drawn beside the animal for each activity."""

COLOURS: tuple[str, ...] = ("white", "grey", "red", "yellow", "green", "blue", "purple", "pink")
NUMBERS: tuple[str, ...] = ("one", "two", "three", "four")
SIZES: tuple[str, ...] = ("small", "large")
PLACES: tuple[str, ...] = ("left", "right", "top", "bottom")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

_IRREGULAR: dict[str, str] = {
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "mouse": "mice",
    "goose": "geese",
    "wolf": "wolves",
}


def article(noun: str) -> str:
    """The indefinite article: `article("ant") == "an"`."""
    return "an" if noun[:1].lower() in "aeiou" else "a"


def plural(noun: str) -> str:
    """The plural: `plural("fly") == "flies"`, `plural("mouse") == "mice"`, `plural("sheep") == "sheep"`."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
