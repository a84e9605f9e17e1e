package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"

	"github.com/cayhq/cay/internal/fault"
)

// purgeTimeout bounds the time that Instances and Purge wait for the lock of the claims, which
// other processes hold for milliseconds.
const purgeTimeout = 10 * time.Second

// Remains describes what an instance has on the host.
type Remains struct {
	Instance string
	Live     bool // a process has it open
	Slots    int  // slots with a link or a namespace
}

// Instances returns the instances that have anything on the host, by name.
func Instances() ([]Remains, error) {
	ctx, cancel := context.WithTimeout(context.Background(), purgeTimeout)
	defer cancel()
	unlock, err := lockClaims(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	names, err := instanceNames()
	if err != nil {
		return nil, err
	}
	slots, err := remains()
	if err != nil {
		return nil, err
	}
	for name := range slots {
		names[name] = true
	}
	var out []Remains
	for name := range names {
		f, err := tryLock(instancePart + name)
		if err != nil {
			return nil, err
		}
		if f != nil {
			if err := unlink(f); err != nil {
				return nil, err
			}
		}
		out = append(out, Remains{Instance: name, Live: f == nil, Slots: len(slots[name])})
	}
	slices.SortFunc(out, func(a, b Remains) int { return strings.Compare(a.Instance, b.Instance) })
	return out, nil
}

// instanceNames returns the instances that have a table or a locked file. A file without a lock
// is no remainder of an instance.
func instanceNames() (map[string]bool, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("listing nftables tables: %w", err)
	}
	out := map[string]bool{}
	for _, t := range tables {
		if name, ok := parseTable(t.Name); ok {
			out[name] = true
		}
	}
	entries, err := os.ReadDir(lockDir)
	if err != nil {
		return nil, fmt.Errorf("listing claims: %w", err)
	}
	for _, e := range entries {
		name, found := strings.CutPrefix(e.Name(), instancePart)
		if !found || checkInstance(name) != nil {
			continue
		}
		f, err := tryLock(e.Name())
		if err != nil {
			return nil, err
		}
		if f == nil {
			out[name] = true
		} else if err := unlink(f); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Purge removes everything of an instance from the host. An instance that a process has open
// gives Conflict, code "instance_in_use". After an error it goes on, and returns all errors
// joined. If there is nothing it succeeds.
func Purge(instance string) error {
	if err := checkInstance(instance); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), purgeTimeout)
	defer cancel()
	unlock, err := lockClaims(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	f, err := tryLock(instancePart + instance)
	if err != nil {
		return err
	}
	if f == nil {
		return instanceInUse(instance)
	}
	slots, err := remains()
	errs := []error{err}
	if _, err := claimedBlocks(); err != nil { // also removes the files of dead processes
		errs = append(errs, err)
	}
	for index := range slots[instance] {
		errs = append(errs, demolish(instance, index))
	}
	t := newTable(layout{instance: instance}, Config{})
	errs = append(errs, t.remove(), t.sockets.close(), unlink(f))
	return errors.Join(errs...)
}

// instanceInUse returns the error for an instance that a process has open.
func instanceInUse(instance string) error {
	return fault.New(fault.Conflict, fault.CodeInstanceInUse, "another process runs the instance %s", instance)
}
