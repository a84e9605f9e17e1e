// Command hostile does inside a sandbox what a guest would to get what is the agent's.
package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const agentPort = 49983

func main() {
	switch os.Args[1] {
	case "bind":
		bind(os.Args[2], os.Args[3])
	case "relay":
		relay(os.Args[2], os.Args[3])
	case "from":
		from(os.Args[2], os.Args[3])
	case "crowd":
		crowd(os.Args[2])
	case "namespaces":
		namespaces()
	}
}

// say prints what came of an attack: "refused", or what was won.
func say(what string, err error) {
	if err != nil {
		fmt.Printf("refused %s: %v\n", what, err)
	} else {
		fmt.Printf("WON %s\n", what)
	}
}

// bind tries to take the agent's port in every way, and listens for a while on what it got. Where a host connection
// may come, it writes what came to a file.
func bind(own, caught string) {
	type option struct{ level, name int }
	reuse := map[string][]option{
		"": nil, "reuseaddr": {{unix.SOL_SOCKET, unix.SO_REUSEADDR}}, "reuseport": {{unix.SOL_SOCKET, unix.SO_REUSEPORT}},
		"both":        {{unix.SOL_SOCKET, unix.SO_REUSEADDR}, {unix.SOL_SOCKET, unix.SO_REUSEPORT}},
		"transparent": {{unix.SOL_SOCKET, unix.SO_REUSEADDR}, {unix.IPPROTO_IP, unix.IP_FREEBIND}, {unix.IPPROTO_IP, unix.IP_TRANSPARENT}},
	}
	ip := net.ParseIP(own).To4()
	v4 := map[string][4]byte{"own": [4]byte(ip), "any": {}, "loopback": {127, 0, 0, 1}}
	v6 := map[string][16]byte{"any6": {}, "mapped own": [16]byte(net.ParseIP(own).To16()), "mapped any": [16]byte(net.IPv4zero.To16())}
	var listening []int
	try := func(name string, family int, options []option, only6 int, device string, sa unix.Sockaddr) {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			say(name, err)
			return
		}
		for _, o := range options {
			_ = unix.SetsockoptInt(fd, o.level, o.name, 1) // one that is refused is not needed
		}
		if family == unix.AF_INET6 {
			_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only6)
		}
		if device != "" {
			_ = unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, device)
		}
		if err = unix.Bind(fd, sa); err == nil {
			err = unix.Listen(fd, 16)
		}
		say(name, err)
		if err != nil {
			unix.Close(fd)
			return
		}
		listening = append(listening, fd)
	}
	for with, options := range reuse {
		for _, device := range []string{"", "eth0", "lo"} {
			for name, a := range v4 {
				try(fmt.Sprintf("bind %s %s %s", name, with, device), unix.AF_INET, options, 0, device, &unix.SockaddrInet4{Port: agentPort, Addr: a})
			}
			for name, a := range v6 {
				try(fmt.Sprintf("bind %s %s %s", name, with, device), unix.AF_INET6, options, 0, device, &unix.SockaddrInet6{Port: agentPort, Addr: a})
			}
		}
		// IPv6 alone is not a way that connections of the host take.
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM, 0)
		if err != nil {
			continue
		}
		for _, o := range options {
			_ = unix.SetsockoptInt(fd, o.level, o.name, 1)
		}
		_ = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
		if unix.Bind(fd, &unix.SockaddrInet6{Port: agentPort}) == nil && unix.Listen(fd, 16) == nil {
			listening = append(listening, fd)
		}
	}
	fmt.Println("tried")
	for _, fd := range listening {
		go capture(fd, caught)
	}
	if len(listening) > 0 {
		time.Sleep(time.Minute) // until the test has made its calls, or for good
	}
}

// capture writes what comes to a file.
func capture(fd int, to string) {
	for {
		c, _, err := unix.Accept(fd)
		if err != nil {
			return
		}
		b := make([]byte, 64<<10)
		n, _ := unix.Read(c, b)
		f, err := os.OpenFile(to, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return
		}
		fmt.Fprintf(f, "%q\n", b[:max(n, 0)])
		f.Close()
	}
}

// relay listens on a port and joins each connection to the agent, and notes what the host sends. It asks for its own
// request as soon as the agent answers.
func relay(port, noted string) {
	l, err := net.Listen("tcp4", "0.0.0.0:"+port)
	if err != nil {
		say("listen", err)
		os.Exit(1)
	}
	fmt.Println("listening")
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			own := c.LocalAddr().(*net.TCPAddr).IP.String()
			agent, err := net.Dial("tcp4", net.JoinHostPort(own, strconv.Itoa(agentPort)))
			if err != nil {
				return
			}
			defer agent.Close()
			f, err := os.OpenFile(noted, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
			if err != nil {
				return
			}
			defer f.Close()
			go func() {
				_, _ = io.Copy(c, agent)
				c.Close()
			}()
			_, _ = io.Copy(io.MultiWriter(agent, f), c)
		}()
	}
}

// from tries to connect to the agent from an address that is not the sandbox's, the host's.
func from(own, host string) {
	hostAddr, ownAddr := [4]byte(net.ParseIP(host).To4()), [4]byte(net.ParseIP(own).To4())
	for name, option := range map[string]int{"plain": 0, "freebind": unix.IP_FREEBIND, "transparent": unix.IP_TRANSPARENT} {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err == nil && option != 0 {
			_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, option, 1) // the bind shows what it is worth
		}
		if err == nil {
			err = unix.Bind(fd, &unix.SockaddrInet4{Addr: hostAddr})
		}
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrInet4{Addr: ownAddr, Port: agentPort})
		}
		say("connect from the host's address, "+name, err)
	}
	for name, kind := range map[string][3]int{
		"raw socket": {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP}, "raw IPv6 socket": {unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6},
		"packet socket": {unix.AF_PACKET, unix.SOCK_RAW, 0x0300}, "cooked packet socket": {unix.AF_PACKET, unix.SOCK_DGRAM, 0x0300},
	} {
		_, err := unix.Socket(kind[0], kind[1], kind[2])
		say(name, err)
	}
	say("address on an interface", addAddress(hostAddr))
}

// addAddress asks the kernel to give the loopback another address.
func addAddress(a [4]byte) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const length = 16 + 8 + 8
	b := make([]byte, length)
	*(*uint32)(unsafe.Pointer(&b[0])) = length
	*(*uint16)(unsafe.Pointer(&b[4])) = unix.RTM_NEWADDR
	*(*uint16)(unsafe.Pointer(&b[6])) = unix.NLM_F_REQUEST | unix.NLM_F_ACK | unix.NLM_F_CREATE
	b[16], b[17] = unix.AF_INET, 32
	*(*uint32)(unsafe.Pointer(&b[20])) = 1
	*(*uint16)(unsafe.Pointer(&b[24])) = 8
	*(*uint16)(unsafe.Pointer(&b[26])) = unix.IFA_LOCAL
	copy(b[28:], a[:])
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	if n < 20 || *(*uint16)(unsafe.Pointer(&answer[4])) != unix.NLMSG_ERROR {
		return errors.New("no answer")
	}
	if code := *(*int32)(unsafe.Pointer(&answer[16])); code != 0 {
		return syscall.Errno(-code)
	}
	return nil
}

// crowd opens many connections to the agent that say nothing, or half of something, and waits until the agent has
// closed all.
func crowd(count string) {
	n, err := strconv.Atoi(count)
	if err != nil {
		os.Exit(2)
	}
	var wg sync.WaitGroup
	for i := range n {
		c, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", agentPort))
		if err != nil {
			continue
		}
		_, _ = io.WriteString(c, []string{"", "\x00cay", "\x00cay/1\r\n0123456789abcdef", "GET /health HTTP/1.1\r\nHost: x\r\nA: "}[i%4]) // refused ones are closed
		wg.Go(func() {
			_, _ = io.Copy(io.Discard, c)
			c.Close()
		})
	}
	fmt.Println("crowded")
	wg.Wait()
	fmt.Println("all closed")
}
