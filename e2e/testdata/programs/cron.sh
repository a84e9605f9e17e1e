# A job that is due each minute, of a user.
rm -f /tmp/cron-ran
echo '* * * * * id -un >/tmp/cron-ran' | crontab -u user -
cron
for n in $(seq 150); do
	test -s /tmp/cron-ran && break
	sleep 0.5
done
grep '^user$' /tmp/cron-ran
crontab -u user -r
kill "$(cat /var/run/crond.pid)"
