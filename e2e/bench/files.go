package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of files.
const (
	fileUpload   = "upload of 100 MB"
	fileDownload = "download of 100 MB"
	fileList     = "listing of 20,000 files"
	fileShell    = "  ls -l of the same, inside"
)

// transfers returns how often the largest file is moved each way.
func (o options) transfers() int { return max(2, o.starts/5) }

// measureFiles moves the largest file that the API takes, of incompressible bytes, in and out of
// one sandbox.
func measureFiles(ctx context.Context, o options, s *server, _ *docker, r *results) error {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	data := make([]byte, cay.MaxFile)
	if _, err := rand.Read(data); err != nil {
		return err
	}
	for range o.transfers() {
		if err := s.transfer(ctx, id, data, fileUpload, fileDownload, r); err != nil {
			return err
		}
	}
	if err := s.measureListing(ctx, id, o.transfers(), r); err != nil {
		return err
	}
	return s.api.DestroySandbox(ctx, id)
}

// transfer moves data in and out of a sandbox, and adds both as measurements of these names.
func (s *server) transfer(ctx context.Context, id string, data []byte, upload, download string, r *results) error {
	const path = "/var/tmp/bench"
	began := time.Now()
	if err := s.api.WriteFile(ctx, id, path, bytes.NewReader(data), cay.WriteFileOptions{}); err != nil {
		return fmt.Errorf("uploading: %w", err)
	}
	r.add(upload, unitMBps, float64(len(data))/1e6/time.Since(began).Seconds())
	began = time.Now()
	n, err := s.download(ctx, id, path)
	if err == nil && n != int64(len(data)) {
		err = fmt.Errorf("got %d bytes of %d", n, len(data))
	}
	if err != nil {
		return fmt.Errorf("downloading: %w", err)
	}
	r.add(download, unitMBps, float64(n)/1e6/time.Since(began).Seconds())
	return nil
}

// measureListing lists a large directory through the API and with a program inside, in turn.
func (s *server) measureListing(ctx context.Context, id string, times int, r *results) error {
	const dir, files = "/tmp/many", 20_000
	fill := fmt.Sprintf("mkdir %s && cd %s && seq %d | xargs touch", dir, dir, files)
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"sh", "-c", fill}}); err != nil {
		return err
	}
	for range times {
		began := time.Now()
		all, err := s.api.ListFiles(ctx, id, dir, 1)
		if err == nil && len(all) != files {
			err = fmt.Errorf("%d files of %d", len(all), files)
		}
		if err != nil {
			return fmt.Errorf("listing: %w", err)
		}
		r.add(fileList, unitMS, milliseconds(time.Since(began)))
		res, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"sh", "-c", "ls -l " + dir + " >/dev/null"}})
		if err != nil {
			return err
		}
		r.add(fileShell, unitMS, float64(res.DurationMs))
	}
	return nil
}

func (s *server) download(ctx context.Context, id, path string) (int64, error) {
	file, err := s.api.ReadFile(ctx, id, path, cay.ReadFileOptions{})
	if err != nil {
		return 0, err
	}
	defer file.Close()
	return io.Copy(io.Discard, file)
}
