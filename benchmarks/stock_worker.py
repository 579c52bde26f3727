"""Tripod's handler and engine on the runpod SDK's own job loop, to measure what JobLoop changes."""

import os
import sys

from worker import __main__, settings, stock_loop

if __name__ == "__main__":
    code = __main__.main(lambda: stock_loop.serve(settings.load(os.environ)))
    sys.stdout.flush()
    os._exit(code)
