"""Numbers the TA-SFT paper reports (arXiv:2412.06843), to be printed beside ours and never in their place."""

import pandas as pd

BENCHMARK_SIZES = {"I-MaliciousInstructions": 100, "I-CoNa": 178, "I-Controversial": 40, "HarmfulQ": 200}

SIZES = (1000, 500, 300, 100)  # of D_unsafe

# Tables 2 and 6: harmful responses per benchmark (in the order above), "NLCL/EMD", after training on n unsafe rows.
_TABLES_2_AND_6 = {
    "Llama-7B": {1000: "0/0 0/0 0/0 0/0", 500: "2/0 11/0 0/0 0/1", 300: "1/0 4/0 0/0 7/4", 100: "6/0 42/5 3/0 4/0"},
    "Llama-13B": {1000: "0/1 2/0 0/0 0/2", 500: "1/0 1/0 0/0 0/1", 300: "1/1 0/0 0/1 0/1", 100: "10/2 40/1 8/1 16/2"},
    "Mistral-7B": {1000: "0/0 0/0 0/0 0/0", 500: "1/1 1/2 0/0 0/0", 300: "1/1 8/5 0/0 0/1", 100: "3/0 53/4 2/0 4/1"},
    "Llama-3.1-8B": {1000: "0/0 0/1 0/0 0/3", 500: "1/0 6/6 2/2 1/1", 300: "1/0 6/5 0/2 1/1", 100: "1/0 12/7 2/2 1/1"},
}


# Tables 3 and 7: the same for STL.
_TABLES_3_AND_7 = {
    "Llama-7B": {1000: "2 10 0 2", 500: "2 22 0 3", 300: "5 40 3 2", 100: "4 70 3 3"},
    "Llama-13B": {1000: "1 4 0 0", 500: "1 7 0 1", 300: "2 12 1 1", 100: "7 61 4 3"},
    "Mistral-7B": {1000: "0 0 0 1", 500: "0 1 0 0", 300: "1 13 0 1", 100: "8 64 1 5"},
    "Llama-3.1-8B": {1000: "0 0 0 1", 500: "1 7 0 1", 300: "2 22 0 3", 100: "11 71 1 5"},
}
# Tables 1 and 5: SFT/KTO/NLCL/EMD.
_TABLES_1_AND_5 = {
    "Llama-7B": ("78.26/75.08/78.38/78.75", "56.14/35.47/54.48/57.37", "77.09/89.11/79.27/79.22", "32/35.4/35.2/34.8"),
    "Llama-13B": ("80.55/79.3/80.92/80.37", "61.99/50.9/60.36/62.24", "75.46/79.11/79.33/79.33", "35.6/34.8/34/33.4"),
    "Mistral-7B": (
        "84.34/84.37/84.92/84.31",
        "69.81/64.85/70.42/71.06",
        "77.31/80.85/81.23/80.85",
        "34/35.6/33.8/33.8",
    ),
    "Llama-3.1-8B": ("82.91/83.21/83.27/82.87", "72.05/61.5/69.56/73.35", "80.32/80.96/80.14/80.41", "35/37/35.2/35.2"),
}
# Last table: attack success (%) and mean judge score (1-10), n = 1000/500/300/100.
_JAILBREAKS = {
    "emd": ((19.57, 26.09, 34.78, 63.04), (6.02, 7.39, 8.11, 9.13)),
    "stl": ((60.00, 63.04, 73.33, 69.57), (8.91, 8.71, 9.33, 9.07)),
}


def harmful_counts() -> pd.DataFrame:
    """Tables 2 and 6 as rows of model, n_unsafe, benchmark, n (prompts), method ("nlcl", "emd"), harmful."""
    return pd.DataFrame(
        [
            {"model": model, "n_unsafe": n_unsafe, "benchmark": name, "n": n, "method": method, "harmful": int(count)}
            for model, sizes in _TABLES_2_AND_6.items()
            for n_unsafe, cells in sizes.items()
            for (name, n), cell in zip(BENCHMARK_SIZES.items(), cells.split(), strict=True)
            for method, count in zip(("nlcl", "emd"), cell.split("/"), strict=True)
        ]
    )


def stl_counts() -> pd.DataFrame:
    """Tables 3 and 7 (STL) with EMD of Tables 2 and 6, in the columns of `harmful_counts`."""
    stl = [
        {"model": model, "n_unsafe": n_unsafe, "benchmark": name, "n": n, "method": "stl", "harmful": int(count)}
        for model, sizes in _TABLES_3_AND_7.items()
        for n_unsafe, cells in sizes.items()
        for (name, n), count in zip(BENCHMARK_SIZES.items(), cells.split(), strict=True)
    ]
    return pd.concat([pd.DataFrame(stl), harmful_counts().query("method == 'emd'")], ignore_index=True)


def response_quality() -> pd.DataFrame:
    """Tables 1 and 5 as rows of model, method, BoolQ, AlpacaEval, PIQA, OpenBookQA (%)."""
    rows = []
    for model, cells in _TABLES_1_AND_5.items():
        for method, *values in zip(("sft", "kto", "nlcl", "emd"), *(cell.split("/") for cell in cells), strict=True):
            named = zip(("BoolQ", "AlpacaEval", "PIQA", "OpenBookQA"), map(float, values), strict=True)
            rows.append({"model": model, "method": method} | dict(named))
    return pd.DataFrame(rows)


def jailbreaks() -> pd.DataFrame:
    """The last table as rows of method, n_unsafe, success (%), score (1-10)."""
    return pd.DataFrame(
        [
            {"method": method, "n_unsafe": n, "success": success, "score": score}
            for method, columns in _JAILBREAKS.items()
            for n, success, score in zip(SIZES, *columns, strict=True)
        ]
    )


# Table 4: λ per size of D_unsafe (1000/500/300/100).
_TABLE_4 = {
    "emd": {
        "Llama-7B": (0.83, 1.70, 4.00, 9.00),
        "Llama-13B": (0.70, 0.99, 2.20, 7.10),
        "Mistral-7B": (0.50, 0.60, 1.05, 3.10),
        "Llama-3.1-8B": (0.49, 0.78, 1.30, 3.80),
    },
    "nlcl": {
        "Llama-7B": (3.80, 4.00, 14.50, 20.00),
        "Llama-13B": (5.50, 12.00, 15.00, 55.00),
        "Mistral-7B": (2.40, 3.40, 5.60, 25.00),
        "Llama-3.1-8B": (2.50, 3.50, 5.50, 16.00),
    },
}


def tuned_weights() -> pd.DataFrame:
    """Table 4 as rows of method ("emd", "nlcl"), model, n_unsafe, penalty_weight."""
    return pd.DataFrame(
        [
            {"method": method, "model": model, "n_unsafe": n_unsafe, "penalty_weight": weight}
            for method, models in _TABLE_4.items()
            for model, weights in models.items()
            for n_unsafe, weight in zip(SIZES, weights, strict=True)
        ]
    )
