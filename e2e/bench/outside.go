package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"runtime"
	"strconv"

	"github.com/vishvananda/netns"
	"golang.org/x/net/dns/dnsmessage"
)

// outside is a host in a network namespace of the bench. Sandboxes reach it as they reach the
// internet, through the host's rules; nothing lies behind it.
type outside struct {
	name      string
	block     string
	gateway   string // this machine's address on its network
	address   string
	listeners []io.Closer
}

// Ports of the host outside.
const (
	portBlob = 8080 // sends zeros until the reader closes
	portHang = 8081 // reads a line and closes
)

// newOutside takes a block of the addresses for documentation. Nothing is left after an error.
func newOutside(ctx context.Context) (o *outside, err error) {
	first := 8 * rand.IntN(32)
	at := func(n int) string { return fmt.Sprintf("198.51.100.%d", first+n) }
	o = &outside{name: "caybench" + strconv.Itoa(first), block: at(0) + "/29", gateway: at(1), address: at(2)}
	if err := ip(ctx, "netns", "add", o.name); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.close())
		}
	}()
	for _, args := range [][]string{
		{"link", "add", o.name, "type", "veth", "peer", "name", "eth0", "netns", o.name},
		{"addr", "add", o.gateway + "/29", "dev", o.name},
		{"link", "set", o.name, "up"},
		{"-n", o.name, "addr", "add", o.address + "/29", "dev", "eth0"},
		{"-n", o.name, "link", "set", "eth0", "up"},
		{"-n", o.name, "link", "set", "lo", "up"},
	} {
		if err := ip(ctx, args...); err != nil {
			return o, err
		}
	}
	return o, o.within(o.serve)
}

func ip(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %v: %w: %s", args, err, out)
	}
	return nil
}

// within runs f on a thread in the namespace. A socket stays in the namespace in which it was made.
func (o *outside) within(f func() error) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		return err
	}
	defer home.Close()
	there, err := netns.GetFromName(o.name)
	if err != nil {
		return err
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		return err
	}
	err = f()
	if back := netns.Set(home); back != nil {
		return errors.Join(err, back) // the thread ends with its goroutine
	}
	runtime.UnlockOSThread()
	return err
}

func (o *outside) serve() error {
	for port, answer := range map[int]func(net.Conn){
		portBlob: func(c net.Conn) {
			zeros := make([]byte, 1<<20)
			for {
				if _, err := c.Write(zeros); err != nil {
					return
				}
			}
		},
		portHang: func(c net.Conn) { _, _ = c.Read(make([]byte, 16)) },
	} {
		l, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		o.listeners = append(o.listeners, l)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return // the listener is closed
				}
				go func() { defer c.Close(); answer(c) }()
			}
		}()
	}
	queries, err := net.ListenPacket("udp4", ":53")
	if err != nil {
		return err
	}
	o.listeners = append(o.listeners, queries)
	go o.answer(queries)
	return nil
}

// answer serves names on c and resolves every name to this host.
func (o *outside) answer(c net.PacketConn) {
	address := [4]byte(net.ParseIP(o.address).To4())
	buf := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return // c is closed
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil || len(m.Questions) == 0 {
			continue
		}
		m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
		if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
			m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 3600},
				Body: &dnsmessage.AResource{A: address}}}
		}
		if packed, err := m.Pack(); err == nil {
			_, _ = c.WriteTo(packed, from) // the client asks again
		}
	}
}

func (o *outside) close() error {
	var errs []error
	for _, l := range o.listeners {
		errs = append(errs, l.Close())
	}
	// The link is removed with the namespace.
	return errors.Join(append(errs, ip(context.Background(), "netns", "del", o.name))...)
}
