package network

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// socketBuffer is the size of a socket's buffers in bytes. It bounds a transaction and its
// acknowledgements: 10,000 ranges take about 0.7 MB, and each slot has about 20 acknowledgements
// of 768 bytes when the table is installed. The kernel takes memory only as needed; with a
// smaller buffer a large transaction would fail.
const socketBuffer = 256 << 20

// sockets holds the sockets to netfilter open. Closing one makes the kernel first finish what
// earlier transactions removed, which takes until every CPU was idle for a moment, 10 to 20 ms.
// They are opened when needed, also again after close. Each has a lock of its own, so that no
// transaction waits for a long listing.
type sockets struct {
	changes rulesSocket // transactions
	lists   rulesSocket // listings of rules and elements
	tracked plainSocket // connection tracking; a listing takes milliseconds
	short   plainSocket // requests that take microseconds
}

// plainSocket is a socket to netfilter that serves one request at a time.
type plainSocket struct {
	mu sync.Mutex
	// +checklocks:mu
	conn *netlink.Conn
}

// rulesSocket is a socket to nftables that serves one request at a time.
type rulesSocket struct {
	mu sync.Mutex
	// +checklocks:mu
	conn *nftables.Conn
	// sent is the number of successful transactions.
	// +checklocks:mu
	sent uint32
}

// use calls f with the socket. After an error the socket is closed, since an answer may be left
// in it.
func (s *rulesSocket) use(f func(*nftables.Conn) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.useLocked(f)
}

// +checklocks:s.mu
func (s *rulesSocket) useLocked(f func(*nftables.Conn) error) error {
	if s.conn == nil {
		c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
			return errors.Join(c.SetWriteBuffer(socketBuffer), c.SetReadBuffer(socketBuffer))
		}))
		if err != nil {
			return fmt.Errorf("opening nftables: %w", err)
		}
		s.conn = c
	}
	err := f(s.conn)
	if err != nil {
		_ = s.conn.CloseLasting() // nothing is lost with it
		s.conn = nil
	}
	return err
}

func (s *rulesSocket) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return nil
	}
	err := s.conn.CloseLasting()
	s.conn = nil
	return err
}

// transact sends what f adds to the kernel as one transaction: all or nothing.
func (s *sockets) transact(f func(*nftables.Conn) error) error {
	s.changes.mu.Lock()
	defer s.changes.mu.Unlock()
	err := s.changes.useLocked(func(c *nftables.Conn) error {
		if err := f(c); err != nil {
			return err
		}
		return c.Flush()
	})
	if err == nil {
		s.changes.sent++
	}
	return err
}

// list calls f with the socket for listings. isGone is true for its error if something did not
// exist; the library keeps only the text of that error.
func (s *sockets) list(f func(*nftables.Conn) error) error {
	err := s.lists.use(f)
	if err == nil || isGone(err) {
		return err
	}
	if text, ok := strings.CutSuffix(err.Error(), unix.ENOENT.Error()); ok {
		return fmt.Errorf("%s%w", text, unix.ENOENT)
	}
	return err
}

// foreign returns a number that changes only when another process changes the host's rules.
func (s *sockets) foreign() (uint32, error) {
	s.changes.mu.Lock() // so that this process sends no transaction between the two numbers
	defer s.changes.mu.Unlock()
	generation, err := s.generation()
	return generation - s.changes.sent, err
}

// execute sends a request and returns the kernel's answers.
func (s *plainSocket) execute(m netlink.Message) ([]netlink.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return nil, fmt.Errorf("opening netfilter: %w", err)
		}
		s.conn = c
	}
	answers, err := s.conn.Execute(m)
	if err != nil && !refusedByKernel(err) {
		_ = s.conn.Close() // no error matters, since the socket only sent requests
		s.conn = nil
	}
	return answers, err
}

func (s *plainSocket) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return nil
	}
	err := s.conn.Close()
	s.conn = nil
	return err
}

// refusedByKernel reports whether an error is the kernel's whole answer to a request, so that nothing
// is left in the socket.
func refusedByKernel(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP)
}

func (s *sockets) close() error {
	return errors.Join(s.changes.close(), s.lists.close(), s.tracked.close(), s.short.close())
}
