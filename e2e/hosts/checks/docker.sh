# Beside Docker, which drops forwarded packets.
serve
world
back() { systemctl stop docker.socket docker containerd; nft flush ruleset; systemctl restart cay; no_world; } >/dev/null 2>&1
trap back EXIT
beside nothing || fail "the network outside cannot be reached without Docker"
systemctl start docker
if beside docker; then out="sandboxes reach out"; else
	iptables -I DOCKER-USER -i 'cay+' -j ACCEPT
	iptables -I DOCKER-USER -o 'cay+' -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
	beside "docker, with rules" || fail "the network outside cannot be reached with rules in DOCKER-USER"
	out="they reach out after the rules of operating.md"
fi
echo "note: sandboxes run and are reached, $out"
