#!/bin/sh
# Install the pinned OpenLLM into .cache/openllm, a virtual environment of its own (200 MB).
# Quick when it is there already. Run by the build of an image for MODEL=openllm:<tag>, and by
# the tests.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(dirname "$here")/.cache/openllm
development=$(dirname "$here")/.venv/bin # what `make setup` made; an image has none

stop() { printf 'openllm: %s\n' "$*" >&2; exit 1; }

wanted=$(cat "$here/openllm.txt" "$here/openllm.sh" | cksum)
if [ "$(cat "$folder/.installed" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
rm -rf "$folder"
if [ -x "$development/uv" ]; then
    python=$development/python
    install() { "$development/uv" pip install --quiet --python "$folder/bin/python" "$@"; }
else
    python=python3
    install() {
        python3 -m pip --python "$folder/bin/python" install --quiet \
            --disable-pip-version-check --no-cache-dir --no-compile "$@"
    }
fi
"$python" -m venv --without-pip "$folder" || stop "$python can't make a virtual environment"
install --no-deps -r "$here/openllm.txt" || stop "the packages above could not be installed"

# `openllm --help` works even where no sub-command does.
trial=$(mktemp -d)
BENTOML_DO_NOT_TRACK=True OPENLLM_HOME=$trial OPENLLM_TEST_REPO=$trial \
    "$folder/bin/openllm" model list >"$trial/log" 2>&1 || {
    cat "$trial/log" >&2
    stop "it was installed but does not run: see above"
}
rm -rf "$trial"
printf '%s' "$wanted" >"$folder/.installed"
