# Does $action, and prints what was answered: at that line the power goes. What is meant by
# during-… prints what was asked for, and the power goes in the middle.
mark=mark-$cut
answer() { # KEY VALUE...
	local text
	text=$(jq -cn '$ARGS.positional | [range(0; length; 2) as $i | {(.[$i]): .[$i + 1]}] | add' --args action "$action" mark "$mark" "$@")
	echo "answered: $text"
	sleep 600 # nothing comes after it
}
# in_the_middle KEY VALUE... COMMAND... lets the power go while a call is under way.
in_the_middle() {
	local path=$1 method=$2 body=$3
	shift 3
	api "$method" "$path" "$body" >/dev/null &
	sleep "$((cut % 4)).$((cut * 7 % 10))"
	answer "$@"
}
marked() { # a persistent sandbox that has the mark in a file that is saved
	local id
	id=$(create "$persistent")
	inside "$id" "echo $mark >/home/user/mark" >/dev/null
	echo "$id"
}
good() { # ANSWER fails unless it is no error
	if [[ $(jq -r '.error.code // empty' <<<"${1:-null}" 2>/dev/null) != "" ]]; then echo "answer: $1" >&2; exit 1; fi
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
