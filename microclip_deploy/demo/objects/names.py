"""What the scenes of the objects benchmark show, and how its classes are described."""

CLASSES = (
    "monkey face", "monkey", "dog face", "dog", "poodle", "cat face", "cat", "tiger face", "tiger",
    "horse face", "horse", "cow face", "ox", "water buffalo", "cow", "pig face", "pig", "ram",
    "goat", "camel", "elephant", "mouse face", "mouse", "chipmunk", "koala", "chicken", "rooster",
    "baby chick", "crocodile", "turtle", "snake", "spouting whale", "dolphin", "tropical fish",
    "blowfish", "octopus", "spiral shell", "snail", "bug", "ant", "honeybee", "lady beetle",
)  # fmt: skip
"""The 42 animals that every artist drew, by the names of the emoji."""

CLUTTER = (
    "grapes", "melon", "watermelon", "tangerine", "lemon", "banana", "pineapple", "red apple",
    "green apple", "pear", "peach", "cherries", "strawberry", "kiwi fruit", "tomato", "coconut",
    "avocado", "eggplant", "potato", "carrot", "ear of corn", "hot pepper", "cucumber", "peanuts",
    "chestnut", "bread", "croissant", "pretzel", "pancakes", "cheese wedge", "meat on bone",
    "poultry leg", "bacon", "hamburger", "french fries", "pizza", "hot dog", "sandwich", "taco",
    "burrito", "popcorn", "rice ball", "spaghetti", "doughnut", "cookie", "birthday cake",
    "shortcake", "pie", "chocolate bar", "candy", "lollipop", "rose", "sunflower", "tulip",
    "cactus", "evergreen tree", "palm tree", "deciduous tree", "four leaf clover", "maple leaf",
    "mushroom", "egg",
)  # fmt: skip
"""Food and plants that lie about in the scenes and are nobody's class."""

CAPTIONS = (
    "a drawing of a {}",
    "a small {} on a busy background",
    "there is a {} in the picture",
    "a cartoon {}",
    "an icon that shows a {}",
)
"""What takes the place of a language model's sentences: five wordings a class, in the voice of
the captions that the tiny model was pretrained on."""


def descriptions() -> dict[str, list[str]]:
    """Return the five sentences of every class, by its name."""
    return {name: [caption.format(name) for caption in CAPTIONS] for name in CLASSES}
