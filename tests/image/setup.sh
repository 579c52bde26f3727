#!/bin/sh
# Make what tests/image needs: a container engine, and a stand-in for vLLM's official image.
# Run by `make image-test`, after `make setup`. Everything lies in .cache/image, podman's storage
# too; all that is written elsewhere are Debian packages, only when podman is missing, and a cgroup.
# Quick when nothing changed. Where it can't work, it says why, and the tests skip with that.
set -eu
cd "$(dirname "$0")/../.."

cache=$PWD/.cache/image
root=localhost/tripod-test/root
base=localhost/tripod-test/base
newer=localhost/tripod-test/newer
llama=localhost/tripod-test/llama

say() { printf 'image-test: %s\n' "$*"; }
stop() { say "$*" >&2; exit 1; }
skip() {
    say "skipped: $*"
    printf '%s\n' "$*" >"$cache/skip"
    exit 0
}

mkdir -p "$cache"
rm -f "$cache/skip"

# ---- the engine: docker if one answers, else podman with a configuration and storage of its own

[ "$(id -u)" = 0 ] || skip "it enters the network of containers, which only root may"
if docker --version 2>/dev/null | grep -q '^Docker' && docker info >/dev/null 2>&1; then
    engine=docker
else
    engine=podman
    missing=
    for package in podman runc mmdebstrap ssh:openssh-client; do
        command -v "${package%%:*}" >/dev/null || missing="$missing ${package##*:}"
    done
    if [ -n "$missing" ]; then
        command -v apt-get >/dev/null || skip "no container engine: install docker, or$missing"
        say "installing Debian's$missing"
        # shellcheck disable=SC2086
        { apt-get update -qq && apt-get install -qq -y --no-install-recommends $missing; } \
            >"$cache/apt.log" 2>&1 || stop "apt-get failed: see $cache/apt.log"
    fi
    cat >"$cache/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "$cache/run/libpod"
image_copy_tmp_dir = "$cache/run"
CONF
    cat >"$cache/storage.conf" <<CONF
[storage]
driver = "overlay"
graphroot = "$cache/storage"
runroot = "$cache/run"
CONF
    export CONTAINERS_CONF="$cache/containers.conf" CONTAINERS_STORAGE_CONF="$cache/storage.conf"
    # Containers get the cores that nobody else wants: Linux 6.18 lets a cgroup with vLLM's
    # processes, which spin, keep two cores from all others, an ssh client's too, for seconds.
    for cpu in /sys/fs/cgroup/cpu /sys/fs/cgroup; do
        [ ! -w $cpu/cgroup.procs ] || mkdir -p $cpu/libpod_parent
        [ ! -w $cpu/libpod_parent/cpu.idle ] || echo 1 >$cpu/libpod_parent/cpu.idle
    done
    podman info >/dev/null 2>"$cache/podman.log" ||
        skip "podman does not work here: $(tail -n 1 "$cache/podman.log")"
    # What an interrupted run left, and images that later builds have replaced.
    { podman rm --all --force --time 0 && podman image prune --force; } >/dev/null
fi
printf '%s\n' "$engine" >"$cache/engine"

# ---- the tools that check the files, in an environment of their own

python=$PWD/.venv/bin/python
[ -x "$python" ] || stop ".venv is missing: run make setup first"

if ! cmp -s tests/image/tools.txt "$cache/tools/installed"; then
    say "installing $(grep -c == tests/image/tools.txt) tools"
    rm -rf "$cache/tools"
    "$python" -m venv "$cache/tools"
    "$cache/tools/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
        -r tests/image/tools.txt 2>"$cache/tools.log" ||
        stop "the tools could not be installed: see $cache/tools.log"
    cp tests/image/tools.txt "$cache/tools/installed"
fi

# ---- wheels, fetched with pip as this machine has it configured; the builds see only this folder

pins() { sort -u requirements/cpu.txt requirements/image.txt; }
wanted=$({ pins; cat tests/image/Dockerfile.base tests/image/setup.sh deploy/bases.Dockerfile; } | cksum)
if [ "$(cat "$cache/base/built-$engine" 2>/dev/null)" = "$wanted" ] &&
    $engine image inspect $base $llama >/dev/null 2>&1; then
    say "nothing to do ($engine, $base, $llama)"
    exit 0
fi

begin=$(date +%s)
context=$cache/base
mkdir -p "$context/wheels"
if [ $engine = docker ]; then
    root=debian:bookworm-slim
    newer=debian:forky-slim
elif ! podman image inspect $root $newer >/dev/null 2>&1; then
    say "making two Debians in the background"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    # shellcheck disable=SC2016 # apt-get expands that
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -n 1)
    {
        mmdebstrap --quiet --variant=minbase bookworm "$cache/root.tar" &&
            # A mirror may be weeks behind with a suite that changes daily.
            mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
                forky "$cache/newer.tar" "deb [signed-by=$keyring] $mirror forky main"
    } >"$cache/root.log" 2>&1 &
    debian=$!
fi

fetch() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
        --only-binary :all: --dest "$context/wheels" "$@" 2>>"$cache/wheels.log"
}
: >"$cache/wheels.log"
torch=$(grep '^torch==' requirements/cpu.txt)
say "fetching $(pins | grep -c ==) wheels (650 MB)"
fetch "$torch" || fetch "$torch" --index-url "${TORCH_INDEX-}" ||
    stop "$torch could not be fetched: see $cache/wheels.log"
pins | grep -v '^torch==' >"$cache/wheels.txt"
fetch -r "$cache/wheels.txt" "$(grep '^uv==' requirements/dev.txt)" ||
    stop "the wheels could not be fetched: see $cache/wheels.log"

# The newer Debian has a newer Python, and image.txt is installed there too.
grep -v 'python_version < "3.14"' requirements/image.txt >"$cache/newer.txt"
fetch --python-version 3.14 -r "$cache/newer.txt" ||
    stop "the wheels could not be fetched: see $cache/wheels.log"

if [ -n "${debian-}" ]; then
    wait "$debian" || stop "mmdebstrap failed: see $cache/root.log"
    podman import --quiet "$cache/root.tar" $root >/dev/null
    podman import --quiet "$cache/newer.tar" $newer >/dev/null
    rm "$cache/root.tar" "$cache/newer.tar"
fi

# ---- the base of llama.cpp, which is a real one, and the stand-in for vLLM's

build() {
    tag=$1
    shift
    [ $engine = docker ] || set -- --pull=never --layers --format docker "$@"
    $engine build --network host --tag "$tag" "$@" >"$cache/${tag##*/}.log" 2>&1 ||
        stop "$tag was not built: $(tail -n 1 "$cache/${tag##*/}.log"); see $cache/${tag##*/}.log"
}

say "building $llama"
build $llama --build-arg DEBIAN=$newer --target llama-cpu --file deploy/bases.Dockerfile "$context"

say "building $base"
cp requirements/cpu.txt "$context/cpu.txt"
build $base --build-arg ROOT=$root --file tests/image/Dockerfile.base "$context"
printf '%s' "$wanted" >"$context/built-$engine"
say "done in $(($(date +%s) - begin)) s"
