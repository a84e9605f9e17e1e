# /var is full. Running sandboxes go on, calls that need space are refused with the reason, and everything
# works when there is space again.
serve
id=$(create)
back() { rm -f /var/tmp/fill; }
trap back EXIT
fallocate -l "$(($(stat -f -c '%a*%S' /var) - (200 << 20)))" /var/tmp/fill
answer=$(api POST /sandboxes "$ephemeral")
echo "$answer"
[[ $(jq -r '.error.code // .code // empty' <<<"$answer") == no_capacity ]] || fail "a create on a full disk: $answer"
fallocate -l "$(($(stat -f -c '%a*%S' /var) + $(stat -c %s /var/tmp/fill) - (1 << 20)))" /var/tmp/fill || true
dd if=/dev/zero of=/var/tmp/fill bs=1M oflag=append conv=notrunc 2>/dev/null || true
df /var
is "$id" running || fail "the sandbox is $(state "$id")"
[[ $(inside "$id" 'echo alive') == alive ]] || fail "the sandbox does not answer"
systemctl restart cay || true
sleep 15 # so that more starts may fail than systemd allows by default
rm -f /var/tmp/fill
eventually 300 ready
is "$id" running || fail "after a restart on the full disk the sandbox is $(state "$id")"
[[ $(inside "$id" 'echo alive') == alive ]]
forty_two
api DELETE "/sandboxes/$id"
echo "note: refused with no_capacity, the sandbox lives, also after a restart of the server on the full disk"
