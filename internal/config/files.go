package config

import (
	"errors"
	"fmt"
	"os"

	"github.com/BurntSushi/toml"

	"github.com/cayhq/cay/internal/objects"
)

// Files sets the bucket that has copies of images, build contexts and checkpoints, and the space that images and
// contexts take here. Without a URL there is none.
type Files struct {
	URL             string `toml:"url"`
	AccessKey       string `toml:"access_key"`
	SecretKey       Secret `toml:"secret_key"`
	SessionToken    Secret `toml:"session_token"`
	CredentialsFile string `toml:"credentials_file"`
	ImagesMB        int    `toml:"images_mb"`
	ContextsMB      int    `toml:"contexts_mb"`
	CheckpointsMB   int    `toml:"checkpoints_mb"`
}

// Secret is a text that is not printed.
type Secret string

const hidden = "(hidden)"

// SecretVariables lists the environment variables of settings that are secrets or may have one in them.
var SecretVariables = []string{"CAY_STORE_URL", "CAY_STORE_PASSWORD", "CAY_FILES_SECRET_KEY", "CAY_FILES_SESSION_TOKEN"}

// String returns no part of the secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return hidden
}

// GoString returns no part of the secret.
func (s Secret) GoString() string { return s.String() }

// MarshalText implements [encoding.TextMarshaler], with no part of the secret.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// check refuses a URL that names no bucket, and credentials that are missing.
func (f Files) check() error {
	if f.URL == "" {
		return nil
	}
	l, err := objects.ParseURL(f.URL)
	if err != nil {
		return fmt.Errorf("files.url: %w", err)
	}
	keys := f.AccessKey != "" || f.SecretKey != "" || f.SessionToken != ""
	switch {
	case l.Dir != "":
		return nil
	case keys && f.CredentialsFile != "":
		return fmt.Errorf("files.credentials_file: must be empty if files.access_key is set, not %q", f.CredentialsFile)
	case f.CredentialsFile == "" && (f.AccessKey == "" || f.SecretKey == ""):
		return errors.New("files.access_key and files.secret_key: must both be set for an S3 bucket, " +
			"or files.credentials_file")
	}
	return nil
}

// Credentials returns the credentials of the bucket. A file of credentials is a TOML file with access_key, secret_key
// and, for temporary keys, session_token. Only its owner may read it.
func (f Files) Credentials() (objects.Credentials, error) {
	if f.CredentialsFile == "" {
		return objects.Credentials{AccessKey: f.AccessKey, SecretKey: string(f.SecretKey), Token: string(f.SessionToken)}, nil
	}
	info, err := os.Stat(f.CredentialsFile)
	if err != nil {
		return objects.Credentials{}, fmt.Errorf("files.credentials_file: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return objects.Credentials{}, fmt.Errorf(
			"files.credentials_file: %s must have mode 0600, not %#o: others can read it", f.CredentialsFile, info.Mode().Perm())
	}
	var in struct {
		AccessKey    string `toml:"access_key"`
		SecretKey    string `toml:"secret_key"`
		SessionToken string `toml:"session_token"`
	}
	meta, err := toml.DecodeFile(f.CredentialsFile, &in)
	if err != nil || len(meta.Undecoded()) > 0 || in.AccessKey == "" || in.SecretKey == "" {
		// An error of the decoder may quote the file.
		return objects.Credentials{}, fmt.Errorf("files.credentials_file: %s must have access_key = \"…\", "+
			"secret_key = \"…\" and nothing else but session_token", f.CredentialsFile)
	}
	return objects.Credentials{AccessKey: in.AccessKey, SecretKey: in.SecretKey, Token: in.SessionToken}, nil
}
