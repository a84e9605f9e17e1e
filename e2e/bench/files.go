package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"time"

	"github.com/cayhq/cay/client"
)

// What is measured about files.
const (
	fileUpload   = "upload of 100 MB"
	fileDownload = "download of 100 MB"
)

// transfers is how often the largest file goes each way.
func (o options) transfers() int { return max(2, o.starts/5) }

// measureFiles moves the largest file that the API takes, which nothing can compress,
// in and out of one sandbox.
func measureFiles(ctx context.Context, o options, s *server, _ *docker, r *results) error {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	data := make([]byte, client.MaxFile)
	if _, err := rand.Read(data); err != nil {
		return err
	}
	const path = "/var/tmp/bench"
	for range o.transfers() {
		began := time.Now()
		if err := s.api.WriteFile(ctx, id, path, bytes.NewReader(data), client.WriteFileOptions{}); err != nil {
			return fmt.Errorf("uploading: %w", err)
		}
		r.add(fileUpload, unitMBps, float64(len(data))/1e6/time.Since(began).Seconds())
		began = time.Now()
		n, err := s.download(ctx, id, path)
		if err == nil && n != int64(len(data)) {
			err = fmt.Errorf("%d bytes of %d came", n, len(data))
		}
		if err != nil {
			return fmt.Errorf("downloading: %w", err)
		}
		r.add(fileDownload, unitMBps, float64(n)/1e6/time.Since(began).Seconds())
	}
	return s.api.DestroySandbox(ctx, id)
}

func (s *server) download(ctx context.Context, id, path string) (int64, error) {
	file, err := s.api.ReadFile(ctx, id, path, client.ReadFileOptions{})
	if err != nil {
		return 0, err
	}
	defer file.Close()
	return io.Copy(io.Discard, file)
}
