"""A small server on this machine that answers as Kaggle does, for the real client.

The client is sent here by its LOCALHOST environment; a `sitecustomize.py` on PYTHONPATH, which Python imports before
anything else, names the port. Nothing leaves the machine.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

USER, KEY = "someone", "0123456789abcdef0123456789abcdef"
KERNEL_URL = "https://www.kaggle.com/code/someone/prompt-recovery"
DATASET_URL = "https://www.kaggle.com/datasets/someone/prompt-recovery-wheels"

Content = dict[str, Any]

_ANSWERS: dict[str, Content] = {
    "SaveKernel": {"ref": "/code/someone/prompt-recovery", "url": KERNEL_URL, "versionNumber": 3},
    "GetKernelSessionStatus": {"status": "COMPLETE"},
    "GetDatasetStatus": {"status": "READY"},
    "CreateDataset": {"status": "ok", "url": DATASET_URL},
    "CreateDatasetVersion": {"status": "ok", "url": DATASET_URL},
    "CreateCodeSubmission": {"message": "Successfully submitted to LLM Prompt Recovery"},
    "IntrospectToken": {"active": True, "username": "token-owner"},
}


@dataclass(frozen=True)
class Received:
    """A request: the method of the API that it calls, its JSON, its Authorization header."""

    method: str
    content: Content
    authorization: str


@dataclass
class KaggleServer:
    """What the server answers and what it received."""

    received: list[Received] = field(default_factory=list)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    log: str = ""
    silent: bool = False
    port: int = 0
    _told: dict[str, list[tuple[int, Content]]] = field(default_factory=dict)
    _released: threading.Event = field(default_factory=threading.Event)

    def answer(self, method: str, content: Content, status: int = 200) -> None:
        """Answer a method so from now on; told several answers, it gives one after the other and stays at the last."""
        self._told.setdefault(method, []).append((status, content))

    def calls(self, method: str) -> list[Content]:
        """What was received for a method."""
        return [received.content for received in self.received if received.method == method]

    def start(self) -> None:
        """Listen on a free port."""
        server = self

        class Handler(_Handler):
            kaggle = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Let silent requests go and close the port."""
        self._released.set()
        self._http.shutdown()
        self._http.server_close()

    def reply_to(self, received: Received) -> tuple[int, Content]:
        """The answer to a request; blocks while the server is silent."""
        self.received.append(received)
        if self.silent:
            self._released.wait(30)
        told = self._told.get(received.method, [])
        if told:
            return told.pop(0) if len(told) > 1 else told[0]
        if received.method == "StartBlobUpload":
            name = received.content["name"]
            return 200, {"token": f"token-of-{name}", "createUrl": f"{self.url}/upload/{name}"}
        if received.method == "ListKernelSessionOutput":
            files = [{"url": f"{self.url}/files/{name}?signature=secret", "fileName": name} for name in self.files]
            return 200, {"files": files, "log": self.log}
        if received.method in _ANSWERS:
            return 200, _ANSWERS[received.method]
        return 404, {"code": 404, "message": f"no method {received.method}"}

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


class _Handler(BaseHTTPRequestHandler):
    kaggle: KaggleServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self._body() or b"{}")
        received = Received(self.path.rpartition("/")[2], body, self.headers.get("Authorization", ""))
        status, content = self.kaggle.reply_to(received)
        self._send(status, json.dumps(content).encode(), "application/json")

    def do_PUT(self) -> None:
        self.kaggle.uploaded[self.path.rpartition("/")[2]] = self._body()
        self._send(200, b"{}", "application/json")

    def do_GET(self) -> None:
        name = self.path.removeprefix("/files/").partition("?")[0]
        missing = self.kaggle.files.get(name) == b"gone"
        self._send(404 if missing else 200, b"<html>" if missing else self.kaggle.files[name], "text/csv")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def client_environment(folder: Path, port: int) -> dict[str, str]:
    """Environment variables that send the client to a port of this machine, with credentials of nobody."""
    home, site = folder / "home", folder / "site"
    home.mkdir(exist_ok=True)
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(
        f'import kagglesdk.kaggle_env as env\nenv._env_to_endpoint[env.KaggleEnv.LOCAL] = "http://127.0.0.1:{port}"\n'
    )
    return {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_USERNAME": USER,
        "KAGGLE_KEY": KEY,
        "HOME": str(home),
        "TMPDIR": str(folder),
        "PYTHONPATH": str(site),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
