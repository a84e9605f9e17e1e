# The loopback interface has only IPv6.
serve
back() { ip address add 127.0.0.1/8 dev lo 2>/dev/null || true; install_unit; }
trap back EXIT
systemctl stop cay
ip address del 127.0.0.1/8 dev lo
settings 'CAY_LISTEN=[::1]:7070'
systemctl restart cay
ready() { curl -g -fsS -o /dev/null 'http://[::1]:7070/readyz'; }
eventually 120 ready
forty_two
echo "note: listens on [::1]"
