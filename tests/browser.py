"""A real browser, Debian's chromium, driven over its DevTools; tests that need it are skipped where there is none."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest


class Page:
    """One page of a browser.

    Attributes:
        asked: addresses that it has asked for.
        errors: what its scripts threw, and what its policy refused.
    """

    def __init__(self, socket):
        self.socket, self.ids, self.asked, self.errors = socket, itertools.count(1), [], []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self.socket.recv())).get("id") != number:
            match message.get("method"):
                case "Network.requestWillBeSent":
                    self.asked.append(message["params"]["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.errors.append(message["params"]["exceptionDetails"])
                case "Log.entryAdded" if message["params"]["entry"]["level"] == "error":
                    self.errors.append(message["params"]["entry"])
        assert "error" not in message, message
        return message["result"]

    def run(self, script: str):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str, seconds: float = 60):
        """The value of an expression as soon as there is one that is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.1)
        return value

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def press(self, key: str) -> None:
        """A key as a person presses it."""
        text = "\r" if key == "Enter" else key if len(key) == 1 else ""
        code = {"Enter": 13, "Tab": 9}.get(key, ord(key.upper()) if len(key) == 1 else 0)
        for kind in ("keyDown", "keyUp"):
            options = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **options)

    def picture(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser_page(folder: Path, width: int = 1300, height: int = 900):
    """A `Page` of a browser whose profile lies in `folder`."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium (Debian: apt-get install chromium)")
    websocket = pytest.importorskip("websocket", reason="websocket-client, which comes with JupyterLab, is missing")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    flags += ["--remote-allow-origins=*", f"--user-data-dir={folder}", f"--window-size={width},{height}"]
    browser = subprocess.Popen([program, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = folder / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (port.exists() and port.read_text().strip()):
            assert time.monotonic() < end and browser.poll() is None, "chromium did not start"
            time.sleep(0.1)
        (page,) = (
            target
            for target in json.load(urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json"))
            if target["type"] == "page"
        )
        socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60)
        yield Page(socket)
        socket.close()
    finally:
        browser.terminate()
        browser.wait()
