#!/bin/sh
# Install the pinned CPU environment into .venv and llama.cpp into .cache, and make the bundled GGUF.
# Needs Python 3.11 and nothing else.
# Run by `make setup`; does nothing when .venv already holds what the pins ask for.
set -eu

stamp=.venv/.installed
pins() { cat requirements/cpu.txt requirements/dev.txt; }
wanted=$({ pins; cat requirements/setup.sh requirements/llama.sh; } | cksum)

say() { printf 'setup: %s\n' "$*"; }
stop() { printf 'setup: %s\n' "$*" >&2; exit 1; }

if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then
    sh requirements/llama.sh
    sh requirements/gguf.sh
    say "nothing to do"
    exit 0
fi

command -v "$PYTHON" >/dev/null 2>&1 || stop "$PYTHON is missing: install Python 3.11, or name it with PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || stop "$PYTHON is not Python 3.11: name it with PYTHON=/path/to/python3.11"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || stop "$PYTHON has no venv module: install it (on Debian: apt-get install python3.11-venv)"
[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || stop "vLLM's CPU build runs on Linux x86-64 only, and this is $(uname -s) $(uname -m)"
grep -qw avx2 /proc/cpuinfo || stop "vLLM's CPU build needs a processor with AVX2"
"$PYTHON" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || stop "vLLM's CPU build needs libnuma: install it (on Debian: apt-get install libnuma1)"
free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
[ "$free_mb" -gt 4000 ] || stop "the environment needs 4 GB of disk, and $free_mb MB are free here"

if ! [ -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "making .venv with $("$PYTHON" --version)"
    rm -rf .venv
    "$PYTHON" -m venv .venv
fi

torch=$(grep '^torch==' requirements/cpu.txt)
say "installing $torch (190 MB)"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
# torch's own needs are pinned in cpu.txt; --no-deps keeps pip from resolving them again.
if ! pip install --quiet --no-deps "$torch" 2>.venv/torch.log; then
    say "not in pip's configured places; asking $TORCH_INDEX"
    pip install --no-deps "$torch" --index-url "$TORCH_INDEX" || {
        cat .venv/torch.log >&2
        stop "$torch could not be installed: see above"
    }
fi

say "installing $(pins | sort -u | grep -c '==') pinned packages"
pip install --quiet "$(grep '^uv==' requirements/dev.txt)"
# The pins are complete and leave packages out on purpose, so nothing is resolved here. What is
# compiled now, no start of vLLM compiles again: it imports some 4,000 files in each of its processes.
.venv/bin/uv pip install --python .venv/bin/python --no-deps --compile-bytecode \
    -r requirements/cpu.txt -r requirements/dev.txt || stop "the packages above could not be installed"

rm -f .cache/llama.cpp/skip
sh requirements/llama.sh
sh requirements/gguf.sh

printf '%s' "$wanted" >$stamp
say "done"
