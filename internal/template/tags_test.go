package template

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/cayhq/cay/internal/fault"
)

// lose makes images unusable.
func (b *builder) lose(images ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, image := range images {
		b.gone[image] = true
	}
}

// tagsOf returns the builds that the tags of a template name.
func (h *harness) tagsOf(t *testing.T, name string) map[string]string {
	t.Helper()
	_, tags, err := h.Tags(t.Context(), me.OrgID, name)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, tag := range tags {
		out[tag.Name] = tag.BuildID
	}
	return out
}

// TestTagNamesAReadyBuild checks that a tag which is given while another build waits, runs or has failed
// names the build of the version that it keeps.
func TestTagNamesAReadyBuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		first := h.create(t, me, of("app", "a"))
		h.wantBuilt(t, "app")
		tag := func(name string) {
			t.Helper()
			build, err := h.Tag(t.Context(), me, "app", "", []string{name})
			if err != nil || build != first.BuildID || h.tagsOf(t, "app")[name] != first.BuildID {
				t.Errorf("tag %s: %q, %v, %v; want build %q", name, build, err, h.tagsOf(t, "app"), first.BuildID)
			}
		}
		release := h.builder.hold()
		h.builder.fails("app", &BuildError{Message: "no"})
		h.rebuild(t, "app", new(of("", "b")))
		tag("waiting")
		synctest.Wait()
		tag("running")
		release()
		h.wantStatus(t, "app", Failed, 1)
		tag("failed")
		h.builder.fails("app", nil)
		second := h.rebuild(t, "app", new(of("", "b")))
		h.wantStatus(t, "app", Ready, 2)
		if build, err := h.Tag(t.Context(), me, "app", "", []string{"newest"}); err != nil || build != second.BuildID {
			t.Errorf("the newest is %q, %v; want %q", build, err, second.BuildID)
		}
	})
}

// TestTagOfATagThatGoes checks that no tag is made of one that is removed at the same moment, whose image
// may go with it.
func TestTagOfATagThatGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		h.create(t, me, of("app", "a"))
		h.wantBuilt(t, "app")
		if _, err := h.Tag(t.Context(), me, "app", "", []string{"v1"}); err != nil {
			t.Fatal(err)
		}
		untag := func() {
			if err := h.Untag(t.Context(), me, "app", []string{"v1"}); err != nil {
				t.Error(err)
			}
		}
		h.store.meanwhile("UpdateTemplate", untag)
		h.store.between["CopyTag"] = untag
		_, err := h.Tag(t.Context(), me, "app", "v1", []string{"stable", DefaultTag})
		wantCode(t, err, "template_not_found")
		if tags := h.tagsOf(t, "app"); len(tags) != 0 {
			t.Errorf("the tags are %v", tags)
		}
	})
}

// TestRequestBesideAnother checks that a request for tags of the ready version, which another request
// precedes by a moment, is answered like one that comes after it.
func TestRequestBesideAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		r := of("app", "a")
		r.Tags = []string{"v1"}
		h.create(t, me, r)
		h.wantBuilt(t, "app")
		release := h.builder.hold()
		h.store.meanwhile("UpdateTemplate", func() { h.rebuild(t, "app", new(of("", "b"))) })
		again := r
		_, err := h.Rebuild(t.Context(), me, "app", &again, nil)
		wantCode(t, err, "build_in_progress")
		release()
		h.wantStatus(t, "app", Ready, 2)

		h.rebuild(t, "app", &again)
		h.wantStatus(t, "app", Ready, 3)
		h.store.meanwhile("UpdateTemplate", func() {
			h.rebuild(t, "app", new(of("", "b")))
			h.wantStatus(t, "app", Ready, 4)
		})
		if got := h.rebuild(t, "app", &again); got.Status != Pending {
			t.Errorf("after another build is ready: %+v", got)
		}
		h.wantStatus(t, "app", Ready, 5)
	})
}

// TestTagsOnly checks that a build for tags alone changes no default version, unless the template has
// none, and that any version can become the default one.
func TestTagsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		made := 0 // each image differs from the one before
		h.builder.made = func(d Definition) string { made++; return d.Image + strings.Repeat("'", made) }
		tagged := func(image string, tags ...string) *Request {
			r := of("app", image)
			r.Tags, r.TagsOnly = tags, true
			return &r
		}
		want := func(versions map[string]int) {
			t.Helper()
			for ref, version := range versions {
				if v, err := h.Ready(t.Context(), me.OrgID, ref); err != nil || v.Version != version {
					t.Errorf("%s is version %d of image %q, %v; want version %d", ref, v.Version, v.Image, err, version)
				}
			}
		}
		h.create(t, me, *tagged("a", "v1"))
		h.wantBuilt(t, "app")
		want(map[string]int{"app": 1, "app:v1": 1, "app:latest": 1})
		first := h.get(t, "app")

		// A request that waits is not enough for one with other tags.
		release := h.builder.hold()
		h.rebuild(t, "app", tagged("b", "v2"))
		_, err := h.Rebuild(t.Context(), me, "app", tagged("b", "other"), nil)
		wantCode(t, err, "build_in_progress")
		release()
		second := h.wantStatus(t, "app", Ready, 1)
		want(map[string]int{"app": 1, "app:v1": 1, "app:v2": 2, "app:" + second.BuildID: 2})
		if second.Image != first.Image || second.ReadyBuild != first.ReadyBuild || second.Inputs != first.Inputs {
			t.Errorf("the default version changed: %+v, before %+v", second, first)
		}
		// The same again is built, and a tag of what is there is not.
		h.rebuild(t, "app", tagged("a", "again"))
		h.wantStatus(t, "app", Ready, 1)
		want(map[string]int{"app": 1, "app:again": 1, "app:v2": 2})
		// A rebuild repeats the newest build, with what it gave.
		h.rebuild(t, "app", nil)
		h.wantStatus(t, "app", Ready, 1)
		want(map[string]int{"app": 1, "app:v2": 3})

		promoted := func(ref string) {
			t.Helper()
			if _, err := h.Tag(t.Context(), me, "app", ref, []string{DefaultTag, "prod"}); err != nil {
				t.Fatal(err)
			}
		}
		promoted("v2")
		want(map[string]int{"app": 3, "app:v1": 1, "app:prod": 3})
		if got := h.get(t, "app"); got.Egress.Mode != first.Egress.Mode || got.Status != Ready {
			t.Errorf("the template is %+v", got)
		}
		h.rebuild(t, "app", new(of("", "c")))
		h.wantStatus(t, "app", Ready, 4)
		want(map[string]int{"app:v2": 3, "app:again": 1})

		// The inputs of another version do not repair the default one.
		h.rebuild(t, "app", tagged("d", "v5"))
		h.wantStatus(t, "app", Ready, 4)
		image := h.get(t, "app").Image
		h.builder.lose(image)
		h.Recheck(image)
		synctest.Wait()
		if got := h.wantStatus(t, "app", Failed, 4); got.BuildError == nil ||
			!strings.Contains(got.BuildError.Message, "v5") {
			t.Errorf("its image is gone, and it is %+v", got)
		}
		want(map[string]int{"app:v5": 5})
		promoted("v5")
		want(map[string]int{"app": 5})
		h.builder.lose(h.get(t, "app").Image)
		_, err = h.Tag(t.Context(), me, "app", "again", []string{DefaultTag})
		if err != nil {
			t.Error(err)
		}
		want(map[string]int{"app": 1})

		// No reference means a tag whose build an older cay did not record.
		h.store.mu.Lock()
		h.store.putTagLocked(first.ID, Tag{Name: "old"})
		h.store.mu.Unlock()
		if build, err := h.Tag(t.Context(), me, "app", "", []string{"newest"}); err != nil || build != first.BuildID {
			t.Errorf("the default version is of build %q, %v; want %q", build, err, first.BuildID)
		}
	})
}

// TestImageOfATagIsGone checks that a tag whose image is gone says so, and that it is repaired with the
// version that it names, if its inputs are still known.
func TestImageOfATagIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		made := 0 // each image differs from the one before
		h.builder.made = func(d Definition) string { made++; return d.Image + strings.Repeat("'", made) }
		h.create(t, me, of("app", "a"))
		h.wantBuilt(t, "app")
		tag := func(names ...string) {
			t.Helper()
			if _, err := h.Tag(t.Context(), me, "app", "", names); err != nil {
				t.Fatal(err)
			}
		}
		image := func(ref string) string {
			t.Helper()
			v, err := h.Ready(t.Context(), me.OrgID, ref)
			if err != nil {
				t.Errorf("%s: %v", ref, err)
			}
			return v.Image
		}
		tag("v1")
		h.rebuild(t, "app", new(of("", "b")))
		h.wantBuilt(t, "app")
		tag("v2", "stable")
		old, newest := image("app:v1"), image("app")
		if old == newest || image("app:v2") != newest {
			t.Fatalf("the images are %q and %q", old, newest)
		}
		h.builder.lose(old, newest)
		release := h.builder.hold()
		h.Recheck(old)
		h.Recheck(newest)
		synctest.Wait()
		for _, ref := range []string{"app:v1", "app:v2", "app:stable"} {
			_, err := h.Ready(t.Context(), me.OrgID, ref)
			if f := fault.As(err); f == nil || f.Code != "template_not_ready" || !strings.Contains(f.Detail, ref) {
				t.Errorf("%s is gone: %v", ref, err)
			}
		}
		if _, err := h.Tag(t.Context(), me, "app", "v1", []string{"stable"}); err != nil { // moved while it is repaired
			t.Fatal(err)
		}
		release()
		h.wantBuilt(t, "app")
		repaired := h.get(t, "app")
		if got := image("app:v2"); got == newest || got != repaired.Image || h.tagsOf(t, "app")["v2"] != repaired.BuildID {
			t.Errorf("v2 is %q of %v; want %q of %q", got, h.tagsOf(t, "app"), repaired.Image, repaired.BuildID)
		}
		for _, ref := range []string{"app:v1", "app:stable"} {
			_, err := h.Ready(t.Context(), me.OrgID, ref)
			wantCode(t, err, "template_not_ready")
		}
		h.builder.mu.Lock()
		delete(h.builder.gone, old) // another build gave it again
		h.builder.mu.Unlock()
		if image("app:v1") != old || image("app:stable") != old {
			t.Error("an image that is there again is not used")
		}
		for _, tag := range h.store.tags[repaired.ID] {
			if tag.Gone {
				t.Errorf("tag %s is still marked", tag.Name)
			}
		}
	})
}

// TestTagIsNotRepairedByOtherInputs checks that a tag does not move to what a later request, which failed,
// would build.
func TestTagIsNotRepairedByOtherInputs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		h.create(t, me, of("app", "a"))
		h.wantBuilt(t, "app")
		if _, err := h.Tag(t.Context(), me, "app", "", []string{"v1"}); err != nil {
			t.Fatal(err)
		}
		h.builder.fails("app", &BuildError{Message: "no"})
		h.rebuild(t, "app", new(of("", "b")))
		h.wantBuilt(t, "app")
		h.builder.fails("app", nil)
		image := h.get(t, "app").Image
		h.builder.lose(image)
		h.Recheck(image)
		h.wantBuilt(t, "app")
		h.wantStatus(t, "app", Ready, 2)
		_, err := h.Ready(t.Context(), me.OrgID, "app:v1")
		wantCode(t, err, "template_not_ready")
	})
}

// TestPromotedVersionIsNotRepairedByOtherInputs loses the image of a version that a tag made the
// default. The kept inputs are those of the version that was rolled back.
func TestPromotedVersionIsNotRepairedByOtherInputs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		h.builder.made = func(d Definition) string { return "image of " + d.Image }
		h.create(t, me, of("app", "a"))
		h.wantBuilt(t, "app")
		if _, err := h.Tag(t.Context(), me, "app", "", []string{"stable"}); err != nil {
			t.Fatal(err)
		}
		h.rebuild(t, "app", new(of("", "b")))
		h.wantBuilt(t, "app")
		if _, err := h.Tag(t.Context(), me, "app", "stable", []string{DefaultTag}); err != nil {
			t.Fatal(err)
		}
		image := h.get(t, "app").Image
		if image != "image of a" {
			t.Fatalf("the default is %q", image)
		}
		h.builder.lose(image)
		h.Recheck(image)
		synctest.Wait()
		if got := h.get(t, "app"); got.Status != Failed || got.Image == "image of b" {
			t.Errorf("the template is %s with %q", got.Status, got.Image)
		}
	})
}

// TestSharedRunBuildsWhatWasAskedFor checks that a run of two templates does not build, in the name of
// both, what one of them was changed to at the moment when the run begins.
func TestSharedRunBuildsWhatWasAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		h.builder.made = func(d Definition) string { return "image of " + d.Image }
		release := h.builder.hold()
		h.create(t, me, of("other", "o"))
		synctest.Wait()
		replaced := h.create(t, me, of("a", "old"))
		kept := h.create(t, me, of("b", "old"))
		h.store.meanwhile("GetBuild", func() { // of the build of other, which ends
			h.store.meanwhile("GetBuild", func() { // of the run of a and b, which begins
				if _, err := h.Cancel(t.Context(), me, "a"); err != nil {
					t.Error(err)
				}
				if _, err := h.Rebuild(t.Context(), me, "a", new(of("", "new")), nil); err != nil {
					t.Error(err)
				}
			})
		})
		release()
		synctest.Wait()
		for _, want := range []struct{ name, build, image string }{{"b", kept.BuildID, "image of old"},
			{"a", "", "image of new"}} {
			got := h.wantStatus(t, want.name, Ready, 1)
			if got.Image != want.image || want.build != "" && got.BuildID != want.build || got.BuildID == replaced.BuildID {
				t.Errorf("%s has %q of build %s", want.name, got.Image, got.BuildID)
			}
		}
	})
}
