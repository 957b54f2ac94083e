"""A real Chromium, driven through chromedriver with the standard library, and a real `strop rank` to look at."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from strop.ranking import PreferenceStore

REMEDY = "the browser tests need Chromium and its driver; on Debian: apt-get install chromium chromium-driver"

KEYS = {"Enter": "\ue007", "Backspace": "\ue003", "Escape": "\ue00c", "Tab": "\ue004"}

FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"),
]


class Browser:
    """One Chromium window: W3C WebDriver over HTTP, and the DevTools log of every request that the page makes."""

    def __init__(self, driver_url: str) -> None:
        capabilities = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": FLAGS, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
            "unhandledPromptBehavior": "ignore",
        }
        made = call("POST", f"{driver_url}/session", {"capabilities": {"alwaysMatch": capabilities}})
        self._url = f"{driver_url}/session/{made['sessionId']}"

    def open(self, url: str) -> None:
        call("POST", f"{self._url}/url", {"url": url})

    @property
    def url(self) -> str:
        return call("GET", f"{self._url}/url")

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script returns; async functions are awaited."""
        return call("POST", f"{self._url}/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any, seconds: float = 10.0) -> Any:
        """The expression's value as soon as it is truthy."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(f"return {script}", *arguments)):
            assert time.monotonic() < deadline, f"{script} stayed {value!r} for {seconds} s at {self.url}"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def press(self, *keys: str) -> None:
        """Press and release each key in the page, as a keyboard would."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        call("POST", f"{self._url}/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def tap(self, selector: str) -> None:
        """A click in the middle of what the selector finds, once it is scrolled to the middle of the window."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", selector)
        found = call("POST", f"{self._url}/element", {"using": "css selector", "value": selector})
        call("POST", f"{self._url}/element/{next(iter(found.values()))}/click", {})

    def resize(self, width: int, height: int, *, is_phone: bool = False, is_dark: bool = False) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone},
        )
        self.devtools("Emulation.setTouchEmulationEnabled", {"enabled": is_phone})
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", {"features": [scheme]})

    def set_offline(self, is_offline: bool) -> None:
        rates = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.devtools("Network.emulateNetworkConditions", {"offline": is_offline, **rates})

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return call("POST", f"{self._url}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def screenshot(self, path: Path, *, is_full: bool = False) -> None:
        shot = self.devtools("Page.captureScreenshot", {"captureBeyondViewport": is_full})
        path.write_bytes(base64.b64decode(shot["data"]))

    def requests(self) -> list[str]:
        """The URLs that the page asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the console got since the last call: script errors, refusals of the Content-Security-Policy."""
        return [entry["message"] for entry in self._log("browser")]

    def dialog(self) -> str | None:
        """The text of an alert that is open, or None."""
        try:
            return call("GET", f"{self._url}/alert/text")
        except AssertionError as error:
            assert "no such alert" in str(error), error
            return None

    def forget(self) -> None:
        """As if the browser were new: no cookie, nothing stored, nothing logged."""
        call("DELETE", f"{self._url}/cookie")
        self.devtools("Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"})
        self.open("about:blank")
        self.set_offline(False)
        self.resize(1280, 900)
        self.requests()
        self.complaints()

    def close(self) -> None:
        call("DELETE", self._url)

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return call("POST", f"{self._url}/se/log", {"type": kind})


def call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{method} {url}: {json.load(error)['value']}") from None


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    assert not missing, f"{' and '.join(missing)} not found: {REMEDY}"
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert driver.stdout is not None
        found = (re.search(r"started successfully on port (\d+)", line) for line in driver.stdout)
        port = next((match.group(1) for match in found if match), None)
        assert port is not None, f"chromedriver did not start: {REMEDY}"
        window = Browser(f"http://127.0.0.1:{port}")
        yield window
        window.close()
    finally:
        driver.terminate()
        driver.wait(10)
        assert driver.stdout is not None
        driver.stdout.close()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """The window of the session, as if new."""
    chromium.forget()
    return chromium


class Server:
    """`strop rank STORE` in a process of its own."""

    def __init__(self, path: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "strop.cli.main", "rank", str(path), *flags]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:(\d+)/) ", line)
        assert found, f"no URL in {line!r}; exit status {self._process.poll()}"
        self.url, self.port = found.group(1), found.group(2)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """serve(path, *flags) starts a server that ends with the test."""
    running: list[Server] = []

    def start(path: Path, *flags: str) -> Server:
        running.append(Server(path, *(flags if "--port" in flags else ("--port", "0", *flags))))
        return running[-1]

    yield start
    for server in running:
        server.kill()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PreferenceStore]:
    made = PreferenceStore(tmp_path / "people.db", create=True, seed=5)
    yield made
    made.close()
