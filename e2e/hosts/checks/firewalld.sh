# Beside firewalld.
serve
world
back() { systemctl stop firewalld; no_world; } >/dev/null 2>&1
trap back EXIT
beside nothing || fail "the network outside cannot be reached without a firewall"
systemctl start firewalld
if beside firewalld; then out="sandboxes reach out"; else
	range=$(jq -r '.range // empty' /run/cay/servers/*.json | head -1)
	[[ -n $range ]] || range=$(ip -4 -o address show | awk '/cay/ {print $4}' | head -1 | cut -d. -f1-2).0.0/16
	firewall-cmd -q --zone=trusted --add-source="$range"
	beside "firewalld, range trusted" || fail "the network outside cannot be reached after: firewall-cmd --zone=trusted --add-source=$range"
	out="they reach out after firewall-cmd --zone=trusted --add-source=RANGE"
fi
systemctl reload firewalld
beside "firewalld after a reload" || true
echo "note: sandboxes run and are reached, $out"
