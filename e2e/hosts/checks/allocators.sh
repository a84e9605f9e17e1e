# Processes ask for more memory than there is, first one, then eight at once. They are ended, the sandbox lives,
# and the kernel has killed no process. (The checks memory-… run all of e2e's TestMemory, which takes an hour in
# emulation.)
serve
id=$(create)
allocate "$id"
events=$(memory_events "$id")
[[ $events == *"oom_kill 0"* ]] || fail "the kernel killed: $events"
api DELETE "/sandboxes/$id"
echo "note: $events"
