package config

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func TestFilesCredentials(t *testing.T) {
	file := filepath.Join(t.TempDir(), "credentials")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("access_key = \"a\"\nsecret_key = \"topsecret\"\n", 0o600)
	c, err := Read("", []string{"CAY_FILES_URL=s3://cay", "CAY_FILES_CREDENTIALS_FILE=" + file})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	got, err := c.Files.Credentials()
	if err != nil || got.AccessKey != "a" || got.SecretKey != "topsecret" {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []struct {
		text string
		mode os.FileMode
	}{{"access_key = \"a\"\nsecret_key = \"topsecret\"\n", 0o644}, {"access_key = \"a\"\n", 0o600},
		{"access_key = topsecret", 0o600}, {"access_key = \"a\"\nsecret_key = \"topsecret\"\nmore = 1\n", 0o600}} {
		write(bad.text, bad.mode)
		if _, err := c.Files.Credentials(); err == nil || strings.Contains(err.Error(), "topsecret") ||
			!strings.HasPrefix(err.Error(), "files.credentials_file: ") {
			t.Errorf("%q with mode %o: %v", bad.text, bad.mode, err)
		}
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	var want []string
	for prefix, section := range map[string]reflect.Type{
		"CAY_STORE_": reflect.TypeFor[Store](), "CAY_FILES_": reflect.TypeFor[Files]()} {
		for field := range section.Fields() {
			if field.Type == reflect.TypeFor[Secret]() {
				want = append(want, prefix+strings.ToUpper(field.Tag.Get("toml")))
			}
		}
	}
	if got := slices.Sorted(slices.Values(SecretVariables)); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
		t.Errorf("the variables of secrets are %v, want %v", got, want)
	}
	c, err := Read("", []string{"CAY_FILES_URL=s3://cay", "CAY_FILES_ACCESS_KEY=a", "CAY_FILES_SECRET_KEY=topsecret",
		"CAY_FILES_SESSION_TOKEN=topsecret", "CAY_STORE_URL=postgres://cay:topsecret@localhost/cay"})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Files.Credentials(); err != nil || got.SecretKey != "topsecret" || got.Token != "topsecret" {
		t.Errorf("got %+v, %v", got, err)
	}
	data, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{fmt.Sprint(c), fmt.Sprintf("%+v", c), fmt.Sprintf("%#v", c), string(data)} {
		if strings.Contains(text, "topsecret") {
			t.Errorf("it was printed: %s", text)
		}
	}
}
