# The data directory is on a file system that is mounted with noexec.
serve
systemctl stop cay
truncate -s 3G /var/tmp/noexec.img
mkfs.ext4 -q /var/tmp/noexec.img
mkdir -p /srv/cay
mount -o loop,noexec,nosuid,nodev /var/tmp/noexec.img /srv/cay
back() {
	systemctl stop cay
	/usr/local/bin/cay server --data-dir /srv/cay --purge || true
	umount /srv/cay
	rm /var/tmp/noexec.img
	install_unit
}
trap back EXIT
settings CAY_DATA_DIR=/srv/cay
systemctl restart cay
refused() { journalctl -u cay --no-pager -o cat | grep -i noexec; }
for _ in $(seq 120); do if ready 2>/dev/null || refused >/dev/null; then break; fi; sleep 0.5; done
if ready; then
	api() { curl -sS -X "$1" -H "Authorization: Bearer $(cat /srv/cay/api-key)" -H 'Content-Type: application/json' ${3:+-d "$3"} "http://127.0.0.1:7070/v1$2"; }
	eventually 300 template_ready
	id=$(create)
	[[ $(inside "$id" 'echo alive') == alive ]]
	echo "note: works"
else
	line=$(refused) || fail "the server does not start and does not say why: $(journalctl -u cay --no-pager -o cat | tail -1)"
	echo "note: refused: ${line%%$'\n'*}"
fi
