package template

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cayhq/cay/internal/fault"
)

// contextBudget bounds the space that the contexts of one organization take on the disk: those of
// its templates, recently stored ones that are not collected yet, even if their requests failed,
// and those being stored.
type contextBudget struct {
	mu sync.Mutex
	// +checklocks:mu
	lately map[string]map[string]int64 // bytes, by organization and context
	// +checklocks:mu
	putting map[string]int64 // most bytes that may come, by organization
}

// leastSize limits from below what a context counts, in bytes: it takes a block of the disk and an inode.
const leastSize = 4096

// contextSizes maps an organization's contexts to their sizes in bytes.
type contextSizes map[string]int64

// begin reserves space for a context of up to most bytes, less if less is left, and returns the
// number of bytes. The caller must call end.
func (b *contextBudget) begin(org string, has contextSizes, most, total int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	left := total - b.putting[org]
	if len(b.lately[org]) >= maxUploads {
		return 0 // each takes memory, and a file
	}
	for hash, size := range b.lately[org] {
		if _, counted := has[hash]; !counted {
			left -= size
		}
	}
	for _, size := range has {
		left -= size
	}
	got := max(min(most, left), 0)
	b.putting[org] += got
	return got
}

// end gives back the reservation and records the stored context; "" is none.
func (b *contextBudget) end(org string, got int64, hash string, size int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.putting[org] -= got; b.putting[org] == 0 {
		delete(b.putting, org)
	}
	if hash == "" {
		return
	}
	if b.lately[org] == nil {
		b.lately[org] = map[string]int64{}
	}
	b.lately[org][hash] = size
}

// gone removes contexts that were collected.
func (b *contextBudget) gone(hashes []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for org, all := range b.lately {
		for _, hash := range hashes {
			delete(all, hash)
		}
		if len(all) == 0 {
			delete(b.lately, org)
		}
	}
}

// putContext stores a context; "" for none. length is its size in bytes, if that is known, or
// negative. If the organization's contexts would take too much space it gives Exhausted, code
// "quota_exceeded".
func (s *Service) putContext(ctx context.Context, org string, source io.Reader, length int64) (hash string, err error) {
	if source == nil {
		return "", nil
	}
	most := s.cfg.ContextLimit
	if length >= 0 && length < most {
		most = length // others may come at the same time
	}
	const block = 512 // bytes of a tar's first header
	buffered := bufio.NewReaderSize(source, block)
	head, err := buffered.Peek(block)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if !isTar(head) {
		return "", invalid("context", "must be a tar, plain or compressed with gzip")
	}
	has, err := s.keptContexts(ctx, org)
	if err != nil {
		return "", err
	}
	limit := s.budget.begin(org, has, most, s.cfg.ContextTotal)
	var size int64
	defer func() { s.budget.end(org, limit, hash, max(size, leastSize)) }()
	spent := fault.New(fault.Exhausted, fault.CodeQuotaExceeded,
		"the contexts and uploads of the organization's templates may take %d MiB in all (build.contexts_mb): "+
			"delete templates, or wait an hour until unused ones are removed", s.cfg.ContextTotal>>20)
	if limit == 0 {
		return "", spent
	}
	hash, size, err = s.contexts.Put(ctx, buffered, limit)
	if fault.Is(err, fault.TooLarge) {
		if limit < most {
			return "", spent
		}
		return "", fault.New(fault.TooLarge, fault.CodeContextTooLarge,
			"the context has more than %d MiB; a .dockerignore leaves out what the build does not need", s.cfg.ContextLimit>>20)
	}
	return hash, err
}

// keptContexts returns the contexts of an organization's templates, and its uploads.
func (s *Service) keptContexts(ctx context.Context, org string) (contextSizes, error) {
	hashes, err := s.store.TemplateContexts(ctx, org)
	if err != nil {
		return nil, fmt.Errorf("listing contexts: %w", err)
	}
	all := s.uploads.sizes(org)
	for _, hash := range hashes {
		size, err := s.contexts.Size(hash)
		if err != nil {
			continue // it is missing, which its build reports
		}
		all[hash] = size
	}
	return all, nil
}
