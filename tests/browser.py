"""A headless Chromium, driven by its DevTools protocol over a pipe."""
import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path

PATIENCE = 60  # seconds for an answer
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. What its console says of errors, and what it loads, is kept."""

    def __init__(self, path: str):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (to_child, self.to), (self.back, from_child) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_child, from_child)]
        os.close(to_child)
        os.close(from_child)
        flags = ["--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars",
                 "--no-first-run", f"--user-data-dir={self.folder.name}"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # root cannot have one

        def connect():
            for end, at in zip(ends, (3, 4)):  # messages go in at its descriptor 3, come out at 4
                os.dup2(end, at)

        self.process = subprocess.Popen(
            [path, *flags, "about:blank"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, close_fds=False,
            preexec_fn=connect)
        for end in ends:
            os.close(end)
        self.read, self.sent, self.session = b"", 0, None
        self.errors, self.requests = [], []
        (tab,) = [target for target in self.send("Target.getTargets")["targetInfos"]
                  if target["type"] == "page"][:1]
        self.session = self.send("Target.attachToTarget", targetId=tab["targetId"],
                                 flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def message(self) -> dict:
        while b"\0" not in self.read:
            if not select.select([self.back], [], [], PATIENCE)[0]:
                self.process.kill()
                raise RuntimeError(f"the browser has said nothing for {PATIENCE} seconds")
            some = os.read(self.back, 1 << 20)
            if not some:
                raise RuntimeError("the browser has ended")
            self.read += some
        one, _, self.read = self.read.partition(b"\0")
        return json.loads(one)

    def next(self) -> dict:
        """The next message; errors and requests among them are noted."""
        message = self.message()
        method, about = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown" or method == "Log.entryAdded" and \
                about["entry"]["level"] == "error":
            self.errors.append(about)
        if method == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(about)
        if method == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        return message

    def send(self, method: str, **params) -> dict:
        self.sent += 1
        sent = {"id": self.sent, "method": method, "params": params}
        if self.session:
            sent["sessionId"] = self.session
        os.write(self.to, json.dumps(sent).encode() + b"\0")
        while True:
            message = self.next()
            if message.get("id") == self.sent:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False,
             scale: float = 1) -> None:
        """Load a file as on a screen of that size, in CSS pixels of scale device pixels each."""
        self.errors, self.requests = [], []
        self.size(width, height, scale)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=path.resolve().as_uri())
        while self.next().get("method") != "Page.loadEventFired":
            pass

    def size(self, width: int, height: int, scale: float = 1) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=scale, mobile=False)

    def run(self, script: str):
        """The value of a JavaScript expression; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True,
                          awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def key(self, key: str, shift: bool = False) -> None:
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        modifiers = 8 if shift else 0
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, modifiers=modifiers,
                  windowsVirtualKeyCode=13 if key == "Enter" else 0)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers)

    def mouse(self, x: float, y: float, click: bool = False) -> None:
        kinds = ["mouseMoved", "mousePressed", "mouseReleased"] if click else ["mouseMoved"]
        for kind in kinds:
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=1,
                      button="none" if kind == "mouseMoved" else "left")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self.to)
        os.close(self.back)
        self.folder.cleanup()
