"""Semantic classes of the rooms data set, their palette, and the map from catalogue names to classes.

Ids are stable: 0 is void (unlabelled), then the room shell, then furniture. A class that is one of the 80 COCO classes
carries the COCO name.
"""

from __future__ import annotations

import colorsys
import dataclasses
import re

import numpy as np

CLASSES: tuple[str, ...] = (
    "void",
    "wall",
    "floor",
    "ceiling",
    "window",
    "door",
    "rug",
    "picture",
    "chair",
    "couch",
    "bed",
    "dining table",
    "toilet",
    "sink",
    "tv",
    "laptop",
    "oven",
    "microwave",
    "refrigerator",
    "potted plant",
    "vase",
    "book",
    "clock",
    "bottle",
    "cup",
    "teddy bear",
    "bench",
    "sports ball",
    "handbag",
    "umbrella",
    "armchair",
    "stool",
    "desk",
    "side table",
    "cabinet",
    "wardrobe",
    "bookcase",
    "lamp",
    "radiator",
    "shower",
    "towel",
    "musical instrument",
    "game table",
    "appliance",
    "toy",
    "box",
    "food",
    "trash can",
)
CLASS_ID: dict[str, int] = {name: index for index, name in enumerate(CLASSES)}
STRUCTURE: frozenset[str] = frozenset({"void", "wall", "floor", "ceiling"})


def palette() -> np.ndarray:
    """Fixed drawing colours, uint8 [len(CLASSES), 3]; void is black, neighbouring ids get well separated hues."""
    colors = np.zeros((len(CLASSES), 3), np.uint8)
    colors[1:4] = ((188, 184, 176), (140, 108, 84), (236, 236, 230))
    for index in range(4, len(CLASSES)):
        hue = (index * 0.61803399) % 1.0  # the golden ratio spreads any prefix of hues evenly over the circle
        value = (0.95, 0.7, 0.85)[index % 3]
        saturation = (0.65, 0.85, 0.45)[(index // 3) % 3]
        colors[index] = np.round(255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value)))
    return colors


@dataclasses.dataclass(frozen=True)
class ClassRule:
    """One line of the name map: `pattern` must match the catalogue name; class_name None means "not used indoors"."""

    pattern: str
    class_name: str | None
    noun: str | None = None  # the caption's word; None uses the class name

    def matches(self, name: str) -> bool:
        return re.search(self.pattern, name, re.IGNORECASE) is not None


# Models whose catalogue name misleads: decided by looking at the model.
_BY_ID: dict[str, tuple[str | None, str | None]] = {
    "Blend Swap CC-0#armchair": ("chair", None),
    "Blend Swap CC-0#stove": ("oven", "stove"),
    "Blend Swap CC-0#highCabinet": ("oven", "built-in oven"),
    "Blend Swap CC-0#sinkCabinet": ("sink", "kitchen sink"),
    "Blend Swap CC-0#televisionCabinet": ("cabinet", "tv cabinet"),
    "Blend Swap CC-0#islandExtension": ("side table", "kitchen island"),
    "Blend Swap CC-0#box": ("box", "plastic box"),
    "Blend Swap CC-0#motorbike": ("toy", "toy motorbike"),
    "Blend Swap CC-0#radiator1": (None, None),
    "Blend Swap CC-0#showerDoor": (None, None),
    "Blend Swap CC-0#shower": (None, None),
    "Blend Swap CC-0#cupboard": ("cabinet", "cupboard"),
    "Blend Swap CC-0#ammoBox": ("box", "wooden box"),
    "Blend Swap CC-0#stoneLantern": (None, None),
    "Blend Swap CC-0#lantern": (None, None),
    "Blend Swap CC-0#outdoorLamp": (None, None),
    "Blend Swap CC-0#mano_cooktop": (None, None),
    "Blend Swap CC-0#umbrella": (None, None),
}

# Categories of the catalogues that hold nothing for the inside of a room.
_OUTDOOR_CATEGORIES = frozenset({"Vehicles", "Characters", "Doors and windows", "Staircases"})

# First match wins, so the specific names stand before the general ones.
_RULES: tuple[ClassRule, ...] = tuple(
    ClassRule(*rule)
    for rule in (
        (r"deck chair|relax chair|beach chair|pool lounge", "chair", "lounge chair"),
        (r"high chair|children? chair|child chair", "chair", "child chair"),
        (r"wheelchair|hospital|child swing|child hut|children game|street|park |tree|lamppost", None),
        (r"living room|shower curtain|shower head|fence|railing|container|garden|swimming|jacuzzi", None),
        (
            r"plate|knife|cutlery|fork|spoon|\btool|plug|switch|socket|\bsign|\block\b|letters box|mailbox|surveil",
            None,
        ),
        (r"corner sofa", "couch", "corner sofa"),
        (r"armchair", "armchair"),
        (r"sofa|couch|futon", "couch"),
        (r"puff|ottoman", "stool", "ottoman"),
        (r"stool|bar chair", "stool"),
        (r"piano bench", "stool", "piano stool"),
        (r"folding chair", "stool", "folding stool"),
        (r"baby bed|crib", "bed", "crib"),
        (r"bunk bed|mezzanine", "bed", "bunk bed"),
        (r"bedside table|nightstand", "side table", "nightstand"),
        (r"\bbed\b|day bed", "bed"),
        (r"chair|class seat", "chair"),
        (r"coffee table", "side table", "coffee table"),
        (r"dressing table|changing table", "cabinet", "dressing table"),
        (r"pool table", "game table", "pool table"),
        (r"football table|flipper|table tennis$", "game table"),
        (r"technical table", "desk", "drawing table"),
        (r"desk lamp|little lamp|lamp artwork|vase lamp", "lamp"),
        (r"desk|workbench", "desk"),
        (r"table fan|rigged fan", "appliance", "fan"),
        (r"island bath|corner bathtub", "shower", "bathtub"),
        (r"bar table|cafe table|island", "side table"),
        (r"table tennis|tennis", "toy", "racket"),
        (r"table", "dining table", "table"),
        (r"urinal", "toilet", "urinal"),
        (r"bidet", "toilet", "bidet"),
        (r"toilet brush|toilet paper|paper towel", None),
        (r"toilets? unit|lavatory", "toilet"),
        (r"vanity|washbasin|basin|sink", "sink"),
        (r"television cabinet|tv stand|tv cabinet", "cabinet", "tv cabinet"),
        (r"^tv$|tv 16:9|wall flat tv", "tv"),
        (r"remote|projector|dvd", None),
        (r"laptop|ibook", "laptop"),
        (r"imac|^screen$", "tv", "monitor"),
        (r"microwave", "microwave"),
        (r"hood", "appliance", "range hood"),
        (r"oven|cooker|stove|cooktop", "oven"),
        (r"refrigerator|fridge|freezer", "refrigerator"),
        (r"cactus", "potted plant", "cactus"),
        (r"flower box|plant box", "potted plant", "plant box"),
        (r"orchid|tulip|lily|^flowers$", "potted plant", "flower pot"),
        (r"plant|ficus|yucca|bamboo|spathiphyllum|bonsai", "potted plant", "plant"),
        (r"vase|pottery|old jar", "vase"),
        (r"bookcase", "bookcase"),
        (r"shel(f|ves)(?! cabinet)", "bookcase", "shelf"),
        (r"^book$", "book"),
        (r"cuckoo clock", "clock", "cuckoo clock"),
        (r"clock", "clock"),
        (r"flacon", "bottle", "flacon"),
        (r"bottle", "bottle"),
        (r"milk", "bottle", "milk carton"),
        (r"cup cake|cupcake", "food", "cupcake"),
        (r"beer glass", "cup", "beer glass"),
        (r"^cup$|coffee cup|coffee mug|plastic cup", "cup"),
        (r"^glass$|cocktail", "cup", "glass"),
        (r"teddy", "teddy bear"),
        (r"bench(?!press)", "bench"),
        (r"basketball$", "sports ball", "basketball"),
        (r"soccer ball", "sports ball", "soccer ball"),
        (r"handbag|backpack", "handbag"),
        (r"briefcase|suitcase", "box", "briefcase"),
        (r"^umbrella$", "umbrella"),
        (r"glass door cabinet", "cabinet", "glass cabinet"),
        (r"upper|drawers cabinet|lower", "cabinet", "kitchen cabinet"),
        (r"locker", "cabinet", "locker"),
        (r"wardrobe", "wardrobe"),
        (r"cabinet|cupboard|dresser|sideboard|chest|safe", "cabinet"),
        (r"ceiling fan", "appliance", "ceiling fan"),
        (r"wall light|wall spotlight", "lamp", "wall lamp"),
        (r"lantern", "lamp", "lantern"),
        (r"outdoor lamp|camping|track lights|spotlight|fluorescent|porch", None),
        (r"lamp|hanging light|candle", "lamp"),
        (r"radiator", "radiator"),
        (r"shower stall", "shower", "shower stall"),
        (r"bath(tub)?$", "shower", "bathtub"),
        (r"towel rack", "towel", "towel rack"),
        (r"towel", "towel"),
        (r"piano", "musical instrument", "piano"),
        (r"guitar", "musical instrument", "guitar"),
        (r"xylophone", "musical instrument", "xylophone"),
        (r"coffee (brewer|machine|maker)", "appliance", "coffee machine"),
        (r"washing machine|dryer machine|washer", "appliance", "washing machine"),
        (r"mixer", "appliance", "mixer"),
        (r"speaker|stereo|mp3", "appliance", "speaker"),
        (r"toaster|blender|espresso|radio\b|sandwich maker|deep fryer", "appliance"),
        (r"rocking horse", "toy", "rocking horse"),
        (r"biplane|wood toy|toy train|car model|^doll$|doll house|rubik|tricycle|skateboard", "toy"),
        (r"potty", "toy", "potty"),
        (r"barrel", "box", "barrel"),
        (r"crate", "box", "crate"),
        (r"^(open )?(cardboard )?box$|trunck|gift", "box"),
        (r"bread$|hot ?dog|hamburger|birthday cake|apples|roasted|bowl with", "food"),
        (r"butter", "food", "butter"),
        (r"dustbin|trash ?can|recycling bin|bullet trash", "trash can"),
    )
)


@dataclasses.dataclass(frozen=True)
class Label:
    """Class of a catalogue model and the noun a caption uses for it."""

    class_name: str
    noun: str


def label_model(model_id: str, name: str, category: str = "") -> Label | None:
    """Class and caption noun of a catalogue model, or None when the model is not used in rooms.

    Args:
      model_id: catalogue id, such as "Blend Swap CC-0#bed1".
      name: English catalogue name, such as "Bed".
      category: English catalogue category, such as "Bedroom".
    """
    if model_id in _BY_ID:
        class_name, noun = _BY_ID[model_id]
        return Label(class_name, noun or class_name) if class_name else None
    if category in _OUTDOOR_CATEGORIES:
        return None
    for rule in _RULES:
        if rule.matches(name):
            return Label(rule.class_name, rule.noun or rule.class_name) if rule.class_name else None
    return None
