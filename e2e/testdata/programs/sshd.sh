# A login by key: a command, a terminal, a file, a port.
rm -rf /tmp/ssh && mkdir -p /tmp/ssh /run/sshd /root/.ssh
chmod 700 /root/.ssh
ssh-keygen -q -t ed25519 -N '' -f /tmp/ssh/key
cp /tmp/ssh/key.pub /root/.ssh/authorized_keys
chmod 600 /root/.ssh/authorized_keys
ssh-keygen -A >/dev/null
/usr/sbin/sshd -p 2222 -o ListenAddress=127.0.0.1 -o PidFile=/tmp/ssh/pid
options='-i /tmp/ssh/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/tmp/ssh/known -o LogLevel=ERROR'
until ssh $options -p 2222 root@127.0.0.1 true; do sleep 0.2; done
ssh $options -p 2222 root@127.0.0.1 'echo $((40+2))' | grep '^42$'
ssh $options -tt -p 2222 root@127.0.0.1 'tty; exit 7' >/tmp/ssh/tty || test $? = 7
grep '^/dev/pts/' /tmp/ssh/tty
head -c 3000000 /dev/urandom >/tmp/ssh/file
scp -q $options -P 2222 /tmp/ssh/file root@127.0.0.1:/tmp/ssh/copy
cmp /tmp/ssh/file /tmp/ssh/copy
ssh $options -p 2222 -f -N -L 127.0.0.1:2223:127.0.0.1:2222 root@127.0.0.1
timeout 20 ssh-keyscan -p 2223 127.0.0.1 2>/dev/null | grep -q ed25519
kill "$(cat /tmp/ssh/pid)"
pkill -f 2223:127.0.0.1:2222
