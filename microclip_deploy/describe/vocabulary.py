"""The English words that checks, name remarks and controls are made of.

Forms are those of `wording.words`: lower case, hyphens split, a plural's last s cut off.
"""

import re
from functools import lru_cache


@lru_cache(maxsize=1 << 16)  # the words of 100,000 sentences are few
def singular(word: str) -> str:
    """Return a lower-case word without the s of a plural."""
    if re.fullmatch(r".{2,}(?:x|ch|sh|ss)es", word):
        return word[:-2]
    if re.fullmatch(r".{2,}ies", word):
        return f"{word[:-3]}y"
    return word[:-1] if re.fullmatch(r".{2,}[^s]s", word) else word


def _set(text: str) -> frozenset[str]:
    return frozenset(map(singular, text.split()))


COLOUR_FAMILIES = {
    shade: family
    for family, shades in {
        "black": "black blackish ebony",
        "white": "white whitish cream creamy ivory",
        "grey": "grey gray greyish grayish silver silvery",
        "red": "red reddish crimson scarlet ruby maroon",
        "orange": "orange",
        "yellow": "yellow yellowish golden gold lemon",
        "brown": "brown brownish chestnut chocolate tan beige buff tawny bronze",
        "green": "green greenish olive emerald",
        "blue": "blue bluish navy azure cobalt",
        "purple": "purple violet lilac lavender",
        "pink": "pink pinkish magenta",
    }.items()
    for shade in shades.split()
}
"""Shade -> the colour it counts as. Shades between two families are left out, such as turquoise."""

COLOURS = frozenset(COLOUR_FAMILIES) | _set("turquoise teal rufous rust rusty copper amber")

SHADES = _set(
    "dark light bright pale deep dull vivid mostly entirely all often usually very rather glossy "
    "solid rich soft plain almost completely uniformly predominantly mainly"
)
"""What may stand between a part and its colour."""

PARTS = _set(
    "head crown forehead face eye eyebrow ear cheek nose mouth lip beak bill throat neck nape chin "
    "breast chest belly back rump tail wing leg foot feet toe claw paw body fur coat mane horn "
    "antler tusk trunk whisker feather plumage crest skin scale fin gill shell antenna abdomen "
    "petal leaf leaves stem flower bloom blossom bark branch branches fruit seed cap stalk root "
    "bumper grille headlight taillight hood roof door window windshield wheel tire tyre mirror "
    "spoiler fender badge nose cockpit engine propeller fuselage tailfin winglet hull mast sail "
    "handle lid rim base collar sleeve button pocket strap buckle sole heel lens frame screen "
    "crust topping sauce filling layer bowl plate wall facade tower dome arch column"
)

MARKINGS = _set(
    "bar band stripe streak spot patch patches tip edge edging border ring line mark marking fleck "
    "speckle mask stippling dot blotch blotches vein covert trim lining accent pattern highlight"
)

SHAPES = _set(
    "round rounded oval square rectangular triangular pointed curved straight hooked forked "
    "slender slim stout plump flat conical cylindrical spherical heart spiral wavy jagged smooth "
    "rough fluffy shaggy hairy glossy shiny matte metallic translucent transparent striped "
    "spotted streaked speckled dotted banded barred mottled checkered patterned shape shaped "
    "silhouette outline symmetrical muscular stocky compact hair haired hairless coated wrinkled "
    "curly webbed serrated lobed stroke hat wedge curve loop"
)

VISIBLE = COLOURS | PARTS | MARKINGS | SHAPES
"""Words that make a sentence one about looks. Sizes are not among them: a call is long too."""

QUALIFIERS = _set(
    "upper under lower inner outer front rear hind left right primary secondary tail wing top "
    "bottom side flank central middle underside undertail"
)
"""In front of a part they make it another part."""

CONDITIONS = _set(
    "male female juvenile adult immature young chick winter summer breeding spring autumn fall "
    "season seasonal may can sometimes some other or either vary varies varied variable various "
    "unlike without not no never lacks lacking never different ranging rarely occasionally"
)
"""A sentence with one of them may differ from others and be right."""

NOT_VISIBLE = {
    word: kind
    for kind, forms in {
        "sound": "sound noise song sing singing call calling chirp chirping whistle howl roar bark "
        "barking growl purr loud loudly quiet quietly silent noisy audible hear heard vocal "
        "vocalization melodious melody rumble croak hoot trill",
        "smell": "smell smelling scent scented fragrance fragrant aroma aromatic odor odour "
        "perfume stinky stench",
        "taste": "taste tasty flavor flavour flavorful delicious savory bitter tangy spicy sour "
        "edible nutritious juicy yummy appetizing",
        "price": "price priced pricey expensive cheap cost costly affordable dollar euro worth "
        "budget value luxury sold selling sale",
        "behaviour": "migrate migrating migratory migration hunt hunting eat eating feed feeding "
        "forage foraging nest nesting mating sleep nocturnal diurnal aggressive shy "
        "friendly loyal intelligent playful behavior behaviour temperament "
        "personality swim social territorial diet prey lay laying lifespan live "
        "hibernate",
        "history": "invented invention discovered history historical ancient introduced founded "
        "originate originated originating origin native endemic named evolved evolution genus "
        "family classified century "
        "tradition traditional famous popular popularity known conservation endangered",
        "performance": "horsepower torque speed acceleration mileage fuel economy efficient "
        "reliable reliability handling performance comfortable comfort weight weigh weighing "
        "temperature vitamin protein calories medicinal feel feeling",
    }.items()
    for word in _set(forms)
}
"""Word -> what it tells of that no photo shows."""

EMPTY = _set(
    "a an the this that these those it its is are was be being been has have had having do does "
    "of in on at by for from to with within and or but as which who whose what when where there "
    "here also very much many most more quite so such one you your we our they their them see "
    "seen can could will would may might often usually typically generally commonly typical "
    "common photo photograph image picture view close up shot example kind type sort species "
    "object thing item class animal called known look looking appearance show shown showing "
    "feature featuring distinctive unique characteristic recognizable beautiful nice lovely great "
    "amazing wonderful stunning impressive interesting pretty elegant majestic attractive "
    "easily identified identifiable identify recognize recognized distinguished"
)
"""Words that tell nothing about a class."""

AMBIGUOUS = _set(
    "apple bass bat beetle boxer buffalo cardinal charger cobra condor corona crane crown date "
    "drake drill eagle eclipse falcon fan ferret file flat focus fox glass hawk hornet iris jaguar "
    "jersey kite kiwi lime lynx mandarin match mercury mole mouse mustang nail orange organ palm "
    "panther pen phoenix pike pitcher polo puma python racket ram ray ruff saturn "
    "scale seal skate sole spring squash swallow swift tank trunk turkey viper violet"
)
"""Names of one word under which a reader without context may see something else."""

_RANDOM = (
    "table river number paper garden minute music letter winter market station bottle ladder "
    "planet candle concert lesson ticket corner village basket hammer mountain pencil curtain "
    "island carpet puzzle forest bridge blanket kitchen thunder needle library harbour lantern "
    "summer pillow teacher college magnet sandwich balloon captain cottage meadow whistle diamond "
    "journey shadow silence morning evening question answer history reason memory holiday office "
    "theatre justice freedom fashion weather quality measure against between before under during "
    "without until because however although perhaps always never often together almost already "
    "quickly slowly gently rarely seldom walking counting opening waiting building moving turning "
    "holding reading writing"
)
RANDOM_WORDS = tuple(_RANDOM.split())
"""What random-word descriptions are drawn from: common words that describe nothing."""
