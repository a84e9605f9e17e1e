# cay doctor finds that nothing is missing.
code=0
$lab/bin/cay doctor || code=$?
$lab/bin/cay doctor | grep -v -i -E '^ *ok' | head -3 | sed 's/^/note: /' || true
[[ $code == 0 ]]
