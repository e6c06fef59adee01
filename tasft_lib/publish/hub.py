"""Which files of a folder are a model, and their way to the hub. No text, checkpoint or optimizer state goes along."""

import os
from fnmatch import fnmatch
from pathlib import Path

from ..storage.files import MODEL_FILES, read_adapter_config, read_object

# Card and record go along. No .bin weights: those are pickles.
PUBLISHED = ("README.md", "tasft.json", *(name for name in MODEL_FILES if ".bin" not in name))


def model_files(folder: Path) -> list[Path]:
    """The files at the top of the folder that are weights, configuration, tokenizer or card.

    Raises ValueError where there are no safetensors weights with a configuration, or it is torn.
    """
    found = sorted(p for p in folder.glob("*") if p.is_file() and any(fnmatch(p.name, name) for name in PUBLISHED))
    names = {path.name for path in found}
    if not {"config.json", "adapter_config.json"} & names or not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder}: no model here (config.json or adapter_config.json, and *.safetensors); check it")
    if "config.json" in names:
        read_object(folder / "config.json")
    if "adapter_config.json" in names:
        read_adapter_config(folder)
    return found


def push(folder: Path, repo_id: str, *, public: bool = False) -> str:
    """Upload the model in the folder in one commit; its address. The token is HF_TOKEN's or that of `hf auth login`.

    The repository is made private where it does not exist. Raises ValueError, without what the hub wrote back, where it
    is public and `public` was not said, the hub refuses or is not reached, or the weights can't be used (torn, NaN,
    other shapes).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    from ..storage.checkpoints import adapter_shapes, check_weights

    files = model_files(folder)
    (check_weights if (folder / "config.json").exists() else adapter_shapes)(folder)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} is public: say --public if it shall be, or make it private first.")
        api.upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(folder),
            commit_message="Model and card, by tasft",
            allow_patterns=[path.name for path in files],
            ignore_patterns=["*/*"],
        )
    except HFValidationError:
        raise ValueError(f"{repo_id!r} is no hub id; write owner/name.") from None
    except OfflineModeIsEnabled:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it.") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        raise ValueError(
            f"{repo_id}: the hub refused ({status}); log in with a token that may write (hf auth login, or HF_TOKEN)."
        ) from None
    except HTTPError as error:
        raise ValueError(f"{repo_id}: the hub is not reached ({type(error).__name__}); check the network.") from None
    return f"https://huggingface.co/{repo_id}"
