#!/bin/sh
# Sets up everything that building and testing need: Debian packages, a virtual environment in .venv,
# and pykvm in it, built and editable. Quick when nothing has changed since the last time.
#
#   tools/setup.sh                      the whole set-up; `make build` runs it
#   tools/setup.sh --packages-only      the Debian packages only
#   PYTHON=python3.13 tools/setup.sh    with a Python of your choice
#   CC=clang tools/setup.sh             with a compiler of your choice
#
# Missing Debian packages are installed where apt-get can be run as root. Elsewhere the command is
# printed, and set-up goes on with what there is: without a compiler the KVM extension is left out.
set -eu
cd "$(dirname "$0")/.."

say() { echo "pykvm: $*" >&2; }
die() { say "$*"; exit 1; }

# Sets $python to the first interpreter that is new enough.
find_python() {
    for python in ${PYTHON:-/usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            return 0
        fi
    done
    return 1
}

has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }

has_python_header() {
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [ -e "$header" ]
}

has_compiler() {
    printf '#include <stdlib.h>\n#include <linux/kvm.h>\n' | ${CC:-gcc} -E - >/dev/null 2>&1
}

can_build_extension() { has_python_header && has_compiler; }

missing_packages() {
    find_python || echo python3
    has_venv || echo python3-venv
    has_python_header || echo python3-dev
    # A compiler that was asked for by name is the caller's business.
    [ -n "${CC:-}" ] || has_compiler || echo gcc libc6-dev
    # The tests rebuild the guests, boot Debian's SeaBIOS and work in clones.
    command -v ld >/dev/null || echo binutils
    command -v make >/dev/null || echo make
    command -v git >/dev/null || echo git
    [ -e /usr/share/seabios/bios.bin ] || echo seabios
}

install_packages() {
    if ! command -v apt-get >/dev/null; then
        say "missing, by their Debian names:" "$@"
        return
    fi
    if [ "$(id -u)" = 0 ]; then
        as_root=
    elif sudo -n true 2>/dev/null; then
        as_root='sudo -n'
    else
        say "please run: sudo apt-get install" "$@"
        return
    fi
    say "installing Debian packages:" "$@"
    $as_root apt-get -qq update >&2 || say "apt-get update failed; going on"
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
        -o DPkg::Lock::Timeout=120 install "$@" >&2 || say "could not install:" "$@"
}

# Prints what the installation depends on; it is repeated when this changes.
fingerprint() {
    { echo "$PWD ${CC:-} ${CFLAGS:-} $extension"
      .venv/bin/python -VV
      cat pyproject.toml setup.py tools/setup.sh ext/pykvm/*.p??
    } | cksum
}

make_environment() {
    # A working environment is kept, unless another Python is asked for.
    if [ -z "${PYTHON:-}" ] && .venv/bin/python -c 'import pip' 2>/dev/null; then
        return
    fi
    prefix='import sys; print(sys.base_prefix, sys.version)'
    if [ "$(.venv/bin/python -c "$prefix" 2>/dev/null)" != "$("$python" -c "$prefix")" ]; then
        "$python" -m venv --clear .venv
    fi
}

install_pykvm() {
    say "installing pykvm and its tools in .venv (a minute or two the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        $(.venv/bin/python -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --no-build-isolation --editable '.[dev]'
}

packages=$(missing_packages | xargs)
# shellcheck disable=SC2086 # one argument per package
[ -z "$packages" ] || install_packages $packages
[ "${1:-}" != --packages-only ] || exit 0

find_python || die "needs Python 3.11 or newer; name one with PYTHON=/path/to/python"
has_venv || die "$python cannot make virtual environments (Debian: apt-get install python3-venv)"
extension=without
if can_build_extension; then
    extension=with
    export PYKVM_REQUIRE_EXTENSION=1
fi

make_environment
stamp=.venv/pykvm-setup
if [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint)" ]; then
    install_pykvm
    fingerprint >"$stamp"
fi
[ $extension = with ] || say "there is no KVM extension: it needs a C compiler, Python.h and <linux/kvm.h>;" \
    "the emulator backend works without it"
