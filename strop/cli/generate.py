"""`strop generate`: completions of prompts from the command line or from a file, or what most of them answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from strop.cli.evaluate import write_json_lines
from strop.cli.frozen import ModelArguments, SamplingArguments, frozen_model, sampling_params

if TYPE_CHECKING:
    from strop.tokenizer import Tokenizer
    from strop.types import Completion, Message


@dataclass(frozen=True, kw_only=True)
class Arguments(ModelArguments, SamplingArguments):
    """Completions from frozen weights, of --prompt TEXT ... or of the rows of --file."""

    prompt: tuple[str, ...] = ()
    """Prompts. A model with a chat template sees each as a user's message, unless --plain."""
    file: str | None = None
    """Prompts as a data source with a prompt column (text as it is, or messages)."""
    system: str | None = None
    """A system message before each --prompt."""
    plain: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue each --prompt as plain text, without the chat template."""
    num_samples: int = 1
    """Completions per prompt."""
    vote: int = 0
    """Self-consistency: sample so many completions per prompt and print the answer that most of them give, its share
    and the tally, not the completions."""
    answer_pattern: str = "auto"
    """With --vote, how an answer is cut out of a completion, as for the math reward: auto, boxed, last_number,
    after:MARKER or whole."""
    output: Path | None = None
    """Write JSON lines here instead of printing text: id, prompt, completion, finish_reason, num_tokens, logprob; with
    --vote id, prompt, answer, share, tally, num_samples."""


def run(command: str, args: Sequence[str]) -> int:
    arguments = tyro.cli(Arguments, args=list(args), prog=f"strop {command}")
    if bool(arguments.prompt) == (arguments.file is not None):
        raise ValueError("give either --prompt TEXT or --file FILE")
    if arguments.num_samples < 1:
        raise ValueError(f"--num-samples {arguments.num_samples}: at least 1")
    if arguments.vote:
        check_vote(arguments)
    elif arguments.answer_pattern != "auto":
        raise ValueError("--answer-pattern belongs to --vote: add --vote N, or leave it out")
    with frozen_model(arguments) as frozen:
        from strop.runs import derive_seed
        from strop.types import Request

        named = named_prompts(arguments, frozen.tokenizer)
        sampling = sampling_params(arguments, frozen.tokenizer)
        requests = [
            Request(
                prompt_ids=tuple(frozen.tokenizer.encode_prompt(prompt)),
                sampling=sampling,
                num_samples=arguments.vote or arguments.num_samples,
                seed=derive_seed(arguments.seed, "generate", index),
            )
            for index, (_, prompt) in enumerate(named)
        ]
        completions = frozen.engine.generate(requests)
    if arguments.vote:
        show_votes(arguments, named, completions)
        return 0
    if arguments.output is not None:
        write_json_lines(arguments.output, json_rows(named, completions))
        print(f"{arguments.output}: {len(named)} prompts, {arguments.num_samples} completions each")
        return 0
    for (name, _), group in zip(named, completions, strict=True):
        for number, completion in enumerate(group, start=1):
            if len(named) * len(group) > 1:
                print(f"--- {name}, sample {number} of {len(group)} ({completion.finish_reason})")
            print(completion.text)
    return 0


def check_vote(arguments: Arguments) -> None:
    """ValueError for what cannot be meant together with --vote."""
    from strop.rewards.answers import check_answer_pattern

    if arguments.vote < 2:
        raise ValueError(f"--vote {arguments.vote}: a vote needs at least 2 completions")
    if arguments.num_samples != 1:
        raise ValueError("--vote says how many completions to sample: leave --num-samples out")
    if not arguments.temperature > 0:
        raise ValueError("--vote needs --temperature above 0: greedy completions of one prompt are all the same")
    check_answer_pattern(arguments.answer_pattern)


def show_votes(
    arguments: Arguments,
    named: Sequence[tuple[str, str | tuple[Message, ...]]],
    completions: Sequence[Sequence[Completion]],
) -> None:
    """The majority answer of each prompt's completions, with the tally: printed, or written to --output."""
    from strop.rewards.answers import answer_key
    from strop.rewards.vote import count_votes

    pattern = arguments.answer_pattern
    votes = [count_votes([answer_key(completion.text, pattern) for completion in group]) for group in completions]
    if arguments.output is not None:
        rows = [
            {
                "id": name,
                "prompt": prompt,
                "answer": vote.winner,
                "share": vote.share,
                "tally": {answer: int(count) for answer, count in vote.tally.items()},
                "num_samples": arguments.vote,
            }
            for (name, prompt), vote in zip(named, votes, strict=True)
        ]
        write_json_lines(arguments.output, rows)
        print(f"{arguments.output}: {len(named)} prompts, the vote of {arguments.vote} completions each")
        return
    for (name, _), vote in zip(named, votes, strict=True):
        if len(named) > 1:
            print(f"--- {name}")
        if vote.winner is None:
            print(f"no answer: none of {arguments.vote} completions has one that {pattern!r} finds")
            continue
        counts = sorted(vote.tally.items(), key=lambda item: -item[1])
        silent = arguments.vote - int(sum(vote.tally.values()))
        tally = [f"{answer} {count:.0f}" for answer, count in counts] + ([f"no answer {silent}"] if silent else [])
        print(f"{vote.winner}   {counts[0][1]:.0f} of {arguments.vote} ({vote.share:.0%})   tally: {', '.join(tally)}")


def named_prompts(arguments: Arguments, tokenizer: Tokenizer) -> list[tuple[str, str | tuple[Message, ...]]]:
    """(name, prompt) pairs; the name is "file:line", or "prompt N"."""
    if arguments.file is not None:
        from strop.data.sources import load_rows
        from strop.data.tasks import tasks_from_rows

        if arguments.system is not None or arguments.plain:
            raise ValueError("--system and --plain belong to --prompt; in a --file the rows decide")
        return [(task.id, task.prompt) for task in tasks_from_rows(load_rows(arguments.file))]
    if arguments.plain or tokenizer.chat_template is None:
        if arguments.system is not None:
            raise ValueError("--system needs a chat template" + (", not --plain" if arguments.plain else ""))
        return [(f"prompt {number}", text) for number, text in enumerate(arguments.prompt, start=1)]
    system: tuple[Message, ...] = () if arguments.system is None else ({"role": "system", "content": arguments.system},)
    return [
        (f"prompt {number}", (*system, {"role": "user", "content": text}))
        for number, text in enumerate(arguments.prompt, start=1)
    ]


def json_rows(
    named: Sequence[tuple[str, str | tuple[Message, ...]]], completions: Sequence[Sequence[Completion]]
) -> list[dict[str, object]]:
    return [
        {
            "id": name,
            "prompt": prompt,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
            "logprob": sum(completion.sampling_logprobs),
        }
        for (name, prompt), group in zip(named, completions, strict=True)
        for completion in group
    ]
