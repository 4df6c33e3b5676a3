"""A headless Chromium, driven through chromedriver's WebDriver interface with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """One window."""

    def __init__(self, address: str) -> None:
        self._address = address

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self._address}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from error

    def open(self, path: Path) -> None:
        """Load a file, by ``file://``."""
        self._call("/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self._call("/execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def size(self, width: int, height: int = 900, *, phone: bool = False) -> None:
        """The page's size in its own pixels."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )

    def media(self, *, dark: bool = False, paper: bool = False) -> None:
        """What the page believes that it is shown on."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])

    def type_into(self, selector: str, text: str) -> None:
        """Type, key by key."""
        found = self._call("/element", {"using": "css selector", "value": selector})
        self._call(f"/element/{next(iter(found.values()))}/value", {"text": text})

    def click(self, selector: str) -> None:
        """Click, as a mouse does."""
        found = self._call("/element", {"using": "css selector", "value": selector})
        self._call(f"/element/{next(iter(found.values()))}/click", {})

    def messages(self) -> list[str]:
        """What the console was told since the last call: errors, warnings, refused requests."""
        return [entry["message"] for entry in self._call("/se/log", {"type": "browser"})]

    def screenshot(self) -> bytes:
        """PNG of what is in the window."""
        return base64.b64decode(self._call("/screenshot"))

    def pdf(self) -> bytes:
        """The page on paper."""
        return base64.b64decode(self._call("/print", {}))


@contextmanager
def browser() -> Iterator[Browser]:
    """A new browser with an empty profile; the test is skipped where there is none."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [driver, f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=_environment(),
        )
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address)
            window = Browser(address)
            options = {"binary": chromium, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
            capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = window._call("/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
            window._address = f"{address}/session/{session}"
            try:
                yield window
            finally:
                request = urllib.request.Request(window._address, method="DELETE")
                urllib.request.urlopen(request, timeout=60).close()
        finally:
            process.terminate()
            process.wait(30)


def _environment() -> dict[str, str]:
    """Without proxies: chromedriver is on this machine."""
    return {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


def _wait(address: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{address}/status", timeout=10) as answer:
                if json.load(answer)["value"]["ready"]:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("chromedriver does not answer")
