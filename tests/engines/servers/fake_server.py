"""`mlc_llm serve` and TabbyAPI as their documentation describes them, for what can't be had here.

Started under the name of one of them. It checks its command line as theirs does, is ready after
LOADING seconds, and tells in its answers which fields a request held. With HANGS it leaves its
first caller without an answer.
"""

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BEGIN = time.monotonic()
LOADING = float(os.environ.get("LOADING", "0.5"))
HANGS = iter([True] if os.environ.get("HANGS") else [])


def arguments(name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(name)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    if name == "mlc_llm":
        parser = argparse.ArgumentParser(name)
        serve = parser.add_subparsers(required=True).add_parser("serve")
        serve.add_argument("model")
        serve.add_argument("--host", default="127.0.0.1")
        serve.add_argument("--port", type=int, default=8000)
        serve.add_argument("--model-lib", required=True)
        serve.add_argument("--mode", choices=["local", "interactive", "server"])
        serve.add_argument("--overrides", default="")
        serve.add_argument("--speculative-mode", default="disable")
    else:
        parser.add_argument("--model-dir")
        parser.add_argument("--model-name")
        parser.add_argument("--max-seq-len", type=int)
        parser.add_argument("--cache-size", type=int)
        parser.add_argument("--cache-mode")
        parser.add_argument("--disable-auth", type=lambda text: text == "true")
    return parser.parse_args()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name: str
    models: dict

    def do_GET(self) -> None:
        if next(HANGS, False):
            time.sleep(3600)
        ready = time.monotonic() - BEGIN > LOADING
        if self.path == "/health" and self.name == "tabbyapi":
            self.answer(200 if ready else 503, {"status": "healthy" if ready else "unhealthy"})
        elif self.path == "/v1/models" and ready:
            self.answer(200, self.models)
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path not in {"/v1/completions", "/v1/chat/completions"}:
            self.answer(404, {"detail": "Not Found"})
        elif not body.get("stream"):
            choice = {"index": 0, "text": json.dumps(body), "finish_reason": "stop"}
            self.answer(200, {"object": "text_completion", "choices": [choice]})
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b": ping - 2026-01-01\r\n\r\n")
            text = json.dumps(body)
            key = "text" if "prompt" in body else "delta"
            parts = [text[:10], text[10:]]
            for part in parts:
                piece = part if key == "text" else {"content": part}
                self.event({"choices": [{"index": 0, key: piece, "finish_reason": None}]})
            empty = "" if key == "text" else {}
            self.event({"choices": [{"index": 0, key: empty, "finish_reason": "stop"}]})
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

    def event(self, item: dict) -> None:
        self.wfile.write(f"data: {json.dumps(item)}\r\n\r\n".encode())
        self.wfile.flush()

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    name = sys.argv[0].rsplit("/", 1)[-1]
    given = arguments(name)
    print("arguments:", json.dumps(sys.argv[1:]), flush=True)
    port = given.port
    while True:
        try:
            server = ThreadingHTTPServer((given.host, port), Handler)
            server.daemon_threads = True
            break
        except OSError:
            if name != "tabbyapi":
                raise
            port += 1  # as TabbyAPI does, without a word
    Handler.name = name
    known = given.model_name if name == "tabbyapi" else given.model
    owner = "tabbyAPI" if name == "tabbyapi" else "MLC-LLM"
    entry = {"id": known, "object": "model", "created": 1, "owned_by": owner}
    Handler.models = {"object": "list", "data": [entry]}
    server.serve_forever()


if __name__ == "__main__":
    main()
