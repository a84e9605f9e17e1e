# After a cut, every answered change is there, nothing is incomplete, and nothing is left over.
eventually 60 blkid -L data # the disk was put in a moment ago
mount LABEL=data /var/lib/cay
systemctl start cay
eventually 300 ready
# The server reads an image as a whole before its first use after a start. In emulation that takes most of a cut with an
# ordinary image, so the first start makes a template of one program.
if [[ $cut == 0 ]]; then
	mkdir -p /tmp/template
	cp /bin/busybox /tmp/template/
	printf '%s\n' 'FROM scratch' 'COPY --chmod=755 busybox /bin/sh' 'COPY --chmod=755 busybox /bin/cat' \
		>/tmp/template/Dockerfile
	cay templates create one-program --dockerfile /tmp/template/Dockerfile
fi
ephemeral='{"template": "one-program", "timeout": "1h"}'
persistent='{"template": "one-program", "mode": "persistent"}'
loss() { echo "loss: $*"; }
was() { jq -r ".$1 // empty" <<<"${answered:-null}"; }
has_mark() { # ID
	local got
	got=$(inside "$1" 'cat /mark') || { loss "the sandbox does not answer: $(api GET "/sandboxes/$1")"; return; }
	[[ $got == "$(was mark)" ]] || loss "the file has ${got:0:40}"
}
in_state() { # ID STATE...
	local id=$1 s
	shift
	for _ in $(seq 60); do # until the server has settled the sandbox
		s=$(state "$id")
		for want in "$@"; do [[ $s != "$want" ]] || return 0; done
		sleep 0.5
	done
	loss "the sandbox is $s, want $*: $(api GET "/sandboxes/$id")"
	return 0
}
id=$(was id)
case $(was action) in
"" | nothing) ;;
create) in_state "$id" destroyed ;;
create-persistent) in_state "$id" suspended destroyed ;;
suspend | checkpoint | wake) in_state "$id" suspended; has_mark "$id" ;;
snapshot)
	child=$(create "{\"snapshot\": \"$(was snapshot)\"}") || loss "no sandbox can be made from the snapshot"
	[[ -z $child ]] || has_mark "$child" ;;
fork)
	in_state "$id" suspended; has_mark "$id"
	in_state "$(was child)" suspended destroyed ;;
policy)
	in_state "$id" suspended
	got=$(api GET "/sandboxes/$id" | jq -r '.egress.allow_cidrs[0]')
	[[ $got == "$(was policy)" ]] || loss "the policy is $got"
	has_mark "$id" ;;
key)
	code=$(curl -s -o /dev/null -w '%{http_code}' -H "Authorization: Bearer $(was key)" http://127.0.0.1:7070/v1/me)
	[[ $code == 200 ]] || loss "the key is answered $code" ;;
destroy) in_state "$id" destroyed ;;
during-create) ;;
during-suspend) in_state "$id" suspended; has_mark "$id" ;;
during-snapshot) in_state "$id" suspended; has_mark "$id" ;;
during-destroy) in_state "$id" suspended destroyed; if is "$id" suspended; then has_mark "$id"; fi ;;
*) loss "no action $(was action)" ;;
esac
# Every snapshot works; none is incomplete.
for snapshot in $(api GET /snapshots | jq -r '.snapshots[].id'); do
	child=$(create "{\"snapshot\": \"$snapshot\"}") || loss "snapshot $snapshot is half"
	api DELETE "/snapshots/$snapshot"
done
# After everything is deleted, nothing may be left on the disk or on the machine.
for id in $(api GET /sandboxes | jq -r '.sandboxes[].id'); do
	if ! is "$id" destroyed; then api DELETE "/sandboxes/$id"; fi
done
left() {
	find /var/lib/cay/sandboxes /var/lib/cay/checkpoints -mindepth 1 -maxdepth 1 2>/dev/null
	find /sys/fs/cgroup -path '*/cay-*/sbx_*' -prune 2>/dev/null
}
nothing_left() { [[ -z $(left) ]]; }
for _ in $(seq 120); do if nothing_left; then break; fi; sleep 0.5; done
nothing_left || loss "left: $(left | head -3 | xargs)"
if journalctl -u cay | grep -E 'database disk image is malformed|integrity'; then loss "the database is damaged"; fi
