# Processes ask for more memory than there is, first one, then eight at once. They are ended, the sandbox lives,
# and the kernel has killed no process. (The checks memory-… run all of e2e's TestMemory, which takes an hour in
# emulation.)
serve
id=$(create)
sentry=$(pids "$id" | head -1)
one='{"args": ["python3", "-c", "b = bytearray(2 << 30)"], "timeout": "5m"}'
eight='{"command": "for i in 1 2 3 4 5 6 7 8; do python3 -c \"b = bytearray(2 << 30)\" & done; wait; echo all gone", "timeout": "5m"}'
for what in "$one" "$eight"; do
	answer=$(api POST "/sandboxes/$id/execute" "$what")
	echo "$answer"
	[[ $(jq .oom_killed <<<"$answer") == true ]] || fail "not killed for memory: $answer"
done
[[ $(inside "$id" 'echo alive') == alive ]] || fail "the sandbox does not answer"
[[ $(pids "$id" | head -1) == "$sentry" ]] || fail "the sandbox has other processes than before"
events="no control group"
for file in /sys/fs/cgroup/cay-*/"$id"/memory.events /sys/fs/cgroup/memory/cay-*/"$id"/memory.oom_control; do
	if [[ -e $file ]]; then events=$(xargs <"$file"); fi # one is that of v2, the other of v1
done
[[ $events == *"oom_kill 0"* ]] || fail "the kernel killed: $events"
api DELETE "/sandboxes/$id"
echo "note: $events"
