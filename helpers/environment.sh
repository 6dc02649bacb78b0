# Sourced by helpers/start and helpers/test: find a Python, make a virtual environment. POSIX sh.
# They set `here`, the checkout, and `venv`, the environment.
# shellcheck shell=sh disable=SC2154

say() { echo "${0##*/}: $*" >&2; }

# Set `python` to an interpreter that is new enough and can make environments, or fail.
find_python() {
    for python in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
        "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    done
    return 1
}

# Prepare the machine through helpers/setup-host: as root, or through sudo; else say what root would have to do.
# Never fails: what is still missing then shows in the next step, which says so.
prepare_host() { # ARGUMENTS of setup-host
    lacking=$(sh "$here/helpers/setup-host" --print "$@") || return 0
    [ "$lacking" ] || return 0
    if [ "$(id -u)" = 0 ]; then
        become=''
    elif command -v sudo >/dev/null && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
        become=sudo
    else
        say "this machine lacks something; an administrator can run: sh helpers/setup-host $*"
        printf '%s\n' "$lacking" | sed 's/^/    /' >&2
        return 0
    fi
    say "this machine lacks something; running as root${become:+, through sudo}:"
    printf '%s\n' "$lacking" | sed 's/^/    /' >&2
    $become sh "$here/helpers/setup-host" "$@" >/dev/null || say "that did not work; going on without it"
}

# Make the environment `venv` and run pip in it, unless the stamp says that just this was done before.
make_environment() { # WHAT-IT-WAS-MADE-FROM PIP-ARGUMENTS…
    stamp=$1
    shift
    [ "$(cat "$venv/stamp" 2>/dev/null)" = "$stamp" ] && [ -x "$venv/bin/python3" ] && return
    find_python || { say "no Python 3.11 or later with venv; on Debian and Ubuntu: apt install python3-venv" && exit 1; }
    say "making the Python environment $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
    "$venv/bin/python3" -m pip install --quiet --disable-pip-version-check "$@" ||
        { say "pip could not install the packages: is a package index reachable?" && exit 1; }
    echo "$stamp" > "$venv/stamp"
}
