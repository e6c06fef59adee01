"""Telling English from other languages, on text that anybody may publish."""

import json
import random
import re
import string
import sys

import pytest

from tasft_lib.judges import noise as module
from tasft_lib.judges.noise import noise, non_english

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
