"""pass@1, pass@k and maj@k on tasks with a verifier, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from strop.evals.intervals import mean_interval
from strop.generation import Engine
from strop.objectives.pass_at_k import pass_at_k
from strop.rewards.base import HasAnswers, ReadsTokens, Reward
from strop.rewards.vote import count_votes
from strop.rollouts.prompts import encode_prompt
from strop.runs.seeds import derive_seed
from strop.tokenizer import Tokenizer
from strop.types import Completion, Request, SamplingParams, Task, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReport:
    """What a policy can do on a set of tasks: the numbers, and every sample behind them.

    Example: report.metrics["pass@1"], report.metrics["pass@1_low"], report.samples[0].completion.text
    """

    metrics: dict[str, float]
    samples: list[Sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer to one task, and the verifier's word on it."""

    task: Task
    completion: Completion
    verdict: Verdict

    @property
    def is_correct(self) -> bool:
        return self.verdict.status == "ok" and self.verdict.score >= 1.0


def evaluate_tasks(
    engine: Engine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    reward: Reward,
    *,
    sampling: SamplingParams,
    num_samples: int = 1,
    k: Sequence[int] = (1,),
    seed: int = 0,
) -> TaskReport:
    """Sample num_samples answers per task and judge them; an answer is right when its score reaches 1.

    Metrics: "pass@k" for each k (unbiased, Chen et al. 2021) with "pass@k_low" and "pass@k_high" (95 %, over tasks),
    "maj@n" (the answer most samples agree on is right; n = num_samples), mean score, mean length in tokens, share of
    truncated answers, and "infra_errors": answers whose verifier broke. Those are left out of the task's sample, a
    task with fewer than k left is left out of pass@k, and one with none left of everything: "num_unjudged" counts it.
    A reward model, which is bound here, knows degrees only: no answer of its is right, so there is no pass@k or maj@n.
    Raises ValueError, before any work, when a k exceeds num_samples, there is no task, or a prompt is too long (naming
    the task), and RuntimeError when no answer at all could be judged.
    """
    if not tasks:
        raise ValueError("there is no task to evaluate")
    if bad := [value for value in k if not 1 <= value <= num_samples]:
        raise ValueError(
            f"k={bad[0]} needs between 1 and num_samples={num_samples} answers per task: raise num_samples"
        )
    requests = [
        Request(
            prompt_ids=encode_prompt(task, tokenizer, sampling.max_new_tokens, engine.max_length),
            sampling=sampling,
            num_samples=num_samples,
            seed=derive_seed(seed, "eval", index),
        )
        for index, task in enumerate(tasks)
    ]
    if isinstance(reward, ReadsTokens):
        if tuple(k) != (1,):
            raise ValueError(
                f"{reward.name} gives degrees, not right or wrong, so that there is no pass@k: leave k out"
            )
        longest = max(len(request.prompt_ids) for request in requests)
        reward.bind(tokenizer, longest + sampling.max_new_tokens)
    return judge_samples(tasks, engine.generate(requests), reward, k=k)


def judge_samples(
    tasks: Sequence[Task], groups: Sequence[Sequence[Completion]], reward: Reward, *, k: Sequence[int] = (1,)
) -> TaskReport:
    """evaluate_tasks from its second half on: answers that are there already, equally many for each task.

    Of the errors only RuntimeError is raised here.
    """
    num_samples = len(groups[0])
    flat_tasks = [task for task, group in zip(tasks, groups, strict=True) for _ in group]
    flat_completions = [completion for group in groups for completion in group]
    verdicts = reward.score(flat_tasks, flat_completions)
    samples = [
        Sample(task=task, completion=completion, verdict=verdict)
        for task, completion, verdict in zip(flat_tasks, flat_completions, verdicts, strict=True)
    ]
    per_task = [
        [sample for sample in samples[start : start + num_samples] if sample.verdict.status != "infra_error"]
        for start in range(0, len(samples), num_samples)
    ]
    judged = [group for group in per_task if group]
    if not judged:
        raise RuntimeError(f"no answer could be judged; the first failure: {verdicts[0].detail}")
    metrics = {} if isinstance(reward, ReadsTokens) else _successes(reward, judged, num_samples, k)
    lengths = [len(sample.completion.token_ids) for sample in samples]
    valid = [sample for group in judged for sample in group]
    metrics |= {
        "score": sum(sample.verdict.score for sample in valid) / len(valid),
        "mean_length": sum(lengths) / len(lengths),
        "truncated": sum(sample.completion.finish_reason == "length" for sample in samples) / len(samples),
        "infra_errors": len(samples) - len(valid),
        "num_tasks": len(tasks),
        "num_unjudged": len(per_task) - len(judged),
    }
    return TaskReport(metrics=metrics, samples=samples)


def _successes(
    reward: Reward, judged: Sequence[Sequence[Sample]], num_samples: int, k: Sequence[int]
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for value in k:
        rates = [
            pass_at_k(len(group), sum(sample.is_correct for sample in group), value)
            for group in judged
            if len(group) >= value
        ]
        if rates:
            metrics[f"pass@{value}"] = sum(rates) / len(rates)
            metrics[f"pass@{value}_low"], metrics[f"pass@{value}_high"] = mean_interval(rates)
    if num_samples > 1:
        votes = [float(_majority(reward, group)) for group in judged]
        metrics[f"maj@{num_samples}"] = sum(votes) / len(votes)
        metrics[f"maj@{num_samples}_low"], metrics[f"maj@{num_samples}_high"] = mean_interval(votes)
    return metrics


def _majority(reward: Reward, group: Sequence[Sample]) -> bool:
    """Whether the most frequent answer is right; ties go to the one sampled first, an unreadable answer has no vote.

    Where the reward cannot tell the answer from the words around it, the whole text is the vote.
    """
    if isinstance(reward, HasAnswers):
        keys = [reward.answer_key(sample.completion) for sample in group]
    else:
        keys = [sample.completion.text.strip() or None for sample in group]
    winner = count_votes(keys).winner
    if winner is None:
        return False
    return next(sample.is_correct for key, sample in zip(keys, group, strict=True) if key == winner)
