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

# Let the kernel start the interpreter of SBX itself, where its path can stand in a first line: half a millisecond less
# than by the shell script that pip installs. What it runs is the package's __main__, as that script does. The one thing
# that the shell says better is that stdin is a folder.
quicken() { # SBX PACKAGE
    tail -n +3 "$1" | cmp -s - "$2/__main__.py" && return 0
    interpreter=${1%/*}/python3
    case $1$2 in *[!A-Za-z0-9/._+-]*) return 0 ;; esac
    [ ${#interpreter} -le 100 ] && [ -w "${1%/*}" ] || return 0
    { echo "#!$interpreter -ISE" && echo "__file__ = \"$2/__main__.py\"" && cat "$2/__main__.py"; } > "$1.new"
    chmod 755 "$1.new" && mv "$1.new" "$1"
}
