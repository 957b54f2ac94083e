"""The report of runs: whatever a model wrote is text on the page, and a gap in a log is a gap in a curve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from strop.cli import main as cli
from strop.runs import RunFolder, resolve
from strop.runs.charts import Curve, draw, running_mean
from strop.runs.report import (
    Estimate,
    HeldOut,
    _samples,  # pyright: ignore[reportPrivateUsage]
    curves,
    estimate_text,
    logged_held_out,
    visible,
    write_report,
)

ATTACK = "</pre><script>alert('x')</script><img src=http://example.org/a onerror=alert(1)>{{ 7 * 7 }}"


class Page(HTMLParser):
    """Tags, the text of each <pre>, and the cells of the table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pres: list[str] = []
        self.cells: list[str] = []
        self._open: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("pre", "td"):
            self._open = self.pres if tag == "pre" else self.cells
            self._open.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("pre", "td"):
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self._open[-1] += data

    def rows(self) -> list[list[str]]:
        cells = [" ".join(cell.split()) for cell in self.cells]
        return [cells[start : start + 8] for start in range(0, len(cells), 8)]


def make_run(
    runs_dir: Path,
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    *,
    stage: str = "grpo",
    config: Mapping[str, Any] | None = None,
    samples: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    parent: str | None = None,
) -> RunFolder:
    origin = None if parent is None else resolve(parent, runs_dir)
    with RunFolder.create(
        runs_dir, name, stage=stage, config=config or {"num_steps": 3}, parent=origin, data_hashes={}, seed=5
    ) as run:
        for row in metrics:
            step = row["step"]
            run.log(step, {key: value for key, value in row.items() if key != "step"})
            run.log_samples(step, (samples or {}).get(step, ()))
        step = metrics[-1]["step"] if metrics else 0
        run.save_checkpoint(step, lambda folder: (folder / "config.json").write_text("{}"), {}, {})
    return RunFolder.open(runs_dir, name)


def report(tmp_path: Path, *runs: RunFolder, **options: Any) -> tuple[str, Page]:
    text = write_report(runs, tmp_path / "out" / "report.html", **options).read_text(encoding="utf-8")
    return text, Page(text)


def test_what_a_model_wrote_is_text_and_never_markup(tmp_path: Path):
    verdict = {"score": 0.0, "status": "wrong", "detail": ATTACK}
    row = {"prompt": ATTACK, "completion": ATTACK, "reward": 0.0, "parts": {ATTACK: verdict}, "finish_reason": "stop"}
    metrics = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.5}]
    run = make_run(tmp_path, "evil", metrics, stage=ATTACK, config={ATTACK: ATTACK}, samples={1: [row]})
    text, page = report(tmp_path, run, title=ATTACK, held_out={"evil": HeldOut(metric=ATTACK, before=None, after=None)})
    assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "form"} == set()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.pres[:2] == [ATTACK, ATTACK]
    assert text.count("{{ 7 * 7 }}") >= 8, "a model's braces are not a template"


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path):
    run = make_run(tmp_path, "a", [{"step": step, "reward": 0.1 * step} for step in range(60)])
    text, page = report(tmp_path, run)
    assert "svg" in {tag for tag, _ in page.tags}
    assert "http" not in text.replace("http-equiv", "")
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name.endswith("href")]
    assert addresses and all(str(address).startswith("#") for address in addresses)
    ids = set(re.findall(r' id="([^"]+)"', text))
    assert {str(address)[1:] for address in addresses} | set(re.findall(r"url\(#([^)]+)\)", text)) <= ids
    assert re.search(r"default-src 'none'", text)


def test_a_value_that_was_not_finite_is_a_gap_and_counted(tmp_path: Path):
    metrics = [{"step": step, "loss": 2.0, "grad_norm": float("inf") if step == 2 else 1.5} for step in range(1, 5)]
    nothing = [row | {"kl": float("nan")} for row in metrics]
    run = make_run(tmp_path, "a", nothing)
    text, page = report(tmp_path, run)
    assert "1 of 4 values were not finite" in text
    assert "4 of 4 values were not finite" in text
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    assert labels == ["training loss, nats per token over the steps", "gradient norm over the steps"]


def test_a_gap_cuts_the_line_and_its_running_mean():
    values = [1.0, 1.0, None, 1.0, 1.0]
    svg = draw(Curve(title="t", steps=range(5), values=values), "t")
    whole = draw(Curve(title="t", steps=range(5), values=[1.0] * 5), "t")
    lines = [re.findall(r"[ML] ", path) for path in re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--line\)', svg)]
    assert lines[0] == ["M ", "L ", "M ", "L "]
    assert svg.count("<use ") == whole.count("<use ") - 1, "one marker less"
    assert str(running_mean([1.0, float("nan"), 3.0, 5.0], window=3)) == "[1.0, nan, 4.0, 4.0]"


def test_a_chart_has_no_colour_of_its_own_and_is_the_same_every_time():
    curve = Curve(title="t", steps=[0, 9], values=[0.1, 0.9], low=[0.0, 0.8], high=[0.2, 1.0])
    svg = draw(curve, "a")
    assert re.findall(r"#[0-9a-f]{6}", svg) == []
    assert "currentColor" in svg and "fill: var(--line); fill-opacity: 0.2" in svg
    assert svg == draw(curve, "a")
    shared = set(re.findall(r' id="([^"]+)"', svg)) & set(re.findall(r' id="([^"]+)"', draw(curve, "b")))
    assert shared == set(), "two charts on one page"


def test_several_runs_have_a_row_and_a_section_each_and_name_their_parents(tmp_path: Path):
    base = make_run(tmp_path, "base", [{"step": 7, "loss": 3.0, "time/step_seconds": 90.0}], stage="pretrain")
    metrics = [
        {"step": 0, "eval/pass@1": 0.1, "eval/pass@1_low": 0.05, "eval/pass@1_high": 0.2},
        {"step": 4, "reward": 0.5, "time/step_seconds": 2.0},
        {"step": 9, "eval/pass@1": 0.7, "eval/pass@1_low": 0.6, "eval/pass@1_high": 0.8, "time/step_seconds": 3.0},
    ]
    grpo = make_run(tmp_path, "grpo", metrics, parent="base")
    given = HeldOut(metric="bits_per_byte", before=Estimate(value=3.21), after=Estimate(value=1.5, low=1.4, high=1.6))
    text, page = report(tmp_path, base, grpo, held_out={"base": given})
    assert page.rows() == [
        ["base", "pretrain", "scratch", "7", "1.5 min", "bits per byte", "3.210", "1.500 [1.400, 1.600]"],
        ["grpo", "grpo", "base/7", "9", "5 s", "pass@1 (step 9)", "10.0 % [5.0, 20.0]", "70.0 % [60.0, 80.0]"],
    ]
    assert [attributes["id"] for tag, attributes in page.tags if tag == "h2"] == ["run-1", "run-2"]
    assert "fill-opacity" in text, "the interval is drawn as a band"
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "charts that share a name could take one another's clip paths"


def test_the_score_of_answers_that_are_right_or_wrong_is_not_drawn_a_second_time():
    rows = [{"step": step, "eval/score": 0.5, "eval/pass@1": 0.5, "eval/pass@1_low": 0.4} for step in (0, 9)]
    assert [curve.title for curve in curves(rows)] == ["held-out pass@1"]
    of_a_reward_model = [{"step": row["step"], "eval/score": row["eval/score"]} for row in rows]
    assert [curve.title for curve in curves(of_a_reward_model)] == ["held-out score"]


def test_the_first_and_the_last_step_are_shown_with_their_verdicts(tmp_path: Path):
    def row(prompt: str, completion: str, reward: float | None) -> dict[str, Any]:
        parts = {"math": {"score": reward or 0.0, "status": "ok" if reward else "wrong", "detail": ""}}
        return {"prompt": prompt, "completion": completion, "reward": reward, "parts": parts, "finish_reason": "length"}

    samples = {
        1: [row("p", "first", 0.0), row("p", "second", 1.0), row("q", "broken", None)],
        2: [row("p", "between", 0.0)],
        3: [row("p", "\x1flast", 1.0)],
    }
    run = make_run(tmp_path, "a", [{"step": step, "reward": 0.5} for step in samples], samples=samples)
    text, page = report(tmp_path, run)
    assert page.pres[:-1] == ["p", "first", "second", "q", "broken", "p", "\u241flast"]
    shown = [" ".join(part.split()) for part in re.findall(r'<div class="verdict">(.*?)</div>', text, re.DOTALL)]
    assert shown[0] == "<b>reward 0</b> · math: wrong · cut at the token limit"
    assert [part[:16] for part in shown[1:]] == ["<b>reward 1</b> ", "<b>reward none</", "<b>reward 1</b> "]
    assert re.findall(r'class="answer ?(\w*)"', text) == ["bad", "good", "", "good"]


def test_odd_text_can_be_written(tmp_path: Path):
    samples = {1: [{"prompt": [{"role": "user", "content": "hé"}], "completion": "\ud800 " + "x" * 5000}]}
    run = make_run(tmp_path, "a", [{"step": 1, "loss": 1.0}], samples=samples)
    _, page = report(tmp_path, run)
    assert page.pres[0] == '[{"role": "user", "content": "hé"}]'
    assert page.pres[1].startswith("\\ud800 xxx") and page.pres[1].endswith("x … (3,502 more characters)")
    assert visible("a\tb\n\x00\r\x7f") == "a\tb\n␀␍␡"


def test_a_run_that_logged_nothing_says_so(tmp_path: Path):
    text, page = report(tmp_path, make_run(tmp_path, "a", []))
    assert "Nothing was logged." in text
    assert page.rows() == [["a", "grpo", "scratch", "0", "0 s", "–", "–", "–"]]


def test_before_is_only_what_was_measured_before_the_first_step():
    losses = {50: 2.0, 90: None, 99: 1.0}
    late = logged_held_out([{"step": step, "eval/loss": loss} for step, loss in losses.items()])
    assert late == HeldOut(metric="loss", before=None, after=Estimate(value=1.0), note="step 99")
    unfinished = logged_held_out([{"step": 0, "eval/pass@1": 0.5, "eval/loss": 2.0}])
    assert unfinished == HeldOut(metric="pass@1", before=Estimate(value=0.5), after=None, note="step 0")
    assert logged_held_out([{"step": 1, "loss": 2.0}]) is None


def test_flat_groups_are_a_share_and_estimates_have_their_units():
    (curve,) = curves([{"step": 1, "groups_flat": 3, "groups": 12}, {"step": 2, "groups_flat": 0, "groups": 0}])
    assert list(curve.values) == [0.25, None]
    assert estimate_text(Estimate(value=0.0, low=0.0, high=0.04), "pass@1") == "0.0 % [0.0, 4.0]"
    assert estimate_text(Estimate(value=1.23456), "bits_per_byte") == "1.235"


def test_the_command_writes_beside_the_last_run_and_refuses_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_run(tmp_path, "one", [{"step": 1, "loss": 1.0}])
    make_run(tmp_path, "two", [{"step": 1, "loss": 1.0}])
    assert cli.main(["runs", "report", "one", "two", "--runs-dir", str(tmp_path)]) == 0
    assert Page((tmp_path / "two" / "report.html").read_text(encoding="utf-8")).rows()[0][0] == "one"
    assert cli.main(["runs", "report", "tow", "--runs-dir", str(tmp_path)]) == 2
    assert "no run 'tow'" in capsys.readouterr().err
    assert cli.main(["runs", "report", "--runs-dir", str(tmp_path)]) == 2
    assert "name at least one run" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path):
    make_run(tmp_path, "one", [{"step": 1, "loss": 1.0}])
    code = (
        "import sys; sys.modules['matplotlib'] = None; from strop.cli.main import main; "
        f"sys.exit(main(['runs', 'report', 'one', '--runs-dir', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "strop: error: a report's curves need matplotlib: pip install 'strop[report]'\n"


def test_each_score_of_several_rewards_has_a_chart_so_that_one_can_be_seen_to_fall(tmp_path: Path):
    rows = [
        {"step": step, "reward": step / 3, "score/buggy": step / 3, "score/gold": 1 - step / 3} for step in (1, 2, 3)
    ]
    by_title = {curve.title: curve.values for curve in curves(rows)}
    assert by_title["score of gold"] == [1 - 1 / 3, 1 - 2 / 3, 0.0]
    assert by_title["score of buggy"] == by_title["reward"]
    alone = [{"step": 1, "reward": 0.5, "score/math": 0.5}]
    assert [curve.title for curve in curves(alone)] == ["reward"]


@pytest.mark.parametrize(("name", "is_warned"), [("judge", True), ("model", True), ("math", False)])
def test_a_learned_judge_is_labelled(tmp_path: Path, name: str, is_warned: bool):
    config = {"num_steps": 3, "rewards": [{"name": "format"}, {"name": name, "weight": 0.1}]}
    text, _ = report(tmp_path, make_run(tmp_path, "judged", [{"step": 1, "reward": 0.5}], config=config))
    assert ("It can be gamed" in text) is is_warned


def test_a_game_of_self_play_is_shown_by_its_moves(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    row = {"step": 3, "seats": ["self", "past"], "moves": [" x(0,0)", "4"], "rewards": [1.0, -1.0], "is_illegal": False}
    path.write_text(json.dumps(row) + "\n")
    [shown] = _samples(path)
    [group] = shown["groups"]
    assert group["prompt"] == "self against past"
    assert [(answer["text"], answer["reward"]) for answer in group["rows"]] == [("x(0,0), 4", 1.0)]
    held_out = logged_held_out([{"step": 0, "eval/random/win": 0.5}, {"step": 9, "eval/random/win": 0.9}])
    assert held_out is not None and estimate_text(held_out.after, held_out.metric) == "90.0 %"
