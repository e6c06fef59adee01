"""`tasft export`: an adapter merged into its base: a folder for vLLM, llama.cpp or transformers."""

import argparse
import os
from pathlib import Path

from ..publish import hub
from ..storage import integrity
from .flags import MODEL, add_dtype, located

AFTERWARDS = """\
vLLM:      vllm serve {folder} --generation-config vllm
llama.cpp: python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf --outtype auto
then measure this very model: tasft evaluate --model {folder} ... and tasft card --model {folder} ..."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft export",
        description="Merge an adapter into its base and check that the logits stay; a fully tuned model is copied.",
    )
    parser.add_argument("--model", required=True, help=f"adapter or fully tuned model: {MODEL}")
    parser.add_argument("--model_revision", help="commit of that hub id; of a folder's base, where it names none")
    parser.add_argument("--base", help="another place of the adapter's base: a folder, or a hub id")
    add_dtype(parser)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)

    args.model = located(args.model, args.model_revision)
    if os.path.isdir(args.model):
        hub.model_files(Path(args.model))

    with integrity.folder_lock(args.output_dir):
        _export(args)


def _export(args) -> None:
    from .. import models
    from ..publish import export

    folder = models.fetch(args.model, args.model_revision)
    hub.model_files(folder)
    options = {"tokenizer": models.load_tokenizer(args.model, args.model_revision), "dtype": args.dtype}
    if models.is_adapter(folder):
        base, revision = models.adapter_base(args.model, args.model_revision, base=args.base)
        difference, effect = export.merge_adapter(folder, base, revision, args.output_dir, **options)
        print(
            f"merged: logits differ from those of base and adapter by {difference:.1e} of their spread; the adapter "
            f"itself makes {effect:.1e}"
        )
    elif args.base:
        raise ValueError(f"{args.model}: a whole model, which stands on no base; leave out --base")
    else:
        export.copy_model(folder, args.output_dir, **options)
    print(f"saved to {args.output_dir}")
    print(AFTERWARDS.format(folder=args.output_dir))
