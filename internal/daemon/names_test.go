package daemon

import (
	"net"
	"testing"

	"github.com/cayhq/cay/internal/config"
)

func TestPortNames(t *testing.T) {
	for _, tt := range []struct {
		domain, listens, want string
		local                 bool
	}{
		{"", "127.0.0.1:7070", "", false},
		{"localhost", "127.0.0.1:7070", "localhost:7070", true},
		{"localhost", "[::1]:80", "localhost:80", true},
		{"localhost", "0.0.0.0:7070", "localhost", false},
		{"", "[::]:7070", "", false},
		{"", "192.0.2.1:7070", "", false},
		{"boxes.example", "127.0.0.1:7070", "boxes.example", false},
	} {
		at, err := net.ResolveTCPAddr("tcp", tt.listens)
		if err != nil {
			t.Fatal(err)
		}
		names := portNames(config.Proxy{Domain: tt.domain, Scheme: "https"}, at)
		scheme := map[bool]string{true: "http", false: "https"}[tt.local]
		if names.Domain != tt.want || names.Local != tt.local || names.Scheme != scheme {
			t.Errorf("domain %q at %s: %+v", tt.domain, tt.listens, names)
		}
	}
}
