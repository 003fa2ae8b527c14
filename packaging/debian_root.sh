#!/usr/bin/env bash
# A Debian bookworm root under build/, and commands in it. Nothing is installed on the host.
#
#   packaging/debian_root.sh arm|bare make                          unpack it (a minute), or see that it is there
#   packaging/debian_root.sh arm|bare run [--bind DIR]… COMMAND…    run a command in it; this repository and each DIR are where they are here
#
# arm: for arm64, emulated by qemu-user. bare: this machine's own kind, with Python and make and no compiler, cmake or git.
# `run` lives in a user namespace of its own: mounts and the binfmt entry for aarch64 are in there, and end with it.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
kind=${1:-}
[ $# -gt 0 ] && shift
place=$here/build/$kind
root=$place/root
suite=bookworm # Raspberry Pi OS 12, Ubuntu 22.10 and newer: glibc 2.36
# The Pi 4's processor. qemu's own default, with SVE and more, makes numpy's products wrong.
cpu=${DLORA_ARM_CPU:-cortex-a72}
packages="base-files bash coreutils dash findutils grep libc-bin sed mount python3 ca-certificates"
case $kind in
# PyInstaller wants libpython and binutils, some tests mount, the Debian package wants dpkg, diff and two of systemd. What else
# makes the binary comes from PyPI.
arm) arch=arm64 packages="$packages binutils libpython3.11 diffutils dpkg systemd-standalone-sysusers systemd-standalone-tmpfiles" ;;
# libstdc++6 is on every Debian, as apt needs it.
bare) arch=$(dpkg --print-architecture) packages="$packages libstdc++6 make python3-venv" ;;
esac

ELF_AARCH64='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
ELF_MASK='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'

die() {
    echo "error: $*" >&2
    exit 1
}

# URIs that this machine's apt has for Debian; DLORA_DEBIAN_MIRROR for machines that are not Debian.
mirrors() {
    if [ -n "${DLORA_DEBIAN_MIRROR:-}" ]; then
        echo "$DLORA_DEBIAN_MIRROR $suite"
        return
    fi
    # shellcheck disable=SC2016  # these are apt's words
    apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Created-By: Packages' |
        awk -v suite="$suite" '
            $1 == "Debian" && $2 !~ /backports/ { print $3, suite ($2 ~ /-security$/ ? "-security" : $2 ~ /-updates$/ ? "-updates" : "") }
        ' | sort -u
}

keyring() {
    for file in /usr/share/keyrings/debian-archive-keyring.pgp /usr/share/keyrings/debian-archive-keyring.gpg; do
        [ -e "$file" ] && echo "$file" && return
    done
    die "no Debian archive keyring in /usr/share/keyrings: apt-get install debian-archive-keyring"
}

# qemu, of whose package one program is kept. It must be static, as the root has other libraries; Debian 12 has that in a
# package of its own.
fetch_qemu() {
    if [ "$arch" != arm64 ] || [ -x "$place/qemu-aarch64" ] || [ "$(uname -m)" = aarch64 ]; then return; fi
    echo "qemu-user: fetching the package" >&2
    for package in qemu-user qemu-user-static; do
        rm -rf "$place/fetch"
        mkdir -p "$place/fetch"
        (
            cd "$place/fetch"
            [ -n "$(apt-cache show --no-all-versions "$package" 2>/dev/null)" ] || apt-get -qq update
            apt-get -qq -o APT::Sandbox::User=root download "$package"
            dpkg-deb --fsys-tarfile "$package"_*.deb | tar -x --no-same-owner --wildcards './usr/bin/qemu-aarch64*'
        ) || die "apt cannot download $package; run apt-get update"
        for program in "$place"/fetch/usr/bin/qemu-aarch64 "$place"/fetch/usr/bin/qemu-aarch64-static; do
            if [ -f "$program" ] && ! readelf --program-headers "$program" | grep -q INTERP; then
                mv "$program" "$place/qemu-aarch64"
            fi
        done
        rm -rf "$place/fetch"
        if [ -x "$place/qemu-aarch64" ]; then return; fi
    done
    die "apt has no static qemu-aarch64"
}

# An apt with a state of its own: it installs nothing, it only works out what bookworm's packages need.
private_apt() {
    apt-get -qq -o Dir::State="$place/apt/state" -o Dir::State::status="$place/apt/status" -o Dir::Cache="$place/apt/cache" \
        -o Dir::Etc::SourceList="$place/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o APT::Architecture=$arch -o APT::Architectures=$arch -o APT::Install-Recommends=false \
        -o APT::Sandbox::User=root -o Debug::NoLocking=true "$@"
}

make_root() {
    stamp=$place/root.made
    wanted="$suite $arch $packages"
    fetch_qemu
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then return; fi
    echo "Debian $suite $arch: unpacking into build/$kind/root" >&2
    rm -rf "$root" "$place/apt" "$stamp"
    mkdir -p "$root"/usr/{bin,sbin,lib} "$root"/{proc,sys,dev,tmp,etc,root} "$place"/apt/state/lists/partial "$place"/apt/cache/archives/partial
    chmod 1777 "$root/tmp"
    for folder in bin sbin lib; do ln -s "usr/$folder" "$root/$folder"; done
    : >"$place/apt/status"
    mirrors | while read -r uri name; do echo "deb [arch=$arch signed-by=$(keyring)] $uri $name main"; done >"$place/apt/sources.list"
    [ -s "$place/apt/sources.list" ] || die "apt has no Debian mirror; say one: DLORA_DEBIAN_MIRROR=https://…/debian"
    private_apt update
    # shellcheck disable=SC2086  # a list
    private_apt --yes --download-only install $packages
    for package in "$place"/apt/cache/archives/*.deb; do
        # Not dpkg-deb --extract, which would put folders where bin, sbin and lib are links.
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$root"
    done
    rm -rf "$place/apt"
    ln -sf dash "$root/bin/sh" # what dash's own set-up would do; no package here has run its scripts
    cp /etc/resolv.conf "$root/etc/resolv.conf" 2>/dev/null || true
    printf 'root:x:0:0:root:/root:/bin/bash\n' >"$root/etc/passwd"
    printf 'root:x:0:\n' >"$root/etc/group"
    printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
    "$here/packaging/debian_root.sh" "$kind" run ldconfig
    "$here/packaging/debian_root.sh" "$kind" run python3 -c 'import platform as p; print(p.machine(), p.python_version(), *p.libc_ver())' >&2
    echo "$wanted" >"$stamp"
}

run() {
    [ -e "$root/usr/bin/python3" ] || die "no root in build/$kind; make it: packaging/debian_root.sh $kind make"
    binds=$here
    while [ "${1:-}" = --bind ]; do
        binds="$binds:$2"
        shift 2
    done
    DLORA_ROOT=$root DLORA_BINDS=$binds DLORA_QEMU=$place/qemu-aarch64 DLORA_CPU=$cpu DLORA_CWD=${DLORA_ROOT_CWD:-$here} \
        exec unshare --user --map-root-user --mount --pid --fork --kill-child "$here/packaging/debian_root.sh" "$kind" inside "$@"
}

# In the namespaces already.
inside() {
    if [ "$arch" = arm64 ] && [ "$(uname -m)" != aarch64 ]; then
        mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc 2>/dev/null ||
            die "this kernel has no binfmt_misc in user namespaces (Linux 6.7 has); build on an aarch64 machine instead"
        # Programs of 64-bit little-endian ARM, static or not. F opens qemu now, so that the root needs none.
        printf '%s' ":aarch64:M::$ELF_AARCH64:$ELF_MASK:$DLORA_QEMU:F" >/proc/sys/fs/binfmt_misc/register
    fi
    mount --rbind /dev "$DLORA_ROOT/dev"
    mount --rbind /sys "$DLORA_ROOT/sys" # onnxruntime asks it for the processors
    mount -t proc proc "$DLORA_ROOT/proc"
    IFS=:
    for folder in $DLORA_BINDS; do
        mkdir -p "$DLORA_ROOT$folder"
        mount --rbind "$folder" "$DLORA_ROOT$folder"
    done
    unset IFS
    # shellcheck disable=SC2016  # of the shell inside
    exec chroot "$DLORA_ROOT" /usr/bin/env -i QEMU_CPU="$DLORA_CPU" PATH=/usr/bin:/usr/sbin HOME=/root LANG=C.UTF-8 TMPDIR=/tmp \
        sh -c 'cd "$1" && shift && exec "$@"' sh "$DLORA_CWD" "$@"
}

command=${1:-}
[ -n "$command" ] && shift
case $kind-$command in
arm-make | bare-make) make_root ;;
arm-run | bare-run) run "$@" ;;
arm-inside | bare-inside) inside "$@" ;;
*) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
