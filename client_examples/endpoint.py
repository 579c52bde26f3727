"""What the Python examples share: where the endpoint is, what a job asks, what errors say."""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx

Job = dict[str, Any]
RUNNING = {"IN_QUEUE", "IN_PROGRESS"}
ENVIRONMENT = """\
environment:
RUNPOD_API_KEY       your key (required)
RUNPOD_ENDPOINT_ID   the endpoint's id (required)
RUNPOD_BASE_URL      default: https://api.runpod.ai/v2; the emulator: http://127.0.0.1:8008/v2"""


class Problem(Exception):
    """Whatever went wrong, as one sentence for the user. `status` is the HTTP status, if any."""

    def __init__(self, sentence: str, status: int = 0) -> None:
        super().__init__(sentence)
        self.status = status


def parser(description: str | None) -> argparse.ArgumentParser:
    """The start of every example's command line."""
    plain = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        description=description, epilog=ENVIRONMENT, formatter_class=plain
    )


def add_question(command_line: argparse.ArgumentParser) -> None:
    """What most examples ask for: a prompt and the options of the answer."""
    command_line.add_argument("prompt")
    command_line.add_argument("--chat", action="store_true", help="as the user's turn of a chat")
    add_options(command_line)


def add_options(command_line: argparse.ArgumentParser) -> None:
    """`-o NAME=VALUE`, as often as wanted: the job's `options`."""
    text = "a sampling option such as max_tokens=64 or temperature=0.2; may be repeated"
    command_line.add_argument(
        "-o", dest="options", metavar="NAME=VALUE", action="append", type=_option, help=text
    )


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not like max_tokens=64")
    try:
        return name, json.loads(value, parse_constant=str)
    except ValueError:
        return name, value


def job_input(
    args: argparse.Namespace, answer_type: str = "normal", prompt: str = ""
) -> dict[str, Any]:
    """The job's `input` for the command line; `prompt` where that names a file of them."""
    shared = {"answerType": answer_type, "options": dict(args.options or [])}
    if "chat" in args and args.chat:
        return {"messages": [{"role": "user", "content": args.prompt}], **shared}
    return {"prompt": prompt or args.prompt, **shared}


def address() -> tuple[str, str]:
    """The endpoint's URL and the key. Ends the program with code 2 where one is not given."""
    key, endpoint_id = os.getenv("RUNPOD_API_KEY", ""), os.getenv("RUNPOD_ENDPOINT_ID", "")
    base = os.getenv("RUNPOD_BASE_URL") or "https://api.runpod.ai/v2"
    sentence = ""
    if not key or not endpoint_id:
        sentence = "Set RUNPOD_API_KEY and RUNPOD_ENDPOINT_ID in the environment; see --help."
    elif not (key.isascii() and key.isprintable() and " " not in key):
        sentence = "RUNPOD_API_KEY holds a space, a line break or another character no key has."
    if sentence:
        print(sentence, file=sys.stderr)
        raise SystemExit(2)
    return f"{base.rstrip('/')}/{endpoint_id}", key


def connect() -> httpx.Client:
    """A client for `/run`, `/runsync` and so on of the endpoint."""
    url, key = address()
    # A /runsync may keep us waiting for 90 s.
    timeout = httpx.Timeout(120, connect=10)
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=timeout)


def answer(response: httpx.Response) -> Job:
    """The endpoint's JSON answer. Raises Problem for an HTTP error, or for no JSON."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not response.is_success:
        said = body.get("error", "") if isinstance(body, dict) else ""
        raise Problem(refusal(response.status_code, said), response.status_code)
    if not isinstance(body, dict):
        raise Problem("The answer is not Runpod's; look at RUNPOD_BASE_URL.")
    return body


def refusal(status: int, said: str) -> str:
    """One sentence for an HTTP status of 400 or more; `said` are the endpoint's own words."""
    if status in (401, 403):
        sentence = "The endpoint does not accept this RUNPOD_API_KEY"
    elif status == 404:
        sentence = "There is no such endpoint or job; look at RUNPOD_ENDPOINT_ID"
    elif status == 429:
        sentence = "The endpoint has too many requests; try again later"
    elif status >= 500:
        sentence = "The endpoint is in trouble; try again later"
    else:
        sentence = "The endpoint refused the request"
    return f"{sentence} (HTTP {status}){f': {said}' if said else '.'}"


def back_off(first: float = 0.25, most: float = 10.0) -> Iterator[float]:
    """Seconds to wait, growing, each with a random part so that many clients spread out."""
    while True:
        yield random.uniform(first / 2, first)
        first = min(first * 1.5, most)


def finished(client: httpx.Client, job: Job) -> Job:
    """The job once it has ended, in whatever way."""
    for pause in back_off():
        if job["status"] not in RUNNING:
            break
        time.sleep(pause)
        job = answer(client.get(f"/status/{job['id']}"))
    return job


def news_of(chunk: dict[str, Any], seen: int) -> str:
    """What a chunk adds to the `seen` characters before it.

    A chunk that may have come already, since the worker had to send it again, says by its
    `offset` where its text belongs.
    """
    text: str = chunk["text"]
    return text[max(0, seen - chunk.get("offset", seen)) :]


def text_of(job: Job) -> str:
    """The whole text of a finished job. Raises Problem for one that is not COMPLETED."""
    if job["status"] != "COMPLETED":
        reason = job.get("error") or "no reason given"
        raise Problem(f"Job {job['id']} ended {job['status']}: {reason}")
    return "".join(chunk["text"] for chunk in job["output"])


def run(main: Callable[[], None]) -> None:
    """Run an example; what goes wrong is one sentence on stderr and exit code 1."""
    try:
        main()
    except Problem as problem:
        sys.exit(str(problem))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        sys.exit(f"The endpoint cannot be reached: {error or type(error).__name__}")
    except KeyboardInterrupt:
        sys.exit(130)
