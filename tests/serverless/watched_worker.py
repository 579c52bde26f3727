"""The real worker, which also writes to the file WATCHED what vLLM's scheduler says."""

import json
import os
import sys
from pathlib import Path

from worker import __main__, configuration, modes, startup


def main() -> int:
    start = startup.start
    told = Path(os.environ["WATCHED"]).open("a", encoding="utf-8")  # noqa: SIM115 - until the end

    async def start_watched(settings, handler):
        engine = await start(settings, handler)
        processor = engine._llm.output_processor
        heard = processor.update_scheduler_stats

        def hear(stats) -> None:
            if stats is not None:
                line = {
                    "running": stats.num_running_reqs,
                    "waiting": stats.num_waiting_reqs,
                    "used": stats.kv_cache_usage,
                    "preempted": stats.prefix_cache_stats.preempted_requests,
                }
                told.write(json.dumps(line) + "\n")
                told.flush()
            heard(stats)

        processor.update_scheduler_stats = hear
        return engine

    startup.start = start_watched
    return __main__.main(lambda: modes.run(configuration.load(os.environ), os.environ))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
