"""MODE_TO_RUN → what runs."""

from worker.settings import Settings


def run(settings: Settings) -> int:
    """Run the mode until it ends; returns the exit code of the process."""
    from worker import serverless

    return serverless.serve(settings)
