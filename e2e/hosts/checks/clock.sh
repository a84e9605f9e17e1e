# The clock is set back a day. Sandboxes live as long as their timeout says, and new ones can be made.
serve
id=$(create)
inside "$id" 'echo 1 >/tmp/a' >/dev/null
now=$(date +%s)
back() { date -s "@$(($(date +%s) + 86400))" >/dev/null; systemctl restart cay; }
trap back EXIT
date -s "@$((now - 86400))" >/dev/null
[[ $(inside "$id" 'cat /tmp/a') == 1 ]] || fail "the sandbox does not answer"
forty_two
systemctl restart cay; eventually 300 ready
is "$id" running || fail "after a restart the sandbox is $(state "$id")"
short=$(create '{"template": "python", "timeout": "20s"}')
eventually 300 is "$short" destroyed
awake=$(create "$persistent")
inside "$awake" 'echo kept >/home/user/file' >/dev/null
api POST "/sandboxes/$awake/suspend" >&2
[[ $(inside "$awake" 'cat /home/user/file') == kept ]] || fail "the suspended sandbox did not wake with its file"
for i in "$awake" "$id"; do api DELETE "/sandboxes/$i"; done
echo "note: runs, restarts, expires, suspends and wakes a day earlier"
