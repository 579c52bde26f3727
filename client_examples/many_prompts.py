"""Answer many prompts, some at a time: one prompt a line in, one JSON object a line out."""

import json
import sys
import time
from argparse import FileType
from concurrent.futures import ThreadPoolExecutor

import httpx
from endpoint import (
    Job,
    Problem,
    add_options,
    answer,
    back_off,
    connect,
    finished,
    job_input,
    parser,
    run,
    text_of,
)
from rich.console import Console
from rich.progress import track

TRIES = 5


def submit(client: httpx.Client, question: Job) -> Job:
    """A new job. Tried again only where the endpoint surely took none: 429."""
    for attempt, pause in enumerate(back_off(), start=1):
        try:
            return answer(client.post("/runsync", json={"input": question}))
        except Problem as problem:
            if problem.status != 429 or attempt == TRIES:
                raise
            time.sleep(pause)
    raise AssertionError("back_off() never ends")


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("file", type=FileType(encoding="utf-8"), help="- for stdin")
    command_line.add_argument(
        "--at-once", type=int, choices=range(1, 101), default=16, metavar="N", help="1 to 100"
    )
    add_options(command_line)
    args = command_line.parse_args()
    prompts = [line.rstrip("\n") for line in args.file if line.strip()]

    with connect() as client, ThreadPoolExecutor(args.at_once) as pool:

        def result(prompt: str) -> dict[str, str]:
            try:
                job = submit(client, job_input(args, prompt=prompt))
                return {"prompt": prompt, "text": text_of(finished(client, job))}
            except (Problem, httpx.HTTPError) as error:
                return {"prompt": prompt, "error": str(error) or type(error).__name__}

        failed, results = 0, pool.map(result, prompts)  # in the order of the prompts
        try:
            for line in track(results, "prompts", len(prompts), console=Console(stderr=True)):
                print(json.dumps(line, ensure_ascii=False), flush=True)
                failed += "error" in line
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        sys.exit(f"{failed} of {len(prompts)} prompts failed; their lines hold the error.")


if __name__ == "__main__":
    run(main)
