"""Where the published prompts lie: the paper's benchmarks of harm and over-refusal, and what unsafe rows come from."""

from pathlib import Path
from urllib.request import urlopen

from ..storage.files import cache_folder, content_hash, write_text
from ..storage.integrity import keep_if_whole, seal

# As Safety-Tuned LLaMAs (Bianchi et al., 2023), HarmfulQ (Shaikh et al., 2022) and XSTest (Röttger et al., 2023)
# published them: name -> address.
STL_COMMIT = "36a4b8d5c2177ed165bf61f59b590161394f7f12"
_STL = f"https://raw.githubusercontent.com/vinid/safety-tuned-llamas/{STL_COMMIT}/data"
_COT = "https://raw.githubusercontent.com/SALT-NLP/chain-of-thought-bias/e92a0efeb94e64eb68586d5c04a25af1415282d2/data"
TOXIC_FILES = {
    "I-MaliciousInstructions": f"{_STL}/evaluation/I-MaliciousInstructions.json",
    "I-CoNa": f"{_STL}/evaluation/I-CoNa.json",
    "I-Controversial": f"{_STL}/evaluation/I-Controversial.json",
    "HarmfulQ": f"{_COT}/dangerous-q/toxic_outs.json",
}
DEVELOPMENT_FILES = {"Q-Harm": f"{_STL}/evaluation/Q-Harm.json"}
_XSTEST = "https://raw.githubusercontent.com/paul-rottger/xstest/d7bb5bd738c1fcbc36edd83d5e7d1b71a3e2d84d"
XSTEST_FILE = f"{_XSTEST}/xstest_prompts.csv"  # 250 safe prompts, for over-refusal; 200 unsafe ones
BENIGN_FILES = {"I-Alpaca": f"{_STL}/evaluation/I-Alpaca.json"}
# Every benchmark by its name: kind of its prompts and address; XSTest's two halves lie in one file.
BENCHMARKS = (
    {name: ("toxic", url) for name, url in (TOXIC_FILES | DEVELOPMENT_FILES).items()}
    | {name: ("benign", url) for name, url in BENIGN_FILES.items()}
    | {"XSTest safe": ("seemingly toxic", XSTEST_FILE), "XSTest unsafe": ("toxic contrast", XSTEST_FILE)}
)
# Toxic prompts that no benchmark contains, to harvest unsafe answers from.
HARVEST_FILE = f"{_STL}/training/safety_only_data_Instructions.json"


def locate(source: str, url: str) -> str:
    """The downloaded file for "stl" (kept in the cache folder), else the file of that name inside folder `source`."""
    name = url.rsplit("/", 1)[-1]
    if source == "stl":
        kept = downloaded_file(url)
        if not keep_if_whole(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            try:
                with urlopen(url, timeout=60) as response:
                    write_text(kept, response.read().decode())
                seal(kept)
            except OSError as error:
                raise ValueError(f"{url}: {error}; check the network, or give a folder with {name} in it") from error
        return str(kept)
    found = sorted(Path(source).rglob(name))
    if not found:
        raise ValueError(f"{source}: no {name} in this folder; download it from {url}, or use 'stl'")
    return str(found[0])


def downloaded_file(url: str) -> Path:
    """Where `locate` keeps the download of `url`, whether it is there or not."""
    return cache_folder() / "benchmarks" / f"{content_hash(url)}-{url.rsplit('/', 1)[-1]}"
