package network

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func command(program, stdin string) (string, error) {
	cmd := exec.Command(program, "-f", "-")
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// serveTCP echoes on a port of the namespace at path until the test ends.
func serveTCP(t *testing.T, path string, port int) {
	t.Helper()
	var l net.Listener
	if err := enter(path, func() (err error) {
		l, err = net.Listen("tcp4", fmt.Sprintf(":%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
}

// echo sends size bytes and checks that they come back.
func echo(t *testing.T, c net.Conn, size int) {
	t.Helper()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent := bytes.Repeat([]byte("sandbox "), size/8)
	go c.Write(sent)
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("reading back: %v", err)
	}
	if !bytes.Equal(sent, got) {
		t.Error("what came back differs")
	}
}

// TestOutside checks that what a slot may do works, and looks as if the host did it.
func TestOutside(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	t.Run("TCP", func(t *testing.T) {
		serveTCP(t, outsidePath, probePort)
		var c net.Conn
		if err := inNamespace(s.Namespace, func() (err error) {
			c, err = net.DialTimeout("tcp4", netip.AddrPortFrom(farAddr, probePort).String(), 5*time.Second)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		echo(t, c, 4<<20)
	})
	t.Run("UDP", func(t *testing.T) { udpRoundTrip(t, s) })
	t.Run("ICMP echo", func(t *testing.T) {
		if got := ping(t, s, farAddr, 64); got.kind != icmpEchoReply || got.from != farAddr {
			t.Errorf("got ICMP type %d from %s, want an answer of %s", got.kind, got.from, farAddr)
		}
	})
	t.Run("error of the host", func(t *testing.T) {
		if got := ping(t, s, farAddr, 1); got.kind != icmpTimeExceeded || got.from != s.Gateway {
			t.Errorf("got ICMP type %d from %s, want time exceeded from the gateway %s", got.kind, got.from, s.Gateway)
		}
	})
	t.Run("error from outside", func(t *testing.T) {
		err := inNamespace(s.Namespace, func() error {
			c, err := net.Dial("udp4", netip.AddrPortFrom(farAddr, 1).String())
			if err != nil {
				return err
			}
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
				return err
			}
			if _, err := c.Write([]byte("x")); err != nil {
				return err
			}
			_, err = c.Read(make([]byte, 1))
			return err
		})
		if !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("a closed port outside gives %v, want connection refused", err)
		}
	})
}

func udpRoundTrip(t *testing.T, s *Slot) {
	var outside net.PacketConn
	if err := inNamespace(outsidePath, func() (err error) {
		outside, err = net.ListenPacket("udp4", netip.AddrPortFrom(farAddr, probePort).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	var inside net.Conn
	if err := inNamespace(s.Namespace, func() (err error) {
		inside, err = net.Dial("udp4", netip.AddrPortFrom(farAddr, probePort).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer inside.Close()
	deadline := time.Now().Add(5 * time.Second)
	if err := errors.Join(inside.SetDeadline(deadline), outside.SetDeadline(deadline)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	var from net.Addr
	// A link drops packets in the first moment after it was set up.
	eventually(t, func() error {
		if _, err := inside.Write([]byte("question")); err != nil {
			return err
		}
		if err := outside.SetReadDeadline(time.Now().Add(grace)); err != nil {
			return err
		}
		var count int
		var err error
		if count, from, err = outside.ReadFrom(b); err != nil || string(b[:count]) != "question" {
			return fmt.Errorf("outside got %q: %w", b[:count], err)
		}
		return nil
	})
	if got := from.(*net.UDPAddr).AddrPort().Addr(); got != hostAddr {
		t.Errorf("outside sees %s, want the host's address %s", got, hostAddr)
	}
	if _, err := outside.WriteTo([]byte("answer"), from); err != nil {
		t.Fatal(err)
	}
	if count, err := inside.Read(b); err != nil || string(b[:count]) != "answer" {
		t.Errorf("inside got %q, %v", b[:count], err)
	}
}

const (
	icmpEchoReply   = 0
	icmpEchoRequest = 8
)

type pong struct {
	kind byte
	from netip.Addr
}

// ping sends an echo request from the slot and returns the first ICMP packet that comes.
func ping(t *testing.T, s *Slot, to netip.Addr, ttl int) pong {
	t.Helper()
	var got pong
	if err := inNamespace(s.Namespace, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, ttl); err != nil {
			return err
		}
		tv := unix.Timeval{Sec: 5}
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return err
		}
		request := []byte{icmpEchoRequest, 0, 0, 0, 0x12, byte(ttl), 0, 1}
		sum := checksum(request)
		request[2], request[3] = byte(sum>>8), byte(sum)
		if err := unix.Sendto(fd, request, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
			return err
		}
		b := make([]byte, 256)
		count, from, err := unix.Recvfrom(fd, b, 0)
		if err != nil {
			return fmt.Errorf("waiting for ICMP: %w", err)
		}
		const ipHeader = 20
		if count <= ipHeader {
			return errors.New("short packet")
		}
		got = pong{b[ipHeader], netip.AddrFrom4(from.(*unix.SockaddrInet4).Addr)}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return got
}
