# A server of another architecture makes a template of one program, whose sandboxes calculate, sleep and wake.
cay=$lab/bin/cay
$cay version
$cay server --data-dir /var/lib/cay >/var/log/cay.log 2>&1 &
server=$!
trap 'kill "$server"; tail -n 20 /var/log/cay.log' EXIT
eventually 300 ready
mkdir /tmp/template
cp /bin/busybox /tmp/template/
printf '%s\n' 'FROM scratch' 'COPY --chmod=755 busybox /bin/sh' 'COPY busybox /bin/cat' 'COPY busybox /bin/sleep' \
	>/tmp/template/Dockerfile
$cay templates create calculator --dockerfile /tmp/template/Dockerfile
start=$EPOCHREALTIME
id=$(create '{"template": "calculator", "mode": "persistent"}')
[[ $(inside "$id" 'echo $((6 * 7))') == 42 ]] || fail "the sandbox does not calculate"
took=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN {printf "%.1f", b - a}')
inside "$id" 'echo kept >/file; (while :; do sleep 1; done) & echo $! >/pid' >/dev/null
api POST "/sandboxes/$id/suspend" '{}' >&2
is "$id" suspended || fail "after a suspend the sandbox is $(state "$id")"
[[ $(inside "$id" 'kill -0 "$(cat /pid)" && cat /file') == kept ]] || fail "the sandbox lost its file or its process"
api DELETE "/sandboxes/$id"
echo "note: $(uname -m): 42 after $took s, suspended and woke with its file and process"
