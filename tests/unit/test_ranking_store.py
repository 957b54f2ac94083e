"""A preference store without the page: who gets which item, and what happens to what they say."""

from __future__ import annotations

import dataclasses
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from strop.ranking import (
    Answer,
    ConflictError,
    PreferenceStore,
    agreement,
    next_item,
    progress,
    rank_with_judge,
    rankings,
    ranks_from_scores,
    submit,
    undo,
    win_rates,
)
from strop.ranking.queue import REPEAT_GAP


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    made = PreferenceStore(tmp_path / "people.db", create=True, seed=1)
    yield made
    made.close()


def fill(store: PreferenceStore, num_items: int, num_completions: int = 3) -> None:
    for item in range(num_items):
        store.add_item(f"prompt {item}", [f"{item} " + "x" * n for n in range(1, num_completions + 1)])


def longest(prompt: object, completions: Sequence[str]) -> list[float]:
    return [len(text) for text in completions]


def answer(uuid: str, **fields) -> Answer:
    return Answer(uuid=f"uuid-{uuid:0>8}", **fields)


def num_rows(store: PreferenceStore) -> int:
    return store.query("SELECT count(*) FROM rankings")[0][0]


# Handing out


def test_two_people_never_have_the_same_item_and_every_item_is_done_once(store: PreferenceStore):
    fill(store, 12)
    done: list[str] = []
    while True:
        shown = {name: next_item(store, name) for name in ("ann", "bob", "cem")}
        prompts = [item.prompt for item in shown.values() if item is not None]
        assert len(set(prompts)) == len(prompts)
        if not prompts:
            break
        for name, item in shown.items():
            if item is not None:
                submit(store, item.id, name, answer(f"{name}{item.id}", ranks=(1, 2, 3)))
                done.append(str(item.prompt))
    assert sorted(done) == sorted(f"prompt {n}" for n in range(12))
    assert dataclasses.astuple(progress(store, "ann")) == (4, 12, 12)


def test_a_reload_shows_the_same_item_in_the_same_order(store: PreferenceStore):
    fill(store, 5)
    assert next_item(store, "ann") == next_item(store, "ann")


def test_an_item_comes_back_when_its_lease_ends_and_late_work_still_counts(store: PreferenceStore):
    fill(store, 1)
    first = next_item(store, "ann")
    assert first is not None and next_item(store, "bob") is None
    store.change_settings(lease_seconds=1e-6)
    assert next_item(store, "ann") == first  # renewed, for a moment
    second = next_item(store, "bob")
    assert second is not None and second.prompt == first.prompt
    submit(store, second.id, "bob", answer("b", ranks=(1, 2, 3)))
    assert next_item(store, "ann") is None  # nobody wants it any more ...
    submit(store, first.id, "ann", answer("a", ranks=(1, 2, 3)))  # ... but what was read is not thrown away
    assert len(list(rankings(store))) == 2


def test_overlap_is_the_share_of_items_that_several_people_get(store: PreferenceStore):
    fill(store, 200, 2)
    store.change_settings(overlap=0.25, people=3)
    for name in ("a", "b", "c", "d"):
        rank_with_judge(store, longest, name=name)
    counts = Counter(Counter(ranking.group_id for ranking in rankings(store)).values())
    assert counts[1] + counts[3] == 200 and 30 <= counts[3] <= 70  # 50 expected, standard deviation 6


def test_order_is_shuffled_and_stored_with_the_answer(store: PreferenceStore):
    fill(store, 300, 3)
    rank_with_judge(store, longest, name="len")
    orders = Counter(tuple(ranking.shown_order) for ranking in rankings(store))
    assert len(orders) == 6 and min(orders.values()) >= 25  # 50 each expected, standard deviation 6.5
    assert all(list(ranking.ranks) == [3, 2, 1] for ranking in rankings(store))  # in the item's order, not the page's


def test_repeats_come_later_in_reversed_order_and_stay_out_of_exports(store: PreferenceStore):
    fill(store, 40, 3)
    store.change_settings(repeats=0.2)
    rank_with_judge(store, longest, name="len")
    rows = store.query("SELECT item_id, purpose, shown_order FROM presentations ORDER BY id")
    repeats = [(place, row) for place, row in enumerate(rows) if row["purpose"] == "repeat"]
    assert len(repeats) == 10  # 0.2 of all 50
    for place, row in repeats:
        first = next(n for n, other in enumerate(rows) if other["item_id"] == row["item_id"])
        assert place - first > REPEAT_GAP
        assert json.loads(rows[first]["shown_order"]) == json.loads(row["shown_order"])[::-1]
    assert len(list(rankings(store))) == 40
    assert agreement(store).consistency is not None and agreement(store).consistency.value == 1  # type: ignore[union-attr]


def test_gold_items_are_mixed_in_at_their_share_and_tell_good_people_from_bad(store: PreferenceStore):
    fill(store, 40, 3)
    for n in range(20):
        store.add_item(f"gold {n}", ["yes " * 3, "no"], gold_ranks=(1, 2))
    store.change_settings(gold=0.2, overlap=1.0)
    rank_with_judge(store, longest, name="good")
    rank_with_judge(store, lambda prompt, texts: [-len(text) for text in texts], name="bad")
    shares = {person.name: person.gold for person in agreement(store).people}
    assert [shares[f"judge:{name}"].value for name in ("good", "bad")] == [1, 0]  # type: ignore[union-attr]
    assert shares["judge:good"].count == 10  # type: ignore[union-attr]  # 0.2 of 50
    assert all(not str(ranking.prompt).startswith("gold") for ranking in rankings(store))


def test_active_mode_hands_out_the_newest_first(store: PreferenceStore):
    fill(store, 3)
    store.change_settings(newest_first=True)
    item = next_item(store, "ann")
    assert item is not None and item.prompt == "prompt 2"


# Answering


def test_an_answer_sent_twice_is_stored_once(store: PreferenceStore):
    fill(store, 1)
    item = next_item(store, "ann")
    assert item is not None
    same = answer("1", ranks=(2, 1, 2), milliseconds=900)
    assert submit(store, item.id, "ann", same) == submit(store, item.id, "ann", same)
    assert num_rows(store) == 1
    with pytest.raises(ConflictError, match="other content"):
        submit(store, item.id, "ann", dataclasses.replace(same, ranks=(1, 1, 2)))


def test_of_two_tabs_the_second_is_refused(store: PreferenceStore):
    fill(store, 1)
    item = next_item(store, "ann")
    assert item is not None
    submit(store, item.id, "ann", answer("1", ranks=(1, 2, 3)))
    with pytest.raises(ConflictError, match="another tab"):
        submit(store, item.id, "ann", answer("2", ranks=(3, 2, 1)))
    assert num_rows(store) == 1


def test_undo_is_a_new_row_and_the_item_comes_back_first(store: PreferenceStore):
    fill(store, 3)
    for n in range(2):
        item = next_item(store, "ann")
        assert item is not None
        submit(store, item.id, "ann", answer(str(n), ranks=(1, 2, 3)))
    next_item(store, "ann")  # the third is on the page
    assert undo(store, "ann", "undo-0001") == undo(store, "ann", "undo-0001")  # sent twice
    second = undo(store, "ann", "undo-0002")
    assert second is not None and second.prompt == "prompt 0" and next_item(store, "ann") == second
    assert next_item(store, "bob") is None  # taken back is not given to others
    submit(store, second.id, "ann", answer("again", ranks=(3, 2, 1)))
    assert [ranking.prompt for ranking in rankings(store)] == ["prompt 0"]
    assert num_rows(store) == 5  # two answers, two undos, one answer: history keeps all
    shown = next_item(store, "ann")
    assert shown is not None and shown.prompt == "prompt 1"
    assert undo(store, "bob", "undo-0003") is None


def test_a_skip_leaves_the_item_to_others(store: PreferenceStore):
    fill(store, 1)
    item = next_item(store, "ann")
    assert item is not None
    submit(store, item.id, "ann", answer("1", verdict="skipped", reason="unclear"))
    assert next_item(store, "ann") is None and next_item(store, "bob") is not None
    assert list(rankings(store)) == [] and agreement(store).skipped == {"unclear": 1}


BAD_ANSWERS = {
    "ranks must be 3 whole numbers": {"ranks": (1, 2)},
    "one for each": {"ranks": (1, 2, 2.5)},
    "ranks must": {"ranks": None},
    "whole numbers, one": {"ranks": (True, 1, 2)},
    "reason must be one of": {"verdict": "skipped", "reason": "bored"},
    "only a skip has a reason": {"ranks": (1, 2, 3), "reason": "same"},
    "all_bad has no ranks": {"verdict": "all_bad", "ranks": (1, 1, 1)},
    "verdict must be one of": {"verdict": "undone"},
    "strength says how much": {"ranks": (1, 2, 3), "strength": 2},
    "strength must be": {"ranks": (1, 2, 3), "strength": 5},
    "milliseconds must": {"ranks": (1, 2, 3), "milliseconds": -1},
    "comment must be text": {"ranks": (1, 2, 3), "comment": "x" * 2001},
}


@pytest.mark.parametrize(("message", "fields"), BAD_ANSWERS.items())
def test_an_answer_that_does_not_fit_is_refused(store: PreferenceStore, message: str, fields: dict):
    fill(store, 1)
    item = next_item(store, "ann")
    assert item is not None
    with pytest.raises(ValueError, match=message):
        submit(store, item.id, "ann", answer("1", **fields))
    assert num_rows(store) == 0


def test_nobody_answers_for_another(store: PreferenceStore):
    fill(store, 1)
    item = next_item(store, "ann")
    assert item is not None
    with pytest.raises(ValueError, match="never shown to you"):
        submit(store, item.id, "bob", answer("1", ranks=(1, 2, 3)))


# The file


@pytest.mark.parametrize("table", ["prompts", "responses", "items", "presentations", "rankings"])
def test_history_cannot_be_changed(store: PreferenceStore, table: str):
    fill(store, 1)
    rank_with_judge(store, longest, name="len")
    for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET created = 0"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"), store.transaction() as connection:
            connection.execute(statement)


def test_the_schema_itself_refuses_ranks_that_do_not_cover_what_was_shown(store: PreferenceStore):
    fill(store, 1)
    item = next_item(store, "ann")
    assert item is not None
    values = (f"({item.id}, 'ranked', '[1, 2]', '', '', NULL, 'uuid-0001', 0, NULL, 0)",)
    columns = "presentation_id, verdict, ranks, reason, comment, strength, uuid, milliseconds, supersedes, created"
    with pytest.raises(sqlite3.IntegrityError, match="exactly what was shown"), store.transaction() as connection:
        connection.execute(f"INSERT INTO rankings ({columns}) VALUES {values[0]}")


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    text = tmp_path / "text.db"
    text.write_text("not a database, but long enough to be looked at as one" * 30)
    before = other.read_bytes(), text.read_bytes()
    for path in (other, text):
        with pytest.raises(ValueError, match="not a preference store"):
            PreferenceStore(path, create=True)
    assert (other.read_bytes(), text.read_bytes()) == before
    with pytest.raises(ValueError, match="does not exist; make a store with"):
        PreferenceStore(tmp_path / "missing.db")


@pytest.mark.parametrize(
    ("completions", "message"), [(["a", "a"], "equal"), (["a", " "], "empty"), ([], "at least one answer")]
)
def test_an_item_that_cannot_be_ranked_is_refused(store: PreferenceStore, completions: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        store.add_item("prompt", completions)


def test_settings_outlive_the_process(tmp_path: Path):
    first = PreferenceStore(tmp_path / "s.db", create=True)
    first.change_settings(overlap=0.5, repeats=0.1)
    first.close()
    second = PreferenceStore(tmp_path / "s.db")
    assert (second.settings.overlap, second.settings.repeats) == (0.5, 0.1)
    with pytest.raises(ValueError, match="overlap=2 must be a share"):
        second.change_settings(overlap=2)
    second.close()


# Judges and figures


def test_a_judge_goes_on_where_it_stopped_and_its_rankings_are_those_of_its_scores(store: PreferenceStore):
    fill(store, 6)
    assert rank_with_judge(store, longest, name="len", limit=4) == 4
    assert rank_with_judge(store, longest, name="len") == 2
    assert {ranking.annotator for ranking in rankings(store)} == {"judge:len"}
    assert [list(ranking.ranks) for ranking in rankings(store)] == [[3, 2, 1]] * 6


@pytest.mark.parametrize("scores", [[1.0, 2.0], [1.0, 2.0, float("nan")]])
def test_a_judge_that_does_not_score_every_completion_is_refused(store: PreferenceStore, scores: list[float]):
    fill(store, 1)
    with pytest.raises(ValueError, match="judge broken must give 3 finite scores"):
        rank_with_judge(store, lambda prompt, completions: scores, name="broken")


def test_scores_become_ranks():
    assert ranks_from_scores([0.9, 0.2, 0.85]) == [1, 3, 2]
    assert ranks_from_scores([0.9, 0.2, 0.85], tie_margin=0.1) == [1, 2, 1]
    assert ranks_from_scores([0.3, 0.2, 0.1], tie_margin=0.15) == [1, 1, 2]  # from the best of the tier, not in a chain
    assert ranks_from_scores([1, 1, 1]) == [1, 1, 1]


def test_a_person_who_always_takes_the_first_shows_in_the_bias_and_a_fair_one_does_not(store: PreferenceStore):
    fill(store, 100, 2)
    rank_with_judge(store, lambda prompt, completions: [1, 0], name="left", limit=50)
    bias = agreement(store).first_wins
    assert bias is not None and (bias.value, bias.count) == (1, 50) and bias.low > 0.9
    rank_with_judge(store, longest, name="len")
    bias = agreement(store).first_wins
    assert bias is not None and abs(bias.value - 0.75) < 0.1  # half of them fair
    assert bias.low < bias.value < bias.high


def test_people_who_agree_have_alpha_one_and_noise_lowers_it(store: PreferenceStore):
    fill(store, 60, 3)
    store.change_settings(overlap=1.0)
    rank_with_judge(store, longest, name="a")
    rank_with_judge(store, longest, name="b")
    # Every item lists its texts from short to long, so that all agree on one value and none could disagree by chance.
    assert agreement(store).alpha is None and agreement(store).raw_agreement.value == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("noise", "low", "high"), [(0.0, 1.0, 1.0), (0.3, 0.35, 0.9), (100.0, -0.3, 0.3)])
def test_alpha_falls_with_noise(store: PreferenceStore, noise: float, low: float, high: float):
    draw = random.Random(3)
    for n in range(60):
        texts = [f"{n} " + "x" * length for length in range(3)]
        draw.shuffle(texts)
        store.add_item(f"prompt {n}", texts)
    store.change_settings(overlap=1.0)
    rank_with_judge(store, longest, name="a")
    rank_with_judge(store, lambda _, texts: [len(text) + noise * 5 * draw.gauss(0, 1) for text in texts], name="b")
    alpha = agreement(store).alpha
    assert alpha is not None and low <= alpha <= high


def test_win_rates_name_the_better_policy(store: PreferenceStore):
    for n in range(30):
        store.add_item(f"prompt {n}", [f"{n} short", f"{n} much longer"], models=["sft/10", "grpo/20"])
    rank_with_judge(store, longest, name="len")
    rates = win_rates(store)
    assert (rates["grpo/20"].value, rates["sft/10"].value) == (1, 0) and rates["grpo/20"].low > 0.85
