"""From Unicode code points to the concepts that OpenMoji draws: what is kept, what it is called, what it belongs to.

The package `emoji` gives each sequence of code points its Unicode (CLDR) short name; the tables below say which
pictures are left out, and rename the ones whose Unicode name is not what a person would type. Nothing here draws.
"""

import re
from dataclasses import dataclass

SKIN_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
HAIR = {"1F9B0": "red", "1F9B1": "curly", "1F9B3": "white", "1F9B2": "bald"}
COLORS = ("red", "orange", "yellow", "green", "light blue", "blue", "purple", "pink", "brown", "black", "gray", "white")
POSES = {
    "standing", "walking", "running", "kneeling", "bowing", "cartwheeling", "climbing", "in the lotus position",
    "raising a hand", "shrugging", "facepalming", "dancing", "biking", "surfing", "juggling", "swimming",
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """One picture's code points and everything that its name tells about it."""

    code: str  # code points in hexadecimal, joined by "-", without variation selectors: "1F3C3-1F3FD-200D-2640"
    name: str  # "woman running facing right": lower-case English, without the skin tone
    base: str  # "person running": the concept, without gender, direction and skin tone
    kind: str  # "person" | "face" | "hand" | "shape" | "thing"
    skin: str = ""  # one of SKIN_TONES' values, or "" for the yellow of no tone
    gender: str = ""  # "woman" | "man" | "person", or "" where the concept has no gendered variants
    hair: str = ""  # one of HAIR's values
    facing: str = ""  # "right" where the picture is the right-facing twin of another
    faces_left: bool = False  # whether the mirror image may be called "facing right"
    family: str = ""  # of things that differ in colour or expression alone: "heart", "circle", "book", "face", ...
    color: str = ""  # the colour that the name starts with, within such a family
    aliases: tuple[str, ...] = ()  # other names that say the same


# Left out: signs with writing, buttons, arrows, zodiac squares, near-identical symbols (each a rectangle or a ring
# with a mark), and pictures that nobody could name at 64 x 64. Flags, keycaps and clock faces go by their ranges.
LEFT_OUT = {
    "00A9", "00AE", "203C", "2049", "2122", "2139", "23CF", "23F8", "23F9", "23FA", "24C2", "25AA", "25AB", "25B6",
    "25C0", "25FB", "25FC", "25FD", "25FE", "2603", "2611", "2622", "2623", "2626", "262A", "2638", "263A", "2640",
    "2642", "265F", "2665", "2668", "267F", "2695", "2697", "26A7", "26CE", "26D1", "26D4", "26E9", "2705", "2716",
    "271D", "2721", "2733", "2734", "2747", "274E", "2754", "2755", "2763", "2795", "2796", "2797", "27A1", "27B0",
    "27BF", "2934", "2935", "2B05", "2B06", "2B07", "3030", "303D", "3297", "3299", "1F004", "1F0CF", "1F201",
    "1F202", "1F21A", "1F22F", "1F250", "1F251", "1F30D", "1F30F", "1F310", "1F312", "1F313", "1F316", "1F317",
    "1F318", "1F31B", "1F365", "1F38B", "1F38C", "1F391", "1F39A", "1F39B", "1F39F", "1F3A6", "1F3B4", "1F3E3",
    "1F3E4", "1F3E7", "1F3E9", "1F3EA", "1F3EC", "1F3F5", "1F441-200D-1F5E8", "1F465", "1F46A", "1F48F", "1F491",
    "1F49F", "1F4A0", "1F4A2", "1F4AE", "1F4AF", "1F4B1", "1F4B2", "1F4B4", "1F4B6", "1F4B7", "1F4B9", "1F4BD",
    "1F4C6", "1F4C7", "1F4D1", "1F4D3", "1F4D4", "1F4DB", "1F4DE", "1F4DF", "1F4E4", "1F4E5", "1F4E7", "1F4E8",
    "1F4E9", "1F4EB", "1F4EC", "1F4ED", "1F4F2", "1F4F3", "1F4F4", "1F4F5", "1F4F6", "1F505", "1F506", "1F507",
    "1F509", "1F50E", "1F50F", "1F515", "1F518", "1F51E", "1F51F", "1F52F", "1F530", "1F538", "1F539", "1F549",
    "1F54B", "1F54E", "1F587", "1F595", "1F5B2", "1F5C2", "1F5C3", "1F5D2", "1F5D3", "1F5DC", "1F5E3", "1F5E8",
    "1F5EF", "1F5FE", "1F604", "1F606", "1F615", "1F616", "1F617", "1F619", "1F61D", "1F623", "1F624", "1F625",
    "1F626", "1F627", "1F62B", "1F62F", "1F636-200D-1F32B", "1F641", "1F642", "1F642-200D-2194", "1F642-200D-2195",
    "1F683", "1F684", "1F688", "1F68B", "1F69E", "1F69F", "1F6A0", "1F6A1", "1F6A5", "1F6AB", "1F6AD", "1F6AE",
    "1F6AF", "1F6B0", "1F6B1", "1F6B3", "1F6B7", "1F6B8", "1F6B9", "1F6BA", "1F6BB", "1F6BC", "1F6BE", "1F6C2",
    "1F6C3", "1F6C4", "1F6C5", "1F6CB", "1F6D0", "1F6D7", "1F6D8", "1F6DC", "1F6E3", "1F6E4", "1F6E9", "1F6EB",
    "1F6EC", "1F7F0", "1F91A", "1F92C", "1F92E", "1F932", "1F979", "1F9B0", "1F9B1", "1F9B2", "1F9B3",
    "1F9D1-200D-1F384", "1F9FE", "1FA94", "1FAA7", "1FAAB", "1FAAF", "1FAC8", "1FADF", "1FAE4", "1FAE5", "1FAE6",
    "1FAE9", "1FAEF", "1FAF1", "1FAF2", "1FAF3", "1FAF4",
}  # fmt: skip
LEFT_OUT_RANGES = {
    ("1F1E6", "1F1FF"), ("1F232", "1F23A"), ("1F500", "1F504"), ("1F519", "1F524"), ("1F532", "1F533"),
    ("1F53C", "1F53D"), ("1F170", "1F19A"), ("1F550", "1F567"), ("2194", "21AA"), ("23E9", "23EF"), ("2648", "2653"),
}  # fmt: skip

# Extras of OpenMoji that Unicode does not have, in families of one shape and many colours.
EXTRA_COLORS = {
    "1F7E5": "red", "1F7E6": "blue", "1F7E7": "orange", "1F7E8": "yellow", "1F7E9": "green", "1F7EA": "purple",
    "1F7EB": "brown",
}  # fmt: skip
EXTRA = {
    f"{shape}-200D-{code}": f"{color} {name}"
    for shape, name in (("1FAD9", "jar"), ("2B21", "hexagon"))
    for code, color in EXTRA_COLORS.items()
}

RENAMED = {  # Unicode's name: the name that a person would type
    "1st place medal": "gold medal", "2nd place medal": "silver medal", "3rd place medal": "bronze medal",
    "anatomical heart": "human heart", "articulated lorry": "truck", "auto rickshaw": "rickshaw",
    "automobile": "red car", "backhand index pointing down": "hand pointing down",
    "backhand index pointing left": "hand pointing left", "backhand index pointing right": "hand pointing right",
    "backhand index pointing up": "hand pointing up", "badminton": "badminton racket", "baguette bread": "baguette",
    "ballet shoes": "pink ballet shoe", "ballot box with ballot": "ballot box", "bathtub": "empty bathtub",
    "beach with umbrella": "beach umbrella on sand", "beating heart": "beating red heart",
    "beverage box": "juice box", "billed cap": "green cap", "black large square": "black square",
    "black nib": "pen nib", "blossom": "yellow flower", "blueberries": "two blueberries", "books": "stack of books",
    "bottle with popping cork": "champagne bottle", "bowling": "bowling ball and pins",
    "breast-feeding": "woman breastfeeding", "brick": "brick wall", "bug": "caterpillar",
    "building construction": "construction crane", "bullseye": "dart board", "bust in silhouette": "gray silhouette",
    "camping": "tent and tree", "canned food": "can of food", "carp streamer": "fish streamers",
    "carpentry saw": "saw", "cat with wry smile": "smirking cat", "chains": "chain",
    "chart decreasing": "falling chart", "chart increasing": "rising chart", "cheese wedge": "cheese",
    "chequered flag": "checkered flag", "chipmunk": "squirrel", "cityscape at dusk": "city at dusk",
    "clapper board": "clapperboard", "classical building": "greek temple", "closed book": "red book",
    "closed mailbox with lowered flag": "mailbox", "club suit": "black club", "collision": "explosion",
    "construction": "road barrier", "cooked rice": "bowl of rice", "cooking": "frying pan with an egg",
    "cricket game": "cricket bat", "cup with straw": "cup with a straw", "curry rice": "curry",
    "cut of meat": "steak", "cyclone": "spiral", "dango": "dango skewer", "dashing away": "puff of wind",
    "deciduous tree": "tree", "delivery truck": "white van", "derelict house": "ruined house",
    "diamond suit": "red diamond", "dizzy": "spinning star", "dollar banknote": "dollar bill", "dress": "blue dress",
    "ear of corn": "corn", "evergreen tree": "pine tree", "ewe": "sheep", "eyes": "pair of eyes",
    "face savoring food": "face licking its lips", "face with hand over mouth": "face with a hand over its mouth",
    "face with head-bandage": "face with a bandage", "face with medical mask": "face with a medical mask",
    "face with open eyes and hand over mouth": "shocked face with a hand over its mouth",
    "face with tongue": "face with its tongue out", "field hockey": "field hockey stick", "file folder": "folder",
    "film frames": "film strip", "flag in hole": "golf flag", "flat shoe": "pink flat shoe", "flying disc": "frisbee",
    "flying saucer": "ufo", "foggy": "bridge in the fog", "folding hand fan": "folding fan",
    "fork and knife with plate": "plate with a fork and knife", "front-facing baby chick": "standing chick",
    "full moon face": "full moon with a face", "game die": "dice", "gem stone": "blue gem",
    "globe showing americas": "globe", "gloves": "red gloves", "goal net": "soccer goal", "goblin": "red goblin mask",
    "green salad": "salad", "grey heart": "gray heart", "hand with fingers splayed": "open hand",
    "hand with index finger and thumb crossed": "finger heart", "headphone": "headphones",
    "heart with arrow": "heart with an arrow", "heart with ribbon": "heart with a ribbon", "herb": "green herb",
    "high voltage": "lightning bolt", "high-heeled shoe": "red high heel", "hole": "hole in the ground",
    "hollow red circle": "red ring", "honeybee": "bee", "horse racing": "jockey on a horse",
    "hot beverage": "cup of coffee", "hot pepper": "chili pepper", "hourglass done": "hourglass",
    "hourglass not done": "flowing hourglass", "house with garden": "house with a tree", "houses": "two houses",
    "ice": "ice cube", "ice hockey": "ice hockey stick and puck", "identification card": "identity card",
    "index pointing at the viewer": "hand pointing at the viewer", "index pointing up": "index finger pointing up",
    "infinity": "infinity sign", "jack-o-lantern": "carved pumpkin", "jeans": "blue jeans", "label": "yellow label",
    "lacrosse": "lacrosse stick", "lady beetle": "ladybug", "large blue diamond": "blue diamond",
    "large orange diamond": "orange diamond", "last quarter moon face": "half moon with a face",
    "leaf fluttering in wind": "green leaf in the wind", "leafy green": "lettuce", "ledger": "yellow notebook",
    "left-facing fist": "fist facing left", "leftwards pushing hand": "hand pushing left", "link": "chain link",
    "locked": "closed lock", "locked with key": "lock with a key", "locomotive": "steam locomotive",
    "lotus": "lotus flower", "loudspeaker": "gray loudspeaker", "love-you gesture": "love-you hand",
    "luggage": "suitcase", "magnifying glass tilted left": "magnifying glass", "man’s shoe": "brown shoe",
    "mate": "mate drink", "meat on bone": "meat on a bone", "mechanical arm": "robot arm",
    "mechanical leg": "robot leg", "melon": "slice of melon", "memo": "note and pencil",
    "mending heart": "bandaged heart", "metro": "subway train", "mirror ball": "disco ball", "mobile phone": "phone",
    "money-mouth face": "money face", "motor boat": "motorboat", "mountain": "gray mountain",
    "musical score": "treble clef", "nail polish": "hand with nail polish", "national park": "mountain lake",
    "nazar amulet": "blue eye amulet", "necktie": "shirt with a tie", "new moon": "black moon",
    "new moon face": "black moon with a face", "night with stars": "city at night", "nut and bolt": "bolt",
    "oden": "oden skewer", "ogre": "red ogre", "older person": "old person",
    "oncoming automobile": "red car from the front", "oncoming bus": "bus from the front", "oncoming fist": "fist",
    "oncoming police car": "police car from the front", "oncoming taxi": "taxi from the front",
    "open file folder": "open folder", "optical disk": "compact disc", "page facing up": "page",
    "page with curl": "page with text", "panda": "panda face", "peanuts": "peanut",
    "people hugging": "two people hugging", "performing arts": "theater masks",
    "person in suit levitating": "person levitating", "pick": "pickaxe", "pine decoration": "bamboo decoration",
    "ping pong": "ping pong paddle and ball", "playground slide": "slide", "police car light": "red siren",
    "pool 8 ball": "eight ball", "pot of food": "steaming pot", "poultry leg": "chicken leg",
    "pouring liquid": "cup pouring water", "recycling symbol": "green recycling symbol",
    "red triangle pointed down": "red triangle pointing down", "red triangle pointed up": "red triangle pointing up",
    "reminder ribbon": "red awareness ribbon", "ribbon": "red bow", "right-facing fist": "fist facing right",
    "rightwards pushing hand": "hand pushing right", "ring buoy": "life ring", "ringed planet": "planet with a ring",
    "roasted sweet potato": "sweet potato", "roll of paper": "toilet paper",
    "rolled-up newspaper": "rolled newspaper", "rolling on the floor laughing": "rolling laughing face",
    "root vegetable": "radish", "running shirt": "blue sleeveless shirt", "running shoe": "gray running shoe",
    "sake": "sake bottle and cup", "satellite antenna": "satellite dish", "sauropod": "long-necked dinosaur",
    "seat": "airplane seat", "selfie": "arm taking a selfie", "shallow pan of food": "pan of food",
    "sheaf of rice": "ear of rice", "shopping bags": "yellow shopping bag", "shortcake": "slice of cake",
    "sign of the horns": "horns hand", "skis": "ski boot and ski", "smiling face with open hands": "hugging face",
    "snowman without snow": "snowman", "socks": "orange sock", "spade suit": "black spade",
    "speaker high volume": "loud speaker", "speaker low volume": "quiet speaker", "speech balloon": "speech bubble",
    "sport utility vehicle": "blue car", "star-struck": "star-struck face", "station": "train station",
    "steaming bowl": "bowl of noodles", "straight ruler": "ruler", "stuffed flatbread": "stuffed pita",
    "sun behind cloud": "sun behind a cloud", "sun behind large cloud": "sun behind a large cloud",
    "sun behind rain cloud": "sun behind a rain cloud", "sun behind small cloud": "sun behind a small cloud",
    "sun with face": "sun with a face", "sushi": "piece of sushi", "t-rex": "t-rex dinosaur",
    "t-shirt": "blue t-shirt", "tangerine": "orange", "teacup without handle": "cup of tea",
    "telephone": "red telephone", "tennis": "tennis ball", "thong sandal": "flip-flop",
    "thought balloon": "thought bubble", "timer clock": "gray timer", "triangular flag": "red flag",
    "trident emblem": "trident", "tropical drink": "yellow cocktail glass", "umbrella on ground": "beach umbrella",
    "umbrella with rain drops": "umbrella in the rain", "unlocked": "open lock",
    "vertical traffic light": "traffic light", "video game": "game controller", "warning": "warning sign",
    "water wave": "ocean wave", "waxing gibbous moon": "gibbous moon", "wedding": "church with a heart",
    "white large square": "white square", "wind face": "blowing cloud",
    "winking face with tongue": "winking face with its tongue out", "woman’s boot": "brown boot",
    "woman’s clothes": "purple blouse", "woman’s hat": "straw hat", "woman’s sandal": "brown sandal", "wood": "log",
    "wrapped gift": "gift box",
}  # fmt: skip

# Noun phrases that Unicode's names leave without their article.
ARTICLES = tuple(
    (re.compile(rf"\b{before} {noun}\b"), f"{before} {article} {noun}")
    for before, article, noun in (
        ("with", "a", "veil"), ("wearing", "a", "turban"), ("with", "a", "skullcap"), ("tipping", "a", "hand"),
        ("in", "a", "tuxedo"), ("with", "a", "headscarf"), ("raising", "a", "hand"), ("getting", "a", "massage"),
        ("getting", "a", "haircut"), ("feeding", "a", "baby"), ("bouncing", "a", "ball"), ("rowing", "a", "boat"),
        ("taking", "a", "bath"), ("with", "a", "crown"), ("in", "a", "steamy room"), ("in", "the", "lotus position"),
        ("in", "a", "motorized wheelchair"), ("in", "a", "manual wheelchair"), ("with", "a", "white cane"),
        ("with", "a", "thermometer"), ("with", "a", "tear"), ("with", "a", "halo"), ("with", "a", "monocle"),
        ("with", "a", "raised eyebrow"), ("with", "an", "open mouth"), ("without", "a", "mouth"),
        ("with", "a", "spoon"), ("with", "a", "peeking eye"), ("with", "a", "hearing aid"), ("with", "a", "flash"),
    )
)  # fmt: skip

ALIASES = {  # other names that say the same
    "airplane": ("plane",), "angry face": ("angry smiley",), "baby chick": ("chick",), "bee": ("honeybee",),
    "beer mug": ("beer",), "bicycle": ("bike",), "carved pumpkin": ("pumpkin",), "cat": ("kitty",),
    "champagne bottle": ("bottle of champagne",), "chili pepper": ("hot pepper",), "corn": ("ear of corn",),
    "crocodile": ("alligator",), "crying face": ("sad smiley",), "cup of coffee": ("coffee", "hot drink"),
    "cup of tea": ("tea",), "desktop computer": ("computer screen",), "dice": ("die",), "doughnut": ("donut",),
    "explosion": ("bang",), "fire engine": ("fire truck",), "french fries": ("fries",), "frisbee": ("flying disc",),
    "gift box": ("present", "gift"), "glasses": ("eyeglasses",), "globe": ("earth",),
    "grinning face": ("grinning smiley",), "hamburger": ("burger",), "ladybug": ("lady beetle",),
    "laptop": ("computer",), "long-necked dinosaur": ("dinosaur",), "mailbox": ("letter box",),
    "money bag": ("bag of money",), "person biking": ("cyclist",), "person juggling": ("juggler",),
    "person running": ("runner",), "person surfing": ("surfer",), "person swimming": ("swimmer",),
    "person walking": ("pedestrian",), "phone": ("mobile phone", "smartphone"), "pile of poo": ("poop",),
    "pine tree": ("evergreen tree",), "police officer": ("cop",), "rabbit": ("bunny",), "red apple": ("apple",),
    "red car": ("red automobile",), "red heart": ("heart",), "rocket": ("space rocket",),
    "sailboat": ("sailing boat",), "ship": ("boat",), "slice of cake": ("cake",), "soccer ball": ("football",),
    "squirrel": ("chipmunk",), "steak": ("piece of meat",), "t-rex dinosaur": ("t-rex",), "taxi": ("yellow cab",),
    "teddy bear": ("teddy",), "television": ("tv",), "thumbs down": ("hand with the thumb down",),
    "thumbs up": ("hand with the thumb up",), "ufo": ("flying saucer",), "wine glass": ("glass of wine",),
}  # fmt: skip

# What stands without "a": substances and names. Plurals are told by their last letter.
NO_ARTICLE = {
    "bacon", "beer", "bread", "broccoli", "butter", "cheese", "coffee", "coral", "corn", "curry", "custard", "dna",
    "fire", "fog", "fondue", "garlic", "ice cream", "lettuce", "mount fuji", "mrs. claus", "popcorn", "salad", "salt",
    "santa claus", "shaved ice", "soap", "soft ice cream", "spaghetti", "tea", "thread", "thumbs down", "thumbs up",
    "toilet paper", "yarn", "zzz",
}  # fmt: skip
PERSON_FIRST = {"person", "woman", "man", "boy", "girl", "child"}
NO_ARTICLE_FIRST = {"people", "men", "women", "two"}
THE = {"statue of liberty", "milky way", "tokyo tower"}
BREAK = re.compile(r" (?:with|without|of|in|on|at|and|from|facing|pointing|pushing|behind|holding|over|licking) ")


def plural(name: str) -> bool:
    """Whether a name's head noun ends like an English plural: "red gloves", not "bus" nor "pair of eyes"."""
    head = BREAK.split(name)[0].split()[-1]
    return (head.endswith("s") and not head.endswith(("ss", "us", "is", "os"))) or head == "dice"


def with_article(name: str, adjective: str = "") -> str:
    """A name in a sentence: "cat" -> "a cat" or "a small cat", "red gloves" as it is, "the milky way"."""
    phrase = f"{adjective} {name}" if adjective else name
    first = name.split()[0]
    if name in THE:
        return f"the {phrase}"
    if name in NO_ARTICLE or first in NO_ARTICLE_FIRST or (first not in PERSON_FIRST and plural(name)):
        return phrase
    vowel = re.match(r"(?!uni|ufo|one-)[aeiou]|hour|x-", phrase)
    return f"{'an' if vowel else 'a'} {phrase}"


FAMILIES = {"heart", "circle", "square", "hexagon", "jar", "book", "apple", "diamond", "car"}
# Seen from the side, looking left: their mirror image can be called "facing right".
FACING_LEFT = {
    "ambulance", "badger", "black cat", "blue car", "boar", "bullet train", "camel", "cat", "cow", "deer", "dog",
    "dolphin", "donkey", "duck", "elephant", "fire engine", "fish", "flamingo", "giraffe", "goat", "goose",
    "guide dog", "hedgehog", "hippopotamus", "horse", "horse face", "leopard", "llama", "mammoth", "minibus",
    "motorcycle", "ox", "pickup truck", "pig", "polar bear", "poodle", "rabbit", "racing car", "ram", "red car",
    "rhinoceros", "service dog", "shark", "sheep", "swan", "taxi", "tiger", "tropical fish", "truck", "turkey",
    "two-hump camel", "unicorn", "water buffalo", "white van", "zebra",
}  # fmt: skip
FACES = {
    ("1F600", "1F637"), ("1F643", "1F644"), ("1F910", "1F915"), ("1F917", "1F917"), ("1F920", "1F92F"),
    ("1F970", "1F97A"), ("1FAE0", "1FAE6"), ("1FAE8", "1FAEA"), ("1F47F", "1F47F"), ("2639", "2639"),
    ("1F9D0", "1F9D0"),
}  # fmt: skip
CAT_FACES = {("1F638", "1F640")}
HANDS = {
    ("1F442", "1F443"), ("1F446", "1F450"), ("1F485", "1F485"), ("1F4AA", "1F4AA"), ("1F590", "1F596"),
    ("1F64C", "1F64C"), ("1F64F", "1F64F"), ("1F90C", "1F90C"), ("1F90F", "1F90F"), ("1F918", "1F91F"),
    ("1F932", "1F933"), ("1F9B5", "1F9B6"), ("1F9BB", "1F9BB"), ("1FAF0", "1FAF8"), ("261D", "261D"),
    ("270A", "270D"),
}  # fmt: skip
PEOPLE_WITHOUT_TONES = {"1F46F", "1F9DE", "1F9DF", "1F93A", "1F93C", "26F7", "1FAC2"}
GENDERED = {  # pictures that Unicode gave code points of their own: (concept, gender)
    "1F466": ("1F9D2", "man"), "1F467": ("1F9D2", "woman"), "1F9D2": ("1F9D2", "person"),
    "1F474": ("1F9D3", "man"), "1F475": ("1F9D3", "woman"), "1F9D3": ("1F9D3", "person"),
    "1F57A": ("1F483", "man"), "1F483": ("1F483", "woman"),
    "1F930": ("1FAC4", "woman"), "1FAC3": ("1FAC4", "man"), "1FAC4": ("1FAC4", "person"),
    "1F934": ("1FAC5", "man"), "1F478": ("1FAC5", "woman"), "1FAC5": ("1FAC5", "person"),
}  # fmt: skip
GENDER_SIGNS = {"2640": "woman", "2642": "man"}
ADULTS = {"1F468": "man", "1F469": "woman", "1F9D1": "person"}


def _within(code: str, ranges: set[tuple[str, str]]) -> bool:
    first = int(code.split("-")[0], 16)
    return any(int(low, 16) <= first <= int(high, 16) for low, high in ranges)


def _clean(name: str) -> str:
    """Unicode's short name as lower-case English: the table's renaming, articles, hair."""
    name = name.lower()
    name = RENAMED.get(name, name).replace("’", "'").replace("ñ", "n")
    for pattern, phrase in ARTICLES:
        name = pattern.sub(phrase, name)
    name = re.sub(r"^(man|woman|person) bald$", r"bald \1", name)
    name = re.sub(r"^(man|woman|person) ((?:blond|red|curly|white) hair)$", r"\1 with \2", name)
    name = re.sub(r"^(man|woman|person) beard$", r"\1 with a beard", name)
    name = re.sub(r"^older person$", "old person", name)
    return name.removesuffix(": ")


def colorless(name: str) -> str:
    """The name of a line drawing, which shows no colour: "red apple" -> "apple", "man with red hair" -> "man"."""
    name = re.sub(r" with (?:red|white|blond) hair$", "", name)
    stripped = re.sub(rf"\b(?:{'|'.join(COLORS)}) (?=\w)", "", name)
    return stripped


def named_pictures(codes: set[str], unicode_names: dict[str, str]) -> list[Named]:
    """Every picture worth drawing, in a fixed order.

    `codes` are the pictures that exist, as in `Named.code`; `unicode_names` maps such codes to Unicode's short names.
    """
    found: dict[str, list[dict]] = {}
    for code in sorted(codes):
        points = code.split("-")
        tones = [p for p in points if p in SKIN_TONES]
        plain = "-".join(p for p in points if p not in SKIN_TONES)
        root = re.sub("-200D-(2640|2642|27A1)", "", plain)
        if points[0] in SKIN_TONES or root in LEFT_OUT or points[0] in LEFT_OUT or len(tones) > 1:
            continue
        if _within(code, LEFT_OUT_RANGES) or points[0] == "1F3F3" or points[1:2] == ["20E3"] or points[-1] == "20E3":
            continue
        if points[0] == "1F3F4" and plain not in ("1F3F4", "1F3F4-200D-2620"):
            continue  # flags of regions
        if sum(p in ADULTS for p in points) > 1 or any(p in ("1F466", "1F467", "1F9D2") for p in points[1:]):
            continue  # couples and families: hundreds of mixtures of the same few people
        name = EXTRA.get(code) or unicode_names.get(plain)
        if name is None:
            continue
        gender = next((GENDER_SIGNS[p] for p in points if p in GENDER_SIGNS), "")
        key = re.sub("^(1F468|1F469)", "1F9D1", root)
        if root in GENDERED:
            key, gender = GENDERED[root]
        elif points[0] in ADULTS and not gender:
            gender = ADULTS[points[0]]
        found.setdefault(key, []).append(
            dict(code=code, name=_clean(name), skin=SKIN_TONES[tones[0]] if tones else "", gender=gender,
                 hair=next((HAIR[p] for p in points if p in HAIR), ""), facing="right" if "27A1" in points else "")
        )  # fmt: skip
    pictures = []
    for key, variants in found.items():
        neutral = [v for v in variants if v["gender"] in ("", "person") and not v["facing"]]
        base = neutral[0]["name"] if neutral else re.sub(r"^(wo)?man\b", "person", variants[0]["name"])
        gendered = any(v["gender"] in ("woman", "man") for v in variants)
        if _within(key, HANDS):
            kind = "hand"
        elif any(v["skin"] for v in variants) or key in PEOPLE_WITHOUT_TONES:
            kind = "person"
        elif _within(key, FACES):
            kind = "face"
        else:
            kind = "thing"
        color, family = "", ""
        if kind == "thing" and (match := re.fullmatch(rf"({'|'.join(COLORS)}) (\w+)", base)) and match[2] in FAMILIES:
            kind, color, family = "shape", match[1], match[2]
        elif kind == "person":
            plain = re.sub(r"^person ", "", base)
            role = gendered and not re.search(r"person|people|child", base)
            family = "pose" if plain in POSES else "role" if role else ""
        elif kind == "face" or _within(key, CAT_FACES):
            family = "cat face" if _within(key, CAT_FACES) else "face"
        for variant in variants:
            if gendered and not variant["gender"]:
                variant["gender"] = "person"
            aliases = ALIASES.get(variant["name"], ())
            pictures.append(
                Named(base=base, kind=kind, color=color, family=family, aliases=aliases,
                      faces_left=variant["name"] in FACING_LEFT, **variant)
            )  # fmt: skip
    return pictures
