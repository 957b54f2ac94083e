"""How the policy is asked: sampling settings and tokenised prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from strop.tokenizer import Tokenizer
from strop.types import SamplingParams, Task


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the policy acts. No top-p, top-k or min-p: it would sample from another law than it is trained on."""

    max_new_tokens: int = 256
    """Longest completion."""
    temperature: float = 1.0
    """Also the temperature of every logprob in the loss."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, beside the tokenizer's stop tokens."""

    def params(self, tokenizer: Tokenizer) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            stop_token_ids=tokenizer.stop_token_ids,
            stop=self.stop,
        )


def encode_prompt(task: Task, tokenizer: Tokenizer, max_new_tokens: int, max_length: int) -> tuple[int, ...]:
    """The prompt's tokens. ValueError naming the task when there are none, or no room for a completion is left."""
    try:
        ids = tuple(tokenizer.encode_prompt(task.prompt))
    except ValueError as error:
        raise ValueError(f"{task.id}: {error}") from error
    if not ids:
        raise ValueError(f"{task.id}: the prompt has no token: give it some text")
    if len(ids) + max_new_tokens > max_length:
        raise ValueError(
            f"{task.id}: the prompt has {len(ids)} tokens; with max_new_tokens={max_new_tokens} it exceeds the "
            f"model's {max_length} positions: shorten it or lower max_new_tokens"
        )
    return ids


def encode_prompts(
    tasks: Sequence[Task], tokenizer: Tokenizer, max_new_tokens: int, max_length: int
) -> dict[str, tuple[int, ...]]:
    """Every prompt's tokens by task id. ValueError as encode_prompt, for the first that it refuses."""
    return {task.id: encode_prompt(task, tokenizer, max_new_tokens, max_length) for task in tasks}


def longest_prompt(*prompt_ids: Mapping[str, tuple[int, ...]]) -> int:
    """The most tokens that any of the prompts has."""
    return max(len(ids) for prompts in prompt_ids for ids in prompts.values())
