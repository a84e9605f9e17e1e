package network

import (
	"errors"
	"fmt"
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
// 20 ms. They are opened when they are needed, also again after close.
type sockets struct {
	mu sync.Mutex
	// +checklocks:mu
	rules *nftables.Conn
	// +checklocks:mu
	sent uint32 // transactions that were carried out
	// +checklocks:mu
	other *netlink.Conn
}

// use lends the socket for rules. After an error it is not used again: an answer
// may be left in it.
func (s *sockets) use(f func(*nftables.Conn) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rules == nil {
		c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
			return errors.Join(c.SetWriteBuffer(socketBuffer), c.SetReadBuffer(socketBuffer))
		}))
		if err != nil {
			return fmt.Errorf("opening nftables: %w", err)
		}
		s.rules = c
	}
	err := f(s.rules)
	if err != nil {
		_ = s.rules.CloseLasting() // nothing is lost with it
		s.rules = nil
	}
	return err
}

// transact sends what f adds to the kernel as one transaction: all or nothing.
func (s *sockets) transact(f func(*nftables.Conn) error) error {
	err := s.use(func(c *nftables.Conn) error {
		if err := f(c); err != nil {
			return err
		}
		return c.Flush()
	})
	if err == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.sent++
	}
	return err
}

func (s *sockets) transactions() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent
}

// execute asks any other part of netfilter.
func (s *sockets) execute(m netlink.Message) ([]netlink.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
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
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if s.rules != nil {
		errs = append(errs, s.rules.CloseLasting())
	}
	if s.other != nil {
		errs = append(errs, s.other.Close())
	}
	s.rules, s.other = nil, nil
	return errors.Join(errs...)
}
