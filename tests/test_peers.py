"""Programs that `eval throughput` compares with: started, asked, and a clear word where they do not start."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eval.peers import Load, llama_server, vllm_with
from submission.errors import UserError

LOAD = Load([[1, 2, 3], [4]], new_tokens=5, ends={2}, samples=2, temperature=0.8)
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with open("asked", "a") as file:
            file.write(body + "\\n")
        self.answer({"content": "hello"})
    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())
    def log_message(self, *arguments):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""
READS = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    with open("asked", "a") as file:
        file.write(line)
    print("done", flush=True)
"""


def program(path: Path, code: str) -> Path:
    """An executable; what it is given as arguments of an interpreter it leaves alone."""
    path.write_text(f"#!{sys.executable} -IS\n{code}")
    path.chmod(0o755)
    return path


def asked(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "asked").read_text().splitlines()]


def test_a_llama_server_is_asked_for_each_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with llama_server(program(tmp_path / "server", SERVER), Path("m.gguf"), 1, 64) as server:
        server(LOAD)
    wanted = {"n_predict": 5, "temperature": 0.0, "cache_prompt": True}
    assert sorted(asked(tmp_path), key=str) == [{"prompt": ids, **wanted} for ids in LOAD.prompts]


def test_vllm_is_asked_in_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with vllm_with(program(tmp_path / "python", READS), tmp_path, "bfloat16", 1, 64) as peer:
        peer.forget()
        peer(LOAD)
        peer.score([[1, 2]])
    assert asked(tmp_path) == [
        {"do": "forget"},
        {"do": "generate", "prompts": [[1, 2, 3], [4]], "new_tokens": 5, "ends": [2], "samples": 2, "temperature": 0.8},
        {"do": "score", "texts": [[1, 2]]},
    ]


def test_a_peer_that_does_not_start_is_named(tmp_path: Path) -> None:
    ends = program(tmp_path / "ends", "raise SystemExit(7)")
    for command, words in ((ends, "ended with exit code 7"), (tmp_path / "none", "cannot be run")):
        with pytest.raises(UserError, match=f"--llama-server .*{words}"), llama_server(command, ends, 1, 64):
            pass
    for command, words in ((ends, "vLLM ended with exit code 7"), (tmp_path / "none", "--vllm .* cannot be run")):
        with pytest.raises(UserError, match=words), vllm_with(command, tmp_path, "float32", 1, 64):
            pass
