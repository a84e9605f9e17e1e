# A page of a server inside, its script, and a picture of it.
mkdir -p /tmp/chromium && cd /tmp/chromium
cat >page.html <<'end'
<!doctype html><body style="background:#f00"><p id=p></p><script>
fetch('data.json').then(r => r.json()).then(d => { document.getElementById('p').textContent = 'sum ' + d.reduce((a, b) => a + b) })
</script>
end
echo '[1, 2, 39]' >data.json
python3 -m http.server 8124 --bind 127.0.0.1 >/dev/null 2>&1 &
server=$!
trap 'kill $server' EXIT
until curl -sf -o /dev/null http://127.0.0.1:8124/data.json; do sleep 0.1; done
run() { timeout 120 chromium --headless --no-sandbox --disable-gpu --user-data-dir=/tmp/chromium/profile --virtual-time-budget=5000 "$@" http://127.0.0.1:8124/page.html 2>/tmp/chromium/log; }
run --dump-dom | grep '<p id="p">sum 42</p>' || { cat /tmp/chromium/log; exit 1; }
run --screenshot=/tmp/chromium/page.png
file=$(head -c 8 page.png | od -An -tx1 | tr -d ' \n')
test "$file" = 89504e470d0a1a0a
