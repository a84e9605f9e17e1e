package buildkit

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// archive returns a tar file with the headers; the content of each is zeros.
func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, h := range headers {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// sparse returns an archive of one file in GNU's old sparse format that consists of a hole.
func sparse(name string, size int64) []byte {
	var h [512]byte
	put := func(at int, text string) { copy(h[at:], text) }
	put(0, name)
	put(100, "0000644\x000000000\x000000000\x0000000000000\x0000000000000\x00        S")
	put(257, "ustar  \x00")
	put(386, fmt.Sprintf("%011o\x00%011o\x00", 0, 0)) // no pieces
	for at, n := 483+11, size; at >= 483; at, n = at-1, n>>8 {
		h[at] = byte(n) // binary, as large numbers are
	}
	h[483] |= 0x80
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	put(148, fmt.Sprintf("%06o\x00 ", sum))
	return append(h[:], make([]byte, 1024)...)
}

func zipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// hostile returns archives that must be refused, each with the reason.
func hostile(t testing.TB) map[string]struct {
	data []byte
	why  string
} {
	file := func(name string, size int64) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: size}
	}
	many := make([]tar.Header, 11)
	for i := range many {
		many[i] = file(fmt.Sprint("f", i), 0)
	}
	whole := archive(t, file("a", 600))
	return map[string]struct {
		data []byte
		why  string
	}{
		"parent":        {archive(t, file("../x", 1)), `entry "../x": its path leads out`},
		"deep parent":   {archive(t, file("a/../../x", 1)), `leads out`},
		"absolute":      {archive(t, file("/x", 1)), `entry "/x": its path is absolute`},
		"link then in":  {archive(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, file("l/x", 1)), `entry "l/x"`},
		"up then in":    {archive(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../.."}, file("l/x", 1)), `entry "l/x"`},
		"hard link out": {archive(t, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "../../etc/passwd"}), "leads out"},
		"hard absolute": {archive(t, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}), "absolute"},
		"hard via link": {archive(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "l/passwd"}), `entry "h"`},
		"device":        {archive(t, tar.Header{Name: "d", Typeflag: tar.TypeBlock, Devmajor: 8}), `entry "d": is a device`},
		"character":     {archive(t, tar.Header{Name: "dev/null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}), "is a device"},
		"pipe":          {archive(t, tar.Header{Name: "p", Typeflag: tar.TypeFifo}), `entry "p": is a named pipe`},
		"root is file":  {archive(t, tar.Header{Name: "./", Typeflag: tar.TypeSymlink, Linkname: "/"}), "must be a directory"},
		"many":          {archive(t, many...), `entry "f10": there are more than the 10 entries`},
		"big":           {archive(t, file("a", 600), file("b", 600)), `entry "b": with it the context has more than the 1000 bytes`},
		"bomb":          {zipped(t, archive(t, file("bomb", 64<<20))), `entry "bomb": with it`},
		"long names":    {zipped(t, archive(t, tar.Header{Name: strings.Repeat("n/", 300<<10), Typeflag: tar.TypeDir})), "longer than"},
		"long name":     {archive(t, file(strings.Repeat("n", 300), 1)), "file name too long"},
		"cut":           {whole[:len(whole)-1024-700], `entry "a": the archive ends in it`},
		"not a tar":     {[]byte(strings.Repeat("hello ", 400)), "is not a tar archive"},
		"not a gzip":    {[]byte("\x1f\x8b nonsense"), "is not a gzip"},
		"cut gzip":      {zipped(t, whole)[:60], "entry"},
		"empty":         {nil, ""}, // an empty archive
		"sparse":        {sparse("holes", 1<<40), `entry "holes": with it`},
	}
}

// TestHostileContexts unpacks hostile archives. Each is refused with a reason that names the
// entry, and nothing is written outside.
func TestHostileContexts(t *testing.T) {
	for name, c := range hostile(t) {
		t.Run(name, func(t *testing.T) {
			outside := t.TempDir()
			dir := filepath.Join(outside, "a", "context")
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			err := unpackFile(t.Context(), write(t, c.data), dir, Limits{Bytes: 1000, Entries: 10})
			if c.why == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), c.why) {
				t.Errorf("got %v, want it refused: %s", err, c.why)
			}
			if f := fault.As(err); f != nil && f.Field != "context" {
				t.Errorf("the field is %q", f.Field)
			}
			checkInside(t, outside, dir)
		})
	}
}

// checkInside checks that everything below outside is dir, or is below it and of a kind that a
// context may have.
func checkInside(t testing.TB, outside, dir string) {
	t.Helper()
	err := filepath.WalkDir(outside, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		inside := path == dir || strings.HasPrefix(path, dir+"/")
		if !inside && !strings.HasPrefix(dir, path) {
			t.Errorf("%s is outside", path)
		}
		if kind := d.Type(); kind != 0 && kind != fs.ModeDir && kind != fs.ModeSymlink {
			t.Errorf("%s is a %v", path, kind)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// TestUnpack checks modes, dates, links and order.
func TestUnpack(t *testing.T) {
	date := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	data := archive(t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "./d/", Typeflag: tar.TypeDir, Mode: 0o500, ModTime: date},
		tar.Header{Name: "./d/f", Typeflag: tar.TypeReg, Mode: 0o4711, Size: 5, ModTime: date},
		tar.Header{Name: "no/parent", Typeflag: tar.TypeReg, Mode: 0, Size: 1, ModTime: date},
		tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "./d/f"},
		// This replaces the link, not the file that it links to.
		tar.Header{Name: "h", Typeflag: tar.TypeReg, Mode: 0o600, Size: 2},
		tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/outside/of/all"},
		tar.Header{Name: "was", Typeflag: tar.TypeReg, Mode: 0o600},
		tar.Header{Name: "was/", Typeflag: tar.TypeDir, Mode: 0o700},
	)
	for name, data := range map[string][]byte{"plain": data, "gzip": zipped(t, data)} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := unpackFile(t.Context(), write(t, data), dir, Limits{}); err != nil {
				t.Fatal(err)
			}
			for path, want := range map[string]string{
				"d": "dr-x------", "d/f": "urwx--x--x 5", "no/parent": "---------- 1", "h": "-rw------- 2", "l": "Lrwxrwxrwx", "was": "drwx------",
			} {
				info, err := os.Lstat(filepath.Join(dir, path))
				if err != nil {
					t.Error(err)
					continue
				}
				got := info.Mode().String()
				if info.Mode().IsRegular() {
					got += fmt.Sprint(" ", info.Size())
				}
				if got != want {
					t.Errorf("%s is %s, want %s", path, got, want)
				}
				if strings.HasPrefix(path, "d") && !info.ModTime().Equal(date) {
					t.Errorf("%s is of %v", path, info.ModTime())
				}
			}
		})
	}
}

// TestUnpackIsCancelled cancels in the middle of a large file.
func TestUnpackIsCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	data := archive(t, tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644, Size: 1 << 20})
	if err := unpackFile(ctx, write(t, data), t.TempDir(), Limits{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// FuzzUnpack unpacks any archive. Nothing is written outside the directory, and every refusal has
// a reason.
func FuzzUnpack(f *testing.F) {
	for _, c := range hostile(f) {
		if len(c.data) < 64<<10 {
			f.Add(c.data)
		}
	}
	f.Add(archive(f, tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "d/f", Typeflag: tar.TypeReg, Size: 3}))
	f.Fuzz(func(t *testing.T, data []byte) {
		outside := t.TempDir()
		dir := filepath.Join(outside, "a", "context")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		err = unpack(t.Context(), bytes.NewReader(data), root, Limits{Bytes: 4096, Entries: 20})
		if err != nil && fault.KindOf(err) != fault.Invalid {
			t.Errorf("got %v, which does not say what is wrong", err)
		}
		checkInside(t, outside, dir)
	})
}
