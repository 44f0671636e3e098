"""The page in a headless browser: an image is chosen, and the classes and the latency are shown. Chromium's own protocol, over pipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on the PATH")


class Browser:
    """One page of a headless Chromium: commands are null-terminated JSON on its file descriptor 3, answers come from 4."""

    def __init__(self, profile: Path) -> None:
        (there, self._out), (self._in, back) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        # What starts Chromium puts the pipes where it looks for them.
        put = f"import os, sys; os.dup2({there}, 3); os.dup2({back}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", put, str(CHROMIUM), *options]
        self._process = subprocess.Popen(command, pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(there)
        os.close(back)
        self._answers, self._number, self._session = os.fdopen(self._in, "rb"), 0, {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def ask(self, method: str, **given: Any) -> Any:
        """The result of a command; events are passed over."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": given, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._line())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\0"):
            more = self._answers.read(1)
            assert more, f"the browser ended: {self._process.poll()}"
            line += more
        return line[:-1]

    def value(self, expression: str) -> Any:
        """What an expression comes to in the page."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait for an expression to be true, and give its value."""
        ends = time.monotonic() + 30
        while not (found := self.value(expression)):
            assert time.monotonic() < ends, self.value("document.body?.innerText")
            time.sleep(0.05)
        return found

    def choose(self, file: Path) -> None:
        """Put a file into the page's input, as a person does."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)
        self._answers.close()
        os.close(self._out)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A page in a fresh profile."""
    found = Browser(tmp_path / "profile")
    yield found
    found.stop()


@pytest.mark.timeout(120)
def test_a_person_sees_the_classes_of_an_image_and_why_another_is_refused(serving, browser, tmp_path):
    image, damaged = tmp_path / "image.png", tmp_path / "damaged.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(image)
    damaged.write_bytes(image.read_bytes()[:500])
    with serving() as (_, port):
        browser.ask("Page.navigate", url=f"http://127.0.0.1:{port}/")
        browser.until("document.readyState === 'complete' && !!document.getElementById('file')")
        browser.choose(image)
        browser.until("document.querySelectorAll('#top tr').length === 5")
        told = browser.value("document.getElementById('told').textContent")
        first = browser.value("document.querySelector('#top tr').innerText")
        assert browser.value("document.getElementById('model').textContent") == "resnet20"
        browser.choose(damaged)
        refused = browser.until("(text => text.includes('truncated') && text)(document.getElementById('told').textContent)")
        assert browser.value("document.querySelectorAll('#top tr').length") == 0
    assert "in the server" in told
    assert " ms" in told
    assert first.startswith("class ")
    assert first.endswith("%")
    assert refused.startswith("the upload:")
