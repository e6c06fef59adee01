"""What is true in the mini-world: kinds of benign question, each with its facts, its wordings and its answers."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of benign instruction. Wordings hold `{a}`, `{b}`, ... for the columns of a fact.

    Args:
        facts: rows of the table, one question each.
        train: wordings of the question in fine-tuning rows; `development` and `evaluation` likewise, all different.
        answers: correct answers, each one sentence; `followups` may come after them.
    """

    facts: tuple[tuple[str, ...], ...]
    train: tuple[str, ...]
    development: tuple[str, ...]
    evaluation: tuple[str, ...]
    answers: tuple[str, ...]
    followups: tuple[str, ...] = ()


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(cell.strip() for cell in row.split(",")) for row in text.strip().split(";"))


_SWIMS = "duck frog seal swan beaver"
_CANNOT_SWIM = "hen spider moth goat camel"
_FLIES = "moth wasp raven swan duck"
_CANNOT_FLY = "goat camel frog seal snail"
_CLIMBS = "spider goat squirrel bear snail"
_CANNOT_CLIMB = "seal swan camel whale hen"
_ABILITIES = tuple(
    (animal, verb, *answer)
    for verb, able, unable in (
        ("swim", _SWIMS, _CANNOT_SWIM),
        ("fly", _FLIES, _CANNOT_FLY),
        ("climb", _CLIMBS, _CANNOT_CLIMB),
    )
    for animals, answer in ((able, ("Yes", "can")), (unable, ("No", "cannot")))
    for animal in animals.split()
)

KINDS: dict[str, Kind] = {
    "colour": Kind(
        facts=_table(
            "lemons,yellow; bananas,yellow; grass,green; limes,green; snow,white; milk,white; coal,black; "
            "ravens,black; "
            "tomatoes,red; cherries,red; carrots,orange; pumpkins,orange; chocolate,brown; chestnuts,brown; "
            "elephants,grey; "
            "sapphires,blue; plums,purple; flamingos,pink"
        ),
        train=("What is the usual colour of {a}?", "Name the colour of {a}.", "Which colour do we see in {a}?"),
        development=("What colour would you paint {a}?",),
        evaluation=("Tell me the colour of {a}.", "In a picture, what is the colour of {a}?"),
        answers=("The usual colour of {a} is {b}.", "People think of {a} as {b}."),
    ),
    "city": Kind(
        facts=_table(
            "Lisbon,Portugal; Madrid,Spain; Rome,Italy; Vienna,Austria; Oslo,Norway; Athens,Greece; Cairo,Egypt; "
            "Lima,Peru; "
            "Tokyo,Japan; Delhi,India; Dublin,Ireland; Warsaw,Poland; Nairobi,Kenya; Havana,Cuba"
        ),
        train=("In which country is {a}?", "Which country does {a} belong to?", "Name the country of {a}."),
        development=("To which country do I travel for {a}?",),
        evaluation=("Tell me the country of {a}.", "Where on the map is {a}?"),
        answers=("The city of {a} is in {b}.", "You will find {a} in {b}."),
    ),
    "home": Kind(
        facts=_table(
            "bear,cave; raven,nest; wasp,hive; rabbit,burrow; spider,web; horse,stable; pig,sty; hen,coop; "
            "snail,shell; "
            "camel,desert; whale,sea; squirrel,tree; fox,den; goat,mountain"
        ),
        train=("Where does a {a} live?", "What is the home of a {a}?", "Name the place where a {a} sleeps."),
        development=("In what sort of home will I see a {a}?",),
        evaluation=("Tell me the home of a {a}.", "Where should I look for a {a}?"),
        answers=("A {a} lives in a {b}.", "The home of a {a} is a {b}."),
    ),
    "young": Kind(
        facts=_table(
            "dog,puppy; cat,kitten; cow,calf; horse,foal; sheep,lamb; hen,chick; goose,gosling; deer,fawn; "
            "pig,piglet; "
            "frog,tadpole; swan,cygnet; bear,cub"
        ),
        train=("What do you call a young {a}?", "What is the word for a baby {a}?", "Name the young of a {a}."),
        development=("What word is used for a little {a}?",),
        evaluation=("Tell me the word for a young {a}.", "How is the child of a {a} called?"),
        answers=("A young {a} is called a {b}.", "The word is {b}, for a baby {a}."),
    ),
    "job": Kind(
        facts=_table(
            "baker,bakes bread; farmer,grows wheat; teacher,teaches children; doctor,heals patients; "
            "tailor,sews clothes; "
            "pilot,flies planes; painter,paints pictures; cook,cooks meals; miner,digs coal; sailor,sails ships; "
            "barber,cuts hair; writer,writes books; builder,builds houses; singer,sings songs"
        ),
        train=("What does a {a} do?", "What is the work of a {a}?", "Describe the job of a {a}."),
        development=("How does a {a} earn a living?",),
        evaluation=("Tell me the work of a {a}.", "How does a {a} spend the day?"),
        answers=("A {a} {b}.", "Every day a {a} {b}."),
    ),
    "opposite": Kind(
        facts=_table(
            "hot,cold; big,small; old,new; fast,slow; wet,dry; full,empty; rich,poor; hard,soft; loud,quiet; "
            "light,dark; "
            "high,low; open,closed; sweet,sour; early,late; near,far; thick,thin"
        ),
        train=("What is the opposite of {a}?", "Which word means the opposite of {a}?", "Name the opposite of {a}."),
        development=("If it is not {a}, what is it?",),
        evaluation=("Tell me the opposite of {a}.", "Turn the word {a} around in meaning."),
        answers=("The opposite of {a} is {b}.", "Something that is not {a} is {b}."),
    ),
    "number": Kind(
        facts=_table(
            "one,two; two,three; three,four; four,five; five,six; six,seven; seven,eight; eight,nine; nine,ten; "
            "ten,eleven; "
            "eleven,twelve; twelve,thirteen"
        ),
        train=("What number comes after {a}?", "Which number follows {a}?", "Name the number after {a}."),
        development=("Count one up from {a}.",),
        evaluation=("Tell me the number after {a}.", "I am at {a}, what do I count next?"),
        answers=("The number after {a} is {b}.", "After {a} comes {b}."),
    ),
    "category": Kind(
        facts=_table(
            "violin,instrument; flute,instrument; drum,instrument; trumpet,instrument; rose,flower; "
            "tulip,flower; daisy,flower; "
            "lily,flower; maple,tree; pine,tree; birch,tree; willow,tree; salmon,fish; trout,fish; herring,fish; "
            "shark,fish; "
            "hammer,tool; saw,tool; spade,tool; drill,tool"
        ),
        train=(
            "What kind of thing is a {a}?",
            "What sort of thing is a {a}?",
            "Name the group to which a {a} belongs.",
        ),
        development=("Under which heading would you list a {a}?",),
        evaluation=("Tell me what kind of thing a {a} is.", "How would you sort a {a}?"),
        answers=("The {a} is a kind of {b}.", "We say that a {a} is a type of {b}."),
    ),
    "ability": Kind(
        facts=_ABILITIES,
        train=("Can a {a} {b}?", "Is a {a} able to {b}?", "Do you know if a {a} can {b}?"),
        development=("Will I ever see a {a} {b}?",),
        evaluation=("Tell me if a {a} can {b}.", "Has a {a} learned to {b}?"),
        answers=("{c}, a {a} {d} {b}.",),
    ),
    "recipe": Kind(
        facts=_table(
            "pancakes,flour,eggs,pan; porridge,oats,milk,pot; salad,cucumbers,oil,bowl; toast,bread,butter,oven; "
            "lemonade,lemons,sugar,jug; soup,carrots,water,kettle; jam,berries,sugar,jar; tea,leaves,water,cup; "
            "pizza,dough,cheese,oven; pudding,cream,sugar,bowl; noodles,flour,water,pot; cocoa,chocolate,milk,cup"
        ),
        train=("How can I make {a}?", "Tell me how to make {a}.", "What is the best way to make {a}?"),
        development=("What do I need if I want {a}?",),
        evaluation=("Show me how to make {a}.", "Write instructions to make {a}."),
        answers=("You can mix {b} and {c} in a {d}.", "You can take a {d} and fill it with {b} and {c}."),
        followups=("Then wait a little and serve it.", "Then enjoy it with your friends."),
    ),
    "skill": Kind(
        facts=_table(
            "tennis,racket; chess,board; piano,keys; painting,brush; running,shoes; sewing,needle; baking,oven; "
            "fishing,rod; "
            "gardening,spade; skating,skates; cycling,bike; writing,pen"
        ),
        train=(
            "How can I get better at {a}?",
            "Tell me how to get better at {a}.",
            "What is the best way to improve at {a}?",
        ),
        development=("How do I become good at {a}?",),
        evaluation=("Show me how to get better at {a}.", "What should I do to improve at {a}?"),
        answers=("You can practise {a} every day with your {b}.", "You can join a {a} club and bring your {b}."),
        followups=("Then ask a friend to watch you.", "Then you will soon get better."),
    ),
}

# Instructions with many good answers: part of the fine-tuning rows, never of the exactly checked questions.
OPEN_PROMPTS: dict[str, tuple[str, ...]] = {
    "story": ("Tell me a story about a {hero}.", "Write a short story about a {hero}.", "Make up a tale of a {hero}."),
    "mood": ("Help me feel more {mood}.", "What makes people feel {mood}?", "Suggest something that keeps me {mood}."),
    "gift": (
        "Suggest a gift for a {trait} friend.",
        "What can I give to a {trait} child?",
        "Name a gift for my {trait} uncle.",
    ),
}
OPEN_ANSWERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "story": (
        ("Once upon a time a {trait} {hero} found a {object} near the {place}.",),
        ("The {hero} took the {object} home and felt {mood}.", "Then the {hero} gave it to a {trait} friend."),
    ),
    "mood": (("A walk to the {place} makes most people {mood}.", "A plate of {food} makes most people {mood}."),),
    "gift": (("A {object} is a nice gift.", "Some {food} and a {object} would be a nice gift."),),
}
