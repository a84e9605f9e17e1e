package buildkit

import (
	"testing"
)

func TestFirst(t *testing.T) {
	r := newRoom(t)
	res, err := r.Build(t.Context(), Request{Dockerfile: "FROM base\nRUN echo hello >/x; dmesg | head -3; id; cat /proc/version; ls -la /\n", Base: testBases(t)}, func(e Event) {
		t.Logf("%+v", e)
	})
	if err != nil {
		t.Fatal(err)
	}
	_, files := opened(t, res)
	t.Log(files["x"], res)
}
