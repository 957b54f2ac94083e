"""The ranking page in a real browser: keys only, a phone, hostile text, a connection that breaks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from strop.ranking import PreferenceStore, agreement, rankings

XSS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)><img src=//evil.example/beacon.png>",
    "</textarea></div><script src=https://evil.example/x.js></script>",
    "[click](javascript:alert(1)) <a href='javascript:alert(1)'>x</a>",
    "{{7*7}} ${7*7} <%= 7*7 %>",
    "<svg xmlns='http://www.w3.org/2000/svg' onload=alert(1)><image href='//evil.example/a.png'/></svg>",
    "data:image/svg+xml,<svg onload=alert(1)>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe><meta http-equiv=refresh content='0;//evil.example'>",
    "<style>@import url(//evil.example/x.css)</style><link rel=stylesheet href=//evil.example/x.css>",
    "```html\n<script>alert(1)</script>\n```\n<base href=//evil.example>",
    "left \u202egnorw ot thgir\u202c \x00\x07 end",
    "y" * 1_000_000,
]


def log_in(browser: Any, url: str, name: str = "Ada") -> None:
    browser.open(url)
    browser.wait("document.activeElement.id === 'name'")
    browser.press(*name, "Enter")
    browser.wait("document.getElementById('work') && !document.getElementById('work').hidden")


def shown(browser: Any) -> list[str]:
    """The answers on the page, in their order."""
    return browser.run("return [...document.querySelectorAll('.card .text')].map((one) => one.textContent)")


def next_page(browser: Any, before: list[str]) -> None:
    browser.wait(
        "!document.body.classList.contains('sending') && JSON.stringify("
        "[...document.querySelectorAll('.card .text')].map((one) => one.textContent)) !== JSON.stringify(arguments[0])",
        before,
    )


@pytest.mark.parametrize("is_phone", [False, True])
def test_hostile_text_runs_nothing_and_asks_nobody(
    browser: Any, serve: Callable[..., Any], store: PreferenceStore, is_phone: bool
):
    for place, text in enumerate(XSS):
        store.add_item([{"role": f"user{text[:200]}", "content": text}], [f"{place} {text}", f"{place} {text} again"])
    server = serve(store.path)
    if is_phone:
        browser.resize(390, 844, is_phone=True)
    log_in(browser, server.url, "<b>E")
    for text in XSS:
        texts = shown(browser)
        assert len(texts) == 2
        if text.isprintable() and len(text) < 1000:
            assert all(text in one for one in texts)  # as it is, character by character
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        foreign = "script:not([src^='/static/']), iframe, img, svg, base, .text a, .text style, .text link"
        assert browser.run("return document.querySelectorAll(arguments[0]).length", foreign) == 0
        browser.press("a", "Enter")
        if text is not XSS[-1]:
            next_page(browser, texts)
    browser.wait("!document.getElementById('empty').hidden")
    browser.open(server.url + "agreement")
    assert browser.text(".who") == "<b>E"
    assert browser.dialog() is None
    assert {url for url in browser.requests() if not url.startswith(server.url)} <= {"about:blank"}
    assert browser.complaints() == []
    assert len(list(rankings(store))) == len(XSS)


def test_twenty_items_with_the_keyboard_only(browser: Any, serve: Callable[..., Any], store: PreferenceStore):
    for n in range(20):
        size = 2 if n % 4 == 3 else 4
        store.add_item(f"prompt {n}", [f"{n} " + "word " * k for k in range(1, size + 1)])
    log_in(browser, serve(store.path).url)
    wanted: list[tuple[str, Any]] = []
    for n in range(20):
        texts = shown(browser)
        places = {text: str(place + 1) for place, text in enumerate(texts)}
        longest = sorted(texts, key=len, reverse=True)
        if len(texts) == 2:
            browser.press("ab"[texts.index(longest[0])], "3", "Enter")
            wanted.append(("ranked", [2, 1]))
        elif n == 4:
            browser.press("s")
            browser.wait("document.getElementById('skipping').open")
            browser.press("2")
            wanted.append(("skipped", None))
        elif n == 5:
            browser.press("x", "Enter")
            wanted.append(("all_bad", [1, 1, 1, 1]))
        elif n == 6:  # the two longest tie; a wrong key is taken back; a comment
            keys = [places[text] for text in longest]
            browser.press(keys[3], "Backspace", keys[0], "t", keys[1], keys[2], keys[3])
            browser.press("c", *"1st x", "Escape", "Enter")
            wanted.append(("ranked", [3, 2, 1, 1]))
        else:  # the last place goes to whoever is left
            browser.press(*[places[text] for text in longest[:3]], "Enter")
            wanted.append(("ranked", [4, 3, 2, 1]))
        if n < 19:
            next_page(browser, texts)
        if n == 8:  # changed my mind
            after = shown(browser)
            browser.press("u")
            next_page(browser, after)
            assert shown(browser) == texts
            browser.press(*[places[text] for text in reversed(longest)], "Enter")
            wanted[-1] = ("ranked", [1, 2, 3, 4])
            next_page(browser, texts)
    browser.wait("!document.getElementById('empty').hidden")
    rows = store.query("SELECT verdict, ranks, strength, comment, milliseconds FROM answers ORDER BY item_id")
    assert [(row["verdict"], json.loads(row["ranks"] or "null")) for row in rows] == wanted
    assert [row["strength"] for row in rows if row["strength"]] == [3] * 5
    assert rows[6]["comment"] == "1st x" and all(0 < row["milliseconds"] < 60_000 for row in rows)
    assert store.query("SELECT count(*) FROM rankings")[0][0] == 22  # the undo and the second answer are rows too
    assert browser.text("#counts") == "19 of 20 ranked, 19 by you"
    assert agreement(store).skipped == {"unclear": 1} and browser.complaints() == []


def test_a_phone_ranks_by_touch_and_long_answers_open(browser: Any, serve: Callable[..., Any], store: PreferenceStore):
    long = "\n".join(f"{n}. " + "knead and fold " * 6 for n in range(60))
    turns = [{"role": role, "content": f"{role} says {n}"} for n in range(3) for role in ("user", "assistant")]
    store.add_item([*turns, {"role": "user", "content": "and now?"}], ["short", long, "w" * 3000])
    server = serve(store.path)
    browser.resize(390, 844, is_phone=True)
    log_in(browser, server.url)
    assert browser.run("return document.querySelectorAll('.turn').length") == 7
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    heights = browser.run("return [...document.querySelectorAll('.bar button')].map((one) => one.offsetHeight)")
    assert min(height for height in heights if height) >= 36  # a finger finds them
    place = shown(browser).index(long)
    height = f"document.querySelectorAll('.card .text')[{place}].clientHeight"
    before = browser.run(f"return {height}")
    assert before < 844
    browser.tap(f".card[data-place='{place}'] .more")
    assert browser.run(f"return {height}") > 3 * before
    for which in range(3):
        browser.tap(f".card[data-place='{which}'] .pick")
    browser.tap("#submit")
    browser.wait("!document.getElementById('empty').hidden")
    assert [ranking.verdict for ranking in rankings(store)] == ["ranked"]


def test_a_lost_connection_keeps_the_answer_and_a_reload_does_too(
    browser: Any, serve: Callable[..., Any], store: PreferenceStore
):
    for n in range(3):
        store.add_item(f"prompt {n}", ["a", "bb"])
    server = serve(store.path)
    log_in(browser, server.url)
    first = browser.text("#prompt .text")
    browser.set_offline(True)
    browser.press("a", "Enter")
    browser.wait("document.getElementById('notice').textContent.startsWith('No connection')")
    assert not list(rankings(store))
    browser.set_offline(False)
    browser.wait("document.querySelector('#prompt .text').textContent !== arguments[0]", first)
    assert len(list(rankings(store))) == 1
    server.kill()
    browser.press("b", "Enter")
    browser.wait("document.getElementById('notice').textContent.startsWith('No connection')")
    serve(store.path, "--port", server.port)
    browser.open(server.url)  # a reload in the middle of it: the answer was kept beside the page
    browser.wait("document.getElementById('counts').textContent === '2 of 3 ranked, 2 by you'")
    assert len(list(rankings(store))) == 2


def test_of_two_tabs_the_second_is_told_and_goes_on(browser: Any, serve: Callable[..., Any], store: PreferenceStore):
    for n in range(2):
        store.add_item(f"prompt {n}", ["a", "bb"])
    server = serve(store.path)
    log_in(browser, server.url)
    # The other tab, as the server sees it: the same person answers the same item.
    browser.run(
        "const csrf = document.querySelector('meta[name=csrf]').content;"
        "const { item } = await (await fetch('/item')).json();"
        "const headers = { 'Content-Type': 'application/json', 'X-CSRF-Token': csrf };"
        "const body = JSON.stringify({ uuid: 'other-tab-0001', item: item.id, ranks: [1, 2] });"
        "await fetch('/rank', { method: 'POST', headers, body });"
    )
    browser.press("b", "Enter")
    browser.wait("document.getElementById('notice').textContent.includes('another tab')")
    browser.wait("document.querySelector('#prompt .text').textContent === 'prompt 1'")
    assert len(list(rankings(store))) == 1
