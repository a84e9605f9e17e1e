#!/usr/bin/env bash
# Runs every fuzz test for FUZZTIME, one after another, since Go runs one at a time.
set -euo pipefail
grep -rlE '^func Fuzz' --include='*_test.go' . | xargs -r -n1 dirname | sort -u | while read -r dir; do
	binary=$(mktemp)
	(cd "$dir" && go test -c -o "$binary" .) # some are in a module of their own
	grep -hoE '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | sed 's/func //' | while read -r name; do
		echo "fuzzing $dir $name for ${FUZZTIME:=3000x}"
		(cd "$dir" && "$binary" -test.run='^$' -test.fuzz="^$name\$" -test.fuzztime="$FUZZTIME" \
			-test.fuzzcachedir="$(dirname "$binary")/cay-fuzz" >"$binary.log" 2>&1) || { cat "$binary.log"; exit 1; }
	done
	rm -f "$binary" "$binary.log"
done
