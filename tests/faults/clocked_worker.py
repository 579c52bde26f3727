"""The real worker, whose wall clock jumps an hour ahead at each SIGUSR2, and back at the next."""

import itertools
import os
import signal
import sys
import time

from worker import __main__, configuration, modes


def main() -> int:
    wall_clock = time.time
    offsets = itertools.cycle((3600.0, 0.0))
    offset = 0.0

    def jump(*_: object) -> None:
        nonlocal offset
        offset = next(offsets)
        print(f"the wall clock is {offset:g} s ahead", flush=True)

    time.time = lambda: wall_clock() + offset
    signal.signal(signal.SIGUSR2, jump)
    return __main__.main(lambda: modes.run(configuration.load(os.environ), os.environ))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
