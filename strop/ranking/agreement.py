"""How far rankings can be trusted: agreement between people and with themselves, bias of place, gold items, time."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Literal

from strop.evals.intervals import mean_interval
from strop.ranking.queue import ANSWERED
from strop.ranking.store import PreferenceStore

Pair = tuple[int, int, int]
"""(item, position, later position)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A mean of per-item shares with its 95 % interval. Example: Share(value=0.52, low=0.44, high=0.6, count=120)"""

    value: float
    low: float
    high: float
    count: int
    """Items (rankings) behind it, which are the independent draws; the pairs inside one are not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """One annotator's figures."""

    name: str
    num_rankings: int
    num_skipped: int
    median_seconds: float | None
    gold: Share | None
    """Share of a gold item's pairs on which they agree with its known order."""
    consistency: Share | None
    """Share of pairs that they rank as before when the item comes back in reversed order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The agreement page, and `strop rank STORE --report`. None where there is nothing to compute a figure from."""

    num_rankings: int
    num_overlapping: int
    """Items that two people or more have ranked."""
    alpha: float | None
    """Krippendorff's alpha over preferences within pairs (-1, 0 = tie, +1; ordinal): 1 = always, 0 = as by chance."""
    raw_agreement: Share | None
    """Share of the pairs of an item on which two people say the same."""
    first_wins: Share | None
    """How often the answer that is shown earlier (left, above) is preferred, ties left out; without bias 0.5."""
    consistency: Share | None
    gold: Share | None
    skipped: Mapping[str, int] = field(default_factory=dict[str, int])
    people: Sequence[Person] = ()


def agreement(store: PreferenceStore) -> Agreement:
    """All figures about the answers that hold now (undone ones do not count)."""
    rows = store.query("SELECT answers.*, gold_ranks FROM answers JOIN items ON items.id = item_id ORDER BY answers.id")
    names = sorted({row["annotator"] for row in rows})
    rankings = [_Ranking(row) for row in rows if row["ranks"] is not None]
    first = {(one.item_id, one.annotator): one for one in rankings if one.purpose == "first"}
    per_item: dict[int, list[_Ranking]] = defaultdict(list)
    for (item_id, _), ranking in first.items():
        per_item[item_id].append(ranking)
    overlapping = [group for group in per_item.values() if len(group) > 1]
    units = [[ranking.preferences[pair] for ranking in group] for group in overlapping for pair in group[0].preferences]
    gold = {name: [one.against(one.gold) for one in rankings if one.gold and one.annotator == name] for name in names}
    again = {
        name: [
            one.against(first[one.item_id, name].preferences)
            for one in rankings
            if one.purpose == "repeat" and one.annotator == name and (one.item_id, name) in first
        ]
        for name in names
    }
    return Agreement(
        num_rankings=len(rankings),
        num_overlapping=len(overlapping),
        alpha=krippendorff_alpha(units, "ordinal"),
        raw_agreement=_share([_pairwise_agreement(group) for group in overlapping]),
        first_wins=_share([share for one in rankings if (share := one.first_wins()) is not None]),
        consistency=_share([share for shares in again.values() for share in shares]),
        gold=_share([share for shares in gold.values() for share in shares]),
        skipped=Counter(row["reason"] for row in rows if row["verdict"] == "skipped"),
        people=[
            Person(
                name=name,
                num_rankings=sum(one.annotator == name for one in rankings),
                num_skipped=sum(row["annotator"] == name and row["verdict"] == "skipped" for row in rows),
                median_seconds=_median_seconds([one for one in rankings if one.annotator == name]),
                gold=_share(gold[name]),
                consistency=_share(again[name]),
            )
            for name in names
        ],
    )


def krippendorff_alpha(
    units: Sequence[Sequence[float]], level: Literal["nominal", "ordinal", "interval"] = "nominal"
) -> float | None:
    """1 - observed / expected disagreement (Krippendorff 2011); each unit holds the values that people gave to it.

        alpha = 1 - (n - 1) * sum_u [sum_{i != j in u} d(i, j) / (m_u - 1)] / sum_{i != j of all n} d(i, j)

    d is the squared difference: nominal 0 or 1; interval of the values; ordinal of their places among all values.
    Units with fewer than two values say nothing about agreement and are left out. None without any pair, or when all
    values are equal: then no disagreement could have been expected.
    """
    units = [unit for unit in units if len(unit) > 1]
    counts = Counter(value for unit in units for value in unit)
    total = sum(counts.values())
    # The place of a value is the mean rank of its copies, so that between c and k lie n_c/2 + ... + n_k/2 values.
    place: dict[float, float] = {}
    below = 0
    for value in sorted(counts):
        place[value] = below + counts[value] / 2
        below += counts[value]

    def distance(a: float, b: float) -> float:
        if level == "nominal":
            return float(a != b)
        return (a - b) ** 2 if level == "interval" else (place[a] - place[b]) ** 2

    expected = sum(2 * counts[a] * counts[b] * distance(a, b) for a, b in combinations(counts, 2))
    if expected == 0:
        return None
    observed = sum(2 * sum(distance(a, b) for a, b in combinations(unit, 2)) / (len(unit) - 1) for unit in units)
    return 1 - (total - 1) * observed / expected


def win_rates(store: PreferenceStore) -> dict[str, Share]:
    """Policy -> share of its comparisons with other policies that it wins, a tie being half of one. Not for the page:
    who still ranks must not know the names."""
    shares: dict[str, list[float]] = defaultdict(list)
    rows = store.query(
        f"SELECT answers.*, gold_ranks FROM answers JOIN items ON items.id = item_id "
        f"WHERE purpose = 'first' AND gold_ranks IS NULL AND verdict IN {ANSWERED} ORDER BY answers.id"
    )
    for ranking in map(_Ranking, rows):
        models = store.models(ranking.item_id)
        results: dict[str, list[float]] = defaultdict(list)
        for (_, i, j), value in ranking.preferences.items():
            if models[i] != models[j]:
                results[models[i]].append((1 - value) / 2)
                results[models[j]].append((1 + value) / 2)
        for model, values in results.items():
            shares[model].append(sum(values) / len(values))
    found = {model: _share(values) for model, values in sorted(shares.items())}
    return {model: share for model, share in found.items() if share is not None}


class _Ranking:
    """One answer with ranks, as preferences within pairs: -1 the first is better, +1 the second, 0 a tie."""

    def __init__(self, row) -> None:
        self.item_id: int = row["item_id"]
        self.annotator: str = row["annotator"]
        self.purpose: str = row["purpose"]
        self.milliseconds: int = row["milliseconds"]
        self._order: list[int] = json.loads(row["shown_order"])
        self.preferences = self._preferences(json.loads(row["ranks"]))
        self.gold = self._preferences(json.loads(row["gold_ranks"])) if row["gold_ranks"] else None

    def _preferences(self, ranks: Sequence[int]) -> dict[Pair, int]:
        return {
            (self.item_id, i, j): (ranks[i] > ranks[j]) - (ranks[i] < ranks[j])
            for i, j in combinations(range(len(ranks)), 2)
        }

    def against(self, other: Mapping[Pair, int] | None) -> float:
        """Share of the pairs on which this ranking says what the other says."""
        assert other is not None
        return sum(other[pair] == value for pair, value in self.preferences.items()) / len(self.preferences)

    def first_wins(self) -> float | None:
        place = {position: place for place, position in enumerate(self._order)}
        wins = [(place[i] < place[j]) == (value < 0) for (_, i, j), value in self.preferences.items() if value]
        return sum(wins) / len(wins) if wins else None


def _pairwise_agreement(group: Sequence[_Ranking]) -> float:
    shares = [a.against(b.preferences) for a, b in combinations(group, 2)]
    return sum(shares) / len(shares)


def _share(values: Sequence[float]) -> Share | None:
    if not values:
        return None
    low, high = mean_interval(values)
    return Share(value=sum(values) / len(values), low=low, high=high, count=len(values))


def _median_seconds(rankings: Sequence[_Ranking]) -> float | None:
    """Of the answers whose time is known: a judge and an import give none."""
    times = [one.milliseconds / 1000 for one in rankings if one.milliseconds]
    return median(times) if times else None
