package buildkit

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/cayhq/cay/internal/caytest"
)

// testCase is a file of testdata: a build and its expected result.
type testCase struct {
	request            Request
	want, config, fail []string
}

func readCase(t *testing.T, path string) testCase {
	t.Helper()
	archive, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	c := testCase{request: Request{Args: map[string]string{}, Scope: "test"}}
	context := map[string]string{}
	for _, f := range archive.Files {
		text := strings.TrimSuffix(string(f.Data), "\n")
		switch {
		case f.Name == "Dockerfile":
			c.request.Dockerfile = string(f.Data)
		case f.Name == "path":
			c.request.DockerfilePath = text
		case f.Name == "target":
			c.request.Target = text
		case f.Name == "args":
			for line := range strings.Lines(text) {
				name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
				c.request.Args[name] = value
			}
		case f.Name == "want":
			c.want = strings.Split(text, "\n")
		case f.Name == "config":
			c.config = strings.Split(text, "\n")
		case f.Name == "error":
			c.fail = strings.Split(text, "\n")
		case strings.HasPrefix(f.Name, "context/"):
			context[strings.TrimPrefix(f.Name, "context/")] = string(f.Data)
		default:
			t.Fatalf("%s: what is %s?", path, f.Name)
		}
	}
	if len(context) > 0 {
		c.request.Context = pack(t, context)
	}
	return c
}

// TestDockerfiles builds the cases in testdata, all with one Builder.
func TestDockerfiles(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) < 12 {
		t.Fatalf("found %d cases, %v", len(paths), err)
	}
	r := newFixture(t)
	find := testBases(t)
	makeRepository(t)
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			c := readCase(t, path)
			c.request.Base = find
			var log strings.Builder
			result, err := r.Build(t.Context(), c.request, func(e Event) {
				fmt.Fprintf(&log, "%s %d %s %q %v %s\n", e.Kind, e.Step, e.Name, e.Text, e.Cached, e.Error)
			})
			defer func() {
				if t.Failed() {
					t.Log(log.String())
				}
			}()
			if c.fail != nil {
				checkFailure(t, err, c.fail)
			} else if err != nil {
				t.Error(err)
			} else {
				checkResult(t, result, c)
			}
			r.nothingLeft(t)
		})
	}
	if left, err := filepath.Glob(filepath.Join(r.builds(), "*/*")); err != nil || len(left) > 0 {
		t.Errorf("in the directory of builds are %v, %v", left, err)
	}
}

// makeRepository makes a git repository with one file on the machine outside.
func makeRepository(t *testing.T) {
	t.Helper()
	caytest.RequireProgram(t, "git")
	dir := filepath.Join(repositories, "a.git")
	work := t.TempDir()
	if err := os.WriteFile(filepath.Join(work, "file"), []byte("from git\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"init", "-q", "-b", "main", work}, {"-C", work, "add", "file"},
		{"-C", work, "-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "-qm", "one"}, {"clone", "-q", "--bare", work, dir}} {
		if out, err := exec.Command("git", args...).CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() { os.RemoveAll(repositories) })
}

func checkResult(t *testing.T, result *Result, c testCase) {
	t.Helper()
	img, files := opened(t, result)
	for i := 0; i < len(c.want); i++ {
		line := c.want[i]
		path, want := line, ""
		for p := range files {
			if strings.HasPrefix(line, p+" ") && (path == line || len(p) > len(path)) {
				path, want = p, strings.TrimPrefix(line, p+" ")
			}
		}
		if absent, ok := strings.CutSuffix(line, " absent"); ok {
			if got, there := files[absent]; there {
				t.Errorf("%s is in the image: %s", absent, got)
			}
			continue
		}
		got, there := files[path]
		if !there {
			t.Errorf("%s: not in the image", line)
			continue
		}
		if mode, ok := strings.CutPrefix(want, "mode "); ok {
			if !strings.Contains(got, " "+mode+" ") {
				t.Errorf("%s is %.20s, want mode %s", path, got, mode)
			}
			continue
		}
		for range strings.Count(got, "\n") { // a file of several lines
			if i++; i < len(c.want) {
				want += "\n" + c.want[i]
			}
		}
		if got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config := []string{"entrypoint " + strings.Join(file.Config.Entrypoint, " "),
		"cmd " + strings.Join(file.Config.Cmd, " "), "user " + file.Config.User, "dir " + file.Config.WorkingDir}
	for _, e := range file.Config.Env {
		config = append(config, "env "+e)
	}
	for _, want := range c.config {
		if !slices.Contains(config, want) {
			t.Errorf("the image's configuration has no %q: %q", want, config)
		}
	}
	if err := result.Close(); err != nil {
		t.Error(err)
	}
}

func checkFailure(t *testing.T, err error, want []string) {
	t.Helper()
	failed, ok := errors.AsType[*StepError](err)
	if !ok {
		t.Fatalf("got %v, want a StepError", err)
	}
	var step, tail []string
	for _, line := range want {
		what, value, _ := strings.Cut(line, " ")
		switch what {
		case "step":
			step = append(step, value)
		case "tail":
			tail = append(tail, value)
		case "line":
			if got := strconv.Itoa(failed.Line); got != value {
				t.Errorf("line is %s, want %s", got, value)
			}
		case "exit":
			if got := strconv.Itoa(failed.ExitCode); got != value {
				t.Errorf("exit code is %s, want %s", got, value)
			}
		case "text":
			if !strings.Contains(failed.Err.Error(), value) {
				t.Errorf("text is %q, want %q", failed.Err, value)
			}
		}
	}
	if got := strings.Join(step, "\n"); failed.Step != got {
		t.Errorf("step is %q, want %q", failed.Step, got)
	}
	// The streams are two pipes, so their order is not known.
	slices.Sort(tail)
	if got := slices.Sorted(slices.Values(failed.Tail)); tail != nil && !slices.Equal(got, tail) {
		t.Errorf("tail is %q, want %q", got, tail)
	}
	if _, isBase := errors.AsType[*StepError](err); isBase && strings.HasPrefix(failed.Step, "FROM") &&
		!errors.Is(err, errNoImage) {
		t.Errorf("%v is not Base's own error", err)
	}
}
