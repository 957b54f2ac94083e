"""The chat page of `strop serve` in a real browser: two checkpoints, probabilities, a preference, a key."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from strop.ranking import PreferenceStore, rankings


@pytest.fixture
def chat_server(tiny_folder: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """chat_server(*flags) -> its URL; "one" and "two" are copies of the tiny checkpoint."""
    with ExitStack() as stack:

        def start(*flags: str) -> str:
            shutil.copytree(tiny_folder, tmp_path / "other", dirs_exist_ok=True)
            names = [f"one={tiny_folder}", f"two={tmp_path / 'other'}"]
            command = [sys.executable, "-m", "strop.cli.main", "serve", *names, "--port", "0", "--dtype", "float32"]
            process = stack.enter_context(
                subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
            )
            stack.callback(process.terminate)
            assert process.stdout is not None
            found = re.match(r"(http://127\.0\.0\.1:\d+/) ", process.stdout.readline())
            assert found
            return found[1]

        yield start


def ask(browser: Any, text: str, tokens: int = 30) -> None:
    browser.run(f"document.getElementById('tokens').value = {tokens}")
    browser.run("document.getElementById('message').focus()")
    browser.press(*text, "Enter")
    browser.wait("document.getElementById('send').textContent === 'Send' && document.querySelector('.foot span')")


def test_two_answers_and_a_preference(browser: Any, chat_server: Callable[..., str], tmp_path: Path) -> None:
    url = chat_server("--preferences", str(tmp_path / "people.db"))
    browser.open(url)
    browser.wait("document.getElementById('left').options.length === 2")
    ask(browser, "the <b>cat</b>", tokens=10)  # short: the second question must still fit the tiny model's context
    assert browser.text(".user") == "the <b>cat</b>"
    texts = browser.run("return [...document.querySelectorAll('.answer .text')].map((one) => one.textContent)")
    assert len(texts) == 2 and texts[0] != texts[1]
    browser.tap(".answer:last-child .prefer")
    browser.wait("document.querySelector('.answer:last-child.preferred')")
    store = PreferenceStore(tmp_path / "people.db")
    [row] = rankings(store)
    store.close()
    by_text = dict(zip(row.completions, row.ranks, strict=True))
    assert by_text == {texts[1]: 1, texts[0]: 2} and set(row.models) == {"one", "two"}
    assert list(row.prompt) == [{"role": "user", "content": "the <b>cat</b>"}]
    ask(browser, "more", tokens=4)
    assert all(one.startswith(url) for one in browser.requests() if one.startswith("http"))
    assert browser.complaints() == []


@pytest.mark.parametrize("is_phone", [False, True])
def test_a_tap_on_a_token_shows_its_alternatives(browser: Any, chat_server: Callable[..., str], is_phone: bool) -> None:
    browser.open(chat_server())
    if is_phone:
        browser.resize(390, 844, is_phone=True)
    browser.wait("document.getElementById('left').options.length === 2")
    browser.run("document.getElementById('probabilities').checked = true")
    ask(browser, "hello")
    # A token may be part of a letter, and have no width.
    browser.run("[...document.querySelectorAll('.token')].find((one) => one.offsetWidth > 0).id = 'seen'")
    browser.tap("#seen")
    rows = browser.run("return [...document.querySelectorAll('table tr')].map((one) => one.className)")
    assert "own" in rows and 5 <= len(rows) <= 6
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("STROP_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"serve_{'phone' if is_phone else 'desktop'}.png")


def test_the_page_asks_for_the_key(browser: Any, chat_server: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a-key-of-20-letters!\n")
    browser.open(chat_server("--api-key-file", str(tmp_path / "key")))
    browser.wait("document.getElementById('login').open")
    browser.press(*"wrong", "Enter")
    browser.wait("document.getElementById('login').open")
    browser.run("document.getElementById('key').value = ''")
    browser.press(*"a-key-of-20-letters!", "Enter")
    browser.wait("document.getElementById('left').options.length === 2")
