"""`strop chat`: a conversation in the terminal. The model does not learn from it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from strop.cli.frozen import FrozenModel, ModelArguments, SamplingArguments, frozen_model, sampling_params

if TYPE_CHECKING:
    from strop.types import Message


@dataclass(frozen=True, kw_only=True)
class Arguments(ModelArguments, SamplingArguments):
    """A conversation with frozen weights. Ctrl-C stops an answer, Ctrl-D or /quit ends, /reset starts afresh."""

    temperature: float = 0.7
    """Logits are divided by it; 0 takes the likeliest token."""
    system: str | None = None
    """A system message before the conversation."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    with frozen_model(arguments, num_slots=1) as frozen:
        if frozen.tokenizer.chat_template is None:
            raise ValueError(f"{arguments.model} has no chat template; use strop generate, which continues plain text")
        converse(arguments, frozen)
    return 0


def converse(arguments: Arguments, frozen: FrozenModel) -> None:
    opening: list[Message] = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    if sys.stdin.isatty():
        import readline  # noqa: F401  (importing it gives input() line editing and history)

        print("/reset starts afresh, /quit or Ctrl-D ends, Ctrl-C stops an answer")
    messages = list(opening)
    turn = 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
            continue
        if line.startswith("/"):
            print("commands: /reset, /quit")
            continue
        if not line:
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        try:
            answer = stream_answer(arguments, frozen, asked, turn)
        except ValueError as error:
            # A prompt that outgrew the context is refused by the engine; the conversation can go on without it.
            print(f"{error} (/reset starts afresh)")
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
        turn += 1


def stream_answer(arguments: Arguments, frozen: FrozenModel, messages: Sequence[Message], turn: int) -> str:
    """Print the answer as it is sampled and return it; after Ctrl-C, what there was of it."""
    from strop.runs import derive_seed
    from strop.tokenizer import StreamDecoder
    from strop.types import Request

    request = Request(
        prompt_ids=tuple(frozen.tokenizer.encode_prompt(messages)),
        sampling=sampling_params(arguments, frozen.tokenizer),
        seed=derive_seed(arguments.seed, "chat", turn),
    )
    decoder = StreamDecoder(frozen.tokenizer)
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        print(text, end="", flush=True)

    try:
        completion = frozen.engine.generate(
            [request], on_token=lambda request_index, sample_index, token_id: show(decoder.push(token_id))
        )[0][0]
    except KeyboardInterrupt:
        show(decoder.finish())
        print(" ...")
        return "".join(pieces)
    show(decoder.finish())
    print()
    return completion.text
