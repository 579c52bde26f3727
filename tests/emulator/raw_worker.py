"""A worker without the SDK: starts in no time, and is as rude as its arguments ask.

Arguments: ignore-term, fail-start, unhealthy, spawn (a child in a session of its own).
A job's input: exit (code), stop_pod, hold (never answer); anything else is echoed.
"""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from urllib.parse import urlsplit


def call(template: str, job_id: str = "", body: object = None) -> tuple[int, bytes]:
    pod = os.environ["RUNPOD_POD_ID"]
    url = urlsplit(template.replace("$RUNPOD_POD_ID", pod).replace("$ID", job_id or pod))
    assert url.hostname
    connection = http.client.HTTPConnection(url.hostname, url.port)
    data = None if body is None else json.dumps(body)
    connection.request("POST" if data else "GET", f"{url.path}?{url.query}", data)
    response = connection.getresponse()
    return response.status, response.read()


if "ignore-term" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "fail-start" in sys.argv:
    print("cannot start", flush=True)
    sys.exit(7)
if "unhealthy" in sys.argv:
    call(os.environ["RUNPOD_WEBHOOK_PING"] + "?status=unhealthy&check=disk&reason=full")
    sys.exit(1)
if "spawn" in sys.argv:
    subprocess.Popen(["sleep", "1000"])
    subprocess.Popen(["sleep", "1001"], start_new_session=True)
print(json.dumps({"requestId": "r1", "message": "a message", "level": "INFO"}), flush=True)
print("10%\r20%\rdone", flush=True)
print("no end", end="", flush=True)
print(file=sys.stderr, flush=True)

while True:
    status, answer = call(os.environ["RUNPOD_WEBHOOK_GET_JOB"] + "&job_in_progress=0")
    if status != 200:
        continue
    job = json.loads(answer)
    ask = job["input"]
    if "exit" in ask:
        print("leaving without a line end", end="", flush=True)
        os._exit(ask["exit"])
    while "hold" in ask:
        time.sleep(1)
    result = {"output": ask} | ({"stopPod": True} if "stop_pod" in ask else {})
    call(os.environ["RUNPOD_WEBHOOK_POST_OUTPUT"] + "&isStream=false", job["id"], result)
