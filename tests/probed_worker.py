"""The real worker, which also tells on the socket PROBE how many requests its engine works on."""

import asyncio
import os
import sys

from worker import __main__, engines, modes, settings


def main() -> int:
    start = engines.start

    async def start_with_probe(settings):
        engine = await start(settings)

        async def tell(_, writer: asyncio.StreamWriter) -> None:
            writer.write(str(engine.unfinished()).encode())
            await writer.drain()
            writer.close()

        await asyncio.start_unix_server(tell, os.environ["PROBE"])
        return engine

    engines.start = start_with_probe
    return __main__.main(lambda: modes.run(settings.load(os.environ), os.environ))


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())
