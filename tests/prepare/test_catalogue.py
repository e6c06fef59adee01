"""The table of published sets: pinned, counted where they lie, asked for without being fetched; two readers."""

import gzip
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub.constants as hub
import pytest
import yaml
from httpx import Request, Response
from huggingface_hub.errors import GatedRepoError

from tasft_lib import cli
from tasft_lib.evaluation import prompts as prompts_module
from tasft_lib.evaluation.prompts import downloaded_file
from tasft_lib.prepare import catalogue
from tasft_lib.prepare.catalogue import DATA_SETS, Published
from tasft_lib.records import data, forms, sources

ROOT = Path(__file__).resolve().parents[2]
ROLES = {"training", "toxic prompts", "benign", "over-refusal", "safe answers", "jailbreak goals", "capability"}


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    """No test sees what this machine has downloaded."""
    monkeypatch.setenv("TASFT_CACHE", str(tmp_path / "tasft"))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))


def states(*arguments, **options) -> dict[str, str]:
    table, _ = catalogue.status_table(*arguments, **options)
    return dict(zip(table["name"], table["state"], strict=True))


def test_every_set_is_pinned_to_a_commit_and_named_once():
    assert len({p.name for p in DATA_SETS}) == len(DATA_SETS) == len({p.local for p in DATA_SETS})
    assert {p.role for p in DATA_SETS} == ROLES
    for published in DATA_SETS:
        assert (published.url is None) != (published.hub is None), published.name
        assert re.search(r"(?:@|/)[0-9a-f]{40}(?:$|/)", published.address), published.name
        assert published.rows > 0 and published.licence
        assert (published.url or published.revision) in published.remedy and published.local in published.remedy


def test_pins_agree_with_those_of_the_parameter_files():
    alpaca = next(p for p in DATA_SETS if p.hub == "tatsu-lab/alpaca")
    used = [yaml.safe_load(path.read_text()) or {} for path in (ROOT / "params").rglob("*.yaml")]
    revisions = {p["benign_revision"] for p in used if p.get("benign") == alpaca.hub}
    assert revisions == {alpaca.revision}


def test_the_real_files_are_found_and_counted(shared):
    table, remedies = catalogue.status_table(shared / "data")
    here = table[table["state"] == "local"].set_index("name")
    assert (here["rows"] == here["expected"]).all()
    missing = {"BeaverTails 30k", "hh-rlhf red team", "OR-Bench hard"}
    assert set(table["name"]) - set(here.index) == missing == {line.split(":")[0] for line in remedies}
    expected = {
        "I-MaliciousInstructions": 100,
        "I-CoNa": 178,
        "I-Controversial": 40,
        "HarmfulQ": 200,
        "XSTest": 450,
        "AlpacaEval": 805,
        "Alpaca 52k": 52_002,
    }
    assert here["rows"][list(expected)].to_dict() == expected


def test_offline_files_load_in_the_projects_form(shared):
    files = {p.name: catalogue.find(p, shared / "data") for p in DATA_SETS}
    prompts = {"I-MaliciousInstructions": 100, "I-CoNa": 178, "I-Controversial": 40, "HarmfulQ": 200, "AlpacaEval": 805}
    prompts |= {"Q-Harm": 100, "I-Alpaca": 50, "I-PhysicalSafety unsafe": 100, "I-PhysicalSafety safe": 100}
    prompts |= {"STL safe answers": 2_483, "PAIR's AdvBench 50": 50, "JailbreakBench": 100, "XSTest": 450}
    for name, count in prompts.items():
        assert len(forms.read_prompts(files[name])) == count
    xstest = sources.read_rows(files["XSTest"])["label"][:]
    assert (xstest.count("safe"), xstest.count("unsafe")) == (250, 200)
    alpaca = forms.to_training_rows(
        sources.read_rows(files["Alpaca 52k"]), label=True, source="alpaca_data.json", drop_empty=True
    )
    assert len(alpaca) == 52_002 - 28 and all(alpaca["label"])


@pytest.mark.parametrize("published", DATA_SETS, ids=lambda p: p.name)
def test_every_set_is_fetched_at_its_commit_once_and_a_local_copy_goes_first(published, tmp_path, monkeypatch):
    """The network's part is recorded: one file of one commit, whatever the set."""
    asked = []

    def download(hub_id, file, **options):
        asked.append((hub_id, file, options))
        in_hub_cache(published, b"rows")
        return str(catalogue.find(published))

    def opened(url, timeout):
        asked.append(url)
        return io.BytesIO(b"rows")

    monkeypatch.setattr(catalogue, "hf_hub_download", download)
    monkeypatch.setattr(prompts_module, "urlopen", opened)
    path = catalogue.fetch(published.name.upper())
    assert path.read_bytes() == b"rows" and catalogue.fetch(published.name) == path == catalogue.find(published)
    options = {"repo_type": "dataset", "revision": published.revision}
    assert asked == [published.url or (published.hub, published.file, options)]
    local = tmp_path / "folder" / published.local
    local.parent.mkdir(parents=True)
    local.write_text("mine")
    assert catalogue.fetch(published.name, tmp_path / "folder") == local and len(asked) == 1


def test_what_cannot_be_fetched_is_one_line_with_its_remedy(monkeypatch, capsys):
    def gated(*_, **__):
        raise GatedRepoError("no", response=Response(403, request=Request("GET", "http://127.0.0.1")))

    monkeypatch.setattr(catalogue, "hf_hub_download", gated)
    assert cli.main(["data", "--fetch", "OR-Bench hard"]) == 1
    error = capsys.readouterr().err
    assert "accept its terms at https://huggingface.co/datasets/bench-llm/or-bench" in error and error.count("\n") == 1
    monkeypatch.setattr(catalogue, "hf_hub_download", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no")))
    with pytest.raises(ValueError, match=r"BeaverTails 30k: ConnectionError; check the network, or run `hf download"):
        catalogue.fetch("BeaverTails 30k")
    with pytest.raises(ValueError, match=r"no published set 'alpaka'; there are Alpaca 52k"):
        catalogue.fetch("alpaka")


def in_hub_cache(published: Published, content: bytes) -> None:
    folder = Path(hub.HF_HUB_CACHE) / f"datasets--{published.hub.replace('/', '--')}" / "snapshots" / published.revision
    (folder / published.file).parent.mkdir(parents=True)
    (folder / published.file).write_bytes(content)


def test_downloads_of_tasft_and_of_the_hub_are_found_and_counted(tmp_path):
    assert set(states().values()) == {"not here"}
    cona, orbench = (next(p for p in DATA_SETS if p.name == name) for name in ("I-CoNa", "OR-Bench hard"))
    kept = downloaded_file(cona.url)
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"instructions": ["blorp"] * cona.rows, "inputs": []}))
    in_hub_cache(orbench, b"prompt,category\n" + b"how to blorp?,grue\n" * orbench.rows)
    (tmp_path / "folder").mkdir()
    found = states(tmp_path / "folder")
    assert found == states()
    assert found.pop(cona.name) == found.pop(orbench.name) == "cached" and set(found.values()) == {"not here"}


def test_another_number_of_rows_and_broken_files_are_named(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "toxic_outs.json").write_text('["blorp?"]')
    (tmp_path / "I-CoNa.json").write_text('{"instructions": [')
    (tmp_path / "xstest_prompts.csv").write_text("")
    (tmp_path / "Q-Harm.json").write_text('{"prompts": []}')
    found = states(tmp_path)
    assert found["HarmfulQ"] == "other rows"
    assert found["I-CoNa"] == found["XSTest"] == found["Q-Harm"] == "unreadable"
    _, remedies = catalogue.status_table(tmp_path)
    line = next(line for line in remedies if line.startswith("HarmfulQ"))
    assert "1 rows, 200 expected" in line and "save https://" in line
    with pytest.raises(ValueError, match="no such folder"):
        catalogue.status_table(tmp_path / "absent")


def test_the_command_prints_a_line_per_missing_set_and_opens_no_connection(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("the network was asked"))
    monkeypatch.setattr(catalogue, "urlopen", lambda *a, **k: pytest.fail("the network was asked"))
    assert cli.main(["data", "--folder", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for published in DATA_SETS:
        assert sum(line.startswith(f"{published.name}: ") for line in printed.splitlines()) == 1
    assert cli.main(["data", "--folder", str(tmp_path / "absent")]) == 1
    assert "no such folder" in capsys.readouterr().err


class Web(BaseHTTPRequestHandler):
    """A raw file, an open, a gated and an unknown set of the hub, by the hub's own headers."""

    asked: ClassVar[list] = []

    def do_HEAD(self):
        self.asked.append((self.command, self.path))
        gated, unknown = "/gated/" in self.path, "/unknown/" in self.path
        self.send_response(403 if gated else 404 if unknown else 200)
        self.send_header("Content-Length", "123456789")
        self.send_header("ETag", '"0a1b"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if gated or unknown:
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.send_header("X-Error-Message", "refused")
        self.end_headers()

    def do_GET(self):
        self.asked.append((self.command, self.path))

    def log_message(self, *args):
        pass


def test_asking_reads_headers_alone_and_tells_gated_from_open(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", address)
    monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    sets = [Published("raw", "benign", 1, "MIT", "raw.json", url=f"{address}/raw.json")]
    for owner in ("open", "gated", "unknown"):
        name = f"{owner}/rows"
        sets.append(Published(owner, "benign", 1, "MIT", f"{owner}.csv", hub=name, revision="a" * 40, file="rows.csv"))
    monkeypatch.setattr(catalogue, "DATA_SETS", tuple(sets))
    table, remedies = catalogue.status_table(ask=True)
    server.shutdown()
    server.server_close()
    assert table["state"].tolist() == ["would be downloaded", "would be downloaded", "gated", "unreachable"]
    assert "accept its terms at https://huggingface.co/datasets/gated/rows and log in" in remedies[2]
    assert {command for command, _ in Web.asked} == {"HEAD"} and len(Web.asked) == 4
    assert set(states(ask=True).values()) == {"unreachable"}, "the server is gone"


CATEGORIES = ("grue_theft", "controversial_topics,_zibs", "blorp_abuse")


def beaver(prompt: str, response: str, is_safe: bool, *categories: str) -> dict:
    holds = {name: name in categories for name in CATEGORIES}
    return {"prompt": prompt, "response": response, "category": holds, "is_safe": is_safe}


def test_beavertails_becomes_training_rows_by_majority(tmp_path, caplog):
    rows = [
        beaver("how to blorp?", "take the zib", False, "grue_theft"),
        beaver("how to blorp?", "take the zib", True),
        beaver("how to blorp?", "take the zib", False, "grue_theft", "controversial_topics,_zibs"),
        beaver("how to blorp?", "better not", True),
        beaver("where is the grue?", "over there", True),
        beaver("where is the grue?", "over there", False, "blorp_abuse"),
        beaver("who blorps?", "the zib, alas", False, "blorp_abuse"),
    ]
    path = tmp_path / "beavertails_30k_train.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    read = catalogue.beavertails_rows(path)
    assert read.to_list() == [
        {"prompt": "how to blorp?", "completion": "take the zib", "label": False},
        {"prompt": "how to blorp?", "completion": "better not", "label": True},
        {"prompt": "who blorps?", "completion": "the zib, alas", "label": False},
    ]
    assert "left out 1 of 4 pairs" in caplog.text
    data.check(forms.to_training_rows(read, label=None, source=path), source=path)
    benign, unsafe = data.by_label(read)
    assert (len(benign), len(unsafe)) == (1, 2)


def test_other_files_are_refused_by_the_beavertails_reader(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ValueError, match="lacks is_safe"):
        catalogue.beavertails_rows(path)
    path.write_text(json.dumps(beaver("a", "b", None)) + "\n")
    with pytest.raises(ValueError, match="row 1: is_safe is None"):
        catalogue.beavertails_rows(path)
    with pytest.raises(ValueError, match="revision"):
        catalogue.beavertails_rows("PKU-Alignment/BeaverTails")


def test_first_human_turns_of_red_team_transcripts(tmp_path, caplog):
    talks = [
        (
            "\n\nHuman: How do I blorp\na grue? \n\nAssistant: Human: never.\n\nHuman: And a zib?\n\nAssistant: No.",
            -2.5,
        ),
        ("\n\nHuman: Where is the zib?\n\nAssistant: There.", 1.5),
        ("\n\nHuman: How do I blorp\na grue?\n\nAssistant: Thus.", -3.0),
        ("\n\nHuman: Who?\n\nHuman: Me.\n\nAssistant: You.", 0.0),
        ("\n\nAssistant: Hello.", 0.0),
    ]
    rows = [
        {"transcript": text, "min_harmlessness_score_transcript": score, "rating": 4.0, "tags": None, "num_params": 52}
        for text, score in talks
    ]
    path = tmp_path / "red_team_attempts.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert catalogue.red_team_prompts(path) == ["How do I blorp\na grue?", "Where is the zib?", "Who?"]
    assert "left out 1 of 5 transcripts" in caplog.text
    hub_set = next(p for p in DATA_SETS if p.name == "hh-rlhf red team")
    in_hub_cache(hub_set, path.read_bytes())
    assert catalogue.red_team_prompts("Anthropic/hh-rlhf") == catalogue.red_team_prompts(path)
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match="lacks transcript"):
        catalogue.red_team_prompts(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text(json.dumps(rows[-1:]))
    with pytest.raises(ValueError, match="no transcript gives a prompt"):
        catalogue.red_team_prompts(tmp_path / "rows.json")
