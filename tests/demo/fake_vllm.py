"""Stands in for ``vllm serve``: its HTTP surface on made-up embeddings, and a child of its own.

Started as ``python fake_vllm.py serve CHECKPOINT --port PORT ...``. Writes its own and its child's
process id to ``CHECKPOINT/pids``. With a file ``CHECKPOINT/broken`` it fails, as an engine that
cannot start does; with ``CHECKPOINT/stubborn`` it and its child ignore SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ANSWER = ["In ", "large ", "mounds."]
METRICS = """\
# HELP gem_steps_total Engine steps by kind.
# TYPE gem_steps_total counter
gem_steps_total{engine="0",kind="embed"} 5.0
gem_steps_total{engine="0",kind="generate"} 2.0
gem_steps_total{engine="0",kind="mixed"} 7.0
gem_steps_total{engine="1",kind="mixed"} 1.0
"""


def embedding(text: str) -> list[float]:
    """Counts of letters, of length one: texts that share words are near."""
    counts = [float(text.lower().count(chr(ord("a") + i))) for i in range(26)]
    norm = sum(count**2 for count in counts) ** 0.5 or 1.0
    return [count / norm for count in counts]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.reply(METRICS.encode() if self.path == "/metrics" else b"")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/embeddings":
            texts = body["input"]
            data = [{"index": i, "embedding": embedding(text)} for i, text in enumerate(texts)]
            usage = {"prompt_tokens": sum(len(text.split()) for text in texts)}
            self.reply(json.dumps({"data": data[::-1], "usage": usage}).encode())
        else:
            events: list[dict[str, Any]] = [
                {"choices": [{"delta": {"content": piece}}]} for piece in ANSWER
            ]
            events.append({"choices": [], "usage": {"completion_tokens": len(ANSWER)}})
            stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            self.reply(f"{stream}data: [DONE]\n\n".encode())

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    checkpoint = Path(sys.argv[2])
    if (checkpoint / "broken").exists():
        sys.exit("no engine today")
    if (checkpoint / "stubborn").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    part = checkpoint / "pids.new"
    part.write_text(f"{os.getpid()} {child.pid}")
    part.rename(checkpoint / "pids")
    if (checkpoint / "slow").exists():
        time.sleep(600)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
