"""Krippendorff's alpha against the figures that he published for his own example."""

from __future__ import annotations

import pytest

from strop.ranking import krippendorff_alpha

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), part C: four observers, twelve units, gaps.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
UNITS = [[value for value in unit if value is not None] for unit in zip(*OBSERVERS, strict=True)]


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_the_published_example(level, published: float):
    assert krippendorff_alpha(UNITS, level) == pytest.approx(published, abs=5e-4)


def test_two_observers_of_nominal_data():
    # The same paper, part B: two observers, twelve units, five values; alpha = 0.692.
    first = ["a", "a", "b", "b", "d", "c", "c", "c", "e", "d", "d", "a"]
    second = ["b", "a", "b", "b", "b", "c", "c", "c", "e", "d", "d", "d"]
    codes = {letter: float(index) for index, letter in enumerate("abcde")}
    units = [[codes[a], codes[b]] for a, b in zip(first, second, strict=True)]
    assert krippendorff_alpha(units, "nominal") == pytest.approx(0.692, abs=5e-4)


def test_the_ends_of_the_scale():
    assert krippendorff_alpha([[1, 1], [2, 2], [3, 3]]) == 1
    assert krippendorff_alpha([[1, 2], [2, 1]]) == pytest.approx(-0.5)  # systematic disagreement is below chance
    assert krippendorff_alpha([[1, 1], [1, 1]]) is None
    assert krippendorff_alpha([[1], [2]]) is None
