"""What the demo model is taught: which emoji, how often, and which come in seven colours."""

from __future__ import annotations

# CLDR groups that are drawn: smileys, nature, food, travel, activities, objects (no people, flags).
GROUPS = frozenset({0, 3, 4, 5, 6, 7})
DROPPED = ("o\u2019clock", "thirty", "moon face", "keycap", "button")


def _names(text: str) -> frozenset[str]:
    return frozenset(" ".join(name.split()) for name in text.split(";"))


# The emoji that people ask a demo for first, in lower case like all names here.
SHOWN = _names(
    """red apple;red heart;blue heart;broken heart;grinning cat;cat face;dog face;
    smiling face with sunglasses;grinning face;smiling face with heart-eyes;crying face;angry face;
    winking face;thinking face;robot;alien;ghost;skull;pile of poo;jack-o-lantern;fire;star;sun;
    crescent moon;cloud;rainbow;snowman;umbrella;droplet;fox;panda;koala;tiger face;lion;pig face;
    frog;penguin;bird;owl;unicorn;butterfly;snail;turtle;octopus;crab;fish;whale;cactus;palm tree;
    sunflower;tulip;rose;mushroom;banana;watermelon;strawberry;carrot;lemon;cherries;grapes;avocado;
    pizza;hamburger;ice cream;doughnut;birthday cake;hot beverage;automobile;bus;bicycle;airplane;
    rocket;sailboat;house;house with garden;castle;volcano;soccer ball;trophy;guitar;balloon;
    christmas tree;wrapped gift;crown;key;light bulb;bomb;camera;teddy bear"""
)

# Emoji that are sampled more often than the rest.
CORE = SHOWN | _names(
    """face with tears of joy;sleeping face;face savoring food;nerd face;clown face;
    green heart;yellow heart;purple heart;glowing star;full moon;snowflake;mouse face;rabbit face;
    bear;cow face;monkey face;chicken;eagle;duck;wolf;horse face;honeybee;lady beetle;ant;spider;
    snake;shrimp;tropical fish;blowfish;dolphin;spouting whale;shark;crocodile;elephant;giraffe;
    dragon face;t-rex;sauropod;evergreen tree;deciduous tree;four leaf clover;maple leaf;
    cherry blossom;hibiscus;bouquet;green apple;pear;tangerine;peach;pineapple;coconut;kiwi fruit;
    tomato;eggplant;potato;ear of corn;hot pepper;broccoli;bread;croissant;cheese wedge;egg;cooking;
    pancakes;french fries;hot dog;taco;sushi;soft ice cream;cookie;shortcake;cupcake;chocolate bar;
    candy;lollipop;teacup without handle;beer mug;wine glass;cocktail glass;glass of milk;taxi;
    police car;fire engine;ambulance;tractor;motorcycle;locomotive;helicopter;flying saucer;ship;
    anchor;tent;mountain;snow-capped mountain;globe showing europe-africa;hourglass done;
    alarm clock;watch;basketball;tennis;baseball;american football;bowling;1st place medal;
    video game;joystick;bullseye;violin;trumpet;drum;musical keyboard;microphone;headphone;
    artist palette;party popper;top hat;graduation cap;glasses;sunglasses;t-shirt;jeans;dress;
    running shoe;high-heeled shoe;backpack;handbag;ring;gem stone;locked;hammer;axe;wrench;
    scissors;pencil;paperclip;closed book;green book;blue book;books;newspaper;envelope;flashlight;
    candle;television;laptop;desktop computer;mobile phone;telephone;battery;
    magnifying glass tilted left;telescope;microscope;money bag;credit card;toilet;shopping cart;
    broom;bell;chess pawn;game die;puzzle piece;magnet;test tube;syringe;pill;door;bed;chair;soap;
    beach with umbrella;sunrise;night with stars;milky way;high voltage;comet;water wave"""
)

# Emoji of (mostly) one colour that are also drawn in every colour, and their short names.
TINTED = {
    "red heart": "heart",
    "red apple": "apple",
    "automobile": "car",
    "balloon": "balloon",
    "closed book": "book",
    "tulip": "tulip",
    "rose": "rose",
    "fish": "fish",
    "bird": "bird",
    "cat face": "cat",
    "dog face": "dog",
    "mushroom": "mushroom",
    "t-shirt": "t-shirt",
    "dress": "dress",
    "octopus": "octopus",
    "crab": "crab",
    "star": "star",
    "sauropod": "dinosaur",
    "umbrella": "umbrella",
    "gem stone": "gem",
    "bell": "bell",
    "crown": "crown",
    "whale": "whale",
    "backpack": "backpack",
    "handbag": "handbag",
    "droplet": "droplet",
    "strawberry": "strawberry",
    "guitar": "guitar",
    "grinning face": "smiley",
    "rocket": "rocket",
    "alien": "alien",
    "anchor": "anchor",
    "cactus": "cactus",
    "carrot": "carrot",
    "chair": "chair",
    "crescent moon": "moon",
    "cupcake": "cupcake",
    "door": "door",
    "dragon face": "dragon",
    "evergreen tree": "tree",
    "fire": "fire",
    "fox": "fox",
    "helicopter": "helicopter",
    "hibiscus": "flower",
    "high-heeled shoe": "shoe",
    "house": "house",
    "key": "key",
    "lemon": "lemon",
    "lion": "lion",
    "maple leaf": "leaf",
    "owl": "owl",
    "pear": "pear",
    "pig face": "pig",
    "snail": "snail",
    "snake": "snake",
    "sun": "sun",
    "teddy bear": "teddy bear",
    "telephone": "phone",
    "tent": "tent",
    "trophy": "trophy",
    "turtle": "turtle",
    "wrapped gift": "gift",
}

# Objects whose colours are shown most: they get the sampling weight of SHOWN.
SHOWN_TINTED = frozenset(
    {"heart", "car", "apple", "balloon", "fish", "dinosaur", "star", "dress", "rocket", "cat"}
)

# The prompts of the contact sheet, in order, eight to a row.
SHEET_PROMPTS = (
    "red apple",
    "blue heart",
    "grinning cat",
    "smiling face with sunglasses",
    "pizza",
    "hamburger",
    "rocket",
    "rainbow",
    "birthday cake",
    "frog",
    "penguin",
    "unicorn",
    "ghost",
    "house with garden",
    "christmas tree",
    "guitar",
    "banana",
    "grapes",
    "butterfly",
    "panda",
    "robot",
    "sunflower",
    "castle",
    "hot beverage",
    "green dinosaur",
    "orange cat",
    "purple star",
    "purple car",
    "purple apple",
    "blue octopus",
    "green guitar",
    "orange balloon",
)
