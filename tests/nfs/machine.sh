#!/usr/bin/env bash
# machine.sh <command...>: run a command on a machine of its own, node `a` of two that share /nfs, over a real NFS server.
#
# The machine is Linux in user mode: it needs no privileges of the kernel below, sees this file system copy on write, and has one
# processor. Debian: apt-get install user-mode-linux nfs-kernel-server nfs-common iproute2 gcc. NFS_VERSION is 4.2, 4.1, 4.0 or 3.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

version=${NFS_VERSION:-4.2}
if [[ ! $version =~ ^(3|4\.[012])$ ]]; then
  echo "error: NFS_VERSION is '$version'." >&2
  echo "  mend:  give 3, 4.0, 4.1 or 4.2, or leave it out for 4.2" >&2
  exit 2
fi
for tool in linux.uml rpc.nfsd mount.nfs ip gcc mkfs.ext4; do
  PATH=$PATH:/usr/sbin:/sbin command -v $tool > /dev/null || {
    echo "error: $tool is not there." >&2
    echo "  mend:  apt-get install user-mode-linux nfs-kernel-server nfs-common iproute2 gcc e2fsprogs" >&2
    exit 2
  }
done
if (($(cat /proc/sys/vm/max_map_count) < 1000000)); then # each page of the machine's memory may be a mapping of its own
  echo "error: vm.max_map_count is $(cat /proc/sys/vm/max_map_count); a machine in user mode needs a million." >&2
  echo "  mend:  sysctl -w vm.max_map_count=4000000" >&2
  exit 2
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/latentray-nfs-XXXXXX")
trap 'kill "${tail:-}" 2> /dev/null || true; rm -rf "$work"' EXIT
gcc -O2 -shared -fPIC -o "$work/xstate.so" "$here/xstate.c"
mkdir -p "$work/modules/lib/modules"
ln -s /usr/lib/uml/modules/* "$work/modules/lib/modules/"
truncate -s 8G "$work/disk"
printf '%q ' "$@" > "$work/command"
{
  echo "declare -x NFS_VERSION=$version"
  echo "declare -x LATENTRAY_MACHINE=$work WHERE=$PWD"
} > "$work/environment"
: > "$work/log"
tail -f "$work/log" --pid $$ &
tail=$!
LD_PRELOAD="$work/xstate.so" TMPDIR="$work" timeout "${NFS_LIMIT_S:-3000}" linux.uml mem="${NFS_MEMORY:-8G}" \
  root=/dev/root rootfstype=hostfs rootflags=/ ro "ubda=$work/disk" "init=$here/inside.sh" "LATENTRAY_MACHINE=$work" \
  con=null con0=null quiet < /dev/null > "$work/console" 2>&1 || true
sleep 0.5
if [[ ! -e $work/status ]]; then
  echo "error: the machine ended before the command did:" >&2
  tail -5 "$work/console" >&2
  exit 1
fi
exit "$(cat "$work/status")"
