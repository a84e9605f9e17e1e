package daemon

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/archive"
	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/store"
)

// settingSeals names the setting with the key of the MACs of checkpoints in a bucket, in hexadecimal.
const settingSeals = "checkpoints_key"

// files copies this server's files to a bucket.
type files struct {
	store            *objects.Store
	images, contexts *objects.Mirror
	checkpoints      *archive.Archive
}

// openBucket opens the bucket of the settings.
func openBucket(cfg config.Files) (objects.Bucket, error) {
	l, err := objects.ParseURL(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("files.url: %w", err)
	}
	credentials, err := cfg.Credentials()
	if err != nil {
		return nil, err
	}
	bucket, err := objects.Open(l, credentials)
	if err != nil {
		return nil, fmt.Errorf("files.url: %w", err)
	}
	return bucket, nil
}

// openFiles sets up the copies of images, contexts and checkpoints in the bucket of the settings, if there is one. It
// makes no request to an S3 server.
func (s *server) openFiles(ctx context.Context) (err error) {
	cfg := s.cfg.Files
	if cfg.URL == "" {
		return nil
	}
	bucket, err := openBucket(cfg)
	if err != nil {
		return err
	}
	directory, err := directoryID(s.cfg.DataDir)
	if err != nil {
		return err
	}
	f := &files{store: objects.NewStore(bucket, ownerOf(s.cfg, s.session, directory), s.log.With("room", "objects"))}
	minFree := int64(s.cfg.Capacity.MinFreeDiskMB) << 20
	f.images = f.store.Mirror(objects.MirrorConfig{Prefix: "images/", Local: s.images, Alone: s.db.Alone,
		MaxLocal: int64(cfg.ImagesMB) << 20, MaxUnneeded: int64(cfg.ImagesMB) << 20, MaxFile: maxImageFile, MinFree: minFree})
	f.contexts = f.store.Mirror(objects.MirrorConfig{Prefix: "contexts/", Local: s.contexts, Alone: s.db.Alone,
		MaxLocal: int64(cfg.ContextsMB) << 20, MaxUnneeded: int64(cfg.ContextsMB) << 20,
		MaxFile: int64(s.cfg.Build.ContextsMB) << 20, MinFree: minFree})
	s.images.UseRemote(f.images, func(digest string) bool { return s.node.UsesImage(digest) })
	s.contexts.UseRemote(f.contexts)
	if f.checkpoints, err = s.openArchive(ctx, bucket, f.store); err != nil {
		return err
	}
	f.store.OnClaim(f.checkpoints.Run)
	s.files = f
	s.observeFiles()
	return nil
}

// ownerOf returns the owner as which a server with a data directory claims its bucket.
func ownerOf(cfg config.Config, session store.Session, directory string) objects.Owner {
	if inFleet(cfg) {
		return objects.Owner{Cluster: session.Cluster, Directory: objects.Fleet, Generation: session.Generation,
			Before: directory}
	}
	return objects.Owner{Cluster: session.Cluster, Directory: directory}
}

// openArchive returns the archive that copies checkpoints to the bucket.
func (s *server) openArchive(ctx context.Context, bucket objects.Bucket, of *objects.Store) (*archive.Archive, error) {
	text, err := s.setting(ctx, settingSeals, func() string {
		var key [32]byte
		rand.Read(key[:])
		return hex.EncodeToString(key[:])
	})
	if err != nil {
		return nil, err
	}
	key, err := hex.DecodeString(text)
	if err != nil || len(key) < sha256.Size {
		return nil, fmt.Errorf("the setting %s of the records is not a key of 32 bytes or more in hexadecimal", settingSeals)
	}
	// Another server may have taken the bucket since it was claimed. Then its records decide which objects are needed.
	alone := func(ctx context.Context, name string, f func(context.Context) error) error {
		return s.db.Alone(ctx, name, func(ctx context.Context) error {
			if err := of.Owned(ctx); err != nil {
				return err
			}
			return f(ctx)
		})
	}
	return archive.New(archive.Config{Bucket: bucket, Transfer: of.Transfer(), Node: s.session.Holder.Node, Records: s.db,
		Source: savedCheckpoints{s}, Key: key, MaxUnneeded: int64(s.cfg.Files.CheckpointsMB) << 20, Alone: alone,
		Foreign: of.Foreign, Log: s.log.With("room", "archive")}), nil
}

// savedCheckpoints gives the archive the checkpoints of the node, which is opened later.
type savedCheckpoints struct{ server *server }

// SavedNames implements [archive.Source].
func (c savedCheckpoints) SavedNames() ([]string, error) { return c.server.node.SavedNames() }

// OpenSaved implements [archive.Source].
func (c savedCheckpoints) OpenSaved(name string) (*archive.Local, error) {
	saved, err := c.server.node.OpenSaved(name)
	if err != nil {
		return nil, err
	}
	return &archive.Local{MadeAt: saved.MadeAt, CPUClass: saved.CPUClass, Agent: saved.Programs.Agent,
		Runsc: saved.Programs.Runsc, Files: saved.Files}, nil
}

// saved offers a new checkpoint to the archive, if there is a bucket.
func (s *server) saved(name string, bytes int64) {
	if s.files != nil {
		s.files.checkpoints.Offer(name, bytes)
	}
}

// stored reports whether a bucket has the checkpoint of a sandbox or snapshot that was made at that time.
func (s *server) stored(name string, made time.Time) bool {
	return s.files != nil && !s.files.store.Foreign() && s.files.checkpoints.Stored(name, made)
}

// maxImageFile bounds an image that is fetched, in bytes: the size of the files in the largest image, and as much again
// for their names and attributes.
const maxImageFile = 128 << 30

// runFiles copies files until ctx ends.
func (s *server) runFiles(ctx context.Context) {
	s.files.checkpoints.Load(ctx)
	if err := s.files.store.Run(ctx); err != nil {
		s.log.Error("files.url names a bucket that another server uses, with other records or a copy: no file is copied",
			"error", err)
	}
}

// fileMetrics collects the counts of the copies of files.
type fileMetrics struct{ server *server }

var (
	filesReachable = prometheus.NewDesc("cay_files_claimed",
		"1 while the bucket belongs to this server, according to the bucket's last answer.", nil, nil)
	filesWaiting = prometheus.NewDesc("cay_files_waiting", "Files that are not uploaded yet.", []string{"kind"}, nil)
	filesBytes   = prometheus.NewDesc("cay_files_waiting_bytes", "Bytes that are not uploaded yet.", []string{"kind"}, nil)
	filesLag     = prometheus.NewDesc("cay_files_upload_lag_seconds",
		"Time for which the oldest file that is not uploaded yet waits.", []string{"kind"}, nil)
	filesMoved = prometheus.NewDesc("cay_files_bytes_total", "Bytes that were uploaded and fetched.",
		[]string{"kind", "direction"}, nil)
	filesUses = prometheus.NewDesc("cay_files_cache_total",
		"Uses of images that were on this machine (hit), and files that had to be fetched (miss).",
		[]string{"kind", "result"}, nil)
)

// observeFiles registers the metrics of the copies of files.
func (s *server) observeFiles() { s.registry.MustRegister(fileMetrics{s}) }

// Describe implements [prometheus.Collector].
func (m fileMetrics) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{filesReachable, filesWaiting, filesBytes, filesLag, filesMoved, filesUses} {
		c <- d
	}
}

// Collect implements [prometheus.Collector].
func (m fileMetrics) Collect(c chan<- prometheus.Metric) {
	claimed := 0.0
	if m.server.files.store.Claimed() {
		claimed = 1
	}
	c <- prometheus.MustNewConstMetric(filesReachable, prometheus.GaugeValue, claimed)
	for _, kind := range []struct {
		name    string
		fetched bool // whether it is ever
		counts  objects.Counts
	}{{"images", true, m.server.files.images.Counts()}, {"contexts", true, m.server.files.contexts.Counts()},
		{"checkpoints", false, m.server.files.checkpoints.Counts()}} {
		n := kind.counts
		c <- prometheus.MustNewConstMetric(filesWaiting, prometheus.GaugeValue, float64(n.Waiting), kind.name)
		c <- prometheus.MustNewConstMetric(filesBytes, prometheus.GaugeValue, float64(n.WaitingBytes), kind.name)
		c <- prometheus.MustNewConstMetric(filesLag, prometheus.GaugeValue, n.Lag.Seconds(), kind.name)
		c <- prometheus.MustNewConstMetric(filesMoved, prometheus.CounterValue, float64(n.Uploaded), kind.name, "up")
		if !kind.fetched {
			continue
		}
		c <- prometheus.MustNewConstMetric(filesMoved, prometheus.CounterValue, float64(n.Fetched), kind.name, "down")
		c <- prometheus.MustNewConstMetric(filesUses, prometheus.CounterValue, float64(n.Fetches), kind.name, "miss")
	}
	hits := float64(m.server.images.Hits())
	c <- prometheus.MustNewConstMetric(filesUses, prometheus.CounterValue, hits, "images", "hit")
}

// CheckFiles checks the bucket of the settings, if there is one.
func CheckFiles(ctx context.Context, cfg config.Files) []Finding {
	if cfg.URL == "" {
		return nil
	}
	bucket, err := openBucket(cfg)
	if err != nil {
		return []Finding{{Check: "bucket", Detail: err.Error(), Fix: "correct the settings of [files]"}}
	}
	var all []Finding
	for _, f := range objects.Check(ctx, bucket) {
		all = append(all, Finding{Check: f.Name, OK: f.OK, Detail: f.Detail, Fix: f.Fix})
	}
	return all
}
