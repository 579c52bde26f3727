"""Cancel jobs by their ids, or all that still wait in the queue."""

from endpoint import Problem, answer, connect, parser, run


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("job", nargs="*", help="the id that /run gave")
    command_line.add_argument(
        "--queued", action="store_true", help="cancel every job that no worker has taken yet"
    )
    args = command_line.parse_args()
    if not args.job and not args.queued:
        command_line.error("name a job, or say --queued")

    failed = None
    with connect() as client:
        if args.queued:
            print(answer(client.post("/purge-queue"))["removed"], "queued jobs cancelled")
        for job in args.job:
            try:
                # A job that had ended before keeps its status.
                print(job, answer(client.post(f"/cancel/{job}"))["status"])
            except Problem as problem:
                failed = problem
                print(job, problem)
    if failed:
        raise failed


if __name__ == "__main__":
    run(main)
