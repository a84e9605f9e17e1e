package image

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
)

// Same reports whether two images hold the same but for the times of their files, which every build sets anew. It
// has the errors of [Store.Path].
func (s *Store) Same(ctx context.Context, a, b string) (bool, error) {
	if a == b {
		return true, nil
	}
	one, err := s.tree(ctx, a)
	if err != nil {
		return false, err
	}
	defer one.Close()
	other, err := s.tree(ctx, b)
	if err != nil {
		return false, err
	}
	defer other.Close()
	c := comparison{a: one, b: other, pairs: map[*inode]*inode{}, taken: map[*inode]bool{}}
	if !c.alike(one.root, other.root) {
		return false, nil
	}
	return c.contents(ctx)
}

// comparison compares two trees.
type comparison struct {
	a, b  *tree
	pairs map[*inode]*inode // b's by a's: what is one file in a is one in b
	taken map[*inode]bool   // b's in pairs
	files []*inode          // a's regular files that hold anything
}

// alike compares all below two nodes but for the bytes of regular files, which it notes down.
func (c *comparison) alike(a, b *node) bool {
	i, j := a.inode, b.inode
	if known, ok := c.pairs[i]; ok {
		return known == j
	}
	if c.taken[j] {
		return false
	}
	c.pairs[i], c.taken[j] = j, true
	if i.mode != j.mode || i.uid != j.uid || i.gid != j.gid || i.size != j.size || i.target != j.target ||
		!slices.Equal(i.xattrs, j.xattrs) || len(a.children) != len(b.children) {
		return false
	}
	if i.kind() == typeRegular && i.size > 0 {
		c.files = append(c.files, i)
	}
	for name, child := range a.children {
		if other, ok := b.children[name]; !ok || !c.alike(child, other) {
			return false
		}
	}
	return true
}

// contents compares the bytes of the files, in the order in which they lie on disk.
func (c *comparison) contents(ctx context.Context) (bool, error) {
	slices.SortFunc(c.files, func(i, j *inode) int { return cmp.Compare(i.off, j.off) })
	for _, i := range c.files {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		from, other := io.NewSectionReader(c.a.spool, i.off, i.size), io.NewSectionReader(c.b.spool, c.pairs[i].off, i.size)
		for {
			n, err := io.ReadFull(from, c.a.buf)
			if _, err := io.ReadFull(other, c.b.buf[:n]); err != nil && n > 0 {
				return false, fmt.Errorf("reading an image: %w", err)
			}
			if !bytes.Equal(c.a.buf[:n], c.b.buf[:n]) {
				return false, nil
			}
			if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
				break
			}
			if err != nil {
				return false, fmt.Errorf("reading an image: %w", err)
			}
		}
	}
	return true, nil
}
