package image

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math"
)

// The format is https://docs.kernel.org/filesystems/erofs.html: superblock, then inodes, then
// data, in this order, so that a file is written from front to back. This package writes it
// itself because gVisor maps files and cannot map bytes stored beside an inode (so regular files
// are never inline), and because hard links must be kept.
const (
	blockSize   = 4096 // gVisor's page; file data must begin at one
	superOffset = 1024
	superSize   = 128
	inodeSize   = 64 // the extended form, which has a time
	slotSize    = 32 // the unit of inode numbers
	direntSize  = 12
	erofsMagic  = 0xe0f5e1e2

	layoutPlain  = 0 // data in blocks
	layoutInline = 2 // the last, partial block after the inode

	// featureCompat tells that the superblock has a checksum and that times are times of
	// modification.
	featureCompat = 1 | 2
)

// layout is the place of an inode's bytes.
type layout struct {
	format uint16 // layoutPlain or layoutInline
	size   int64  // value of i_size
	blocks int64  // number of data blocks
	block  uint32 // the first of them
	inline int64  // bytes after the inode
	dir    [][]entry
	ino    uint32
	offset int64 // offset of the inode in the metadata
}

// entry is a directory entry whose inode has no number yet.
type entry struct {
	name string
	to   *inode
}

// writeErofs writes a tree as an EROFS image. The same tree gives the same bytes.
func writeErofs(out io.Writer, t *tree) error {
	w := &erofsWriter{t: t, out: bufio.NewWriterSize(out, 1<<20)}
	if err := w.plan(); err != nil {
		return err
	}
	if _, err := w.out.Write(w.superblock()); err != nil {
		return fmt.Errorf("writing superblock: %w", err)
	}
	if err := w.writeInodes(); err != nil {
		return fmt.Errorf("writing inodes: %w", err)
	}
	if err := w.writeData(); err != nil {
		return err
	}
	if err := w.out.Flush(); err != nil {
		return fmt.Errorf("writing image: %w", err)
	}
	return nil
}

type erofsWriter struct {
	t      *tree
	out    *bufio.Writer
	inodes []*inode // in the order of the file
	meta   int64    // bytes of inodes, whole blocks
	blocks int64    // of the whole image
}

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

// plan assigns a place to every inode and a block to every byte.
func (w *erofsWriter) plan() error {
	w.place(w.t.root, w.t.root)
	at := int64(0)
	for _, i := range w.inodes {
		p := &i.plan
		// An inode and the bytes inline after it are in one block.
		if room := blockSize - at%blockSize; inodeSize+p.inline > room {
			at += room
		}
		p.offset = at
		i.nid = uint64(at / slotSize)
		at = roundUp(at+inodeSize+p.inline, slotSize)
	}
	w.meta = roundUp(at, blockSize)
	block := 1 + w.meta/blockSize
	for _, i := range w.inodes {
		if i.plan.blocks > 0 {
			i.plan.block = uint32(block)
			block += i.plan.blocks
		}
	}
	if block > math.MaxUint32 {
		return fmt.Errorf("image of %d blocks is larger than EROFS can be", block)
	}
	w.blocks = block
	return nil
}

// place lists the inodes of a node and all below it, directories before their content, and
// decides the layout of each.
func (w *erofsWriter) place(n, parent *node) {
	i := n.inode
	if i.placed {
		return // another name of the inode came first
	}
	i.placed = true
	w.inodes = append(w.inodes, i)
	p := &i.plan
	*p = layout{ino: uint32(len(w.inodes))}
	switch i.kind() {
	case typeRegular:
		p.size = i.size
		p.blocks = roundUp(i.size, blockSize) / blockSize
		return
	case typeSymlink:
		p.setTail(int64(len(i.target)))
		return
	case typeDir:
	default:
		return
	}
	children := n.sorted()
	entries := make([]entry, 0, len(children)+2)
	dots := []entry{{".", i}, {"..", parent.inode}}
	i.links = 2
	for _, c := range children {
		// "." and ".." are sorted among the names: "-" comes before them.
		for len(dots) > 0 && dots[0].name < c.name {
			entries, dots = append(entries, dots[0]), dots[1:]
		}
		entries = append(entries, entry{c.name, c.inode})
		if c.isDir() {
			i.links++
		}
	}
	p.dir = packDir(append(entries, dots...))
	last := int64(0)
	for _, e := range p.dir[len(p.dir)-1] {
		last += direntSize + int64(len(e.name))
	}
	p.setTail(int64(len(p.dir)-1)*blockSize + last)
	for _, c := range children {
		w.place(c, n)
	}
}

// setTail sets the layout of size bytes, with the last, partial block inline if it fits.
func (p *layout) setTail(size int64) {
	p.size = size
	if tail := size % blockSize; tail > 0 && tail <= blockSize-inodeSize {
		p.format, p.inline, p.blocks = layoutInline, tail, size/blockSize
		return
	}
	p.blocks = roundUp(size, blockSize) / blockSize
}

// packDir distributes entries over directory blocks.
func packDir(entries []entry) [][]entry {
	var blocks [][]entry
	start, used := 0, 0
	for i, e := range entries {
		need := direntSize + len(e.name)
		if used+need > blockSize {
			blocks = append(blocks, entries[start:i])
			start, used = i, 0
		}
		used += need
	}
	return append(blocks, entries[start:])
}

// superblock returns block 0.
func (w *erofsWriter) superblock() []byte {
	b := make([]byte, blockSize)
	sb := b[superOffset:]
	le := binary.LittleEndian
	le.PutUint32(sb[0:], erofsMagic)
	le.PutUint32(sb[8:], featureCompat)
	sb[12] = 12 // log2 of blockSize
	le.PutUint16(sb[14:], uint16(w.t.root.inode.nid))
	le.PutUint64(sb[16:], uint64(len(w.inodes)))
	le.PutUint32(sb[36:], uint32(w.blocks))
	le.PutUint32(sb[40:], 1) // block of the first inode
	// The checksum is CRC-32C of the rest of the block, with this field zero and not inverted at
	// the end.
	le.PutUint32(sb[4:], ^crc32.Checksum(sb, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// writeInodes writes the metadata blocks.
func (w *erofsWriter) writeInodes() error {
	at := int64(0)
	for _, i := range w.inodes {
		if err := w.zeros(i.plan.offset - at); err != nil {
			return err
		}
		if _, err := w.out.Write(i.encode()); err != nil {
			return err
		}
		if i.plan.inline > 0 {
			if err := w.writeTail(i); err != nil {
				return err
			}
		}
		at = i.plan.offset + inodeSize + i.plan.inline
	}
	return w.zeros(w.meta - at)
}

// writeTail writes the bytes inline after an inode.
func (w *erofsWriter) writeTail(i *inode) error {
	if i.kind() == typeDir {
		_, err := w.out.Write(encodeDirents(i.plan.dir[len(i.plan.dir)-1]))
		return err
	}
	_, err := w.out.WriteString(i.target)
	return err
}

// encode returns the inode as on the disk.
func (i *inode) encode() []byte {
	var b [inodeSize]byte
	le := binary.LittleEndian
	le.PutUint16(b[0:], i.plan.format<<1|1) // bit 0: extended
	le.PutUint16(b[4:], i.mode)
	le.PutUint64(b[8:], uint64(i.plan.size))
	le.PutUint32(b[16:], i.plan.block)
	le.PutUint32(b[20:], i.plan.ino)
	le.PutUint32(b[24:], i.uid)
	le.PutUint32(b[28:], i.gid)
	le.PutUint64(b[32:], uint64(i.mtime))
	le.PutUint32(b[40:], i.mtimeNs)
	le.PutUint32(b[44:], i.links)
	return b[:]
}

// direntTypes are the types in directory entries.
var direntTypes = map[uint16]byte{typeRegular: 1, typeDir: 2, typeFIFO: 5, typeSymlink: 7}

// encodeDirents returns the entries of one block, without padding.
func encodeDirents(entries []entry) []byte {
	b := make([]byte, direntSize*len(entries), blockSize)
	for k, e := range entries {
		d := b[direntSize*k:]
		binary.LittleEndian.PutUint64(d[0:], e.to.nid)
		binary.LittleEndian.PutUint16(d[8:], uint16(len(b)))
		d[10] = direntTypes[e.to.kind()]
		b = append(b, e.name...)
	}
	return b
}

// writeData writes the data blocks in the order of their inodes.
func (w *erofsWriter) writeData() error {
	if err := w.t.settle(); err != nil {
		return err
	}
	for _, i := range w.inodes {
		p := &i.plan
		if p.blocks == 0 {
			continue
		}
		var n int64
		var err error
		switch i.kind() {
		case typeRegular:
			n, err = i.size, copyRange(w.out, w.t.spool, i.off, i.size, w.t.buf)
		case typeSymlink:
			_, err = w.out.WriteString(i.target)
			n = int64(len(i.target))
		case typeDir:
			n, err = w.writeDirBlocks(p)
		}
		if err != nil {
			return fmt.Errorf("writing data: %w", err)
		}
		if err := w.zeros(p.blocks*blockSize - n); err != nil {
			return fmt.Errorf("writing data: %w", err)
		}
	}
	return nil
}

// writeDirBlocks writes the blocks of a directory that are not inline; the last
// one is not padded.
func (w *erofsWriter) writeDirBlocks(p *layout) (n int64, err error) {
	for k, entries := range p.dir[:p.blocks] {
		b := encodeDirents(entries)
		if _, err := w.out.Write(b); err != nil {
			return n, err
		}
		n += int64(len(b))
		if k < int(p.blocks)-1 {
			if err := w.zeros(blockSize - int64(len(b))); err != nil {
				return n, err
			}
			n += blockSize - int64(len(b))
		}
	}
	return n, nil
}

var zeroBlock [blockSize]byte

func (w *erofsWriter) zeros(n int64) error {
	for n > 0 {
		k, err := w.out.Write(zeroBlock[:min(n, blockSize)])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}
