# Does $action and prints the answer; at that line the power is cut. An action during-… prints its
# request while the call is under way, so the power is cut in the middle of it.
mark=mark-$cut
answer() { # KEY VALUE...
	local text
	text=$(jq -cn '$ARGS.positional | [range(0; length; 2) as $i | {(.[$i]): .[$i + 1]}] | add' --args action "$action" mark "$mark" "$@")
	echo "answered: $text"
	sleep 600 # until the power is cut
}
# in_the_middle PATH METHOD BODY KEY VALUE... answers while a call is under way, so that the power is cut then.
in_the_middle() {
	local path=$1 method=$2 body=$3
	shift 3
	api "$method" "$path" "$body" >/dev/null &
	sleep "$((cut % 4)).$((cut * 7 % 10))"
	answer "$@"
}
marked() { # makes a persistent sandbox with the mark in a file, and prints its id
	local id
	id=$(create "$persistent")
	inside "$id" "echo $mark >/mark" >/dev/null
	echo "$id"
}
good() { # ANSWER fails if the answer is an error
	if [[ $(jq -r '.code // empty' <<<"${1:-null}" 2>/dev/null) != "" ]]; then echo "answer: $1" >&2; exit 1; fi
}
case $action in
create) id=$(create); answer id "$id" ;;
create-persistent) id=$(create "$persistent"); answer id "$id" ;;
suspend) id=$(marked); a=$(api POST "/sandboxes/$id/suspend"); good "$a"; answer id "$id" ;;
checkpoint) id=$(marked); a=$(api POST "/sandboxes/$id/checkpoint"); good "$a"; answer id "$id" ;;
wake)
	id=$(marked); a=$(api POST "/sandboxes/$id/suspend"); good "$a"
	a=$(api POST "/sandboxes/$id/wake"); good "$a"; answer id "$id" ;;
snapshot) id=$(marked); a=$(api POST "/sandboxes/$id/snapshots" '{}'); good "$a"; answer id "$id" snapshot "$(jq -r .id <<<"$a")" ;;
fork)
	id=$(marked); a=$(api POST "/sandboxes/$id/checkpoint"); good "$a"
	a=$(api POST "/sandboxes/$id/fork" '{"count": 1, "mode": "persistent"}'); good "$a"
	answer id "$id" child "$(jq -r '.children[0].sandbox.id' <<<"$a")" ;;
policy)
	id=$(marked); a=$(api POST "/sandboxes/$id/checkpoint"); good "$a"
	a=$(api PUT "/sandboxes/$id/egress" '{"mode": "deny_all", "allow_cidrs": ["203.0.113.'"$cut"'/32"]}'); good "$a"
	answer id "$id" policy "203.0.113.$cut/32" ;;
key) a=$(api POST /api-keys "{\"name\": \"$mark\"}"); good "$a"; answer key "$(jq -r .api_key <<<"$a")" ;;
destroy) id=$(marked); a=$(api POST "/sandboxes/$id/suspend"); good "$a"; api DELETE "/sandboxes/$id"; answer id "$id" ;;
during-create) in_the_middle /sandboxes POST "$persistent" ;;
during-suspend) id=$(marked); a=$(api POST "/sandboxes/$id/checkpoint"); good "$a"; in_the_middle "/sandboxes/$id/suspend" POST "" id "$id" ;;
during-snapshot) id=$(marked); a=$(api POST "/sandboxes/$id/checkpoint"); good "$a"; in_the_middle "/sandboxes/$id/snapshots" POST '{}' id "$id" ;;
during-destroy) id=$(marked); a=$(api POST "/sandboxes/$id/suspend"); good "$a"; in_the_middle "/sandboxes/$id" DELETE "" id "$id" ;;
nothing) answer ;;
*) echo "no action $action" >&2; exit 2 ;;
esac
