#!/bin/sh
# Installs dlora-edge on a 64-bit Linux device: the binary, a system user, a state directory, a systemd unit.
set -eu

usage() {
    cat <<'TEXT'
usage: install.sh [options]

  --binary PATH   the file dlora-edge, or the folder dlora-edge-dir (default: beside this script, or build/edge/MACHINE)
  --root DIR      install into DIR as into a file system of its own, for an image or a look; needs no root
  --prefix DIR    where bin/ is (default /usr/local)
  --user NAME     whom the service runs as (default dlora-edge)
  --no-verify     do not run the binary: for an image of another architecture
  --uninstall     remove binary and unit; data, adapters, settings and the user stay
  --help          this

exit codes: 0 done, 1 something else, 2 the command line is wrong, 9 cannot write, 12 this machine cannot run it
TEXT
}

fail() { # exit code, text
    echo "error: $2" >&2
    exit "$1"
}

here=$(cd "$(dirname "$0")" && pwd)
binary='' root='' prefix=/usr/local user=dlora-edge verify=yes uninstall=no
while [ $# -gt 0 ]; do
    case $1 in
    --binary | --root | --prefix | --user)
        [ $# -ge 2 ] || fail 2 "$1 needs a value; see --help"
        [ -n "$2" ] || fail 2 "$1 needs a value; see --help"
        case $1 in
        --binary) case $2 in /*) binary=$2 ;; *) binary=$PWD/$2 ;; esac ;;
        --root) root=${2%/} ;;
        --prefix) prefix=${2%/} ;;
        --user) user=$2 ;;
        esac
        shift
        ;;
    --no-verify) verify=no ;;
    --uninstall) uninstall=yes ;;
    --help | -h) usage && exit 0 ;;
    *) fail 2 "unknown option $1; see --help" ;;
    esac
    shift
done
case $prefix in
/*[!A-Za-z0-9/._-]*) fail 2 "--prefix: letters, digits and /._- only" ;;
/*) ;;
*) fail 2 "--prefix must begin with /" ;;
esac
case $user in
*[!a-z0-9_-]* | [!a-z_]*) fail 2 "--user: small letters, digits, _ and - only" ;;
esac

program=$root$prefix/bin/dlora-edge
folder=$root$prefix/lib/dlora-edge
unit=$root/etc/systemd/system/dlora-edge.service
users=$root/usr/lib/sysusers.d/dlora-edge.conf
settings=$root/etc/dlora-edge
state=$root/var/lib/dlora-edge

# systemd of this machine, not of an image; a container has the command and no systemd.
systemd() {
    if [ -z "$root" ] && [ -d /run/systemd/system ]; then systemctl "$@"; fi
}

if [ "$uninstall" = yes ]; then
    if [ ! -e "$program" ] && [ ! -e "$unit" ]; then fail 1 "dlora-edge is not installed in ${root:-/}"; fi
    systemd disable --now dlora-edge.service || true
    rm -f "$program" "$unit" "$users" || fail 9 "cannot remove $program; are you root?"
    rm -rf "$folder"
    systemd daemon-reload
    echo "removed dlora-edge; data, adapters and settings are still in $state and $settings"
    exit 0
fi

machine=$(uname -m)
case $machine in
x86_64 | aarch64) ;;
*) [ "$verify" = no ] || fail 12 "this machine is $machine; dlora-edge needs 64-bit aarch64 or x86_64: onnxruntime has no other builds" ;;
esac
# Raspberry Pi OS of 32 bits runs on a 64-bit kernel.
if [ "$verify" = yes ] && [ "$(getconf LONG_BIT 2>/dev/null || echo 64)" != 64 ]; then
    fail 12 "the kernel is 64-bit $machine but the system is 32-bit (getconf LONG_BIT); dlora-edge needs a 64-bit system"
fi

if [ -z "$binary" ]; then
    for found in "$here/dlora-edge" "$here/dlora-edge-dir" "$here/../build/edge/$machine/dlora-edge"; do
        if [ -e "$found" ]; then
            binary=$found
            break
        fi
    done
fi
[ -n "$binary" ] || fail 1 "there is no dlora-edge beside $0; say --binary PATH, or build it: make edge-binary"
[ -e "$binary" ] || fail 1 "there is no $binary; build it: make edge-binary"
start=$binary
if [ -d "$binary" ]; then start=$binary/dlora-edge; fi
[ -x "$start" ] || fail 1 "$start is not an executable file"
if [ "$verify" = yes ]; then
    said=$("$start" --version 2>&1) || fail 12 "$start does not run on this $machine machine: $(echo "$said" | head -n 1)"
    case $said in
    "dlora-edge "*) ;;
    *) fail 1 "$start is something else than dlora-edge" ;;
    esac
fi

if [ -z "$root" ]; then
    [ "$(id -u)" = 0 ] || fail 9 "installing into / needs root; run it with sudo, or say --root DIR"
    if ! id "$user" >/dev/null 2>&1; then
        useradd --system --user-group --home-dir "$state" --no-create-home --shell /usr/sbin/nologin "$user" ||
            fail 1 "cannot make the user $user"
    fi
fi

for file in dlora-edge.service train.conf; do
    [ -r "$here/$file" ] || fail 1 "there is no $file beside $0; copy it from packaging/"
done

# Beside it and then renamed: a program that runs cannot be written over, and half a program must not run.
mkdir -p "$root$prefix/bin" "$(dirname "$unit")" "$settings" "$state" 2>/dev/null || fail 9 "cannot write to ${root:-/}"
rm -rf "$folder.new" "$program.new"
if [ -d "$binary" ]; then
    { mkdir -p "$folder.new" && cp -R "$binary/." "$folder.new/"; } || fail 9 "cannot write $folder"
    rm -rf "$folder" && mv "$folder.new" "$folder"
    ln -s ../lib/dlora-edge/dlora-edge "$program.new"
else
    cp "$binary" "$program.new" || fail 9 "cannot write $program"
    chmod 755 "$program.new"
    rm -rf "$folder"
fi
mv -f "$program.new" "$program" || fail 9 "cannot write $program"

sed -e "s|/usr/local/bin/|$prefix/bin/|" -e "s|^User=.*|User=$user|" "$here/dlora-edge.service" >"$unit.new" || fail 9 "cannot write $unit"
mv -f "$unit.new" "$unit" || fail 9 "cannot write $unit"
if [ ! -e "$settings/train.conf" ]; then
    (umask 077 && cp "$here/train.conf" "$settings/train.conf") || fail 9 "cannot write $settings/train.conf"
fi
if [ -n "$root" ]; then
    # Whoever starts the image makes the user; systemd gives it the state directory.
    mkdir -p "$(dirname "$users")" || fail 9 "cannot write $users"
    echo "u $user - \"dlora-edge\" /var/lib/dlora-edge" >"$users" || fail 9 "cannot write $users"
else
    chown "$user:$user" "$state"
    chmod 750 "$state"
    systemd daemon-reload
fi

cat <<TEXT
installed $program
next: copy a bundle and data to $state, say in $settings/train.conf what to train on,
then: systemctl enable --now dlora-edge
TEXT
