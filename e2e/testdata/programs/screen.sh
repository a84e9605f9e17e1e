# A session without a terminal that goes on by itself, and what it shows.
export TERM=xterm SCREENDIR=/tmp/screens
install -d -m 700 $SCREENDIR
rm -f /tmp/screen.txt
screen -dmS tried sh
until screen -ls | grep -q tried; do sleep 0.1; done
for n in $(seq 25); do
	# A new session drops keys that come before it has a window.
	screen -S tried -p 0 -X stuff 'expr 40 + 2
'
	sleep 0.2
	screen -S tried -p 0 -X hardcopy /tmp/screen.txt
	sleep 0.2
	grep -qs '^42' /tmp/screen.txt && break
done
grep -m 1 '^42' /tmp/screen.txt
screen -S tried -X quit
