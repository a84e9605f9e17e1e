package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// slots gets network namespaces from the server. It is safe for concurrent use.
type slots struct {
	control *wire.Conn

	mu sync.Mutex
	// +checklocks:mu
	last int64
	// +checklocks:mu
	waiting map[int64]chan gift
}

type gift struct {
	namespace *os.File
	err       error
}

// slot is a network namespace that belongs to the program until it is released.
type slot struct {
	slots     *slots
	id        int64
	namespace *os.File
}

// take requests a slot and waits for it.
func (s *slots) take(ctx context.Context) (*slot, error) {
	answer := make(chan gift, 1)
	s.mu.Lock()
	s.last++
	id := s.last
	s.waiting[id] = answer
	s.mu.Unlock()
	if err := s.control.Send(wire.Ask{Take: id}, nil); err != nil {
		return nil, fmt.Errorf("asking for a network: %w", err)
	}
	select {
	case g := <-answer:
		if g.err != nil {
			return nil, fmt.Errorf("getting a network: %w", g.err)
		}
		return &slot{slots: s, id: id, namespace: g.namespace}, nil
	case <-ctx.Done():
		// The answer still comes, and the slot is given back then.
		go func() {
			if g := <-answer; g.err == nil {
				(&slot{slots: s, id: id, namespace: g.namespace}).release()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

// given is called with every answer.
func (s *slots) given(g wire.SlotGift, namespace *os.File) {
	s.mu.Lock()
	answer := s.waiting[g.ID]
	delete(s.waiting, g.ID)
	s.mu.Unlock()
	switch {
	case answer == nil:
		if namespace != nil {
			namespace.Close()
		}
	case g.Error != "":
		answer <- gift{err: errors.New(g.Error)}
	case namespace == nil:
		answer <- gift{err: errors.New("the server sent none")}
	default:
		answer <- gift{namespace: namespace}
	}
}

// path returns the path of the namespace for processes that this one starts.
func (s *slot) path() string {
	return "/proc/" + strconv.Itoa(os.Getpid()) + "/fd/" + strconv.Itoa(int(s.namespace.Fd()))
}

// release gives the slot back. Nothing may run in it any more.
func (s *slot) release() {
	s.namespace.Close()
	// Without a connection the server has taken all slots back.
	_ = s.slots.control.Send(wire.Ask{Release: s.id}, nil)
}
