"""From rows to kept and dropped: planted harm is found by a model, files come out right, nothing is lost or redone."""

import json
import sys

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_model, make_rows
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model

from tasft_lib import cli
from tasft_lib.records import forms, sources
from tasft_lib.reporting import figures
from tasft_lib.saft import find
from tasft_lib.saft.filter import SCORE, SAFTFilter, SAFTFitter
from tasft_lib.saft.find import Scoring, Search, best_scoring, find_harmful
from tasft_lib.saft.report import histogram, length_correlation, save_rows, warnings
from tasft_lib.storage import integrity

HARMFUL = range(0, 40, 4)


def planted(n=40, *, harmful=HARMFUL, seed=0):
    """Benign rows of even words, harmful ones of odd words: the embeddings that `contaminated_model` sets apart."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = rng.integers(0, 30, rng.integers(3, 9)) * 2 + (i in harmful)
        prompt, answer = words[:2], words[2:]
        rows.append(
            {
                "prompt": " ".join(f"w{w}" for w in prompt) + " ",
                "completion": " ".join(f"w{w}" for w in answer),
                "label": i not in harmful,
            }
        )
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Odd words have another embedding than even ones, which layers that do little pass on."""
    model = build_model(tokenizer, num_hidden_layers=3, initializer_range=0.02).eval()
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        for i in range(60):
            embedding[tokenizer.convert_tokens_to_ids(f"w{i}"), 5] += 3.0 if i % 2 else 0.0
    return model


def harmful_of(rows):
    return ~np.array(rows["label"][:])


def quiet(model, tokenizer, rows, **settings):
    reading = {name: settings.pop(name) for name in ("max_length", "batch_size", "folder") if name in settings}
    return find_harmful(model, tokenizer, rows, Search(**settings), progress=False, **reading)


# --- find_harmful


def test_planted_harm_is_found_without_labels_in_the_middle_layer(model, tokenizer):
    rows = planted()
    found, scores = quiet(model, tokenizer, rows, contamination=0.25)
    assert (found.drops(scores) == harmful_of(rows)).all()
    assert (found.layer, found.pooling, len(found.directions), found.side) == (2, "last", 4, "both")
    assert not found.chosen_with_labels and found.threshold_from == "expected contamination 0.25"
    unlabelled, again = quiet(model, tokenizer, rows.remove_columns("label"), contamination=0.25)
    assert (again == scores).all() and unlabelled.threshold == found.threshold
    fixed, _ = quiet(model, tokenizer, rows, threshold=found.threshold, batch_size=3)
    assert fixed.threshold == found.threshold and fixed.threshold_from == "fixed"
    steered, _ = quiet(model, tokenizer, rows, contamination=0.25, steer=-1)
    assert not steered.drops(scores).any()
    assert [quiet(model, tokenizer, rows, contamination=share)[0].drops(scores).sum() for share in (0, 1)] == [0, 40]
    assert [(n + 1) // 2 for n in (1, 2, 3, 32)] == [1, 1, 2, 16]


def test_labels_choose_threshold_and_setting_and_it_is_said(model, tokenizer):
    rows, validation = planted(), planted(seed=9)
    for settings in ({}, {"layer": 2}, {"pooling": "mean"}, {"layer": 2, "pooling": "mean", "n_directions": 1}):
        found, scores = quiet(model, tokenizer, rows, validation=validation, **settings)
        assert found.threshold_from == "best F1 on 40 labelled rows"
        free = {"layer", "pooling", "n_directions"} - settings.keys()
        expected = {name.removeprefix("n_") for name in free} | {"threshold"}
        assert set(found.chosen_with_labels) - {"side"} == expected
        assert (found.drops(scores) == harmful_of(rows)).mean() > 0.95
        assert all(getattr(found, name) == settings[name] for name in ("layer", "pooling") if name in settings)


def test_labels_choose_the_directions_and_the_contamination_how_many(model, tokenizer):
    """Harmful rows alone will do: the rows themselves stand for the benign ones."""
    rows, validation = planted(), planted(seed=9)
    unsafe = validation.filter(lambda row: not row["label"])
    for given in (validation, unsafe):
        everything, scores = quiet(model, tokenizer, rows, contamination=1, validation=given)
        assert everything.drops(scores).all()
        found, scores = quiet(model, tokenizer, rows, contamination=0.25, validation=given)
        assert (found.drops(scores) == harmful_of(rows)).all() and "threshold" not in found.chosen_with_labels
        assert found.threshold_from == "expected contamination 0.25"
    by_labels, _ = quiet(model, tokenizer, rows, threshold=1e9, validation=validation)
    assert by_labels.threshold == 1e9 and by_labels.chosen_with_labels and by_labels.threshold_from == "fixed"


def test_a_direction_of_little_variance_is_found_by_labelled_centroids_alone():
    rng = np.random.default_rng(0)
    harmful = np.arange(300) < 60
    z = rng.standard_normal((300, 1, 10)) * ([4] * 9 + [0.1])
    z[harmful, 0, 9] += 8
    rows = z[:, 0]

    def best(labelled, harmful, **options):
        return best_scoring(rows, labelled, search(harmful, contamination=0.2, **options))[:2]

    assert best(rows, harmful) == (1, Scoring.CENTROIDS)
    assert best(rows[harmful], harmful[harmful])[1] is Scoring.CENTROIDS
    assert best(rows, harmful, n_directions=2) == (2, Scoring.BOTH_SIDES)


def search(harmful, **options):
    return Search(validation=Dataset.from_dict({"label": (~harmful).tolist()}), **options)


def test_one_labelled_row_of_a_kind_makes_no_centroid(model, tokenizer):
    rows = planted()
    for chosen in ([0, 1, 2, 3], [0]):
        found, _ = quiet(model, tokenizer, rows, contamination=0.25, validation=planted(seed=9).select(chosen))
        assert found.directions_from == "singular vectors"


def test_the_setting_of_the_highest_auroc_is_chosen():
    """Harm lies in the second of two poolings, on one side of the first direction, whichever its sign."""
    rng = np.random.default_rng(0)
    useless, useful = rng.standard_normal((2, 300, 10))
    useful[:, 3] = 8 * rng.standard_normal(300)
    harmful = useful[:, 3] > 9
    z = np.stack([useless, useful], 1)

    def setting(z, harmful):
        read = lambda rows, layers, poolings: z  # noqa: E731
        return find.choose_setting(read, range_of_rows(300), search(harmful, contamination=0.2, layer=7))

    for sign in (1, -1):
        layer, pooling, k, scoring = setting(sign * z, harmful)
        assert (layer, pooling, k) == (7, "mean", 1) and scoring in (Scoring.ONE_SIDE, Scoring.CENTROIDS)
    assert setting(z, abs(useful[:, 3]) > 9) == (7, "mean", 1, Scoring.BOTH_SIDES)


def range_of_rows(n):
    return Dataset.from_dict({"row": list(range(n))})


def test_few_rows_are_compared_in_all_layers_and_all_in_the_chosen_one(model, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(find, "SELECTION_ROWS", 15)
    sizes = []
    original = find.activations
    monkeypatch.setattr(
        find,
        "activations",
        lambda m, t, r, **k: sizes.append((len(r), len(k["layers"]))) or original(m, t, r, **k),
    )
    found, scores = quiet(model, tokenizer, planted(), validation=planted(30, seed=9), folder=tmp_path)
    assert sizes == [(15, 3), (30, 3), (40, 1), (30, 1)] and found.n_rows == 40 == len(scores)


def test_the_same_text_has_the_same_score(model, tokenizer):
    rows = planted()
    both = forms.to_training_rows(
        datasets.concatenate_datasets([rows, rows.select(range(7))]), label=None, source="rows"
    )
    _, scores = quiet(model, tokenizer, both, contamination=0.1, batch_size=3)
    assert (scores[40:] == scores[:7]).all()
    with pytest.raises(ValueError, match="all 5 rows have the same text"):
        quiet(model, tokenizer, rows.select([3] * 5), contamination=0.1)


def test_activations_are_kept_for_other_thresholds_but_not_for_other_models(model, tokenizer, tmp_path, monkeypatch):
    rows = planted()
    _, scores = quiet(model, tokenizer, rows, contamination=0.25, folder=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.f32")}
    assert len(files) == 1

    def count():
        return len(list(tmp_path.glob("*.f32")))

    with monkeypatch.context() as patch:
        patch.setattr("tasft_lib.saft.activations.encode", lambda *a, **k: pytest.fail("made again"))
        _, again = quiet(model, tokenizer, rows, contamination=0.1, folder=tmp_path, n_directions=1, steer=0.2)
        assert quiet(model, tokenizer, rows, contamination=0.25, folder=tmp_path)[1].tolist() == scores.tolist()
    assert {path: path.stat().st_mtime_ns for path in files} == files and count() == 1
    assert (again != scores).any()
    for i, other in enumerate(({"max_length": 3}, {"layer": 1}, {"pooling": "mean"}), start=2):
        quiet(model, tokenizer, rows, contamination=0.25, folder=tmp_path, **other)
        assert count() == i
    quiet(model, tokenizer, rows.select(range(39)), contamination=0.25, folder=tmp_path)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(build_model(tokenizer, num_hidden_layers=3), lora)
    quiet(adapted, tokenizer, rows, contamination=0.25, folder=tmp_path)
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name)[0, 0] += 0.1
    quiet(adapted, tokenizer, rows, contamination=0.25, folder=tmp_path)
    assert count() == 7


def test_a_killed_run_goes_on(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tasft_lib.saft.activations.WINDOW", 1)
    rows = planted()
    _, expected = quiet(model, tokenizer, rows, contamination=0.2, batch_size=4)
    from tasft_lib.saft import activations
    from tasft_lib.saft import activations as module

    calls, original = [], module._append

    def kill(file, part):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        original(file, part)

    monkeypatch.setattr(activations, "_append", kill)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, tokenizer, rows, contamination=0.2, batch_size=4, folder=tmp_path)
    made = []
    monkeypatch.setattr(activations, "_append", lambda file, part: made.append(len(part)) or original(file, part))
    _, scores = quiet(model, tokenizer, rows, contamination=0.2, batch_size=4, folder=tmp_path)
    assert sum(made) == 20 and (scores == expected).all()


def test_activations_that_are_not_finite_name_the_row(model, tokenizer, tmp_path):
    rows, validation = planted(), planted(12, seed=4)
    quiet(model, tokenizer, rows, validation=validation, folder=tmp_path)
    wide = {path.stat().st_size: path for path in tmp_path.glob("*.f32")}

    def break_row(path, row, columns):
        broken = np.memmap(path, np.float32, "r+").reshape(-1, columns, 32)
        broken[row, 0] = np.nan
        broken.flush()
        integrity.seal(path)

    break_row(wide[12 * 6 * 32 * 4], 8, 6)
    with pytest.raises(ValueError, match="validation row 9: its activation is not finite"):
        quiet(model, tokenizer, rows, validation=validation, folder=tmp_path)
    break_row(wide[40 * 6 * 32 * 4], 30, 6)
    with pytest.raises(ValueError, match="row 31: its activation is not finite"):
        quiet(model, tokenizer, rows, validation=validation, folder=tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "give contamination, threshold or validation"),
        ({"contamination": 0.1, "threshold": 1.0}, "contamination and threshold both say"),
        ({"contamination": 10}, "contamination=10: the share"),
        ({"threshold": np.nan}, "threshold=nan"),
        ({"contamination": 0.1, "layer": 0}, "layer 0: layers count from 1"),
        ({"contamination": 0.1, "layer": 4}, "layer 4: the model has the layers 1 to 3"),
        ({"contamination": 0.1, "pooling": "max"}, "pooling 'max'"),
        ({"contamination": 0.1, "n_directions": 40}, "n_directions=40: 40 rows have 1 to 39"),
        ({"contamination": 0.1, "n_directions": 33}, "n_directions=33, but 40 rows of size 32"),
        ({"contamination": 0.1, "steer": 2}, "steering by 2"),
        ({"contamination": 0.1, "n_directions": 0}, "n_directions=0"),
        ({"validation": planted(6, harmful=())}, "validation: no row is harmful"),
        ({"validation": planted(6, harmful=range(6)), "threshold": 1.0}, "say by contamination how many to drop"),
    ],
)
def test_contradictions_are_named(settings, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        quiet(model, tokenizer, planted(), **settings)


def test_one_row_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="got 1; give at least two"):
        quiet(model, tokenizer, planted(1), contamination=0.5)


# --- report and warnings


def fitted(z, k=1):
    found = SAFTFitter(k).update(z).filter
    return found, found.scores(z)


def test_length_in_the_direction_is_warned_of_whichever_end_scores():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, 400)
    noise = rng.standard_normal((400, 16))
    noise[:, 0] += 0.2 * lengths
    found, scores = fitted(noise)
    # Both the short and the long rows score high: no plain correlation shows it.
    assert abs(np.corrcoef(scores, lengths)[0, 1]) < 0.4 and length_correlation(scores, lengths) > 0.9
    assert any("length of the rows" in w for w in warnings(found, scores, lengths))
    unrelated = rng.integers(5, 200, 400)
    assert length_correlation(scores, unrelated) < 0.2
    assert not any("length" in w for w in warnings(found, scores, unrelated))
    assert length_correlation(scores, np.full(400, 7)) == 0 == length_correlation(np.ones(3), np.arange(3))


def test_what_else_is_warned_of():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 200, 3000)
    found, scores = fitted(rng.standard_normal((3000, 64)))
    assert any("no direction stands out" in w for w in warnings(found, scores, lengths))
    said = warnings(found.at_contamination(scores, 0.001), scores, lengths, contamination=0.001)
    assert any("outside 0.01 to 0.5" in w for w in said)
    assert any("every row" in w for w in warnings(found.at_threshold(-1), scores, lengths))
    assert any("no row" in w for w in warnings(found, scores, lengths))
    tied = np.round(scores)
    said = warnings(found.at_contamination(tied, 0.3), tied, lengths, contamination=0.3)
    assert any("scores at the border are equal" in w for w in said)
    z = rng.standard_normal((3000, 8)) * [9, 1, 1, 1, 1, 1, 1, 1]
    found, scores = fitted(z)
    assert warnings(found.at_contamination(scores, 0.1), scores, lengths, contamination=0.1) == []


@pytest.mark.parametrize("kind", ["positive", "signed", "equal", "with zero"])
@pytest.mark.parametrize("threshold", [0.5, -np.inf, np.inf])
def test_the_histogram_counts_every_row_on_its_side(kind, threshold, tmp_path):
    scores = np.random.default_rng(2).standard_normal(500)
    scores = {"positive": scores**2 + 1e-9, "signed": scores, "equal": np.ones(9), "with zero": np.r_[0, scores**2]}[
        kind
    ]
    harmful = scores > 0.7
    table = histogram(scores, threshold, harmful)
    assert table["kept"].sum() == (scores <= threshold).sum() and table["dropped"].sum() == (scores > threshold).sum()
    assert table["harmful"].sum() == harmful.sum() and (table["high"] > table["low"]).all()
    assert not ((table["kept"] > 0) & (table["dropped"] > 0)).any(), "a bin on both sides of the threshold"
    figures.save_figure(figures.plot_scores(table, threshold, caption="c"), tmp_path, "scores", table)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.png", "scores.csv"}


# --- files

TRICKY = ['w1, "w2"\nw3', "w4\r\nw5", "ŵ6 — 漢字 \\n", " w7 "]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ""])
def test_rows_come_back_as_they_were_written(suffix, tmp_path):
    rows = Dataset.from_dict({"prompt": TRICKY, "completion": ["a"] * 4, SCORE: [0.1 + 0.2, 1e-300, 7.0, 1 / 3]})
    path = save_rows(rows, tmp_path / f"rows{suffix}")
    again = sources.read_rows(path)
    assert again["prompt"][:] == TRICKY and again.column_names == rows.column_names
    assert [float(x) for x in again[SCORE][:]] == rows[SCORE][:]
    save_rows(rows.select([1]), path)
    assert len(sources.read_rows(path)) == 1 and len(list(tmp_path.iterdir())) == 1
    save_rows(rows.select([]), path)
    with pytest.raises(ValueError, match=r"no rows|is empty"):
        sources.read_rows(path)


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = planted()
    alpaca = [{"id": i, "instruction": r["prompt"], "input": "", "output": r["completion"]} for i, r in enumerate(rows)]
    save_rows(Dataset.from_list(alpaca), tmp_path / "data.jsonl")
    save_rows(planted(seed=9), tmp_path / "validation.csv")
    return tmp_path


def command(folder, *extra, source="data.jsonl", out="out"):
    common = ["--prompt_template", "none", "--output_dir", str(folder / out)]
    how = [] if {"--threshold", "--validation"} & set(extra) else ["--contamination", "0.25"]
    return ["filter", str(folder / source), "--model", str(folder / "model"), *how, *common, *map(str, extra)]


def test_filter_a_file_and_train_on_both_parts(folder, capsys, monkeypatch):
    before = (folder / "data.jsonl").read_bytes()
    assert cli.main(command(folder)) == 0
    out = folder / "out"
    kept, dropped = (sources.read_rows(out / f"{name}.jsonl") for name in ("kept", "dropped"))
    assert dropped["id"][:] == list(HARMFUL) and kept["id"][:] == [i for i in range(40) if i not in HARMFUL]
    assert kept.column_names == ["id", "instruction", "input", "output", SCORE]
    assert max(kept[SCORE][:]) < min(dropped[SCORE][:])
    assert (folder / "data.jsonl").read_bytes() == before
    report, manifest = (out / "report.md").read_text(), json.loads((out / "manifest.json").read_text())
    assert "dropped: 10 (25.0%)" in report and "chosen with labels: nothing" in report and "layer 2" in report
    assert manifest["n_dropped"] == 10 and not manifest["chosen_with_labels"] and manifest["versions"]["torch"]
    assert str(folder) not in json.dumps(manifest) + report, "no paths"
    for row in (*kept, *dropped):
        assert row["output"] not in report + json.dumps(manifest), "no text of the rows"
    assert SAFTFilter.load(out).threshold == max(kept[SCORE][:])
    assert pd.read_csv(out / "scores.csv")[["kept", "dropped"]].sum().tolist() == [30, 10]

    with monkeypatch.context() as patch:  # the same again
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
        stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        assert cli.main(command(folder)) == 0 and "nothing was computed" in capsys.readouterr().out
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps
        assert cli.main(command(folder, "--steer", "0.5")) == 1
        assert "holds a result with another steer; choose a new --output_dir" in capsys.readouterr().err

    train = {
        "model_name_or_path": folder / "model", "dataset_name": out / "kept.jsonl", "max_steps": 1, "report_to": "none",
        "unsafe_dataset_name": out / "dropped.jsonl", "output_dir": folder / "tuned", "prompt_template": "none",
        "penalty_weight": 0.5, "disable_tqdm": "true", "gradient_checkpointing": "false",
    }  # fmt: skip
    assert cli.main(["train", *(str(x) for k, v in train.items() for x in (f"--{k}", v))]) == 0
    assert "30 benign and 10 unsafe rows at hand" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["rows.json", "rows.csv", "rows.parquet", "rows", "rows.jsonl.gz", "ROWS.JSONL"])
def test_every_format_comes_out_as_it_came_in(source, folder, capsys):
    rows = planted().add_column("note", [f'note {i}, "x"' for i in range(40)])  # with labels
    if source.endswith(".gz"):
        import gzip

        (folder / source).write_bytes(gzip.compress(save_rows(rows, folder / "rows.jsonl").read_bytes()))
        (folder / "rows.jsonl").unlink()
    else:
        save_rows(rows, folder / source.lower()).rename(folder / source)
    assert cli.main(command(folder, source=source)) == 0
    suffix = {"rows": "", "rows.jsonl.gz": ".jsonl", "ROWS.JSONL": ".jsonl"}.get(source, source[4:])
    kept, dropped = (sources.read_rows(folder / "out" / f"{name}{suffix}") for name in ("kept", "dropped"))
    assert len(kept) == 30 and dropped["note"][:] == [f'note {i}, "x"' for i in HARMFUL]
    assert [str(x) for x in dropped["original_label"][:]] == ["False"] * 10 and "label" not in dropped.column_names
    report = capsys.readouterr().out
    assert "AUROC: 1.000" in report and "They had no part in the filter." in report and "nothing" in report
    # What the filter says counts in training, not what the rows said of themselves.
    forms.to_training_rows(dropped, label=False, template="none", source="dropped")
    if suffix == "":
        assert load_from_disk(folder / "out" / "kept").column_names == kept.column_names


def test_chat_rows(folder, tokenizer):
    tokenizer = tokenizer.__class__.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": [{"role": "user", "content": r["prompt"]}],
         "completion": [{"role": "assistant", "content": r["completion"]}]}
        for r in planted()
    ]  # fmt: skip
    save_rows(Dataset.from_list(rows), folder / "chat.jsonl")
    assert cli.main(command(folder, source="chat.jsonl")) == 0
    dropped = sources.read_rows(folder / "out" / "dropped.jsonl")
    assert [row["prompt"] for row in dropped] == [rows[i]["prompt"] for i in HARMFUL]
    (folder / "model" / "tasft.json").write_text('{"prompt_template": "chat"}')
    assert cli.main([word for word in command(folder, out="text") if word not in ("--prompt_template", "none")]) == 0
    template = {
        name: json.loads((folder / name / "settings.json").read_text())["prompt_template"] for name in ("out", "text")
    }
    assert template == {"out": "none", "text": "chat"}, "text as messages, for a model that was tuned on them"
    scores = [pd.read_csv(folder / name / "scores.csv") for name in template]
    pd.testing.assert_frame_equal(*scores)


def test_validation_and_threshold_on_the_command_line(folder, capsys):
    assert cli.main(command(folder, "--validation", folder / "validation.csv", out="labels")) == 0
    report = capsys.readouterr().out
    assert "chosen with labels: layer, pooling, directions" in report and "threshold" in report
    assert "from best F1 on 40 labelled rows" in report and (folder / "labels" / "activations").is_dir()
    assert cli.main(command(folder, "--threshold", "1e9", "--activations", folder / "kept_here", out="none")) == 0
    assert "no row is dropped" in capsys.readouterr().out
    assert len(sources.read_rows(folder / "none" / "kept.jsonl")) == 40
    assert (folder / "none" / "dropped.jsonl").read_text() == "" and list((folder / "kept_here").glob("*.f32"))
    assert cli.main(command(folder, "--threshold", "-1", "--dtype", "bfloat16", out="all")) == 0
    assert "every row is dropped" in capsys.readouterr().out


def test_a_run_that_was_killed_goes_on_and_ends_the_same(folder, monkeypatch):
    assert cli.main(command(folder, out="whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(figures, "save_figure", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(command(folder)) == 130
    monkeypatch.setattr("tasft_lib.saft.activations.batches", lambda *a: pytest.fail("activations made again"))
    assert cli.main(command(folder)) == 0
    for name in ("kept.jsonl", "dropped.jsonl", "report.md", "scores.csv", "scores.png"):
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_without_matplotlib_all_is_written_but_the_picture(folder, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.delattr("tasft_lib.reporting.figures")
        for name in [name for name in sys.modules if name.startswith("tasft_lib.reporting.figures")]:
            patch.delitem(sys.modules, name)
        assert cli.main(command(folder)) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("scores.png is not drawn"))
    assert "pip install 'tasft[notebooks]'" in line
    out, manifest = folder / "out", line.split("remove ")[1].split(" and run")[0]
    assert {"kept.jsonl", "dropped.jsonl", "report.md", "scores.csv"} <= {path.name for path in out.iterdir()}
    assert not (out / "scores.png").exists()
    table = (out / "scores.csv").read_text()
    (out / manifest).unlink()
    assert cli.main(command(folder)) == 0 and (out / "scores.png").exists(), "the remedy is one"
    assert (out / "scores.csv").read_text() == table


@pytest.mark.parametrize("name", ["kept.jsonl", "manifest.json", "dropped.jsonl"])
def test_a_damaged_result_is_named_and_made_again(name, folder, capsys, caplog):
    assert cli.main(command(folder)) == 0
    out = folder / "out"
    (out / "notes.txt").write_text("mine")
    text = (out / name).read_bytes()
    if name == "dropped.jsonl":
        (out / name).unlink()
    else:
        (out / name).write_bytes(text[:-20])
    assert cli.main(command(folder)) == 0
    assert "nothing was computed" not in capsys.readouterr().out
    assert f"{out / name} is {'gone' if name == 'dropped.jsonl' else 'damaged'}" in caplog.text
    assert (out / name).read_bytes() == text and (out / "notes.txt").exists()
    assert cli.main(command(folder)) == 0 and "nothing was computed" in capsys.readouterr().out


def test_four_bits(folder, bitsandbytes):
    assert cli.main(command(folder, "--load_in_4bit", "--dtype", "bfloat16")) == 0
    assert json.loads((folder / "out" / "manifest.json").read_text())["settings"]["load_in_4bit"]


def write(folder, text, name="data.jsonl"):
    (folder / name).write_text(text)


def put_file_in_its_own_way(folder):
    (folder / "out").mkdir()
    (folder / "data.jsonl").rename(folder / "out" / "kept.jsonl")
    return command(folder, source="out/kept.jsonl")


def put_folder_in_its_own_way(folder):
    (folder / "out").mkdir()
    save_rows(planted(), folder / "out" / "kept")
    return command(folder, source="out/kept")


GOOD = '{"prompt": "w1", "completion": "w2"}\n'


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: write(f, GOOD + '{"prompt": "w1", "completion": " "}\n'), "row 2: completion is empty; fill it"),
        (lambda f: write(f, GOOD + '{"prompt": "", "completion": "w"}\n'), "row 2: prompt is empty; fill it or remove"),
        (lambda f: write(f, GOOD), "got 1; give at least two"),
        (lambda f: write(f, ""), "the file is empty"),
        (lambda f: write(f, '{"text": "w1"}\n'), "lacks prompt, completion"),
        (lambda f: write(f, GOOD * 4), "n_directions=4: 4 rows have 1 to 3"),
        (lambda f: write(f, '{"prompt": "w1", "completion": "w2", "label": 3}\n' * 9), "label is 3"),
        (lambda f: command(f, source="missing.jsonl"), "missing.jsonl: no such file"),
        (lambda f: command(f, source="missing.txt"), "missing.txt: no such file"),
        (lambda f: write(f, "w1 w2", "data.txt") or command(f, source="data.txt"), "neither a .json"),
        (lambda f: ["filter", "owner/data", *command(f)[2:]], "a hub id needs a revision"),
        (lambda f: [*command(f)[:3], "owner/model", *command(f)[4:]], "a hub id needs model_revision"),
        (lambda f: [*command(f), "--contamination", "1.5"], "contamination=1.5"),
        (lambda f: [*command(f), "--steer", "-2"], "steering by -2.0"),
        (lambda f: [*command(f), "--batch_size", "0"], "batch_size=0"),
        (lambda f: [*command(f), "--max_length", "0"], "max_length=0"),
        (lambda f: command(f, "--validation", f / "data.jsonl"), "lacks label"),
        (lambda f: (f / "out").mkdir() or write(f, "x", "out/notes.txt"), "holds other files; choose a new"),
        (put_file_in_its_own_way, "kept.jsonl: is the input itself"),
        (lambda f: (f / "out").mkdir() or (f / "out" / "dropped.jsonl").hardlink_to(f / "data.jsonl"), "input itself"),
        (put_folder_in_its_own_way, "is the input itself"),
        (lambda f: save_rows(planted(), f / "set") and command(f, source="set", out="set/new"), "in the input folder"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_before_a_model_is_loaded(change, message, folder, capsys, monkeypatch):
    arguments = change(folder)
    arguments = arguments if isinstance(arguments, list) else command(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    capsys.readouterr()
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and error.startswith("tasft filter: ")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "settings.json"}
    assert after == before


def test_usage(capsys):
    for arguments in (["filter"], ["filter", "x", "--model", "m", "--output_dir", "o"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["filter", "--help"])
    assert stop.value.code == 0 and "--contamination" in capsys.readouterr().out


def test_a_random_model_finds_nothing_and_the_scores_do_not_depend_on_the_batch(tokenizer):
    rows, model = make_rows(40), build_model(tokenizer)
    _, one = quiet(model, tokenizer, rows, contamination=0.1, batch_size=1)
    _, many = quiet(model, tokenizer, rows, contamination=0.1, batch_size=13)
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5 * one.max())
