package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// pythonSized returns a layer of about the size and shape of a Python image: 12,000 files, 240 MB
// that compress to about a third.
func pythonSized(b *testing.B) []byte {
	b.Helper()
	random := rand.New(rand.NewPCG(1, 2))
	words := make([]byte, 1<<20)
	for k := range words {
		words[k] = "  eeetaoinsr\n(self)=_.0123def return"[random.IntN(36)]
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	total := 0
	for k := range 12000 {
		size := int(random.ExpFloat64() * 20000)
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("usr/lib/python3/d%d/f%d.py", k/60, k), Mode: 0o644,
			Size: int64(size), ModTime: time.Unix(1700000000, 0), Format: tar.FormatPAX}
		if err := w.WriteHeader(h); err != nil {
			b.Fatal(err)
		}
		for size > 0 {
			from := random.IntN(len(words) - 600)
			n, err := w.Write(words[from : from+min(size, 600)])
			if err != nil {
				b.Fatal(err)
			}
			size, total = size-n, total+n
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	return out.Bytes()
}

// BenchmarkConvert makes an EROFS image of an OCI layout whose layer is gzip.
func BenchmarkConvert(b *testing.B) {
	layer := pythonSized(b)
	l := benchLayout(b, layer)
	b.SetBytes(int64(len(layer)))
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		s := openStore(b) // an empty store knows no results
		b.StartTimer()
		if _, err := s.Build(b.Context(), Source{Layout: &l}, quiet); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkExport makes an OCI layout of an EROFS image.
func BenchmarkExport(b *testing.B) {
	layer := pythonSized(b)
	l := benchLayout(b, layer)
	s := openStore(b)
	img, err := s.Build(b.Context(), Source{Layout: &l}, quiet)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(img.Size)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if _, err := s.Export(b.Context(), img.Digest, Runtime{}, filepath.Join(b.TempDir(), fmt.Sprint(n))); err != nil {
			b.Fatal(err)
		}
	}
}

// benchLayout pulls an image of one layer from a registry.
func benchLayout(b *testing.B, layer []byte) Layout {
	b.Helper()
	h := newHub(b)
	ref, err := name.ParseReference(h.host + "/python:1")
	if err != nil {
		b.Fatal(err)
	}
	if err := remote.Write(ref, picture(b, platform.Architecture, v1.Config{}, layer)); err != nil {
		b.Fatal(err)
	}
	l, err := openStore(b).Pull(b.Context(), ref.String(), nil, quiet)
	if err != nil {
		b.Fatal(err)
	}
	return l
}
