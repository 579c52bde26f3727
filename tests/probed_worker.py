"""The real worker, which also tells on the socket PROBE how many requests its engine works on."""

import asyncio
import os
import sys

from worker import __main__, configuration, modes, startup


def main() -> int:
    start = startup.start

    async def start_with_probe(settings, handler):
        engine = await start(settings, handler)

        async def tell(_, writer: asyncio.StreamWriter) -> None:
            writer.write(str(engine.unfinished()).encode())
            await writer.drain()
            writer.close()

        await asyncio.start_unix_server(tell, os.environ["PROBE"])
        return engine

    startup.start = start_with_probe
    return __main__.main(lambda: modes.run(configuration.load(os.environ), os.environ))


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main())
