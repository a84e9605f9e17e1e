# Functions for all checks. A check succeeds if it exits with 0; the table has its last line "note: …".
set -euo pipefail
trap 'echo "failed in line $LINENO: $BASH_COMMAND" >&2' ERR
export CAY_IMAGES_CACHE_DIR=/mnt/lab/images HOME=/root TERM=dumb
lab=/mnt/lab

# stop_server ends the server of an earlier check, which would share the processors with tests.
stop_server() { if systemctl -q is-active cay; then systemctl stop cay; fi; }

# go_tests DIRECTORY PATTERN TIME runs tests of the repository that were built outside of the machine.
go_tests() {
	local out code=0
	out=$(mktemp)
	cd "$lab/$1"
	CAY_TEST_REQUIRE=1 CAY_TEST_PROGRAMS=$lab/programs "./$(basename "$1").test" -test.v -test.run "$2" -test.timeout "$3" 2>&1 | tee "$out" || code=$?
	local passed failed skipped parts
	passed=$(grep -c '^--- PASS' "$out" || true)
	parts=
	if [[ $2 == */* ]]; then # the pattern chooses parts of a test, without which the test itself proves nothing
		parts=$(sed -n 's/^    --- PASS: [^/]*\/\([^ ]*\).*/\1/p' "$out" | xargs)
		[[ -n $parts ]] || passed=0
	fi
	skipped=$(sed -n 's/^--- SKIP: \([^ ]*\).*/\1/p' "$out" | xargs)
	failed=$(sed -n 's/^--- FAIL: \([^ ]*\).*/\1/p' "$out" | xargs)
	if [[ $code != 0 && -z $failed ]]; then
		failed=$(grep -m1 -E '^(panic|fatal error|FAIL)' "$out" || echo "ended with $code")
	fi
	echo "note: ${only:+$only }$passed passed${parts:+: $parts}${skipped:+; skipped: $skipped}${failed:+; failed: $failed}"
	[[ $code == 0 && $passed -gt 0 ]]
}

fail() {
	echo "note: $*"
	exit 1
}

# eventually SECONDS COMMAND... waits until the command succeeds.
eventually() {
	local end=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		((SECONDS < end)) || fail "not in time: $*"
		sleep 0.1
	done
}

ready() { curl -fsS -o /dev/null http://127.0.0.1:7070/readyz; }

# api METHOD PATH [JSON] prints the answer, also an error.
api() {
	curl -sS -X "$1" -H "Authorization: Bearer $(cat /var/lib/cay/api-key)" -H 'Content-Type: application/json' \
		${3:+-d "$3"} "http://127.0.0.1:7070/v1$2"
}

ephemeral='{"template": "python", "timeout": "1h"}'
persistent='{"template": "python", "mode": "persistent"}'

# create [JSON] makes a sandbox and prints its id.
create() {
	local answer id
	answer=$(api POST /sandboxes "${1:-$ephemeral}")
	id=$(jq -r .id <<<"$answer")
	[[ $id == sbx_* ]] || { echo "create: $answer" >&2; return 1; }
	echo "$id"
}

# inside ID COMMAND prints the output of a command in a sandbox.
inside() {
	local answer
	answer=$(api POST "/sandboxes/$1/execute" "$(jq -n --arg c "$2" '{command: $c}')")
	[[ $(jq .exit_code <<<"$answer") == 0 ]] || { echo "execute: $answer" >&2; return 1; }
	jq -rj .stdout <<<"$answer"
}

state() { api GET "/sandboxes/$1" | jq -r .state; }
is() { [[ $(state "$1") == "$2" ]]; }

# settings SETTING... writes the settings of the server. The machine has no network, so templates come from the disk of
# the lab; one is enough, since sums of images take long in emulation.
settings() {
	mkdir -p /etc/cay
	printf '%s\n' "CAY_IMAGES_CACHE_DIR=$CAY_IMAGES_CACHE_DIR" CAY_TEMPLATES_PREPARE=python "$@" >/etc/cay/environment
}

# install_files installs the server as docs/operating.md says.
install_files() {
	install -m 755 $lab/bin/cay /usr/local/bin/cay
	cp $lab/deploy/cay.service /etc/systemd/system/
	settings "$@"
	systemctl daemon-reload
}

# install_unit installs the server and waits until it serves.
install_unit() {
	install_files "$@"
	systemctl enable -q cay
	systemctl restart cay
	eventually 300 ready
	eventually 300 template_ready
}

# serve starts the unit's server, and installs the unit first if no check has done so.
serve() {
	if [[ -e /etc/systemd/system/cay.service ]]; then systemctl start cay; eventually 300 ready; else install_unit; fi
}
template_ready() { [[ $(api GET /templates/python | jq -r .status) == ready ]]; }

forty_two() {
	local answer
	answer=$(cay run -t python -- python3 -c 'print(6*7)')
	[[ $answer == 42 ]] || fail "cay run printed $answer"
}

# pids ID prints the processes in a sandbox's control groups, lowest first.
pids() {
	find /sys/fs/cgroup -path "*/cay-*/$1*" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -nu
}

# allocate ID has one process of a sandbox and then eight at once ask for more memory than there is. They are ended,
# and the sandbox lives.
allocate() {
	local id=$1 sentry what answer
	sentry=$(pids "$id" | head -1)
	for what in 'python3 -c "b = bytearray(2 << 30)"; echo all gone' \
		'for i in 1 2 3 4 5 6 7 8; do python3 -c "b = bytearray(2 << 30)" & done; wait; echo all gone'; do
		answer=$(api POST "/sandboxes/$id/execute" "$(jq -n --arg c "$what" '{command: $c, timeout: "5m"}')")
		echo "$answer"
		[[ $(jq .oom_killed <<<"$answer") == true ]] || fail "not killed for memory: $answer"
	done
	[[ $(inside "$id" 'echo alive') == alive ]] || fail "the sandbox does not answer"
	[[ $(pids "$id" | head -1) == "$sentry" ]] || fail "the sandbox has other processes than before"
}

# memory_events ID prints the kernel's counts of a sandbox's group: one file is that of v2, the other of v1.
memory_events() {
	local file
	for file in /sys/fs/cgroup/cay-*/"$1"/memory.events /sys/fs/cgroup/memory/cay-*/"$1"/memory.oom_control; do
		if [[ -e $file ]]; then xargs <"$file"; fi
	done
}

# world makes a namespace with a server that stands for the network outside of the machine.
world() {
	ip netns add world
	ip link add world0 type veth peer name eth0 netns world
	ip address add 198.18.0.1/24 dev world0
	ip link set world0 up
	ip -n world address add 198.18.0.2/24 dev eth0
	ip -n world link set eth0 up
	ip -n world link set lo up
	ip netns exec world python3 -m http.server -b 198.18.0.2 8000 --directory /usr/share/zoneinfo >/dev/null 2>&1 &
	server=$!
}
no_world() {
	kill "$server" 2>/dev/null || true
	ip link delete world0 2>/dev/null || true
	ip netns delete world 2>/dev/null || true
}
fetch='python3 -c "import urllib.request; print(urllib.request.urlopen(\"http://198.18.0.2:8000/tzdata.zi\", timeout=20).status)"'

# beside NAME checks that, beside the named firewall, a sandbox runs commands, can be reached at a port, and
# reaches the addresses that its policy allows.
beside() {
	local id code
	id=$(create '{"template": "python", "timeout": "1h", "egress": {"mode": "deny_all", "allow_cidrs": ["198.18.0.2/32"]}}')
	[[ $(inside "$id" 'echo alive') == alive ]] || fail "with $1: the sandbox does not answer"
	forty_two
	inside "$id" 'nohup python3 -m http.server 8000 >/dev/null 2>&1 &' >/dev/null
	port() { [[ $(curl -s -o /dev/null -w '%{http_code}' -H "Authorization: Bearer $(cat /var/lib/cay/api-key)" "http://127.0.0.1:7070/v1/sandboxes/$id/ports/8000/") == 200 ]]; }
	eventually 60 port
	code=$(inside "$id" "$fetch" 2>/dev/null) || code=none
	api DELETE "/sandboxes/$id"
	echo "outside: $code"
	[[ $code == 200 ]]
}
