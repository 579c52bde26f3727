#!/bin/sh
# Make models/tiny-gguf/tiny-f32.gguf of models/tiny, for the tests of llama.cpp.
# Run by `make setup`; silent when it is there and neither the model nor the script has changed.
set -eu
cd "$(dirname "$0")/.."

target=models/tiny-gguf/tiny-f32.gguf
stamp=.cache/tiny-gguf
wanted=$(cat models/to_gguf.py models/tiny/*.json models/tiny/*.jinja models/tiny/*.safetensors | cksum)

if [ -f $target ] && [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
printf 'setup: making %s (22 MB)\n' $target
mkdir -p "${target%/*}" "${stamp%/*}"
part=$target.$$
trap 'rm -f "$part"' EXIT
.venv/bin/python -m models.to_gguf models/tiny "$part"
mv "$part" $target
printf '%s' "$wanted" >$stamp
