# Beside ufw, which drops forwarded packets. Sandboxes can be reached; packets that they send need the rule that the
# documentation names.
serve
world
back() { ufw --force disable; ufw --force reset; no_world; } >/dev/null 2>&1
trap back EXIT
beside nothing || fail "the network outside cannot be reached without a firewall"
ufw allow ssh >/dev/null
ufw --force enable
if beside ufw; then out="sandboxes reach out"; else
	ufw default allow routed >/dev/null
	beside "ufw, routed allowed" || fail "the network outside cannot be reached after: ufw default allow routed"
	out="they reach out after ufw default allow routed"
fi
systemctl restart cay; eventually 300 ready
beside "ufw after a restart" || fail "after a restart of the server"
echo "note: sandboxes run and are reached, $out"
