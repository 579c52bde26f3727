"""The real worker, which takes the installed SDK for one that it does not know."""

import os
import sys

from worker import __main__, modes, settings, stock_loop

if __name__ == "__main__":
    stock_loop.SDK_ATTRIBUTES = (*stock_loop.SDK_ATTRIBUTES, "something_new")
    code = __main__.main(lambda: modes.run(settings.load(os.environ), os.environ))
    sys.stdout.flush()
    os._exit(code)
