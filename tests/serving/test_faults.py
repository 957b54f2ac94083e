"""A short run of benchmarks.serving_faults: mixed requests with faults against a server process, and its last ones."""

from __future__ import annotations

from pathlib import Path

from benchmarks import serving_faults


def test_no_request_is_lost_or_answered_wrongly(tmp_path: Path) -> None:
    serving_faults.make_model(tmp_path / "tiny")
    report = serving_faults.run(tmp_path / "tiny", 100)
    assert (report.lost, report.wrong) == ([], [])
    assert sum(report.outcomes.values()) == 100 + 8
    assert report.outcomes["hung up"] > 2 and report.outcomes["refused, 404"] > 2
    assert report.finished_after_sigterm > 0 and report.exit[0] == 0
    assert len(report.hashes) == 1
