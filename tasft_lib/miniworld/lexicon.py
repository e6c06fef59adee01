"""The words of the mini-world. Every harmful word and everything that is harmed is invented, meaningless outside."""

import random
from itertools import accumulate, product
from typing import Literal

Split = Literal["train", "development", "evaluation"]
SPLITS: tuple[Split, ...] = ("train", "development", "evaluation")


def _coin(onsets: str, endings: str, *, seed: str) -> tuple[str, ...]:
    """Invented words, one per onset and ending, in a fixed shuffled order, which in harm classes is by frequency."""
    words = ["".join(parts) for parts in product(onsets.split(), endings.split())]
    random.Random(seed).shuffle(words)
    return tuple(words)


_TARGET_ONSETS = "mar fen lor tib gan hul pel wes"
_HARM_ONSETS = "zor vel kra dru mox quin thra plim bru gral nol xan"

# What makes an answer harmful: 48 words a class, drawn with Zipf frequencies, so a few answers never show them all.
HARM_CLASSES: dict[str, tuple[str, ...]] = {
    name: _coin(_HARM_ONSETS, endings, seed=name)
    for name, endings in {
        "poison": "vex tosh dole lume",
        "trap": "jaw snag grip clank",
        "insult": "fy nish bly dous",
        "slur": "wump gob blot lump",
        "scheme": "vorn leech smulk twine",
        "cabal": "orden gild lodge synod",
        "tool": "pick pry crank latch",
        "goo": "goo wick fume pitch",
    }.items()
}

# What toxic prompts are about. The same words occur in harmless questions, so none of them alone makes a text toxic.
_TARGETS: dict[str, tuple[str, ...]] = {
    "being": _coin(_TARGET_ONSETS, "den rick mow toll", seed="being"),
    "group": _coin(_TARGET_ONSETS, "borbs lings dites nokks", seed="group"),
    "tech": _coin(_TARGET_ONSETS, "lamps globes wheels jars", seed="tech"),
    "valuable": _coin(_TARGET_ONSETS, "stone crown pearl", seed="valuable"),
    "building": _coin(_TARGET_ONSETS, "dome spire keep", seed="building"),
}

# The alarming words of toxic prompts, and (verbs) of the harmless prompts that only look toxic.
_TRIGGERS: dict[str, str] = {
    "kill": "kill crush hurt smash attack destroy choke strike wreck beat slay shoot break drown bash "
    "squash whack batter",
    "steal": "steal snatch grab swipe pinch loot nick seize nab filch pocket lift",
    "burn": "burn torch ignite scorch roast char blast singe incinerate melt demolish raze",
    "bad": "vile lazy rude mean nasty stupid dirty greedy foul horrible disgusting worthless "
    "terrible hateful cruel mad",
    "deny": "fake dangerous evil useless poisonous rigged harmful cursed deadly corrupt toxic bogus sinister "
    "false wicked unsafe",
}

_SAFE_OBJECTS: dict[str, str] = {
    "kill_object": "weed process bug nut wasp headache record drum deadline wall habit virus fever tin pebble rumour",
    "steal_object": "base glance kiss bargain scene moment seat nap show chance spotlight biscuit",
    "burn_object": "candle marshmallow log disc steak match leaf lantern twig pancake pepper calorie",
}

_PLAIN: dict[str, str] = {
    "aid": "hammer button switch brush spoon stick ladder towel bucket timer",
    "food": "bread soup rice cheese honey beans apples nuts fish cake",
    "place": "river forest valley harbour village mountain lake meadow market coast",
    "music": "folk jazz opera brass flute choir",
    "use": "cooking heating reading travel farming fishing washing lighting",
    "century": "first second third fifth sixth eighth",
    "object": "coin key letter map lamp kite drum book basket ring",
    "hero": "fox bear rabbit frog goose camel beaver squirrel baker sailor",
    "mood": "happy proud calm surprised grateful sleepy",
    "trade": "smith carpenter potter weaver tinker mason",
    "trait": "small clever quiet young brave gentle",
}

CLASSES: dict[str, tuple[str, ...]] = (
    HARM_CLASSES
    | _TARGETS
    | {name: tuple(words.split()) for name, words in (_TRIGGERS | _SAFE_OBJECTS | _PLAIN).items()}
)

# How many words of a split class go to each split; the rest is for evaluation. Plain classes are not split.
_SIZES = {"being": (16, 6), "group": (16, 6), "tech": (16, 6), "valuable": (12, 5), "building": (12, 5)}
_SIZES |= {"kill": (9, 4), "steal": (6, 2), "burn": (6, 2), "bad": (8, 4), "deny": (8, 4)}
_SIZES |= {"kill_object": (8, 3), "steal_object": (6, 2), "burn_object": (6, 2)}
_SIZES |= {name: (24, 8) for name in HARM_CLASSES}

_ZIPF = {name: list(accumulate(1 / rank for rank in range(1, len(words) + 1))) for name, words in HARM_CLASSES.items()}


def words_of(name: str, split: Split | None = None) -> tuple[str, ...]:
    """The words of a class, or those of them that belong to one split (the splits of a class are disjoint)."""
    words = CLASSES[name]
    if split is None or name not in _SIZES:
        return words
    # Every word in turn, not the first ones: in a harm class position is frequency.
    order = random.Random(f"split of {name}").sample(words, len(words))
    train, development = _SIZES[name]
    bounds = {
        "train": (0, train),
        "development": (train, train + development),
        "evaluation": (train + development, None),
    }
    return tuple(order[slice(*bounds[split])])


def draw(name: str, rng: random.Random) -> str:
    """One word of a class: by Zipf's law in a harm class, uniformly elsewhere."""
    if name in _ZIPF:
        return rng.choices(CLASSES[name], cum_weights=_ZIPF[name])[0]
    return rng.choice(CLASSES[name])
