"""Self-play: the policy learns a game by playing against itself and its past, without anybody's moves to imitate.

    play     games_per_step games; in some of them a past self has the other seats
    reward   the game's result; a move that is not allowed loses
    update   make the moves of seats that did better than that seat usually does likelier, the others less likely

This is AlphaGo's policy-gradient stage (Silver et al. 2016) on a language model, whose moves are text, with the
role-conditioned baseline of SPIRAL (Liu et al. 2025): the seats of a game have different chances, so that each has its
own moving average. Settings are in Config (selfplay_config.py), past selves in selfplay_past.py; docs/selfplay.md.

Shape suffixes: B moves, T label positions.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from strop.environments import load_environment, load_opponent
from strop.evals.games import evaluate_games, results
from strop.generation import Engine
from strop.models import CausalLM, load_model, save_model
from strop.native.freed_memory import give_back_between_phases
from strop.objectives.aggregate import masked_sum
from strop.objectives.kl import kl_k3
from strop.objectives.policy_gradient import clipped_policy_loss
from strop.optim import AdamW, DivergedError, SkippedSteps, optimizer_step
from strop.rollouts.averages import Averages, add_engine_gap, warn_of_engine_gap
from strop.rollouts.batch import RolloutBatch, collate_rollouts
from strop.rollouts.games import Game, Move, OpponentPlayer, Player, PolicyPlayer, play
from strop.rollouts.logprobs import frozen_logprobs, token_logprobs
from strop.rollouts.prompts import Sampling
from strop.runs import Interrupt, Progress, RunFolder, Start, derive_seed, generator, start_run
from strop.stages.begin import chosen_dtype, in_its_dtype, kept_tokenizer, load_policy, load_tokenizer
from strop.stages.selfplay_config import START, Config
from strop.stages.selfplay_past import PastSelves
from strop.tokenizer import Tokenizer
from strop.types import Completion

SELF, PAST, POLICY = "self", "past", "policy"
"""Names of seats: the learning policy against itself, its past self, and the policy where it is measured."""


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Everything that one step needs and that outlives it."""

    policy: CausalLM
    reference: CausalLM | None
    engine: Engine
    tokenizer: Tokenizer
    past: PastSelves
    opponents: tuple[Player, ...]
    """Of the matches."""
    optimizer: AdamW
    baselines: dict[str, float]
    """Kind of game and seat ("self/0", "past/1") -> moving average of the reward. Begins at 0, a draw."""


def selfplay_step(actors: Actors, config: Config, step: int) -> tuple[dict[str, float], list[Game]]:
    """One rollout of games and its updates; step counts from 1. Returns metrics and the games."""
    started = time.perf_counter()
    games, past_step = play_games(actors, config, step)
    rollout_ended = time.perf_counter()
    batch = make_batch(actors, games, config)
    actors.baselines.update(moved_baselines(actors.baselines, games, config.baseline_decay))
    num_tokens = sum(len(completion.token_ids) for *_, completion in own_moves(games))
    averages, norm, num_skipped = update(actors, batch, num_tokens, config, step)
    ended = time.perf_counter()
    metrics = game_metrics(games) | {f"baseline/{name}": value for name, value in actors.baselines.items()}
    metrics |= averages.result() | {
        "past_step": past_step,
        "grad_norm": norm,
        "lr": config.optimizer.lr_at(step - 1, config.num_steps),
        "skipped": num_skipped,
        "num_tokens": num_tokens,
        "time/step_seconds": ended - started,
        "time/rollout_seconds": rollout_ended - started,
        "time/update_seconds": ended - rollout_ended,
        "time/tokens_per_second": num_tokens / (ended - started),
        "time/games_per_second": len(games) / (ended - started),
    }
    return metrics, games


def game_metrics(games: Sequence[Game]) -> dict[str, float]:
    """How the games of a rollout ended: those against itself by seat, and what it made of a past self as past/NAME."""
    against_self = [game for game in games if PAST not in game.seats]
    against_past = [game for game in games if PAST in game.seats]
    metrics = {
        "illegal": sum(game.is_illegal and game.seats[game.moves[-1].player] == SELF for game in games) / len(games),
        "truncated": sum(game.is_truncated for game in games) / len(games),
        "num_moves": sum(len(game.moves) for game in games) / len(games),
    }
    if against_self:
        for seat in range(len(against_self[0].seats)):
            metrics[f"win_seat{seat}"] = sum(game.rewards[seat] > 0 for game in against_self) / len(against_self)
        metrics["draw"] = sum(not any(game.rewards) for game in against_self) / len(against_self)
    if against_past:
        metrics |= {f"past/{name}": value for name, value in results(against_past, SELF).items()}
    return metrics


def play_games(actors: Actors, config: Config, step: int) -> tuple[list[Game], int]:
    """The step's games, and of which step the past self is that some of them are against."""
    sampling = config.sampling.params(actors.tokenizer)
    present = PolicyPlayer(SELF, actors.engine, actors.tokenizer, sampling, as_chat=config.as_chat)
    past_step, past_model = actors.past.draw(step, config.seed)
    num_past = round(config.past_share * config.games_per_step)
    num_seats = load_environment(config.game).num_players
    past = policy_player(PAST, past_model, actors.tokenizer, config, config.sampling)
    seatings: list[list[PolicyPlayer]] = [[present] * num_seats for _ in range(config.games_per_step - num_past)]
    # The present one takes the seats in turn: whoever begins may have the better chances.
    seatings += [
        [present if seat == index % num_seats else past for seat in range(num_seats)] for index in range(num_past)
    ]
    games = play(
        lambda: load_environment(config.game),
        seatings,
        seed=derive_seed(config.seed, "rollout", step),
        openings=torch.randint(
            config.opening_moves + 1, (len(seatings),), generator=generator(config.seed, "openings", step)
        ).tolist(),
        max_moves=config.max_moves,
    )
    for player in (past, present):
        player.engine.release()
    return games, past_step


def policy_player(name: str, model: CausalLM, tokenizer: Tokenizer, config: Config, sampling: Sampling) -> PolicyPlayer:
    engine = Engine(model, tokenizer, num_slots=config.num_slots)
    return PolicyPlayer(name, engine, tokenizer, sampling.params(tokenizer), as_chat=config.as_chat)


def kind_of(game: Game, seat: int) -> str:
    """Which baseline a seat's reward is compared with."""
    return f"{PAST if PAST in game.seats else SELF}/{seat}"


def own_moves(games: Sequence[Game]) -> Iterator[tuple[int, Move, Completion]]:
    """The learning policy's moves, with their game's place: not those of a past self, nor those drawn by lot."""
    for place, game in enumerate(games):
        for move in game.moves:
            if game.seats[move.player] == SELF and move.completion is not None:
                yield place, move, move.completion


def make_batch(actors: Actors, games: Sequence[Game], config: Config) -> RolloutBatch:
    """Every move of the learning policy, with its advantage: the seat's reward minus what was to be expected.

    That is position_baseline's estimate, whose moving averages are read before this rollout moves them. Moves whose
    advantage is 0 have no gradient and are left out, unless the KL gives them one. A position that came up in several
    games is computed once.
    """
    by_prompt: dict[tuple[int, ...], list[tuple[Completion, Outcome]]] = {}
    for place, move, completion in own_moves(games):
        usual = actors.baselines.get(kind_of(games[place], move.player), 0.0)
        outcome = Outcome(game=place, reward=games[place].rewards[move.player], usual=usual)
        by_prompt.setdefault(move.prompt_ids, []).append((completion, outcome))
    prompts: list[tuple[int, ...]] = []
    groups: list[list[Completion]] = []
    advantages: list[float] = []
    for prompt, moves in by_prompt.items():
        expected = position_baseline([outcome for _, outcome in moves], config.seat_weight)
        pairs = [
            (completion, outcome.reward - value) for (completion, outcome), value in zip(moves, expected, strict=True)
        ]
        # Of equal rewards a mean leaves a rounding error, which Adam would scale up to a full step.
        pairs = [pair for pair in pairs if config.kl_coef or abs(pair[1]) > 1e-9]
        if pairs:
            prompts.append(prompt)
            groups.append([completion for completion, _ in pairs])
            advantages += [advantage for _, advantage in pairs]
    batch = collate_rollouts(prompts, groups, device=actors.policy.device)
    advantages_BT = torch.tensor(advantages)[:, None].expand(batch.response_mask_BT.shape)
    return batch.replace(advantages_BT=advantages_BT.to(actors.policy.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a move: the place of its game, its seat's reward there, and what that seat usually gets."""

    game: int
    reward: float
    usual: float


def position_baseline(outcomes: Sequence[Outcome], seat_weight: float) -> list[float]:
    """What each of the moves from one position was to bring.

        (sum of the OTHER games' rewards + seat_weight * usual) / (number of those + seat_weight)

    Its own game's reward must not be in it, however often that game passed the position: that would take back a part of
    what it shows. Alone, or with an infinite weight, a game expects what is usual (SPIRAL); with weight 0 and others,
    their mean (leave-one-out).
    """
    total = sum(outcome.reward for outcome in outcomes)
    own: dict[int, list[float]] = {}
    for outcome in outcomes:
        own.setdefault(outcome.game, []).append(outcome.reward)
    expected: list[float] = []
    for outcome in outcomes:
        others = len(outcomes) - len(own[outcome.game])
        if not others or math.isinf(seat_weight):
            expected.append(outcome.usual)
        else:
            rewards = total - sum(own[outcome.game])
            expected.append((rewards + seat_weight * outcome.usual) / (others + seat_weight))
    return expected


def moved_baselines(baselines: dict[str, float], games: Sequence[Game], decay: float) -> dict[str, float]:
    """decay * old + (1 - decay) * this rollout's mean reward, for every kind of seat that the policy had in it."""
    rewards: dict[str, list[float]] = {}
    for game in games:
        for seat, name in enumerate(game.seats):
            if name == SELF:
                rewards.setdefault(kind_of(game, seat), []).append(game.rewards[seat])
    return {
        kind: decay * baselines.get(kind, 0.0) + (1 - decay) * sum(own) / len(own)
        for kind, own in sorted(rewards.items())
    }


def update(
    actors: Actors, batch: RolloutBatch, num_tokens: int, config: Config, step: int
) -> tuple[Averages, float, int]:
    """The rollout's updates: averages for the metrics, the mean gradient norm, and how many updates were refused.

    num_tokens, all that the policy sampled, is the denominator: moves that teach nothing count as such.
    """
    averages = Averages()
    norms: list[float] = []
    num_skipped = 0
    options = {"temperature": config.sampling.temperature, "max_tokens": config.micro_batch_tokens}
    if config.epochs_per_rollout > 1:
        batch = batch.replace(old_logprobs_BT=frozen_logprobs(actors.policy, batch, **options))
    if actors.reference is not None:
        batch = batch.replace(ref_logprobs_BT=frozen_logprobs(actors.reference, batch, **options))
    for _ in range(config.epochs_per_rollout):
        for micro in batch.split(config.micro_batch_tokens):
            mask_BT = micro.response_mask_BT
            assert micro.advantages_BT is not None
            logprobs_BT, entropy_BT = token_logprobs(
                actors.policy, micro, temperature=config.sampling.temperature, with_entropy=True
            )
            assert entropy_BT is not None
            old_BT = logprobs_BT.detach() if micro.old_logprobs_BT is None else micro.old_logprobs_BT
            loss_BT = clipped_policy_loss(
                logprobs_BT,
                old_BT,
                micro.advantages_BT,
                mask_BT,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
            )
            if micro.ref_logprobs_BT is not None:
                kl_BT = kl_k3(logprobs_BT, micro.ref_logprobs_BT, mask_BT)
                loss_BT = loss_BT + config.kl_coef * kl_BT
                averages.add("kl", kl_BT, mask_BT)
            masked_sum(loss_BT, mask_BT, num_tokens).backward()
            averages.add("entropy", entropy_BT, mask_BT)
            averages.add("ratio", (logprobs_BT.detach() - old_BT).exp(), mask_BT)
            add_engine_gap(averages, old_BT, micro.sampling_logprobs_BT, mask_BT)
        report = optimizer_step(
            actors.optimizer,
            lr=config.optimizer.lr_at(step - 1, config.num_steps),
            max_grad_norm=config.optimizer.max_grad_norm,
        )
        # No move to learn from at all is not a fault of the gradient.
        num_skipped += not math.isfinite(report.grad_norm)
        norms.append(report.grad_norm)
    give_back_between_phases()
    return averages, sum(norms) / len(norms), num_skipped


def evaluate(actors: Actors, config: Config) -> dict[str, float]:
    """Matches against every opponent, as eval/OPPONENT/win and so on; always with the same seed."""
    sampling = Sampling(
        max_new_tokens=config.sampling.max_new_tokens, temperature=config.eval.temperature, stop=config.sampling.stop
    )
    params = sampling.params(actors.tokenizer)
    found = evaluate_games(
        lambda: load_environment(config.game),
        PolicyPlayer(POLICY, actors.engine, actors.tokenizer, params, as_chat=config.as_chat),
        actors.opponents,
        num_games=config.eval.num_games,
        seed=derive_seed(config.seed, "eval"),
        max_moves=config.max_moves,
    )
    for player in (actors.engine, *(each.engine for each in actors.opponents if isinstance(each, PolicyPlayer))):
        player.release()
    return {f"eval/{name}": value for name, value in found.items()}


@in_its_dtype
def train(config: Config, *, name: str, runs_dir: Path, resume: bool) -> Path:
    """Play and learn; returns the run folder. ValueError for bad input, DivergedError when updates keep failing."""
    start = start_run(
        runs_dir, name, stage="selfplay", config=config, init_from=config.init_from, data_hashes={}, seed=config.seed,
        resume=resume, keeps_parent=True,
    )  # fmt: skip
    with start, Interrupt() as interrupt:
        _train(config, start, interrupt)
    return start.run.path


def _train(config: Config, start: Start, interrupt: Interrupt) -> None:
    run = start.run
    actors = make_actors(config, start)
    skipped = SkippedSteps(config.optimizer.max_skipped_steps)
    restore(start, actors, skipped)
    if start.resumed is None:
        print(config.describe(), flush=True)
        if config.eval.opponents:
            run.log(0, evaluate(actors, config))
    with Progress("selfplay", total_steps=config.num_steps, start_step=start.step) as progress:
        for step in range(start.step + 1, config.num_steps + 1):
            is_last = step == config.num_steps
            try:
                metrics, games = selfplay_step(actors, config, step)
                actors.past.keep(step, actors.policy)
                if config.eval.opponents and (is_last or step % config.eval.every == 0):
                    metrics |= evaluate(actors, config)
            except FloatingPointError as error:
                raise DivergedError(
                    f"step {step}: {error}. If the checkpoint that the run started from is sound, the updates "
                    "broke it: lower optimizer.lr or lengthen the warm-up"
                ) from error
            warn_of_engine_gap(metrics, 'set dtype = "float32"')
            run.log(step, metrics)
            run.log_samples(step, sample_rows(games, config.samples_per_step))
            skipped.record(bool(metrics["skipped"]), lambda games=games: save_failed_games(run.path, games))
            is_stopped = interrupt.is_requested  # looked at once: a signal after the save is for the next step
            if is_last or step % config.save_every == 0 or is_stopped:
                save(run, step, actors, skipped, config)
            progress.update(step, {"draws": metrics.get("draw", math.nan), "games/s": metrics["time/games_per_second"]})
            if is_stopped and not is_last:
                interrupt.exit()


def make_actors(config: Config, start: Start) -> Actors:
    """Policy, past selves and opponents; ValueError for a checkpoint whose tokenizer does not fit it."""
    tokenizer = kept_tokenizer(start, lambda: load_tokenizer(start))
    dtype = chosen_dtype(start, config.dtype, config.device)
    policy = load_policy(start, None, dtype, config.device, config.seed, checkpointing=config.gradient_checkpointing)
    tokenizer.check_fits(policy.config.vocab_size)
    assert start.parent is not None
    beginning = start.parent.path

    def load(path: Path) -> CausalLM:
        return load_model(path, dtype=dtype, device=config.device, frozen=True)

    # One copy of it: the first past self, an opponent of the matches, and the KL's reference.
    first = load(beginning)
    opponents: list[Player] = []
    for opponent in config.eval.opponents:
        if opponent == START:
            opponents.append(policy_player(START, first, tokenizer, config, config.sampling))
        else:
            opponents.append(OpponentPlayer(opponent, load_opponent(opponent)))
    return Actors(
        policy=policy,
        reference=first if config.kl_coef else None,
        engine=Engine(policy, tokenizer, num_slots=config.num_slots),
        tokenizer=tokenizer,
        past=PastSelves(start.run.path / "past", first, every=config.past_every, load=load),
        opponents=tuple(opponents),
        optimizer=config.optimizer.build(policy.named_parameters()),
        baselines={},
    )


def sample_rows(games: Sequence[Game], limit: int) -> list[dict[str, object]]:
    """What samples.jsonl keeps of a step: its first and its last games (against a past self), move by move."""
    limit = min(limit, len(games))
    shown = [*games[: limit - limit // 2], *games[len(games) - limit // 2 :]]
    return [
        {
            "seats": list(game.seats),
            "moves": [move.text for move in game.moves],
            "rewards": list(game.rewards),
            "is_illegal": game.is_illegal,
        }
        for game in shown
    ]


def save_failed_games(run_folder: Path, games: Sequence[Game]) -> Path:
    """All games of the rollout whose gradient was not finite, as runs/NAME/failed_batch.jsonl."""
    path = run_folder / "failed_batch.jsonl"
    rows = sample_rows(games, len(games))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def save(run: RunFolder, step: int, actors: Actors, skipped: SkippedSteps, config: Config) -> None:
    """A checkpoint between two steps."""

    def write_model(folder: Path) -> None:
        save_model(actors.policy, folder)
        actors.tokenizer.save(folder)

    state = {"skipped": skipped.state_dict(), "baselines": actors.baselines}
    run.save_checkpoint(step, write_model, actors.optimizer.state_dict(), state, keep_last=config.keep_checkpoints)


def restore(start: Start, actors: Actors, skipped: SkippedSteps) -> None:
    """Put back what `save` kept in the run's newest checkpoint, if there is one."""
    saved = start.training_state()
    if saved is None:
        return
    tensors, state = saved
    actors.optimizer.load_state_dict(tensors)
    skipped.load_state_dict(state["skipped"])
    actors.baselines.update(state["baselines"])
