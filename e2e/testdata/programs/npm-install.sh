# A package and what it depends on, from a registry inside.
rm -rf /tmp/npm && mkdir -p /tmp/npm/registry /tmp/npm/app
cd /tmp/npm/registry
for name in one two; do
	mkdir -p src/$name
	needs='{}'
	test $name = two || needs='{"two":"1.0.0"}'
	echo "{\"name\":\"$name\",\"version\":\"1.0.0\",\"main\":\"index.js\",\"dependencies\":$needs,\"bin\":{\"$name\":\"index.js\"},\"scripts\":{\"install\":\"echo made >made\"}}" >src/$name/package.json
	echo "#!/usr/bin/env node
console.log('$name')" >src/$name/index.js
	(cd src/$name && npm pack --silent --pack-destination ../.. >/dev/null)
	echo "{\"name\":\"$name\",\"dist-tags\":{\"latest\":\"1.0.0\"},\"versions\":{\"1.0.0\":{\"name\":\"$name\",\"version\":\"1.0.0\",\"hasInstallScript\":true,\"dependencies\":$needs,\"bin\":{\"$name\":\"index.js\"},\"dist\":{\"tarball\":\"http://127.0.0.1:8123/$name-1.0.0.tgz\",\"shasum\":\"$(sha1sum $name-1.0.0.tgz | cut -d' ' -f1)\"}}}}" >$name
done
python3 -m http.server 8123 --bind 127.0.0.1 >/dev/null 2>&1 &
server=$!
trap 'kill $server' EXIT
until curl -sf -o /dev/null http://127.0.0.1:8123/one; do sleep 0.1; done
cd /tmp/npm/app
echo '{"name":"app","version":"1.0.0","scripts":{"start":"one"}}' >package.json
npm install --registry http://127.0.0.1:8123 --no-audit --no-fund one >/tmp/npm/log 2>&1 || { cat /tmp/npm/log; exit 1; }
test "$(cat node_modules/one/made)$(cat node_modules/two/made)" = mademade
npm start --silent | grep '^one$'
