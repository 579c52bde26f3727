#!/bin/sh
# What the image runs below tini. `exec` makes the worker the process that gets SIGTERM.
exec python3 -m worker "$@"
