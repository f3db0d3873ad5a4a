#!/bin/bash
# The machine's first process: a file system that forgets, an NFS server, two nodes `a` and `b`; then the command, on `a`.
# A node is a network, a host name and a mount of its own, so that the kernel is two NFS clients.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
if [[ ${1:-} != inside ]]; then
  mount -t proc proc /proc
  mount -t sysfs sys /sys
  for module in overlay ext4 nfsd nfsv3 nfsv4 veth bridge; do modprobe -d "$LATENTRAY_MACHINE/modules" $module; done
  mount -t tmpfs -o size=4g tmpfs /mnt
  mkdir /mnt/new /mnt/work /mnt/whole
  mount -t overlay -o lowerdir=/,upperdir=/mnt/new,workdir=/mnt/work overlay /mnt/whole
  mount -t hostfs none "/mnt/whole$LATENTRAY_MACHINE" -o "$LATENTRAY_MACHINE"
  mount -t proc proc /mnt/whole/proc
  mount -t sysfs sys /mnt/whole/sys
  mount -t devtmpfs dev /mnt/whole/dev
  cd /mnt/whole || exit
  pivot_root . mnt
  exec chroot . /bin/bash "$0" inside
fi

# shellcheck disable=SC1091
. "$LATENTRAY_MACHINE/environment"
exec >> "$LATENTRAY_MACHINE/log" 2>&1
mkdir -p /dev/shm /dev/pts /export /nfs /var/lib/nfs
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mkdir -p /run/rpcbind /run/lock /run/netns
ip link set lo up
hostname server

mkfs.ext4 -q -F /dev/ubda && mount /dev/ubda /export && chmod 1777 /export
mount -t nfsd nfsd /proc/fs/nfsd
echo '/export *(rw,async,no_subtree_check,fsid=0,no_root_squash,insecure)' > /etc/exports
{
  rpcbind -w
  rpc.statd --no-notify
  exportfs -ra
  rpc.nfsd --grace-time 5 --lease-time 5 4
  rpc.mountd
} 2> /dev/null

ip link add lan type bridge
ip addr add 10.0.0.1/24 dev lan
ip link set lan up
address=2
for node in a b; do
  ip netns add $node
  ip link add port-$node type veth peer name eth0 netns $node
  ip link set port-$node master lan up
  ip -n $node addr add 10.0.0.$address/24 dev eth0
  ip -n $node link set eth0 up
  ip -n $node link set lo up
  address=$((address + 1))
  [[ $NFS_VERSION == 3 ]] && shared=/export || shared=/
  ip netns exec $node unshare --uts --mount bash -c "hostname $node
    mount -t nfs -o vers=$NFS_VERSION 10.0.0.1:$shared /nfs && exec sleep infinity" &
  until grep -qs " /nfs nfs" /proc/$!/mounts; do
    kill -0 $! || { echo "error: /nfs could not be mounted"; break; }
    sleep 0.1
  done
  echo "nsenter --target $! --net --uts --mount --wd=$WHERE" > /run/enter-$node
done

LATENTRAY_TEST_NFS=/nfs LATENTRAY_TEST_NFS_OTHER="$(< /run/enter-b)" LATENTRAY_TEST_NFS_SERVER="nsenter --target 1 --net" \
  $(< /run/enter-a) bash "$LATENTRAY_MACHINE/command"
echo $? > "$LATENTRAY_MACHINE/status"
sync
echo o > /proc/sysrq-trigger
sleep infinity
