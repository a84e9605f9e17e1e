# The server starts by itself, and every sandbox has the state that lifecycle.md says.
read -r awake lost sleeping </root/sandboxes
eventually 300 ready
eventually 60 is "$lost" destroyed
is "$sleeping" suspended || fail "the suspended sandbox is $(state "$sleeping")"
is "$awake" suspended || fail "the persistent sandbox is $(state "$awake")"
[[ $(inside "$awake" 'cat /home/user/file') == kept ]] || fail "the persistent sandbox has lost its file"
[[ $(inside "$sleeping" 'cat /home/user/file') == slept ]] || fail "the suspended sandbox has lost its file"
for id in "$awake" "$sleeping"; do api DELETE "/sandboxes/$id"; done
left=$(find /sys/fs/cgroup -maxdepth 3 -path "*/cay-*/$lost*" | head -1)
[[ -z $left ]] || fail "the ephemeral sandbox has left $left"
echo "note: persistent ones wake, the ephemeral one is lost"
