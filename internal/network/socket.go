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

// socketBuffer bounds, in bytes, what a transaction and its acknowledgements take:
// 10,000 ranges are about 0.7 MB, each slot about 20 acknowledgements of 768 bytes
// when everything is installed anew. Memory is only used as needed.
const socketBuffer = 256 << 20

// sockets are kept open: closing one makes the kernel finish first what earlier
// transactions removed, which takes until every CPU was idle for a moment, 10 to
// 20 ms. They are opened when they are needed, also again after close. Each has a
// lock of its own, so that no transaction waits for a long listing.
type sockets struct {
	changes rulesSocket // transactions
	lists   rulesSocket // listings of rules and elements

	otherMu sync.Mutex
	// +checklocks:otherMu
	other *netlink.Conn
}

// rulesSocket is a socket to nftables that one request uses at a time.
type rulesSocket struct {
	mu sync.Mutex
	// +checklocks:mu
	conn *nftables.Conn
	// sent counts the transactions that were carried out.
	// +checklocks:mu
	sent uint32
}

// use lends the socket. After an error it is not used again: an answer may be left
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

// list lends the socket for listings. The error is isGone when something was not there,
// of which the library keeps the text only.
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

// foreign numbers the changes of the host's rules that are not ours, from any number
// on: as long as it stays the same, nobody else changed a rule.
func (s *sockets) foreign() (uint32, error) {
	s.changes.mu.Lock() // no transaction of ours is between the two numbers
	defer s.changes.mu.Unlock()
	generation, err := s.generation()
	return generation - s.changes.sent, err
}

// execute asks any other part of netfilter.
func (s *sockets) execute(m netlink.Message) ([]netlink.Message, error) {
	s.otherMu.Lock()
	defer s.otherMu.Unlock()
	if s.other == nil {
		c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return nil, fmt.Errorf("opening netfilter: %w", err)
		}
		s.other = c
	}
	answers, err := s.other.Execute(m)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		_ = s.other.Close() // it was only asked
		s.other = nil
	}
	return answers, err
}

func (s *sockets) close() error {
	errs := []error{s.changes.close(), s.lists.close()}
	s.otherMu.Lock()
	defer s.otherMu.Unlock()
	if s.other != nil {
		errs = append(errs, s.other.Close())
	}
	s.other = nil
	return errors.Join(errs...)
}
