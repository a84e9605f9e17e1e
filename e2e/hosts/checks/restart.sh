# A restart, an upgrade and a stop of the unit leave every sandbox alive, and the next start adopts them.
serve
ids=()
for _ in 1 2; do ids+=("$(create)"); done
for id in "${ids[@]}"; do
	inside "$id" 'echo "$$" >/tmp/mark; nohup sh -c "while :; do date +%s >/tmp/clock; sleep 1; done" >/dev/null 2>&1 &' >/dev/null
done
same() { # WHEN fails unless each sandbox has the same processes as before
	for id in "${ids[@]}"; do
		is "$id" running || fail "$1: $id is $(state "$id")"
		[[ $(pids "$id" | head -1) == "${sentry[$id]}" ]] || fail "$1: $id has other processes than before"
		[[ -n $(inside "$id" 'cat /tmp/mark') ]] || fail "$1: $id has lost its file"
	done
}
declare -A sentry
for id in "${ids[@]}"; do sentry[$id]=$(pids "$id" | head -1); done
systemctl restart cay; eventually 300 ready
same "after a restart"
cp $lab/bin/cay /usr/local/bin/cay.new; mv /usr/local/bin/cay.new /usr/local/bin/cay
systemctl restart cay; eventually 300 ready
same "after an upgrade"
# Without --kill-who it would reach the sandboxes too with cgroup v1, see docs/hosts.md.
systemctl kill --kill-who=main -s KILL cay; sleep 1; eventually 300 ready
same "after a SIGKILL"
systemctl stop cay
for id in "${ids[@]}"; do [[ -d /proc/${sentry[$id]} ]] || fail "a stop ended $id"; done
# systemd removes control groups at a stop and at a reload.
systemctl daemon-reload
systemctl start cay; eventually 300 ready
same "after a stop and a start"
clock() { [[ $(inside "${ids[0]}" 'cat /tmp/clock') != "$1" ]]; }
eventually 60 clock "$(inside "${ids[0]}" 'cat /tmp/clock')"
for id in "${ids[@]}"; do api DELETE "/sandboxes/$id"; done
gone() { [[ -z $(pids "$1") ]]; }
for id in "${ids[@]}"; do eventually 60 gone "$id"; done
echo "note: restart, upgrade, SIGKILL, stop and start with ${#ids[@]} sandboxes"
