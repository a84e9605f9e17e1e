# A server of its own user, its tools over a socket and over TCP, and a load with several clients.
bin=$(echo /usr/lib/postgresql/*/bin)
install -d -o postgres /tmp/pg
as() { su postgres -c "$*"; }
as $bin/initdb -D /tmp/pg/data >/tmp/pg/log
as $bin/pg_ctl -D /tmp/pg/data -o "'-k /tmp/pg'" -l /tmp/pg/server.log -w start >>/tmp/pg/log
as psql -q -h /tmp/pg -c "'create table t as select n, md5(n::text) m from generate_series(1, 100000) n; create index on t (m)'"
test "$(as psql -h 127.0.0.1 -tAc "'select sum(n) from t'")" = 5000050000
as $bin/pgbench -h /tmp/pg -i -q -s 1 >>/tmp/pg/log 2>&1
as $bin/pgbench -h /tmp/pg -c 4 -j 2 -t 50 | grep 'processed: 200/200'
as psql -h /tmp/pg -qc "'vacuum full t'"
as $bin/pg_ctl -D /tmp/pg/data -m immediate stop >>/tmp/pg/log
as $bin/pg_ctl -D /tmp/pg/data -o "'-k /tmp/pg'" -l /tmp/pg/server.log -w start >>/tmp/pg/log # recovers
test "$(as psql -h /tmp/pg -tAc "'select count(*) from t'")" = 100000
as $bin/pg_ctl -D /tmp/pg/data -m fast stop >>/tmp/pg/log
