"""Ask for a whole answer and print it."""

from endpoint import add_question, answer, connect, finished, job_input, parser, run, text_of


def main() -> None:
    command_line = parser(__doc__)
    add_question(command_line)
    args = command_line.parse_args()

    with connect() as client:
        job = answer(client.post("/runsync", json={"input": job_input(args)}))
        # /runsync waits 90 s at most, and a worker that starts from nothing can take longer.
        job = finished(client, job)
    print(text_of(job))


if __name__ == "__main__":
    run(main)
