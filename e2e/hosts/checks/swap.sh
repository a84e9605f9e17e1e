# The machine has swap. Processes that ask for more memory than their sandbox has are ended as without it, instead of
# being moved to the swap.
serve
fallocate -l 3G /var/tmp/swap
chmod 600 /var/tmp/swap
mkswap -q /var/tmp/swap
swapon /var/tmp/swap
back() { swapoff /var/tmp/swap; rm -f /var/tmp/swap; }
trap back EXIT
id=$(create)
allocate "$id"
left=$(awk '/^SwapTotal/ {t = $2} /^SwapFree/ {print int((t - $2) / 1024)}' /proc/meminfo)
((left < 512)) || fail "after allocators $left MiB of the swap are in use"
events=$(memory_events "$id")
[[ $events == *"oom_kill 0"* ]] || fail "the kernel killed: $events"
api DELETE "/sandboxes/$id"
echo "note: $left MiB of swap in use after allocators; $events"
