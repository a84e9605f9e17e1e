# systemd-oomd watches the whole machine, memory is short, and oomd kills no sandbox.
serve
mkdir -p /etc/systemd/oomd.conf.d /etc/systemd/system/-.slice.d
printf '[OOM]\nDefaultMemoryPressureDurationSec=2s\n' >/etc/systemd/oomd.conf.d/lab.conf
printf '[Slice]\nManagedOOMMemoryPressure=kill\nManagedOOMMemoryPressureLimit=5%%\n' >/etc/systemd/system/-.slice.d/oomd.conf
systemctl daemon-reload
systemctl enable -q --now systemd-oomd
systemctl restart systemd-oomd
back() {
	systemctl disable -q --now systemd-oomd
	rm -rf /etc/systemd/system/-.slice.d /etc/systemd/oomd.conf.d
	systemctl daemon-reload
}
trap back EXIT
id=$(create)
sentry=$(pids "$id" | head -1)
for _ in 1 2 3; do
	answer=$(api POST "/sandboxes/$id/execute" '{"command": "python3 -c \"x = bytearray(4 << 30); print(1)\" & python3 -c \"x = bytearray(4 << 30)\"; wait"}')
	echo "$answer"
done
oomctl
is "$id" running || fail "the sandbox is $(state "$id")"
[[ $(pids "$id" | head -1) == "$sentry" ]] || fail "the sandbox has other processes than before"
kills=$(journalctl -u systemd-oomd --no-pager | grep -c -i 'killed' || true)
[[ $(inside "$id" 'echo alive') == alive ]]
api DELETE "/sandboxes/$id"
echo "note: the sandbox lives under its allocators, oomd killed $kills groups"
