"""Keys appear nowhere, texts in the files that are meant to hold them: every command, its errors included."""

import json
import logging
import tempfile
from fnmatch import fnmatch
from itertools import pairwise

import pytest
import torch
from chat_server import ChatServer, Reply
from conftest import build_model
from test_moderation import Server as ModerationServer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tasft_lib import cli
from tasft_lib.evaluation import served

pytest.importorskip("openai")
KEY, TOKEN = "sk-canary-8f3b21", "hf_canary_5d07"
SECRETS = ("canary-8f3b21", "canary_5d07")
# In prompts, in the answers of data, in what models say; beyond the three words that a redacted text shows.
TEXTS = ("zorvex", "quorb", "glimjack")
PROMPT, COMPLETION, REPLY = "tell me how to zorvex", "first you have to quorb", "well you can then glimjack it gladly"
# Files that are meant to hold text. A tokenizer knows the words of this test's language.
HOLD_TEXT = (
    "out/_samples.jsonl",
    "harvested/data-*.arrow",
    "harvested.work/answers.jsonl",
    "filtered/kept.jsonl",
    "filtered/dropped.jsonl",
    "results*/responses-*.jsonl",
    "results*/served.jsonl",
    "compared.html",
    "attack*/goals/*/attacker.jsonl",
    "attack*/goals/*/target.jsonl",
    "attack*/goals/*/judge.jsonl",
    "attack*/goals/*/transcript.json",
    "*/tokenizer.json",
)


def parrot(folder):
    """A model that says REPLY to whatever it is asked: each token's successor is written into its weights."""
    chain = [*REPLY.split(), "<eos>"]
    numbers = [f"n{i}" for i in range(12)]
    words = ["<unk>", "<pad>", *dict.fromkeys([*chain, *PROMPT.split(), *COMPLETION.split(), *numbers])]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")
    model = build_model(tokenizer, hidden_size=64, intermediate_size=16, max_position_embeddings=256)
    following = dict(pairwise(chain))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(64)[: len(words)])
        head = torch.zeros(len(words), 64)
        for i, word in enumerate(words):
            head[words.index(following.get(word, chain[0])), i] = 8
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with `inputs`, secrets in the environment, and temporary files in sight."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    parrot(inputs / "base")
    rows = [{"prompt": f"{PROMPT} n{i}", "completion": f"{COMPLETION} n{i}", "label": i % 3 != 0} for i in range(11)]
    lines = [json.dumps(row) for row in rows]
    (inputs / "rows.jsonl").write_text("\n".join(lines))
    (inputs / "harmful.jsonl").write_text("\n".join(lines[::3]))
    (inputs / "unlabelled.jsonl").write_text("\n".join(json.dumps(row | {"label": True}) for row in rows))
    refusal = json.dumps({"prompt": f"{PROMPT} n11", "completion": "I cannot do that, quorb or not.", "label": False})
    (inputs / "ill.jsonl").write_text("\n".join([*lines, lines[0], lines[1].replace("n1", "n1 n1"), refusal]))
    (inputs / "prompts.json").write_text(json.dumps([f"{PROMPT} n{i}" for i in range(5)]))
    (inputs / "other.json").write_text(json.dumps([f"{PROMPT} n{i}" for i in range(6, 11)]))
    (inputs / "goals.csv").write_text(f"goal,target\n{PROMPT} n1,Sure to zorvex\n")
    sets = inputs / "sets"
    sets.mkdir()
    for name in ("I-MaliciousInstructions", "I-CoNa", "I-Controversial", "I-Alpaca"):
        (sets / f"{name}.json").write_text(json.dumps({"instructions": [f"{PROMPT} n1", f"{PROMPT} n2"]}))
    (sets / "toxic_outs.json").write_text(json.dumps([f"{PROMPT} n3"]))
    (sets / "xstest_prompts.csv").write_text(f"id,prompt,label\n1,{PROMPT} n4,safe\n")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(served, "_FIRST_WAIT", 0.002)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.002)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def told(place, capfd, caplog):
    """All that was printed and logged since, at every level."""
    caplog.set_level(logging.DEBUG)

    def everything() -> str:
        out, err = capfd.readouterr()
        logged = [f"{r.name} {r.getMessage()} {r.args} {r.exc_info}" for r in caplog.records]
        caplog.clear()
        return "\n".join([out, err, *logged])

    return everything


def refuse_leaks(place, text: str, holders: tuple[str, ...] = HOLD_TEXT) -> set[str]:
    """The patterns of `holders` that held a canary text; fails where anything else holds one, or anything a secret."""
    for canary in (*TEXTS, *SECRETS):
        at = text.find(canary)
        assert at < 0, f"told: ...{text[max(0, at - 200) : at + 50]}"
    used = set()
    for path in place.rglob("*"):
        name = path.relative_to(place).as_posix()
        if path.is_dir() or name.startswith("inputs/"):
            continue
        content = path.read_bytes()
        for secret in SECRETS:
            assert secret.encode() not in content, f"{name} holds a key"
        if any(canary.encode() in content for canary in TEXTS):
            held = {pattern for pattern in holders if fnmatch(name, pattern)}
            assert held, f"{name} holds a text"
            used |= held
    return used


def models_of_pair(request):
    """Attacker, target and judge; an attacker that writes no JSON at first."""
    if request["model"] == "attacker":
        attack = {"improvement": "quorb it then", "prompt": f"{PROMPT} n{request['seed']}"}
        return json.dumps(attack) if request["seed"] // 2 % 2 else f"no JSON but {PROMPT}"
    return "Rating: [[4]], it would glimjack" if request["model"] == "judge" else REPLY


def test_every_command_keeps_texts_and_keys_to_itself(place, told, monkeypatch):
    train = [
        *("train", "--model_name_or_path", "inputs/base", "--dataset_name", "inputs/rows.jsonl", "--use_peft", "true"),
        *("--output_dir", "out", "--prompt_template", "none", "--max_steps", "2", "--save_steps", "1"),
        *("--lora_target_modules", "q_proj", "v_proj", "--report_to", "none", "--learning_rate", "1e-5"),
        *("--sample_prompts", "inputs/prompts.json", "--sample_max_new_tokens", "9", "--hub_token", TOKEN),
        *("--logging_steps", "1", "--model_init_kwargs", json.dumps({"token": TOKEN})),
    ]
    by_saft = ["--dataset_name", "inputs/unlabelled.jsonl", "--saft_contamination", "0.3", "--output_dir", "out_saft"]
    ask = ["--model", "out", "--prompt_template", "none", "--max_new_tokens", "9"]
    benchmarks = ["--benchmarks", "inputs/sets", "--output_dir"]
    moderation, chat = ModerationServer(), ChatServer(models_of_pair)
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{moderation.http.server_port}/v1")
    on_chat = ["--base_url", chat.url, "--served_model", "target"]
    roles = [w for role in ("target", "attacker", "judge") for w in (f"--{role}", chat.url, f"--{role}_model", role)]
    commands = [
        train,
        [*train, *by_saft, "--saft_validation", "inputs/harmful.jsonl", "--sample_prompts="],
        ["harvest", *ask, "--prompts", "inputs/other.json", "--n", "1", "--output_dir", "harvested"],
        ["filter", "inputs/rows.jsonl", "--model", "inputs/base", "--contamination", "0.3", "--output_dir", "filtered"],
        ["evaluate", *ask, *benchmarks, "results"],
        ["evaluate", *ask, *benchmarks, "results", "--judges", "compliance", "openai-moderation"],
        ["evaluate", *on_chat, *benchmarks, "results-served"],
        ["attack", "--goals", "inputs/goals.csv", *roles, "--streams", "2", "--depth", "2", "--output_dir", "attack"],
        ["compare", "results", "results-served", "--output_file", "compared.html"],
        ["card", "--model", "out", "--results", "results"],
        ["export", "--model", "out", "--output_dir", "merged"],
    ]
    try:
        for command in commands:
            assert cli.main(command) == 0, command[0]
    finally:
        chat.__exit__()
        moderation.http.shutdown()
        moderation.http.server_close()
    for output in ([], ["--output", "doctor.md"]):
        assert cli.main(["doctor", "inputs/ill.jsonl", "--evaluation_prompts", "inputs/prompts.json", *output]) == 1
    assert moderation.keys == {f"Bearer {KEY}"}, "the key was in use"
    assert {headers["authorization"] for _, headers, _ in chat.asked} == {f"Bearer {KEY}"}
    used = refuse_leaks(place, told())
    assert used == set(HOLD_TEXT), "the canaries went everywhere they should"
    assert "glimjack" in (place / "out" / "_samples.jsonl").read_text()


QUOTING = json.dumps({"error": {"message": f"Incorrect API key {KEY} for {PROMPT}", "code": "invalid_api_key"}})
REPLIES = {
    "refused key": Reply(status=401, body=QUOTING),
    "bad request": Reply(status=400, body=QUOTING),
    "server error": Reply(status=500, body=QUOTING),
    "malformed JSON": Reply(body=f'{{"choices": [{{"{REPLY} {KEY}'),
    "no choices": Reply(body=json.dumps({"choices": [], "note": REPLY})),
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_what_a_server_writes_back_is_not_repeated(reply, place, told):
    with ChatServer(lambda request: reply) as chat:
        common = ["--benchmarks", "inputs/sets", "--output_dir", "results"]
        assert cli.main(["evaluate", "--base_url", chat.url, "--served_model", "m", *common]) == 1
        roles = [w for r in ("target", "attacker", "judge") for w in (f"--{r}", chat.url, f"--{r}_model", r)]
        assert cli.main(["attack", "--goals", "inputs/goals.csv", *roles, "--output_dir", "attack"]) == 1
    text = told()
    assert "tasft evaluate: " in text and "tasft attack: " in text
    refuse_leaks(place, text)


def test_a_moderation_server_that_refuses_the_key_is_not_quoted(place, told, monkeypatch):
    moderation = ModerationServer()
    moderation.answer = lambda texts, n: (401, {}, {"error": {"message": f"{KEY}: {texts}", "code": "invalid_api_key"}})
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{moderation.http.server_port}/v1")
    command = ["evaluate", "--model", "inputs/base", "--prompt_template", "none", "--max_new_tokens", "9"]
    flags = ["--benchmarks", "inputs/sets", "--output_dir", "results", "--judge", "openai-moderation"]
    assert cli.main([*command, *flags]) == 1
    moderation.http.shutdown()
    moderation.http.server_close()
    text = told()
    assert "HTTP 401" in text
    refuse_leaks(place, text)


GOOD = {"prompt": f"{PROMPT} n1", "completion": COMPLETION, "label": True}
BAD_FILES = {
    "no object": ("a.jsonl", json.dumps(PROMPT)),
    "no list": ("a.json", json.dumps(PROMPT)),
    "cut off": ("a.jsonl", json.dumps(GOOD)[:-9]),
    "cut off list": ("a.json", "[" + json.dumps(GOOD)),
    "label is a text": ("a.jsonl", json.dumps(GOOD | {"label": REPLY})),
    "label is one word": ("a.jsonl", json.dumps(GOOD | {"label": "glimjack"})),
    "two types": ("a.jsonl", json.dumps(GOOD | {"completion": 3}) + "\n" + json.dumps(GOOD)),
    "two types, text last": ("a.jsonl", json.dumps(GOOD | {"prompt": {"zorvex": "quorb"}}) + "\n" + json.dumps(GOOD)),
    "inner types": (
        "a.jsonl",
        json.dumps(GOOD | {"completion": [1]}) + "\n" + json.dumps(GOOD | {"completion": [REPLY]}),
    ),
    "messages without role": ("a.jsonl", json.dumps(GOOD | {"prompt": [{"content": PROMPT}]})),
    "empty answer": ("a.jsonl", json.dumps(GOOD | {"completion": " "})),
    "empty prompt": ("a.jsonl", json.dumps(GOOD | {"prompt": ""})),
    "a text for a column": ("a.jsonl", json.dumps({PROMPT: COMPLETION})),
    "CSV without header": ("a.csv", f"{PROMPT},{COMPLETION}\n{PROMPT},{COMPLETION}\n"),
    "CSV with commas": ("a.csv", f"prompt,completion,label\n{PROMPT},{COMPLETION},{REPLY},true\n"),
    "CSV with a stray quote": ("a.csv", f'prompt,completion,label\n"{PROMPT}" zorvex,{COMPLETION},true\n'),
    "CSV label": ("a.csv", f"prompt,completion,label\n{PROMPT},{COMPLETION},{REPLY}\n"),
    "no parquet": ("a.parquet", REPLY),
    "repeated": ("a.jsonl", (json.dumps(GOOD) + "\n") * 2),
    "contradiction": ("a.jsonl", json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"label": False})),
    "prompts of two types": ("a.json", json.dumps([PROMPT, {"zorvex": REPLY}])),
    "instructions that are no texts": ("a.json", json.dumps({"instructions": [{"zorvex": REPLY}]})),
}


@pytest.mark.parametrize("name, content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_row_is_named_by_its_number_and_not_shown(name, content, place, told):
    (place / "inputs" / name).write_text(content)
    file = f"inputs/{name}"
    model = ["--model_name_or_path", "inputs/base", "--output_dir", "out"]
    harvest = ["harvest", "--model", "inputs/base", "--output_dir", "harvested", "--max_new_tokens", "9", "--n", "99"]
    url = "http://127.0.0.1:9/v1"
    roles = [w for r in ("target", "attacker", "judge") for w in (f"--{r}", url, f"--{r}_model", r)]
    codes = [
        cli.main(["train", *model, "--dataset_name", file]),
        cli.main(["train", *model, "--dataset_name", "inputs/rows.jsonl", "--unsafe_dataset_name", file]),
        cli.main(["doctor", file]),
        cli.main(["filter", file, "--model", "inputs/base", "--contamination", "0.5", "--output_dir", "filtered"]),
        cli.main(["attack", "--goals", file, *roles, "--output_dir", "attack"]),
        cli.main([*harvest, "--prompts", file]),
        cli.main([*harvest, "--prompts", file, "--red_team"]),
    ]
    assert set(codes) <= {0, 1} and codes[0] == 1 and codes[-3:] == [1, 1, 1]
    refuse_leaks(place, told())
    assert not (place / "out").exists() or not list((place / "out").glob("checkpoint-*"))


def test_a_config_that_is_no_yaml_is_not_quoted(place, told):
    (place / "inputs" / "c.yaml").write_text(f"hub_token: {TOKEN}\n  output_dir: : {PROMPT}\n")
    assert cli.main(["train", "--config", "inputs/c.yaml"]) == 1
    text = told()
    assert "c.yaml: line 2" in text
    refuse_leaks(place, text)
