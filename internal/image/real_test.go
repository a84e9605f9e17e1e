package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/caytest"
)

// TestRealThings makes an image of a real Debian package, and starts real gVisor on an image with
// a program of it. A program inside must see what the layers contained.
func TestRealThings(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: downloads from Debian, and -short is given")
	}
	caytest.RequireRoot(t)
	caytest.RequireProgram(t, "mmdebstrap")
	s := openStore(t)
	// "extract" unpacks and runs nothing. It is the smallest package set that takes the whole
	// way.
	src := Source{Debian: &Debian{Suite: "bookworm", Variant: "extract", Packages: []string{"busybox-static"}},
		Setup: Setup{Users: []User{account}}, Require: []string{"busybox"}}
	var lines record
	img, err := s.Build(t.Context(), src, lines.line)
	if err != nil {
		t.Fatal(err)
	}
	lines.has(t, "installing Debian bookworm: extracting archives")
	for _, line := range lines {
		if strings.Contains(line, s.cfg.Dir) {
			t.Errorf("progress tells where on the machine things are: %q", line)
		}
	}
	if img.Source != "debian:bookworm" {
		t.Errorf("source is %q", img.Source)
	}
	leftovers(t, s)
	path, err := s.Path(t.Context(), img.Digest)
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, path)
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), s.cfg.Dir) {
		t.Errorf("mounts left below %s (%v)", s.cfg.Dir, err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fsys, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := fs.ReadFile(fsys, "bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	t.Run("InGVisor", func(t *testing.T) { bootInGVisor(t, string(busybox)) })
	t.Run("AttributesInGVisor", attributesInGVisor)
}

// tinyProgram returns an ELF program that ends with exit code 42 and is smaller than a page. A
// writer that stores small files beside their inodes makes it impossible to map.
func tinyProgram() string {
	var b bytes.Buffer
	code := []byte{0xbf, 42, 0, 0, 0, 0xb8, 60, 0, 0, 0, 0x0f, 0x05} // exit(42)
	const base, headers = 0x400000, 64 + 56
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	// executable, x86-64, entry, program header at 64
	for _, v := range []any{uint16(2), uint16(62), uint32(1), uint64(base + headers), uint64(64), uint64(0), uint32(0),
		uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), uint64(headers + len(code)), uint64(headers + len(code)), uint64(4096)} {
		binary.Write(&b, binary.LittleEndian, v)
	}
	b.Write(code)
	return b.String()
}

// bootInGVisor compares what a program inside sees with what was written.
func bootInGVisor(t *testing.T, busybox string) {
	runsc := caytest.RequireProgram(t, absolute(t, "../../bin/cay-runsc"))
	members := []member{
		dir("./", mode(0o755)), dir("proc"), dir("sys"), dir("dev"), dir("tmp", mode(0o1777)),
		file("bin/busybox", busybox, mode(0o755)), symlink("bin/sh", "busybox"), hardlink("bin/ash", "bin/busybox"),
		file("etc/shadow", "secret", mode(0o640), owner(0, 42)), file("bin/suid", "x", mode(0o4755)), file("bin/sgid", "x", mode(0o2755), owner(5, 6)),
		file("uids", "x", owner(4000000000, 3000000000)), file("empty", ""), file("block", strings.Repeat("b", blockSize)), file("more", strings.Repeat("m", 10*blockSize+7)),
		symlink("abs", "/etc/shadow"), symlink("long-target", strings.Repeat("t", 4000)), file(strings.Repeat("n", maxName), "long"),
		file("has-xattr", "readable", func(h *tar.Header) { h.PAXRecords = map[string]string{"SCHILY.xattr.security.selinux": "x"} }),
		newMember(tar.Header{Typeflag: tar.TypeFifo, Name: "pipe", Mode: 0o600}, "", nil), file("-x", "before the dots"), dir("no/children"),
	}
	members = append(members, file("odd/\xff\xfe bytes", "1"), file("odd/ünï→", "2"), file(`odd/back\slash "quoted"`, "3"),
		file("deep/"+strings.Repeat("d/", 60)+"f", "far down"), hardlink("no/pipe", "pipe"), hardlink("no/abs", "abs"),
		file("sparse", strings.Repeat("\x00", 8<<20)+"end"),
		file("old", "from 1901", func(h *tar.Header) { h.ModTime = time.Unix(-2177452800, 0) }))
	for k := range 10000 {
		members = append(members, file(fmt.Sprintf("many/%d", k), fmt.Sprint(k)))
	}
	script := `/bin/busybox find / -xdev -exec /bin/busybox stat -c '%f %u:%g %h %s %Y %i %n' {} +; echo ---
/bin/busybox find / -xdev -type f -exec /bin/busybox sha256sum {} +; echo ---
/bin/busybox find / -xdev -type l -exec /bin/busybox readlink {} \;; echo ---`
	if runtime.GOARCH == "amd64" {
		members = append(members, file("bin/tiny", tinyProgram(), mode(0o755)))
		script += "\n/bin/tiny; echo tiny ended with $?"
	}
	tree, err := layers(t, archive(t, append(members, file("gone", "x"))...), archive(t, file(".wh.gone", "")))
	if err != nil {
		t.Fatal(err)
	}
	sections := strings.Split(runInGVisor(t, runsc, write(t, tree), script), "---\n")
	if len(sections) != 4 {
		t.Fatalf("output has %d parts: %q", len(sections), sections)
	}
	stats, sums, targets := inside(t, tree)
	mounted := []string{"/proc", "/sys", "/dev", "/tmp"} // gVisor's own
	got := slices.DeleteFunc(sortedLines(sections[0]), func(line string) bool {
		return slices.ContainsFunc(mounted, func(m string) bool { return strings.HasSuffix(line, " "+m) })
	})
	if diff := cmp.Diff(stats, got); diff != "" {
		t.Errorf("what stat says inside (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(sums, sortedLines(sections[1])); diff != "" {
		t.Errorf("contents inside (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(targets, sortedLines(sections[2])); diff != "" {
		t.Errorf("links inside (-want +got):\n%s", diff)
	}
	if runtime.GOARCH == "amd64" && sections[3] != "tiny ended with 42\n" {
		t.Errorf("a program smaller than a page: %q", sections[3])
	}
}

// bindCapability is CAP_NET_BIND_SERVICE, permitted and effective, as the value of a file's
// attribute.
const bindCapability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// attributesInGVisor checks extended attributes from inside.
func attributesInGVisor(t *testing.T) {
	runsc := caytest.RequireProgram(t, absolute(t, "../../bin/cay-runsc"))
	// This needs another program than the test's, since it must be static.
	built := filepath.Join(t.TempDir(), "inside")
	if err := caytest.Build(built, "./testdata/inside"); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(built)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := layers(t, everything(t), archive(t, dir("proc"), dir("sys"), dir("dev"),
		file("bin/capable", string(program), mode(0o755), xattrs(map[string]string{"security.capability": bindCapability}))))
	if err != nil {
		t.Fatal(err)
	}
	if err := tree.writeAttributes(); err != nil {
		t.Fatal(err)
	}
	got := inGVisor(t, runsc, write(t, tree), true, "/bin/capable")
	want := "/bin/capable security.capability=" + hex.EncodeToString([]byte(bindCapability)) + `
/attributes user.a=
/attributes user.b=00ff
/attributes user.ünï=76616c7565
/attributes2 user.a=
/attributes2 user.b=00ff
/attributes2 user.ünï=76616c7565
/attributed user.dir=64
uid 1000, <nil> CapEff:	0000000000000400
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("inside (-want +got):\n%s", diff)
	}
}

// inside returns the expected output of stat, sha256sum and readlink for a tree that was written.
func inside(t *testing.T, tree *tree) (stats, sums, targets []string) {
	t.Helper()
	var walk func(n *node)
	walk = func(n *node) {
		i, path := n.inode, tree.path(n)
		switch path {
		case "/proc", "/sys", "/dev", "/tmp":
		default:
			stats = append(stats, fmt.Sprintf("%x %d:%d %d %d %d %d %s", i.mode, i.uid, i.gid, i.links, i.plan.size, i.mtime,
				i.nid, path))
		}
		switch i.kind() {
		case typeRegular:
			b, err := tree.read(i, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			sums = append(sums, fmt.Sprintf("%x  %s", sha256.Sum256(b), path))
		case typeSymlink:
			targets = append(targets, i.target)
		}
		for _, c := range n.children {
			walk(c)
		}
	}
	walk(tree.root)
	slices.Sort(stats)
	slices.Sort(sums)
	slices.Sort(targets)
	return stats, sums, targets
}

func sortedLines(s string) []string {
	lines := strings.Split(strings.TrimSuffix(s, "\n"), "\n")
	slices.Sort(lines)
	return lines
}

func absolute(t *testing.T, path string) string {
	t.Helper()
	p, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// runInGVisor runs a shell script in a sandbox whose root is the image, and returns its output.
func runInGVisor(t *testing.T, runsc, image, script string) string {
	t.Helper()
	return inGVisor(t, runsc, image, false, "/bin/busybox", "sh", "-c", script)
}

// inGVisor runs a program in a sandbox whose root is the image, and returns its output.
func inGVisor(t *testing.T, runsc, image string, writable bool, args ...string) string {
	t.Helper()
	bundle := t.TempDir()
	caps := []string{"CAP_DAC_OVERRIDE", "CAP_SETFCAP", "CAP_FOWNER", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"}
	annotations := map[string]string{"dev.gvisor.spec.rootfs.source": image, "dev.gvisor.spec.rootfs.type": "erofs"}
	overlay, mounts := "--overlay2=none", []any{}
	if writable { // as in sandboxes: a layer in a file, which needs a gofer, which needs a bind mount
		annotations["dev.gvisor.spec.rootfs.overlay"] = "dir=" + bundle
		overlay = "--overlay2=root:dir=" + bundle
		mounts = append(mounts, map[string]any{"destination": "/.cay", "type": "bind", "source": t.TempDir(),
			"options": []string{"ro", "rbind"}})
	}
	spec := map[string]any{
		"ociVersion": "1.0.2",
		"process": map[string]any{"args": args, "cwd": "/", "env": []string{"PATH=/bin"},
			"user": map[string]any{"uid": 0, "gid": 0},
			// Root reads everything, as in a sandbox of cay's.
			"capabilities": map[string]any{"bounding": caps, "effective": caps, "permitted": caps}},
		"root":        map[string]any{"path": bundle, "readonly": !writable},
		"annotations": annotations, "mounts": mounts,
		"linux": map[string]any{"namespaces": []map[string]string{{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}}},
	}
	b, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	// Use files instead of pipes: the sandbox inherits them, and the reader of a pipe would wait
	// for its end.
	stdout, stderr := filepath.Join(bundle, "stdout"), filepath.Join(bundle, "stderr")
	out, err1 := os.Create(stdout)
	errs, err2 := os.Create(stderr)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	defer out.Close()
	defer errs.Close()
	id := fmt.Sprintf("cay-image-test-%d", os.Getpid())
	global := []string{"--root=" + filepath.Join(bundle, "state"), "--network=none", "--ignore-cgroups", "--allow-suid",
		overlay}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, runsc, append(global, "run", "--bundle="+bundle, id)...)
	cmd.Stdout, cmd.Stderr = out, errs
	err = cmd.Run()
	// After a complete run there is nothing to delete, so this may fail.
	_ = exec.Command(runsc, append(global, "delete", "--force", id)...).Run()
	said, _ := os.ReadFile(stderr) // for the message only
	if err != nil {
		printed, _ := os.ReadFile(stdout)
		t.Fatalf("running in gVisor: %v\n%s\n%s", err, said, printed)
	}
	result, err := os.ReadFile(stdout)
	if err != nil {
		t.Fatal(err)
	}
	if len(said) > 0 {
		t.Logf("on stderr: %s", said)
	}
	return string(result)
}
