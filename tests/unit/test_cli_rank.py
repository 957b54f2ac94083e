"""strop rank without its page: sampling that goes on where it stopped, files, and flags that cannot be honoured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from strop.cli import main as cli
from strop.cli.rank import Arguments
from strop.cli.rank_sampling import load_tasks, sample_batch
from strop.generation import Engine
from strop.models import load_model
from strop.ranking import PreferenceStore, rank_with_judge, rankings
from strop.ranking.sampling import make_items, sample_responses, sampling_key, split_samples
from strop.tokenizer import Tokenizer
from strop.types import SamplingParams, Task


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    made = PreferenceStore(tmp_path / "people.db", create=True, seed=1)
    yield made
    made.close()


def run(*args: object) -> int:
    return cli.main(["rank", *map(str, args)])


def prompts(tmp_path: Path, count: int) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the fox {n}"}) + "\n" for n in range(count)))
    return path


def tasks(count: int) -> list[Task]:
    return [Task(id=f"t:{n}", prompt=f"the fox {n}") for n in range(count)]


def texts(store: PreferenceStore) -> list[tuple[str, ...]]:
    return sorted(tuple(row) for row in store.query("SELECT prompt_id, policy_id, sample_index, text FROM responses"))


class Stopped(Exception):
    pass


def test_sampling_that_was_cut_short_goes_on_to_the_same_answers(
    store: PreferenceStore, tmp_path: Path, tiny_folder: Path
):
    tokenizer = Tokenizer.load(tiny_folder)
    engine = Engine(load_model(tiny_folder), tokenizer, num_slots=4)
    sampling = SamplingParams(max_new_tokens=6, stop_token_ids=tokenizer.stop_token_ids)

    def sample(into: PreferenceStore, stop_after: int | None = None) -> int:
        def on_prompt(num_done: int) -> None:
            if num_done == stop_after:
                raise Stopped

        policy_id = into.add_policy("tiny", "abc")
        return sample_responses(
            *(into, engine, tokenizer, tasks(5)),
            policy_id=policy_id, num_samples=3, sampling=sampling, seed=4, on_prompt=on_prompt,
        )  # fmt: skip

    whole = PreferenceStore(tmp_path / "whole.db", create=True)
    assert sample(whole) == 5
    with pytest.raises(Stopped):
        sample(store, stop_after=2)
    assert len(texts(store)) == 6
    assert sample(store) == 3 and sample(store) == 0
    assert texts(store) == texts(whole) and len(texts(store)) == 15
    report = make_items(store, tasks(5), policies=[(1, 3)], sampling=sampling_key(sampling, 4))
    assert report.num_items + report.num_too_few == 5
    whole.close()


def test_equal_and_empty_answers_are_left_out_and_counted(store: PreferenceStore):
    policy_id = store.add_policy("p")
    for task, answers in zip(tasks(3), (["a", "a", "b"], ["a", " ", ""], ["a", "b", "c"]), strict=True):
        prompt_id = store.add_prompt(task.prompt)
        for index, text in enumerate(answers):
            store.add_response(prompt_id, policy_id, "{}", index, text, "stop")
    report = make_items(store, tasks(3), policies=[(policy_id, 3)], sampling="{}")
    assert (report.num_items, report.num_equal, report.num_empty, report.num_too_few) == (2, 1, 2, 1)
    assert [row[0] for row in store.query("SELECT num_responses FROM items")] == [2, 3]


def test_two_checkpoints_are_sampled_compared_and_exported(tmp_path: Path, tiny_folder: Path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text() + "\n")
    path, out = tmp_path / "people.db", tmp_path / "pairs.jsonl"
    flags = ("--num-completions", 4, "--max-new-tokens", 6, "--dtype", "float32", "--sample-only")
    args = (path, "--prompts", prompts(tmp_path, 4), "--from", tiny_folder, "--from", other, *flags)
    assert run(*args) == 0 and run(*args) == 0
    store = PreferenceStore(path)
    assert store.query("SELECT count(*) FROM items")[0][0] == 4
    assert len({label for item in range(1, 5) for label in store.models(item)}) == 2
    rank_with_judge(store, lambda _, completions: [len(text) for text in completions], name="len")
    store.close()
    assert run(path, "--export", "listwise", out) == 0
    assert run(tmp_path / "copy.db", "--import", out) == 0
    assert run(tmp_path / "copy.db", "--export", "listwise", tmp_path / "again.jsonl") == 0
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()
    capsys.readouterr()
    assert run(path, "--report") == 0
    printed = capsys.readouterr().out
    assert "judge:len: 4 rankings, 0 skipped" in printed and f"{other} wins 0." in printed


def test_active_mode_samples_a_batch_from_the_newest_checkpoint(store: PreferenceStore, tmp_path: Path, tiny_folder):
    arguments = Arguments(
        store=store.path,
        prompts=str(prompts(tmp_path, 5)),
        from_=(str(tiny_folder),),
        batch_size=3,
        max_new_tokens=6,
        dtype="float32",
    )
    found = load_tasks(arguments)
    num_prompts = "SELECT count(DISTINCT prompt_id) FROM responses WHERE policy_id = ?"
    assert sample_batch(arguments, store, found) and store.query(num_prompts, 1)[0][0] == 3
    # A newer checkpoint appears: the prompts that have no item yet come first, from it.
    newer = tmp_path / "newer"
    shutil.copytree(tiny_folder, newer)
    (newer / "tokenizer_config.json").write_text((newer / "tokenizer_config.json").read_text() + "\n")
    arguments = Arguments(**{**arguments.__dict__, "from_": (str(newer),)})
    assert sample_batch(arguments, store, found) and store.query(num_prompts, 2)[0][0] == 3
    assert store.query("SELECT count(DISTINCT prompt_id) FROM responses")[0][0] == 5
    assert sample_batch(arguments, store, found) and not sample_batch(arguments, store, found)
    assert store.query(num_prompts, 2)[0][0] == 5 and len(list(rankings(store))) == 0


def test_completions_are_split_evenly_over_checkpoints():
    assert split_samples(5, 2) == [3, 2] and split_samples(4, 4) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="one from each --from"):
        split_samples(2, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "does not exist; make a store with: strop rank"),
        (("--prompts", "x.jsonl"), "--prompts needs --from"),
        (("--from", "x"), "--from has no effect without --prompts FILE"),
        (("--temperature", 0.5), "--temperature has no effect without --prompts FILE"),
        (("--held-out", 0.1), "--held-out has no effect without --export FORMAT FILE"),
        (("--export", "trl", "x.jsonl", "--port", 80), "--port has no effect without serving the page"),
        (("--prompts", "p", "--from", "x", "--num-completions", 10), "--num-completions 10: from 2 to 9"),
        (("--prompts", "p", "--from", "x", "--batch-size", 4), "--batch-size has no effect without --active"),
        (("--prompts", "p", "--from", "x", "--sample-only", "--active"), "--active has no effect without serving"),
        (("--prompts", "p", "--from", "x", "--report"), "leave --prompts out"),
        (("--import", "missing.jsonl"), "missing.jsonl does not exist"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, args: tuple[object, ...], message: str, capsys):
    assert run(tmp_path / "people.db", *args) == 2
    assert message in capsys.readouterr().err
