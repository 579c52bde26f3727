"""Print an answer as it comes. Ctrl-C cancels the job."""

import time

from endpoint import (
    RUNNING,
    add_question,
    answer,
    connect,
    job_input,
    news_of,
    parser,
    run,
    text_of,
)


def main() -> None:
    command_line = parser(__doc__)
    add_question(command_line)
    command_line.add_argument(
        "--run-limit", type=int, default=600, metavar="SECONDS", help="of the job; default: 600"
    )
    args = command_line.parse_args()

    with connect() as client:
        policy = {"executionTimeout": args.run_limit * 1000}
        body = {"input": job_input(args, "stream"), "policy": policy}
        job = answer(client.post("/run", json=body))["id"]
        seen = 0
        try:
            while True:
                news = answer(client.get(f"/stream/{job}"))
                for chunk in news["stream"]:
                    text = news_of(chunk["output"], seen)
                    print(text, end="", flush=True)
                    seen += len(text)
                if not news["stream"]:
                    # COMPLETED is not the only end: a client that knows no other never ends.
                    if news["status"] not in RUNNING:
                        break
                    time.sleep(0.1)
        except KeyboardInterrupt:
            client.post(f"/cancel/{job}")
            raise
        print(flush=True)
        if news["status"] != "COMPLETED":
            text_of(answer(client.get(f"/status/{job}")))


if __name__ == "__main__":
    run(main)
