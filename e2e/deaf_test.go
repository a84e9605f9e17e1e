package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// earsPatience limits the wait until a socket receives one of some thousand packets a second again.
// That takes a second if it works at all, and longer on a busy machine.
const earsPatience = 30 * time.Second

// earsCount is the number of sockets that ears opens.
const earsCount = 400

// ears listens on many sockets with one epoll instance. Each greets a peer outside twice a second.
// A connection to the listener is told how many packets each socket has received.
const ears = `
import json, select, socket, sys, time
peer, many = (sys.argv[1], 7000), int(sys.argv[2])
poll, socks, heard = select.epoll(), {}, {}
for n in range(many):
    u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    u.bind(("0.0.0.0", 0))
    socks[u.fileno()] = u
    heard[u.fileno()] = 0
    poll.register(u, select.EPOLLIN)
l = socket.socket()
l.bind(("127.0.0.1", 7001))
l.listen(16)
poll.register(l, select.EPOLLIN)
greeted = 0
while True:
    if time.monotonic() - greeted > 0.5:
        greeted = time.monotonic()
        for u in socks.values():
            u.sendto(b"hello", peer)
    for fd, _ in poll.poll(0.5):
        if fd == l.fileno():
            c, _ = l.accept()
            c.sendall(json.dumps(list(heard.values())).encode())
            c.close()
        else:
            socks[fd].recv(100)
            heard[fd] += 1
`

// speak sends to the peers that have last sent to a socket, in random order, so that packets come
// at any moment of a save.
func speak(t *testing.T, c net.PacketConn) {
	var mu sync.Mutex
	var peers [earsCount]net.Addr
	stop := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(func() { close(stop); c.Close(); wg.Wait() })
	wg.Go(func() {
		buf := make([]byte, 100)
		for n := 0; ; n++ {
			_, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			mu.Lock()
			peers[n%len(peers)] = from
			mu.Unlock()
		}
	})
	wg.Go(func() {
		tick := time.NewTicker(250 * time.Microsecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			mu.Lock()
			if to := peers[rand.IntN(len(peers))]; to != nil {
				_, _ = c.WriteTo([]byte("yes"), to) // the test sees which sockets receive nothing
			}
			mu.Unlock()
		}
	})
}

// heard returns how many packets each socket of ears has received, nil if its listener does not
// answer.
func (s *server) heard(id string) (counts []int) {
	s.t.Helper()
	r := s.exec(id, `python3 -c 'import socket; print(socket.create_connection(("127.0.0.1", 7001), `+
		`timeout=5).makefile().read())'`)
	if err := json.Unmarshal([]byte(r.Stdout), &counts); err != nil {
		s.t.Logf("the listener does not answer: %+v", r)
	}
	return counts
}

// TestSocketsHearAfterWake suspends and wakes a process that waits with epoll for many sockets,
// while packets arrive for them. Each socket receives packets again afterwards, and so does the
// listener.
func TestSocketsHearAfterWake(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	o := newOutside(t)
	speak(t, inNamespace(t, o.name, func() (net.PacketConn, error) { return net.ListenPacket("udp4", o.address+":7000") }))
	id := s.persistent(nil)
	defer s.destroy(id)
	s.want(id, fmt.Sprintf("cat > /tmp/ears.py; nohup python3 /tmp/ears.py %s %d >/tmp/ears.log 2>&1 &", o.address,
		earsCount),
		object{"stdin": ears})
	before := make([]int, earsCount)
	for wakes := range 3 {
		if wakes > 0 {
			s.suspend(id)
			s.wake(id)
		}
		for deadline := time.Now().Add(earsPatience); ; time.Sleep(200 * time.Millisecond) { // a poll with a deadline
			now, deaf := s.heard(id), 0
			for i := range now {
				if now[i] <= before[i] {
					deaf++
				}
			}
			if len(now) == earsCount && deaf == 0 {
				before = now
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("after %d wakes %d of %d sockets receive nothing", wakes, deaf, len(now))
			}
		}
	}
	s.want(id, "cat /tmp/ears.log; test ! -s /tmp/ears.log")
}
