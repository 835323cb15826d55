"""Data sets of domain generalisation: names and numbers as published, plain data for `check_data`.

Numbers that no source at hand confirmed are left out (None), rather than guessed.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class KnownData:
    """What a complete copy of a published data set holds.

    Attributes
    ----------
    name : str
    classes : tuple of str
        As the folders are called, sorted as the source lists them.
    domains : dict of str to (int or None)
        Images of each domain by its usual folder name; None where only the total is known.
    total : int
        Images of all domains.
    source : str
        Paper, and where the numbers are from.
    aliases : dict of str to str
        Other folder names in use, as `plain` writes them, to the usual name. Differences in case,
        spaces, dashes and underscores need no alias.
    per_class : dict of str to tuple of int
        Images of each class in the order of `classes`, by domain; empty where not known.
    """

    name: str
    classes: tuple[str, ...]
    domains: dict[str, int | None]
    total: int
    source: str
    aliases: dict[str, str] = field(default_factory=dict)
    per_class: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def domain_of(self, folder: str) -> str | None:
        """Return the usual name of the domain that a folder is called after, if it is one.

        Examples
        --------
        >>> KNOWN["Office-Home"].domain_of("RealWorld")
        'Real World'
        """
        names = {plain(name): name for name in self.domains} | self.aliases
        return names.get(plain(folder))

    def class_of(self, folder: str) -> str | None:
        """Return the usual name of the class that a folder is called after, if it is one."""
        return {plain(name): name for name in self.classes}.get(plain(folder))


def plain(name: str) -> str:
    """Return a name without what copies of a data set differ in: case, spaces, `_`, `-`.

    Examples
    --------
    >>> plain("Real World") == plain("real_world") == "realworld"
    True
    """
    return "".join(char for char in name.casefold() if char.isalnum())


_OFFICE_HOME = """
Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards
Computer Couch Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder
Fork Glasses Hammer Helmet Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug
Notebook Oven Pan Paper_Clip Pen Pencil Postit_Notes Printer Push_Pin Radio Refrigerator Ruler
Scissors Screwdriver Shelf Sink Sneakers Soda Speaker Spoon TV Table Telephone ToothBrush Toys
Trash_Can Webcam
"""

_DOMAIN_NET = """
aircraft_carrier airplane alarm_clock ambulance angel animal_migration ant anvil apple arm asparagus
axe backpack banana bandage barn baseball baseball_bat basket basketball bat bathtub beach bear
beard bed bee belt bench bicycle binoculars bird birthday_cake blackberry blueberry book boomerang
bottlecap bowtie bracelet brain bread bridge broccoli broom bucket bulldozer bus bush butterfly
cactus cake calculator calendar camel camera camouflage campfire candle cannon canoe car carrot
castle cat ceiling_fan cello cell_phone chair chandelier church circle clarinet clock cloud
coffee_cup compass computer cookie cooler couch cow crab crayon crocodile crown cruise_ship cup
diamond dishwasher diving_board dog dolphin donut door dragon dresser drill drums duck dumbbell ear
elbow elephant envelope eraser eye eyeglasses face fan feather fence finger fire_hydrant fireplace
firetruck fish flamingo flashlight flip_flops floor_lamp flower flying_saucer foot fork frog
frying_pan garden garden_hose giraffe goatee golf_club grapes grass guitar hamburger hammer hand
harp hat headphones hedgehog helicopter helmet hexagon hockey_puck hockey_stick horse hospital
hot_air_balloon hot_dog hot_tub hourglass house house_plant hurricane ice_cream jacket jail kangaroo
key keyboard knee knife ladder lantern laptop leaf leg light_bulb lighter lighthouse lightning line
lion lipstick lobster lollipop mailbox map marker matches megaphone mermaid microphone microwave
monkey moon mosquito motorbike mountain mouse moustache mouth mug mushroom nail necklace nose ocean
octagon octopus onion oven owl paintbrush paint_can palm_tree panda pants paper_clip parachute
parrot passport peanut pear peas pencil penguin piano pickup_truck picture_frame pig pillow
pineapple pizza pliers police_car pond pool popsicle postcard potato power_outlet purse rabbit
raccoon radio rain rainbow rake remote_control rhinoceros rifle river roller_coaster rollerskates
sailboat sandwich saw saxophone school_bus scissors scorpion screwdriver sea_turtle see_saw shark
sheep shoe shorts shovel sink skateboard skull skyscraper sleeping_bag smiley_face snail snake
snorkel snowflake snowman soccer_ball sock speedboat spider spoon spreadsheet square squiggle
squirrel stairs star steak stereo stethoscope stitches stop_sign stove strawberry streetlight
string_bean submarine suitcase sun swan sweater swing_set sword syringe table teapot teddy-bear
telephone television tennis_racquet tent The_Eiffel_Tower The_Great_Wall_of_China The_Mona_Lisa
tiger toaster toe toilet tooth toothbrush toothpaste tornado tractor traffic_light train tree
triangle trombone truck trumpet t-shirt umbrella underwear van vase violin washing_machine
watermelon waterslide whale wheel windmill wine_bottle wine_glass wristwatch yoga zebra zigzag
"""

_ALL = (
    KnownData(
        name="PACS",
        classes=("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
        domains={"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
        total=9_991,
        source="Li, Yang, Song and Hospedales, ICCV 2017; counts by class of the standard release",
        aliases={"art": "art_painting", "painting": "art_painting"},
        per_class={
            "art_painting": (379, 255, 285, 184, 201, 295, 449),
            "cartoon": (389, 457, 346, 135, 324, 288, 405),
            "photo": (189, 202, 182, 186, 199, 280, 432),
            "sketch": (772, 740, 753, 608, 816, 80, 160),
        },
    ),
    KnownData(
        name="Office-Home",
        classes=tuple(_OFFICE_HOME.split()),
        domains={"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},
        total=15_588,
        source="Venkateswara, Eusebio, Chakraborty and Panchanathan, CVPR 2017",
        aliases={"real": "Real World"},
    ),
    KnownData(
        name="VLCS",
        classes=("bird", "car", "chair", "dog", "person"),
        domains={"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376},
        total=10_729,
        source="Fang, Xu and Rockmore, ICCV 2013; the copy of DomainBed",
        aliases={
            "caltech": "Caltech101",
            "sun": "SUN09",
            "voc": "VOC2007",
            "pascal": "VOC2007",
        },
    ),
    KnownData(
        name="TerraIncognita",
        classes=tuple(
            "bird bobcat cat coyote dog empty opossum rabbit raccoon squirrel".split()  # noqa: SIM905
        ),
        domains={
            "location_100": None,
            "location_38": None,
            "location_43": None,
            "location_46": None,
        },
        total=24_788,
        source="Beery, Van Horn and Perona, ECCV 2018; four locations and ten classes of DomainBed",
        aliases={f"{mark}{n}": f"location_{n}" for n in (100, 38, 43, 46) for mark in ("", "l")},
    ),
    KnownData(
        name="DomainNet",
        classes=tuple(_DOMAIN_NET.split()),
        domains={
            "clipart": 48_129,
            "infograph": 51_605,
            "painting": 72_266,
            "quickdraw": 172_500,
            "real": 172_947,
            "sketch": 69_128,
        },
        total=586_575,
        source="Peng et al., ICCV 2019, the cleaned version; train and test counts of TensorFlow "
        "Datasets 'domainnet' 1.0.0, whose sum is the total of DomainBed",
        aliases={"clip": "clipart", "info": "infograph", "paint": "painting", "quick": "quickdraw"},
    ),
)

KNOWN = {data.name: data for data in _ALL}
"""The known data sets by name; counts also in Gulrajani and Lopez-Paz, ICLR 2021 (DomainBed)."""


def recognise(domains: list[str], classes: list[str]) -> KnownData | None:
    """Return the known data set that folders of these names are a copy of, whole or in part.

    Most of the folders must be called after its domains and classes, and most of its classes must
    be there; of several the one with the most classes in common.
    """

    def agreement(data: KnownData) -> float:
        known = sum(data.domain_of(name) is not None for name in domains)
        found = {data.class_of(name) for name in classes} - {None}
        if 2 * known <= len(domains) or 2 * len(found) <= len(data.classes):
            return 0.0
        return len(found) / max(len(classes), len(data.classes))

    best = max(KNOWN.values(), key=agreement)
    return best if agreement(best) > 0.5 else None
