#!/usr/bin/env bash
# Compresses programs into a directory, each only when it changed, so that what
# embeds them is built again only then.
#   pack.sh PROGRAM... DIR
set -euo pipefail
dir=${*: -1}
for program in "${@:1:$#-1}"; do
	to=$dir/$(basename "$program").gz
	# -n: no time and name inside, so that the same program gives the same bytes.
	if [[ ! -e $to ]] || ! gzip -dc "$to" | cmp -s - "$program"; then
		gzip -n -6 -c "$program" >"$to.new"
		mv "$to.new" "$to"
	fi
done
