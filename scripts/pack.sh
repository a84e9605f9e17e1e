#!/usr/bin/env bash
# Compresses programs into a directory. It rewrites a file only if the program changed, so that the
# package that embeds it is built again only then.
#   pack.sh PROGRAM... DIR
set -euo pipefail
dir=${*: -1}
for program in "${@:1:$#-1}"; do
	to=$dir/$(basename "$program").gz
	# -n leaves out time and name, so that the same program gives the same bytes.
	if [[ ! -e $to ]] || ! gzip -dc "$to" | cmp -s - "$program"; then
		gzip -n -6 -c "$program" >"$to.new"
		mv "$to.new" "$to"
	fi
done
