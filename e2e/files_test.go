package e2e

import (
	"bytes"
	"cmp"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/cayhq/cay/internal/caytest"
	cay "github.com/cayhq/cay/sdk/go"
)

// becomes waits until a condition holds.
func (s *server) becomes(what string, is func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(50 * time.Millisecond) { // a poll with a deadline
		if time.Now().After(deadline) {
			s.t.Fatalf("it never was so that %s:\n%s", what, s.lastLog())
		}
	}
}

// only returns the one file that a pattern matches, or "".
func only(t testing.TB, pattern ...string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(pattern...))
	if err != nil {
		t.Fatal(err)
	}
	if len(found) != 1 {
		return ""
	}
	return found[0]
}

const anyDigest = "????????????????????????????????????????????????????????????????"

// TestFilesInBucket builds a template while the bucket is away, sees its files arrive there when it is back, loses them
// on the machine and uses them again, and lets the bucket's copy be damaged.
func TestFilesInBucket(t *testing.T) {
	t.Parallel() // it has its own server
	s3 := caytest.StartS3(t)
	s3.Stop()
	settings := []string{"CAY_FILES_URL=" + s3.URL("e2e"), "CAY_FILES_ACCESS_KEY=" + s3.AccessKey,
		"CAY_FILES_SECRET_KEY=" + s3.SecretKey, "CAY_TEMPLATES_PREPARE=", "CAY_IMAGES_CACHE_DIR="}
	s := newServer(t, settings...)
	s.start()
	var saved bytes.Buffer
	tag, err := name.NewTag("registry.example/tiny:1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tarball.Write(tag, tinyImage(t), &saved); err != nil {
		t.Fatal(err)
	}
	s.needBuilt(object{"name": "mine", "image": "."}, saved.Bytes())
	if got := s.inside("mine", "echo $FROM_TINY"); got != "yes" {
		t.Errorf("without the bucket: %q", got)
	}
	if got := s.metric(`cay_files_waiting{kind="images"}`); got != 1 {
		t.Errorf("%d images wait for the bucket, want 1", got)
	}

	s3.Start(t)
	objects := filepath.Join(s3.Dir, "e2e")
	s.becomes("the image is in the bucket", func() bool { return only(t, objects, "images", anyDigest) != "" })
	// The first collection of a process has the contexts of templates uploaded.
	s.stop(syscall.SIGTERM)
	s.start()
	s.becomes("the context is in the bucket", func() bool { return only(t, objects, "contexts", anyDigest) != "" })
	s.becomes("nothing waits", func() bool {
		return s.metric(`cay_files_waiting{kind="contexts"}`) == 0 && s.metric(`cay_files_waiting{kind="images"}`) == 0
	})
	s.bucketIsFine(settings)
	s.checkpointsInBucket(s3, objects)

	image := only(t, s.dataDir, "images", "*.erofs")
	lose := func(files ...string) {
		t.Helper()
		s.stop(syscall.SIGTERM)
		for _, file := range files {
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
		}
		s.start()
	}
	lose(image, only(t, s.dataDir, "contexts", anyDigest))
	if got := s.inside("mine", "echo $FROM_TINY"); got != "yes" {
		t.Errorf("with the image of the bucket: %q", got)
	}
	if got := s.metric(`cay_files_cache_total{kind="images",result="miss"}`); got != 1 {
		t.Errorf("%d images were fetched, want 1", got)
	}
	if template, err := s.api().GetTemplate(t.Context(), "mine"); err != nil ||
		template.Status != cay.TemplateStatusReady || !strings.Contains(jsonOf(template), `"version":1`) {
		t.Errorf("the template was built again: %s, %v", jsonOf(template), err)
	}

	lose(image)
	s3.Stop()
	mine := func() (*cay.Sandbox, error) {
		return s.api().CreateSandbox(t.Context(), cay.CreateSandboxRequest{Template: "mine"}, cay.CreateOptions{})
	}
	if sandbox, err := mine(); !isRefused(err, 503, "image_unavailable") {
		t.Errorf("a create without image and bucket: %s, %v", jsonOf(sandbox), err)
	}
	s3.Start(t)

	// The context comes back from the bucket too, for a build of the image, which is lost everywhere.
	if err := os.WriteFile(only(t, objects, "images", anyDigest), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if sandbox, err := mine(); !isRefused(err, 503, "image_unavailable") {
		t.Errorf("a create from a damaged copy: %s, %v", jsonOf(sandbox), err)
	}
	s.becomes("a sandbox can be created again", func() bool {
		sandbox, err := mine()
		if err == nil {
			s.destroy(sandbox.ID)
		}
		return err == nil
	})
	s.becomes("the copy is whole again", func() bool {
		info, err := os.Stat(only(t, objects, "images", anyDigest))
		return err == nil && info.Size() > 1<<20
	})
	log, err := os.ReadFile(s.logFile())
	if err != nil || bytes.Contains(log, []byte(s3.SecretKey)) {
		t.Errorf("the log has the secret key, or cannot be read: %v", err)
	}
}

// checkpointsInBucket suspends a sandbox and saves a snapshot, with the bucket and without it, and sees their copies
// arrive, also after a restart of the server.
func (s *server) checkpointsInBucket(s3 *caytest.S3, objects string) {
	s.t.Helper()
	id := s.persistent(object{"template": "mine"})
	durable := func(id string) cay.Durable {
		s.t.Helper()
		var d *cay.Durable
		var err error
		if strings.HasPrefix(id, "snap_") {
			var snapshot *cay.Snapshot
			if snapshot, err = s.api().GetSnapshot(s.t.Context(), id); err == nil {
				d = snapshot.Durable
			}
		} else {
			var sandbox *cay.Sandbox
			if sandbox, err = s.api().GetSandbox(s.t.Context(), id); err == nil {
				d = sandbox.Durable
			}
		}
		if err != nil {
			s.t.Fatalf("%s: %v", id, err)
		}
		return *cmp.Or(d, new(cay.Durable))
	}
	if got := durable(id); got != "" {
		s.t.Errorf("a running sandbox is durable: %q", got)
	}
	s.suspend(id)
	snapshot := s.snapshot(id, nil)
	for _, id := range []string{id, snapshot} {
		s.becomes(id+" is in the bucket", func() bool { return durable(id) == cay.DurableCluster })
	}
	for _, kind := range []string{"checkpoints/*/0/*/seal.json", "programs/*"} {
		if got, err := filepath.Glob(filepath.Join(objects, kind)); err != nil || len(got) != 2 {
			s.t.Errorf("%s: %q, %v", kind, got, err)
		}
	}

	s3.Stop()
	s.wake(id)
	s.suspend(id)
	if got := durable(id); got != cay.DurableNode {
		s.t.Errorf("suspended without the bucket: durable is %q", got)
	}
	if got := s.metric(`cay_files_waiting{kind="checkpoints"}`); got != 1 {
		s.t.Errorf("%d checkpoints wait for the bucket, want 1", got)
	}
	s.stop(syscall.SIGKILL)
	s.start()
	s.becomes("the snapshot is known to be in the bucket", func() bool { return durable(snapshot) == cay.DurableCluster })
	if got := durable(id); got != cay.DurableNode {
		s.t.Errorf("after a restart without the bucket the sandbox is durable: %q", got)
	}
	s3.Start(s.t)
	for _, id := range []string{id, snapshot} {
		s.becomes(id+" is in the bucket after the restart", func() bool { return durable(id) == cay.DurableCluster })
	}
	if got, err := filepath.Glob(filepath.Join(objects, "checkpoints", id, "0", "*", "seal.json")); len(got) != 2 {
		s.t.Errorf("the copies of the sandbox are %q, %v; want two", got, err)
	}
	s.wake(id)
	s.destroy(id)
	if err := s.api().DeleteSnapshot(s.t.Context(), snapshot); err != nil {
		s.t.Errorf("deleting the snapshot: %v", err)
	}
}

// bucketIsFine has the doctor check the bucket, with the right and with wrong credentials.
func (s *server) bucketIsFine(settings []string) {
	s.t.Helper()
	for key, fine := range map[string]bool{"": true, "CAY_FILES_SECRET_KEY=another": false} {
		cmd := exec.Command(s.binary, "doctor", "--json")
		cmd.Env = append(append(os.Environ(), settings...), key)
		out, _ := cmd.Output() // it fails for anything wrong with this machine
		var answer struct {
			Findings []struct {
				Check, Detail string
				OK            bool
			}
		}
		if err := json.Unmarshal(out, &answer); err != nil {
			s.t.Fatalf("%v: %s", err, out)
		}
		got := map[string]bool{}
		for _, f := range answer.Findings {
			got[f.Check] = f.OK
		}
		want := map[string]bool{"bucket": fine, "conditional writes": fine, "checksums": fine,
			"bucket's clock": fine}
		for check, ok := range want {
			if was, is := got[check]; !is || was != ok {
				s.t.Errorf("doctor with %q: %s: %s", key, check, out)
			}
		}
	}
}
