# A server that forks to save, ends, and finds what it had.
mkdir -p /tmp/redis
cd /tmp/redis
start() {
	redis-server --port 6390 --dir /tmp/redis --appendonly yes --daemonize yes >/dev/null
	until redis-cli -p 6390 ping 2>/dev/null | grep -q PONG; do sleep 0.1; done
}
start
test "$(redis-cli -p 6390 set key value)" = OK
redis-benchmark -p 6390 -q -n 5000 -c 20 -t set,get,lpush >/tmp/redis/load
redis-cli -p 6390 bgsave
until redis-cli -p 6390 info persistence | grep -q rdb_bgsave_in_progress:0; do sleep 0.1; done
redis-cli -p 6390 info persistence | grep rdb_last_bgsave_status:ok
redis-cli -p 6390 shutdown || true
while pgrep redis-server >/dev/null; do sleep 0.1; done
start
test "$(redis-cli -p 6390 get key)" = value
redis-cli -p 6390 shutdown || true
