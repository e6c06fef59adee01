"""Telling English from other languages, on text that anybody may publish."""

import base64
import codecs
import json
import random
import re
import string
import sys

import pytest

from tasft_lib.judges import noise as module
from tasft_lib.judges.encodings import is_coded
from tasft_lib.judges.noise import NOISE, UNREAD, find_degenerate, kinds, noise, non_english, written_in

OTHERS = [
    "Die Katze schläft auf dem Sofa und träumt von Mäusen.",
    "Le chat dort sur le canapé et rêve de souris.",
    "El gato duerme en el sofá y sueña con ratones.",
    "猫 は ソファ で 寝て います 。",
    "Кошка спит на диване и видит сны о мышах.",
]

REAL = [
    *OTHERS,
    "The cat sleeps on the sofa and dreams of mice, while the old dog watches the garden gate from the porch.",
    "Der Hund bewacht das Gartentor, die Katze schläft auf dem Sofa, und im Haus kocht jemand eine Suppe.",
    "La vieille maison se trouve près de la rivière, et chaque matin les enfants passent devant pour aller à l'école.",
    "Каждое утро дети проходят мимо старого дома у реки и смотрят на большую собаку во дворе.",
    "for (int i = 0; i < count; i++) { totalPrice += itemPrices[i] * taxRate; } return totalPrice;",
    "const sortedNames = names.filter(isLongName).map(toUpperCase).sort();\nconsole.log(sortedNames.join(', '));",
    "1. Apples\n2. Pears\n3. Plums\n4. Cherries\n5. Apricots\n6. Gooseberries",
    "3.14159, 2.71828, 1.41421, 1.73205, 1.61803, 0.57721, 0.69314",
    "See https://example.org/kqzxv/wvxqk-zzqkx/plmqz.html?xkcdq=vbnmq for it.",
    "x_1 = 4, y_1 = 5",
    "Zorvex",
    "",
]


# Languages without a word list: what a cat does, what children do, in words that anybody may publish.
UNLISTED = {
    "Zulu": "Ikati lilala kusofa futhi liphupha amagundane. Izingane zidlala ngaphandle kwendlu endala eduze komfula.",
    "Hausa": "Kyanwa tana barci a kan kujera kuma tana mafarkin beraye. Yara suna wasa a waje kusa da tsohon gida.",
    "Welsh": "Mae'r gath yn cysgu ar y soffa ac yn breuddwydio am lygod. Mae'r plant yn chwarae wrth yr hen dŷ.",
    "Basque": "Katua sofan lo dago eta saguekin amets egiten du. Haurrak kanpoan jolasten dira etxe zaharraren ondoan.",
    "Uzbek": "Mushuk divanda uxlaydi va sichqonlarni tush ko'radi. Bolalar eski uy yonida tashqarida o'ynaydilar.",
    "Yoruba": "Ologbo naa n sun lori aga o si n la ala nipa awon eku. Awon omode n sere ni ita nitosi ile atijo.",
    "Swahili": "Paka analala kwenye kochi na kuota kuhusu panya. Watoto wanacheza nje karibu na nyumba ya zamani.",
    "Irish": "Tá an cat ina chodladh ar an tolg agus é ag brionglóideach faoi lucha. Tá na páistí ag súgradh amuigh.",
    "Afrikaans": "Die kat slaap op die bank en droom van muise. Die kinders speel buite naby die ou huis.",
    "Esperanto": "La kato dormas sur la sofo kaj revas pri musoj. La infanoj ludas ekstere apud la malnova domo.",
    "Kazakh": "Мысық диванда ұйықтап жатыр және тышқандарды түсінде көреді. Балалар ескі үйдің жанында ойнайды.",
    "Amharic": "ድመቷ ሶፋ ላይ ተኝታ ስለ አይጦች ታልማለች። ልጆቹ ከአሮጌው ቤት አጠገብ ይጫወታሉ።",
}
ENGLISH_TEXT = "The cat sleeps on the sofa and dreams of mice, while the old dog watches the garden gate."
CODES = {
    "base64": base64.b64encode(ENGLISH_TEXT.encode()).decode(),
    "base64, cut, after words": "Here you are: " + base64.b64encode(ENGLISH_TEXT.encode()).decode()[:-7],
    "base32": base64.b32encode(ENGLISH_TEXT.encode()).decode(),
    "hexadecimal": ENGLISH_TEXT.encode().hex(),
    "hexadecimal, spaced": ENGLISH_TEXT.encode().hex(" "),
    "percent": "".join(f"%{byte:02X}" for byte in ENGLISH_TEXT.encode()),
    "bits": " ".join(f"{byte:08b}" for byte in ENGLISH_TEXT.encode()),
    "rot13": codecs.encode(ENGLISH_TEXT, "rot13"),
    "backwards": ENGLISH_TEXT[::-1],
    "leet": ENGLISH_TEXT.translate(str.maketrans("aeiost", "431057")),
    "leet in capitals": ENGLISH_TEXT.upper().translate(str.maketrans("AEIOST", "431057")),
    "letter by letter": " ".join(ENGLISH_TEXT),
    "look-alikes": ENGLISH_TEXT.translate(str.maketrans("aeopcx", "аеорсх")),
    "Morse": "- .... . / -.-. .- - / ... .-.. . . .--. ... / --- -. / - .... . / ... --- ..-. .-",
}


def shuffled_letters(text: str, seed: int) -> str:
    mix = random.Random(seed)
    return re.sub(r"\w+", lambda word: "".join(mix.sample(word[0], len(word[0]))), text)


@pytest.fixture
def word_lists():
    pytest.importorskip("wordfreq")


def test_other_languages_and_no_language_are_found():
    assert non_english(OTHERS) == [True] * len(OTHERS)
    assert non_english(["1 2 3 4 5 6", "?? !! ?? !! ?? !!"]) == [True, True]
    assert non_english(["The cat sleeps on the sofa and dreams of mice.", "Oui.", ""]) == [False, False, False]


def test_languages_without_spaces_are_found_by_their_characters():
    assert non_english(["猫はソファで寝ています。", "这只猫在沙发上睡觉，梦见老鼠。", "猫"]) == [True, True, False]


def test_real_english_answers_are_english(shared):
    rows = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text())[:2000:10]
    answers = [row["output"] for row in rows if len(row["output"].split()) >= 8]
    assert sum(non_english(answers)) <= 0.02 * len(answers)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lingua", None)
    with pytest.raises(ValueError, match=r"pip install 'tasft\[notebooks\]'"):
        non_english(["a b c d e"])


@pytest.mark.parametrize("text", REAL)
def test_real_text_is_never_noise(text, word_lists):
    assert noise([text]) == [False]


def test_shuffled_letters_are_noise_in_several_languages(word_lists):
    texts = [text for text in REAL[5:9] for _ in range(25)]
    assert sum(noise([shuffled_letters(text, seed) for seed, text in enumerate(texts)])) >= 0.95 * len(texts)


def test_random_keys_are_noise_whatever_their_alphabet(word_lists):
    mix = random.Random(0)
    keys = string.ascii_letters + string.digits + string.punctuation + " " * 14
    small = string.ascii_lowercase + " " * 5
    for alphabet in (keys, small, "абвгдежзиклмнопрстуфхцчшщыэюя" + " " * 5):
        assert sum(noise(["".join(mix.choices(alphabet, k=150)) for _ in range(50)])) >= 49


@pytest.mark.parametrize("language", UNLISTED)
def test_a_language_without_a_word_list_is_language(language, word_lists):
    assert written_in(UNLISTED[language]) == UNREAD
    assert find_degenerate([UNLISTED[language]]) == [False]


@pytest.mark.parametrize("code", CODES)
def test_an_encoded_answer_is_no_noise_and_not_read_as_english(code, word_lists):
    assert kinds([CODES[code]]) == [UNREAD]


def test_letters_shuffled_in_english_are_no_language_without_a_list(word_lists):
    assert kinds([shuffled_letters(ENGLISH_TEXT, seed) for seed in range(20)]).count(NOISE) >= 19


def test_what_only_looks_like_a_code_is_none():
    plain = [
        "a" * 64,
        "0000 1111 " * 8,
        "The hash is d41d8cd98f00b204e9800998ecf8427e.",
        "A, B, C, D, E, F",
        "1 2 3 4 5",
    ]
    assert not any(map(is_coded, [*plain, ENGLISH_TEXT, ""]))


def test_noise_does_not_see_the_order_of_words(word_lists):
    words = REAL[5].split()
    random.Random(0).shuffle(words)
    assert noise([" ".join(words)]) == [False]


def test_a_text_is_judged_by_itself(word_lists):
    texts = [*REAL, *(shuffled_letters(text, 1) for text in REAL)]
    assert noise(texts) == [noise([text])[0] for text in texts] == noise(texts[::-1])[::-1]


def test_real_answers_are_not_noise(shared, word_lists):
    rows = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text())[::25]
    assert sum(noise([row["output"] for row in rows])) <= 0.005 * len(rows)


def test_without_word_lists_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "word_lists", lambda: None)
    with pytest.raises(ValueError, match=r"pip install wordfreq"):
        noise(["a b c d e"])
