#!/usr/bin/env bash
# Starts the server, runs a first sandbox, and keeps the server running.
set -euo pipefail
dir=${CAY_DATA_DIR:-/var/lib/cay}
listen=${CAY_LISTEN:-127.0.0.1:7070}
if [[ $EUID -ne 0 ]]; then
	echo "cay server needs root, to make namespaces, control groups and packet filter rules" >&2
	exit 1
fi
mkdir -p "$dir"
log=$dir/server.log

bin/cay server --data-dir "$dir" --listen "$listen" >>"$log" 2>&1 &
server=$!
trap 'kill -TERM $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

until curl -fsS -o /dev/null "http://$listen/readyz" 2>/dev/null; do
	if ! kill -0 $server 2>/dev/null; then
		echo "the server did not start:" >&2
		tail -n 20 "$log" >&2
		exit 1
	fi
	sleep 0.2
done

export CAY_API_URL=http://$listen
CAY_API_KEY=$(cat "$dir/api-key")
export CAY_API_KEY
echo "the server listens on $CAY_API_URL; its log is $log"
echo '$ cay run -t python -- python3 -c "print(6*7)"'
bin/cay run -t python -- python3 -c "print(6*7)"
echo '$ cay run -t python -- uname -a'
bin/cay run -t python -- uname -a

cat <<END

It works. In another terminal:

  export PATH=\$PATH:$PWD/bin CAY_API_URL=$CAY_API_URL CAY_API_KEY=\$(cat $dir/api-key)
  id=\$(cay sandbox create -t python --timeout 1h)
  cay sandbox exec \$id -- python3 --version
  cay sandbox upload \$id README.md /home/user/README.md
  cay sandbox list
  cay sandbox destroy \$id
  curl -H "Authorization: Bearer \$CAY_API_KEY" $CAY_API_URL/v1/sandboxes

The API is described at $CAY_API_URL/openapi.yaml. Ctrl-C stops the server. Sandboxes continue until
their time is over; bin/cay doctor --clean removes what is left of them.
END
wait $server
