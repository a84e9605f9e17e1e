# Makes the sandboxes that rebooted.sh checks after an orderly reboot.
serve
awake=$(create "$persistent")
inside "$awake" 'echo kept >/home/user/file' >/dev/null
api POST "/sandboxes/$awake/checkpoint" '{}' >&2
lost=$(create)
sleeping=$(create "$persistent")
inside "$sleeping" 'echo slept >/home/user/file' >/dev/null
api POST "/sandboxes/$sleeping/suspend" '{}' >&2
echo "$awake $lost $sleeping" >/root/sandboxes
sync
