package noderpc

import (
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cayhq/cay/internal/hostfile"
	"github.com/cayhq/cay/internal/pki"
)

// Files keeps a node's key and certificates in a directory, which only root can read.
type Files struct{ Dir string }

const (
	fileKey         = "key.pem"
	fileCertificate = "certificate.pem"
	fileAuthorities = "authorities.pem"
)

// Key returns the node's key, and makes it the first time. It is on the disk before it is used, so that a join whose
// answer is lost is repeated with the same key.
func (f Files) Key() (*ecdsa.PrivateKey, error) {
	path := filepath.Join(f.Dir, fileKey)
	text, err := os.ReadFile(path)
	if err == nil {
		key, err := pki.ParseKey(text)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", path, err)
		}
		return key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := os.MkdirAll(f.Dir, 0o700); err != nil {
		return nil, err
	}
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	if text, err = pki.EncodeKey(key); err != nil {
		return nil, err
	}
	return key, hostfile.ReplaceSynced(path, text, 0o600)
}

// Save writes what a join or a renewal has returned. The authorities are written first: the old certificate works with
// them too.
func (f Files) Save(chain, authorities string) error {
	for _, file := range []struct{ name, text string }{{fileAuthorities, authorities}, {fileCertificate, chain}} {
		if err := hostfile.ReplaceSynced(filepath.Join(f.Dir, file.name), []byte(file.text), 0o600); err != nil {
			return fmt.Errorf("keeping the node's certificate: %w", err)
		}
	}
	return nil
}

// Keeper returns a Keeper with what [Files.Save] wrote. The error is [fs.ErrNotExist] if the node has not joined.
func (f Files) Keeper() (*pki.Keeper, error) {
	key, err := f.Key()
	if err != nil {
		return nil, err
	}
	chain, err := os.ReadFile(filepath.Join(f.Dir, fileCertificate))
	if err != nil {
		return nil, fmt.Errorf("reading the node's certificate: %w", err)
	}
	authorities, err := os.ReadFile(filepath.Join(f.Dir, fileAuthorities))
	if err != nil {
		return nil, fmt.Errorf("reading the cluster's authorities: %w", err)
	}
	k, err := pki.NewKeeper(key, string(chain), string(authorities))
	if err != nil {
		return nil, fmt.Errorf("reading the node's certificate: %w", err)
	}
	return k, nil
}
