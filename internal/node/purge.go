package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/network"
)

// Remains says where an instance whose server does not run may have left files.
type Remains struct {
	Instance string
	Dir      string // as in [Config]; "" if it is not known any more
	RunDir   string
}

// Purge ends all sandboxes of an instance and removes everything of them from the machine:
// processes, control groups, namespaces, links, rules and files. The server of the instance must
// not run. Purge goes on after errors and joins them. It succeeds if there is nothing to remove.
func Purge(ctx context.Context, r Remains) error {
	groups, err := cgroup.Detect()
	if err != nil {
		return err
	}
	root := groups.Group(GroupRoot(r.Instance))
	names, err := root.Children()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, groups.Group(filepath.Join(GroupRoot(r.Instance), name)).Kill(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return err // the remaining processes use everything else
	}
	errs = append(errs, root.Remove(), groups.Group(ServerGroup(r.Instance)).Remove(), network.Purge(r.Instance),
		os.RemoveAll(r.RunDir))
	if r.Dir != "" {
		errs = append(errs, os.RemoveAll(r.Dir))
	}
	return errors.Join(errs...)
}

// Instances returns the instances that have control groups or parts of a network on this machine.
func Instances() ([]string, error) {
	groups, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	names, err := groups.Group("/").Children()
	if err != nil {
		return nil, err
	}
	var instances []string
	for _, name := range names {
		instance, ok := strings.CutPrefix(strings.TrimSuffix(name, serverSuffix), "cay-")
		if ok && ValidInstance(instance) && !slices.Contains(instances, instance) {
			instances = append(instances, instance)
		}
	}
	nets, err := network.Instances()
	if err != nil {
		return nil, fmt.Errorf("listing what is left of networks: %w", err)
	}
	for _, n := range nets {
		if !slices.Contains(instances, n.Instance) {
			instances = append(instances, n.Instance)
		}
	}
	return instances, nil
}

// ValidInstance reports whether the name has the form of an instance: 6 characters of a-z and 0-9,
// so that it fits into the name of a network link.
func ValidInstance(name string) bool {
	if len(name) != 6 {
		return false
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}
