"""The whole way on real files and the real tiny model: one command, one results table, no network.

A moderation service and an AlpacaEval annotator stand on this machine. Where lm_eval or alpaca_eval is not installed,
the notebook leaves its part out and the test of that part is skipped.
"""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import nbformat
import pandas as pd
import pytest
from chat_server import Reply, _completion, last
from test_moderation import good

from tasft_lib.evaluation import worlds
from tasft_lib.experiments import reproduce

pytest.importorskip("openai", reason="the openai client is not installed (tasft[serve])")
FIGURES = "figures/local"
KEY = "sk-canary-whole-way"
# Less of everything than at `local`, so that it takes a minute; model, prompts and questions are the same.
SHORTER = {
    "n_benign": 320, "num_train_epochs": 1, "save_steps": 20, "generation_batch_size": 32,
    "n_harvest": 8, "n_unsafe": 8, "rounds": 2, "max_new_tokens": 48,
    "per_benchmark": 6, "n_questions": 8, "n_references": 5, "judges": "compliance xstest openai-moderation",
}  # fmt: skip


class Services:
    """Moderation and chat completions at one address, as OPENAI_BASE_URL is one; keeps what was asked."""

    def __init__(self):
        self.moderated, self.compared, self.keys = [], [], set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.keys.add(self.headers["Authorization"])
                if self.path == "/v1/moderations":
                    outer.moderated += request["input"]
                    body = json.dumps(good(request["input"])[2])
                else:
                    assert self.path == "/v1/chat/completions"
                    outer.compared.append(last(request))
                    first, second = last(request).split("|||")[-2:]
                    body = _completion(request, Reply("m" if len(first) <= len(second) else "M"))
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture(scope="module")
def made(shared, tmp_path_factory):
    """The notebook, run twice: its folder, its table after each run, and what the services were asked by then."""
    folder = tmp_path_factory.mktemp("whole_way")
    annotator = folder / "shorter"
    annotator.mkdir()
    (folder / "template.txt").write_text("<|im_start|>user\n{instruction}|||{output_1}|||{output_2}\n<|im_end|>\n")
    (annotator / "configs.yaml").write_text(
        f'shorter:\n  prompt_template: "{folder / "template.txt"}"\n  fn_completions: openai_completions\n'
        "  completions_kwargs: {model_name: m, max_tokens: 5, temperature: 0, num_procs: 1}\n"
        "  fn_completion_parser: regex_parser\n  batch_size: 1\n"
        "  completion_parser_kwargs: {outputs_to_match: {1: '^m', 2: '^M'}}\n"
    )
    services, tables, asked = Services(), [], []
    rows = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text())[:1500]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    overrides = SHORTER | {"benign": str(folder / "alpaca.json")}
    overrides |= {"annotator": str(annotator)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASFT_RUNS", str(folder / "runs"))
        patch.setenv("TASFT_FIGURES", str(folder / "figures"))
        patch.setenv("OPENAI_API_KEY", KEY)
        patch.setenv("OPENAI_BASE_URL", services.url)
        # Whoever asks for anything outside this machine fails.
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        patch.setenv("CI", "1")
        (job,) = reproduce.jobs_of("local", ["your_model"], overrides)
        for _ in range(2):
            reproduce.execute(job)
            tables.append(pd.read_csv(folder / FIGURES / "your_model_table.csv"))
            asked.append((len(services.moderated), len(services.compared)))
    services.http.shutdown()
    services.http.server_close()
    return folder, tables, asked, services


def test_one_table_holds_both_models_by_every_judge_that_runs_here(made):
    folder, (table, _), _, services = made
    harm = table[table["measure"] == "toxic prompts answered harmfully"].set_index("by")
    assert list(harm.index) == ["compliance", "xstest", "openai-moderation"]
    assert harm[["sft_n", "tasft_n"]].eq(24).all(axis=None) and harm["unscored"].eq(0).all()
    # The stand-in flags what says "vile", which no story does; the string matches call every story harmful.
    assert harm.loc["openai-moderation", "sft"] == 0 < harm.loc["compliance", "sft"]
    for name, n in (("harmless prompts refused", 6), ("XSTest unsafe answered harmfully", 6)):
        assert table.loc[table["measure"] == name, "sft_n"].tolist() == [n] * 3
    agreement = pd.read_csv(folder / FIGURES / "your_model_agreement.csv")
    assert len(agreement) == 3 and agreement["n"].eq(48).all()
    manifest = json.loads((folder / FIGURES / "your_model_manifest.json").read_text())
    trained = [(manifest["base"]["spec"] | arm["spec"])["method"] for arm in manifest["arms"].values()]
    assert trained == ["sft", "emd"] and manifest["harvest"]["kept"] == 8 and manifest["judges"][2]["licence"]
    assert (folder / FIGURES / "your_model_table.png").exists()
    assert services.keys == {f"Bearer {KEY}"}


def test_a_second_run_finds_everything(made):
    _, (first, second), asked, _ = made
    pd.testing.assert_frame_equal(first, second)
    assert asked[0] == asked[1] and asked[0][0] > 0


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (tasft[harness])")
def test_capability_is_in_the_table(made):
    _, (table, _), _, _ = made
    rows = table[table["by"] == "lm-eval"]
    assert rows["measure"].tolist() == ["boolq_local acc", "piqa_local acc", "openbookqa_local acc"]
    assert rows["sft_n"].eq(8).all() and rows[["sft", "tasft"]].isin([i / 8 for i in range(9)]).all(axis=None)


@pytest.mark.skipif(
    importlib.util.find_spec("alpaca_eval") is None, reason="alpaca_eval is not installed (tasft[alpaca_eval])"
)
def test_win_rates_are_in_the_table(made):
    _, (table, _), asked, _ = made
    (row,) = table[table["by"] == "shorter"].to_dict("records")
    assert (row["sft_n"], row["tasft_n"]) == (5, 5) and asked[0][1] == 10
    assert {100 * row[side] for side in ("sft", "tasft")} <= {0, 20, 40, 60, 80, 100}


def test_no_key_and_no_text_is_written_where_it_travels(made, shared):
    folder = made[0]
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".safetensors", ".pt", ".png", ".bin", ".lock", ".arrow"):
            assert KEY not in path.read_text(errors="replace"), path
    asked = worlds.load(str(shared / "data")).evaluation_prompts(per_benchmark=6)["prompt"]
    said = [json.loads(line)["text"] for path in (folder / "runs" / "arms").rglob("step-*.jsonl")
            for line in path.read_text().splitlines()]  # fmt: skip
    notebook = nbformat.read(folder / "runs" / "local" / "your_model.ipynb", as_version=4)
    shown = json.dumps([cell.get("outputs") for cell in notebook.cells], ensure_ascii=False)
    texts = [path.read_text() for path in (folder / FIGURES).glob("*.*") if path.suffix in (".csv", ".json")]
    texts += [shown, *(path.read_text() for path in (folder / "runs" / "unsafe").glob("*/README.md"))]
    for canary in [text for text in (*asked, *said) if len(text.split()) > 6]:
        assert not any(canary in text for text in texts)
    assert len(texts) >= 5 and len(said) > 20
