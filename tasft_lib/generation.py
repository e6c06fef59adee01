"""Batched decoding of responses: sorted by length, left-padded, stopped at EOS."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .records.templates import OPENING, Turn, assistant_turn, opens_thinking, read_turn, turn_ends
from .storage.files import append_records, checked, content_hash, progress_bar, read_records


@dataclass(frozen=True)
class Decoding:
    """How responses are decoded; written into every result. Greedy, unless `num_beams` or `do_sample` say otherwise.

    `temperature`, `top_p` and `seed` matter with `do_sample` only; there is no top-k cut.
    """

    max_new_tokens: int = 256
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ValueError(f"max_new_tokens and num_beams must be at least 1: {self}")
        if not (0 < self.temperature < math.inf and 0 < self.top_p <= 1):  # NaN is neither
            got = f"got temperature={self.temperature}, top_p={self.top_p}"
            raise ValueError(f"temperature must be above 0 and top_p in (0, 1], {got}; raise or lower it")

    @property
    def name(self) -> str:
        """ "sampled", "beam" or "greedy"."""
        return "sampled" if self.do_sample else "beam" if self.num_beams > 1 else "greedy"


GREEDY = Decoding()


@dataclass(frozen=True)
class Response:
    """One decoded response.

    Attributes:
        text: without special tokens, stripped; a thinking in <think> and </think> (see `templates.split_thinking`).
        n_tokens: tokens generated before EOS.
        finished: ended with EOS, or as the chat template ends a turn; False when `max_new_tokens` cut it off.
    """

    text: str
    n_tokens: int
    finished: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    decoding: Decoding = GREEDY,
    batch_size: int = 32,
    special_tokens: bool = True,
    answers: Path | None = None,
    progress: bool | None = None,
) -> list[Response]:
    """Answer every prompt; responses come in the order of the prompts.

    Prompts are complete strings, template included; BOS is added unless the string begins with it. The sampling and
    length defaults of the checkpoint (`model.generation_config`) play no part, except its EOS tokens, which end a
    response like the tokenizer's own, and like the tokens by which its chat template ends a turn. Model, tokenizer and
    the global random state are left as they were found, so this may be called in the middle of training; PEFT models
    answer with their active adapter.

    Greedy responses do not depend on `batch_size`, up to floating-point near-ties. Sampled ones are determined by
    `decoding.seed` together with prompts and `batch_size`.

    Args:
        special_tokens: False for prompts in a chat template, which has put BOS and the like where they belong.
        answers: JSONL file to which each batch is appended when it is done, in full text; what it holds is not asked
            again, so the same call after a kill goes on. Not for sampling.
        progress: True or False forces the bar on or off; None shows it on a terminal.

    Raises:
        ValueError: a prompt has no token or does not fit the model's context together with `max_new_tokens`, or the
            tokenizer has neither EOS nor pad token; the model gives NaN.
    """
    if answers is not None and decoding.do_sample:
        raise ValueError("answers: a draw depends on those before it, so sampled answers are not kept batch by batch")
    turn = assistant_turn(tokenizer)
    config = _generation_config(model, tokenizer, decoding, turn)
    eos_ids, pad_id = config.eos_token_id or [], config.pad_token_id
    limits = {"max_new_tokens": decoding.max_new_tokens, "special_tokens": special_tokens}
    check_prompts(model, tokenizer, prompts, **limits)
    encoded = _encode(tokenizer, prompts, special_tokens)
    kept = {} if answers is None else _read_answers(answers, prompts)

    # Longest first: what does not fit in memory fails at once, and the progress bar errs on the safe side.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]), reverse=True)
    responses: dict[int, Response] = {}
    with (
        evaluating(model),
        _without_defaults(model),
        _head_in_one_piece(model),
        _seeded(decoding.seed),
        torch.inference_mode(),
        progress_bar(total=len(prompts), desc="generating", unit="prompt", progress=progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            # By whole batches, so that an answer is in the company it would be in without a kill.
            if all(i in kept for i in batch):
                responses |= {i: kept[i] for i in batch}
                bar.update(len(batch))
                continue
            input_ids, attention_mask = _left_pad([encoded[i] for i in batch], pad_id)
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=config,
                logits_processor=[_refuse_nan],
            )
            for i, new_ids in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                responses[i] = _response(tokenizer, new_ids, eos_ids, turn, opens_thinking(prompts[i]))
            if answers is not None:
                asked = [{"number": i, "prompt": content_hash(prompts[i])} for i in batch]
                append_records(answers, [checked(a | asdict(responses[i])) for a, i in zip(asked, batch, strict=True)])
            bar.update(len(batch))
    return [responses[i] for i in range(len(prompts))]


def _refuse_nan(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Greedy decoding would take NaN for the first token of the vocabulary."""
    if scores.isnan().any():
        raise ValueError("the model gives NaN: too large numbers for its dtype, or broken weights; load it in float32.")
    return scores


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int,
    special_tokens: bool = True,
    source: str = "",
) -> None:
    """Raise ValueError naming the first prompt that is empty or, with its answer, longer than the model's context.

    `source` is the file whose rows the prompts are, for the message.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for number, ids in enumerate(_encode(tokenizer, prompts, special_tokens), start=1):
        place = f"{source}: row {number}: the prompt" if source else f"prompt {number}"
        if not ids:
            raise ValueError(f"{place} is empty; a model needs at least one token to start from, so remove it")
        if context is not None and len(ids) + max_new_tokens > context:
            raise ValueError(
                f"{place} has {len(ids)} tokens, which with max_new_tokens={max_new_tokens} is more than the "
                f"model's context of {context}; shorten the prompt or allow fewer new tokens"
            )


def _read_answers(file: Path, prompts: list[str]) -> dict[int, Response]:
    """Those on record, by their place in `prompts`."""
    hashes, kept = [content_hash(prompt) for prompt in prompts], {}
    for record in read_records(file):
        match record:
            case {"number": int(i), "prompt": str(asked), "text": str(text), "n_tokens": int(n), "finished": bool(end)}:
                if i < len(prompts) and asked == hashes[i]:
                    kept[i] = Response(text=text, n_tokens=n, finished=end)
    return kept


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn: Turn | None) -> list[int]:
    """The tokenizer's EOS, which training appends, first; then those a chat checkpoint or template names besides."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *named, *turn_ends(tokenizer, turn)]))


def _generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, turn: Turn | None
) -> GenerationConfig:
    eos_ids = _eos_ids(model, tokenizer, turn)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(eos_ids), None)
    if pad_id is None:
        raise ValueError("the tokenizer has neither a pad nor an EOS token: set tokenizer.pad_token")
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        do_sample=decoding.do_sample,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
        use_cache=True,
        **({"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0} if decoding.do_sample else {}),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, prompts: list[str], special_tokens: bool) -> list[list[int]]:
    # A second BOS would be a start no model has seen.
    bos = tokenizer.bos_token
    added = [special_tokens and not (bos and prompt.startswith(bos)) for prompt in prompts]
    return [
        tokenizer(prompt, add_special_tokens=add, verbose=False)["input_ids"]
        for prompt, add in zip(prompts, added, strict=True)
    ]


def _left_pad(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded by hand, so that the tokenizer's padding side and pad token need no touching."""
    width = max(map(len, sequences))
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in sequences])
    attention_mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences])
    return input_ids, attention_mask


def _response(
    tokenizer: PreTrainedTokenizerBase, new_ids: list[int], eos_ids: list[int], turn: Turn | None, is_thinking: bool
) -> Response:
    """`is_thinking`: whether the prompt has begun a thinking."""
    end = next((position for position, token in enumerate(new_ids) if token in eos_ids), None)
    text = read_turn(tokenizer, new_ids[:end], turn)
    text = f"{OPENING}\n{text}" if is_thinking and not text.startswith(OPENING) else text
    return Response(text=text, n_tokens=len(new_ids) if end is None else end, finished=end is not None)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside, afterwards the modes that were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Module by module: a part that was frozen in evaluation mode stays so.
        for module, training in modes:
            module.training = training


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Iterator[None]:
    """No checkpoint defaults inside: generate() fills whatever a config leaves open from the model's."""
    configs = [(m, m.generation_config) for m in model.modules() if "generation_config" in vars(m)]
    for module, _ in configs:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in configs:
            module.generation_config = config


@contextmanager
def _head_in_one_piece(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the output head reads contiguous states.

    Of a prompt transformers gives it the last states alone, a view; PyTorch (2.13, CPU) multiplies those row by row,
    which takes a batch of 16 and a vocabulary of 262,144 words 45 s in bfloat16, where a copy takes 0.1 s.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A fixed random state on CPU and every GPU inside, the caller's own outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
