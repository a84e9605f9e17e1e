package objects

import (
	"strings"
	"testing"
)

func TestParseURL(t *testing.T) {
	for text, want := range map[string]Location{
		"s3://cay": {Bucket: "cay", Endpoint: "https://s3.amazonaws.com", Region: "us-east-1"},
		"s3://cay/a/b/?endpoint=http://10.0.0.1:9000&region=eu&path_style=true": {Bucket: "cay", Prefix: "a/b/",
			Endpoint: "http://10.0.0.1:9000", Region: "eu", PathStyle: true},
		"s3://cay?endpoint=s3.example.com": {Bucket: "cay", Endpoint: "https://s3.example.com", Region: "us-east-1"},
		"file:///srv/cay/":                 {Dir: "/srv/cay"},
	} {
		if got, err := ParseURL(text); err != nil || got != want {
			t.Errorf("%s is %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "cay", "http://cay", "s3://", "s3://C", "s3://a.b", "s3://cay/ü", "s3://cay/../x",
		"s3://key:secret@cay", "s3://cay?secret=secret", "s3://cay?endpoint=ftp://x", "s3://cay?endpoint=http://u:secret@x",
		"s3://cay?endpoint=http://x/path", "s3://cay?path_style=maybe", "s3://cay?region=a&region=b", "s3://cay?region=",
		"file://host/x", "file:///", "file:x", "s3://cay/\x00secret", "s3://cay/" + strings.Repeat("a", 300)} {
		_, err := ParseURL(text)
		if err == nil {
			t.Errorf("%q was taken", text)
		} else if strings.Contains(err.Error(), "key:secret") || strings.Contains(err.Error(), "u:secret") {
			t.Errorf("the error has the credentials: %v", err)
		}
	}
}

// FuzzParseURL checks that a location which is taken makes keys and requests that stay in its bucket.
func FuzzParseURL(f *testing.F) {
	for _, text := range []string{"s3://cay/a?endpoint=http://h:1&region=r&path_style=1", "file:///a/../b",
		"s3://a:b@cay"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		l, err := ParseURL(text)
		switch {
		case err != nil:
		case l.Dir != "" && (l != Location{Dir: l.Dir} || !strings.HasPrefix(l.Dir, "/") || strings.Contains(l.Dir, "/../")):
			t.Errorf("%q is %+v", text, l)
		case l.Dir == "":
			prefix, slash := strings.CutSuffix(l.Prefix, "/")
			if l.Bucket == "" || strings.ContainsAny(l.Bucket, "/.:") || l.Prefix != "" && (!slash || checkKey(prefix) != nil) ||
				l.Region == "" || strings.Contains(l.Endpoint, "@") {
				t.Errorf("%q is %+v", text, l)
			}
			if _, err := OpenS3(l, Credentials{AccessKey: "a", SecretKey: "b"}); err != nil {
				t.Errorf("%q: %v", text, err)
			}
		}
	})
}
