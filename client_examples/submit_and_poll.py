"""Submit a job, ask for its status with growing pauses, and give up (and cancel it) in time."""

import sys
import time

import httpx
from endpoint import (
    RUNNING,
    Job,
    Problem,
    add_question,
    answer,
    back_off,
    connect,
    job_input,
    parser,
    run,
    text_of,
)


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def ask_again(client: httpx.Client, job: Job) -> Job:
    """The job as it is now, or as it was where the endpoint is in trouble for a moment."""
    try:
        now = answer(client.get(f"/status/{job['id']}"))
    except httpx.TransportError as error:
        say(f"not reached ({type(error).__name__}), trying again")
        return job
    except Problem as problem:
        if problem.status != 429 and problem.status < 500:
            raise
        say(f"HTTP {problem.status}, trying again")
        return job
    if now["status"] != job["status"]:
        say(f"{now['id']} {now['status']}")
    return now


def main() -> None:
    command_line = parser(__doc__)
    add_question(command_line)
    for name, default, meaning in (
        ("--wait", 900, "for the job's end"),
        ("--run-limit", 600, "that the job may run, once a worker has it"),
    ):
        text = f"{meaning}; default: {default}"
        command_line.add_argument(name, type=int, default=default, metavar="SECONDS", help=text)
    args = command_line.parse_args()

    with connect() as client:
        give_up = time.monotonic() + args.wait
        policy = {"executionTimeout": args.run_limit * 1000}
        job = answer(client.post("/run", json={"input": job_input(args), "policy": policy}))
        say(f"{job['id']} {job['status']}")
        for pause in back_off():
            if job["status"] not in RUNNING:
                break
            if time.monotonic() + pause > give_up:
                answer(client.post(f"/cancel/{job['id']}"))
                raise Problem(f"Job {job['id']} took longer than {args.wait} s and is cancelled.")
            time.sleep(pause)
            job = ask_again(client, job)
    print(text_of(job))


if __name__ == "__main__":
    run(main)
