"""`tasft export`: an adapter merged into its base: a folder for vLLM, llama.cpp or transformers."""

import argparse
from pathlib import Path

from ..publish import hub

AFTERWARDS = """\
vLLM:      vllm serve {folder} --generation-config vllm
llama.cpp: python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf --outtype auto
then measure this very model: tasft evaluate --model {folder} ... and tasft card --model {folder} ..."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "tasft export",
        description="Merge an adapter into its base and check that the logits stay; a fully tuned model is copied.",
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of an adapter or of a fully tuned model")
    parser.add_argument("--model_revision", help="commit of an adapter's base, where its configuration names none")
    parser.add_argument("--base", help="another place of the adapter's base: a folder, or a hub id")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args(argv)

    hub.model_files(args.model)

    from ..models import adapter_base, load_tokenizer, torch_dtype
    from ..publish import export

    tokenizer = load_tokenizer(str(args.model), None)
    dtype = torch_dtype(args.dtype)
    if (args.model / "adapter_config.json").exists():
        base, revision = adapter_base(args.model, args.model_revision, base=args.base)
        options = {"tokenizer": tokenizer, "dtype": dtype}
        difference, effect = export.merge_adapter(args.model, base, revision, args.output_dir, **options)
        print(
            f"merged: logits differ from those of base and adapter by {difference:.1e} of their spread; the adapter "
            f"itself makes {effect:.1e}"
        )
    else:
        export.copy_model(args.model, args.output_dir, tokenizer=tokenizer, dtype=dtype)
    print(f"saved to {args.output_dir}")
    print(AFTERWARDS.format(folder=args.output_dir))
