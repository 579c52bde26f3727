#!/bin/sh
# Put llama.cpp's llama-server and ggml-rpc-server into .cache/llama.cpp/bin, from Debian's packages
# and as any user: they are unpacked there with the libraries they need; the system stays as it is.
# Run by `make setup`; silent when they are there. Where it can't work, it says why, and the tests
# of llama.cpp are skipped with that.
set -eu
cd "$(dirname "$0")/.."

home=$PWD/.cache/llama.cpp
suites="forky sid"
packages="llama.cpp-tools llama.cpp-tools-extra libggml0-backend-rpc"

if command -v llama-server >/dev/null || [ -x "$home/bin/llama-server" ] || [ -f "$home/skip" ]; then
    exit 0
fi
mkdir -p "$home"

say() { printf 'setup: %s\n' "$*"; }
skip() {
    printf '%s\n' "$*" >"$home/skip"
    say "no llama.cpp, and its tests are skipped: $*"
    exit 0
}

command -v apt-get >/dev/null ||
    skip "llama-server is not on PATH, and only with apt can it be fetched"
for keyring in /usr/share/keyrings/debian-archive-keyring.gpg /usr/share/keyrings/debian-archive-keyring.pgp; do
    [ -f "$keyring" ] && break
done
[ -f "$keyring" ] || skip "llama-server is not on PATH, and debian-archive-keyring is not installed"

work=$home/fetch
rm -rf "$work"
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/root" "$work/lib" "$work/bin"
trap 'rm -rf "$work"' EXIT
: >"$work/status"

apt() {
    apt-get -qq -o Dir::State="$work" -o Dir::State::lists="$work/lists" \
        -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" \
        -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
        -o APT::Sandbox::User= "$@" >>"$home/apt.log" 2>&1
}

# The mirrors are those that apt is configured with here, even where it was never updated.
fetch() {
    # shellcheck disable=SC2016 # apt-get expands that
    mirrors=$(apt-get indextargets --no-release-info --format '$(REPO_URI)' 'Created-By: Packages')
    for mirror in $(printf '%s\n' "$mirrors" | sort -u); do
        for suite in $suites; do
            printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$mirror" "$suite" >"$work/sources.list"
            # shellcheck disable=SC2086
            apt update &&
                apt install --download-only --yes --no-install-recommends $packages && return
        done
    done
    return 1
}

say "fetching llama.cpp from Debian's packages (30 MB)"
: >"$home/apt.log"
fetch || skip "apt could not fetch $packages: see .cache/llama.cpp/apt.log, and remove .cache/llama.cpp/skip to try again"

for package in "$work"/cache/archives/*.deb; do
    dpkg-deb --extract "$package" "$work/root"
done
libraries=$work/root/usr/lib/x86_64-linux-gnu
# ggml looks for its backends beside the executable, which is ld.so as it is started below.
cp -P "$libraries"/*.so* "$libraries"/llama/*.so* "$libraries"/ggml/backends*/*.so "$work/lib"
for program in usr/bin/llama-server usr/libexec/x86_64-linux-gnu/llama/bin/ggml-rpc-server; do
    name=${program##*/}
    cp "$work/root/$program" "$work/lib"
    # By way of ld.so, for they need a newer libc than this machine may have.
    cat >"$work/bin/$name" <<PROGRAM
#!/bin/sh
lib=\$(dirname "\$(readlink -f "\$0")")/../lib
exec "\$lib/ld-linux-x86-64.so.2" --argv0 "\$0" --library-path "\$lib" "\$lib/$name" "\$@"
PROGRAM
    chmod +x "$work/bin/$name"
done
version=$("$work/bin/llama-server" --version 2>&1 | sed -n 's/^version: //p')
[ -n "$version" ] || skip "the llama-server that was fetched does not run on this machine"
rm -rf "${home:?}/lib" "${home:?}/bin"
mv "$work/lib" "$home/lib"
mv "$work/bin" "$home/bin"
say "llama.cpp $version"
