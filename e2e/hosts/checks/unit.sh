# The unit of deploy/ starts a server, and a first sandbox prints 42.
install_unit
start=$EPOCHREALTIME
forty_two
took=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN {printf "%.1f", b - a}')
[[ $(cay run -t python -- uname -v) == *gVisor* || -n $(cay run -t python -- dmesg | grep -i gvisor) ]] || fail "the kernel inside is not gVisor's"
# The group that systemd cleans holds the server and the program that waits for the next start, and no process
# of a sandbox. With cgroup v1, systemd's own trees hold all processes that the unit started; KillMode=process
# spares those.
id=$(create)
sleep 1
for group in $(find /sys/fs/cgroup -path '*/cay.service*' -type d ! -path '/sys/fs/cgroup/systemd/*' \
	! -path '/sys/fs/cgroup/unified/*'); do
	for pid in $(cat "$group/cgroup.procs"); do
		line=$(tr '\0' ' ' <"/proc/$pid/cmdline" || true)
		[[ $line == *"cay server"* || $line == *"cay-runsc await"* || -z $line ]] || fail "in $group: $line"
	done
done
# The weight of the unit counts against the sandboxes' group only beside it, below the root.
if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
	weight=$(cat /sys/fs/cgroup/cay.service/cpu.weight)
	((weight == 10000)) || fail "the unit's CPU weight is $weight"
fi
mine=0
for pid in $(pids "$id"); do
	grep -q "cay-.*/$id" "/proc/$pid/cgroup" && mine=$((mine + 1))
done
((mine >= 2)) || fail "of the sandbox's processes $mine are in its groups"
api DELETE "/sandboxes/$id"
echo "note: 42 after $took s; a sandbox's $mine processes are in groups of their own"
