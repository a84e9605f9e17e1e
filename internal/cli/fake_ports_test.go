package cli

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// addPorts adds the fake server's ports and directories. /data is a directory, and so is every place into which a test
// unpacked files. Port 81 is closed, and every other port says hello.
func (f *fakeAPI) addPorts(mux *http.ServeMux) {
	for pattern, h := range map[string]fakeHandler{
		"PUT /v1/sandboxes/{id}/ports/{port}": func(w http.ResponseWriter, r *http.Request, body []byte) {
			var in struct{ Public bool }
			_ = json.Unmarshal(body, &in) // made by the client
			answer(w, 200, cay.Port{Port: 8080, Public: in.Public, URL: "https://8080-x.boxes.test/"})
		},
		"POST /v1/sandboxes/{id}/ports/{port}/url": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			answer(w, 201, cay.PortURL{URL: "https://" + r.PathValue("port") + "-x.boxes.test/?cay_token=t",
				ExpiresAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)})
		},
		"POST /v1/sandboxes/{id}/tunnel":     fakeTunnel,
		"GET /v1/sandboxes/{id}/files/stat":  f.statFile,
		"GET /v1/sandboxes/{id}/files/tar":   f.readTree,
		"PUT /v1/sandboxes/{id}/files/tar":   f.writeTree,
		"GET /v1/sandboxes/{id}/files/watch": fakeWatch,
	} {
		mux.HandleFunc(pattern, f.recorded(h))
	}
}

func fakeTunnel(w http.ResponseWriter, r *http.Request, _ []byte) {
	if r.URL.Query().Get("port") == "81" {
		refuse(w, 502, "port_closed", "", "nothing listens on port 81")
		return
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(err) // HTTP/1.1 connections can be hijacked
	}
	defer conn.Close()
	fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhello")
}

func fakeWatch(w http.ResponseWriter, r *http.Request, _ []byte) {
	w.Header().Set("Content-Type", "text/event-stream")
	fmt.Fprintf(w, "event: ready\ndata: {}\n\n:\n\nevent: change\ndata: {\"type\":\"create\",\"path\":%q}\n\n",
		r.URL.Query().Get("path")+"/a")
}

func (f *fakeAPI) statFile(w http.ResponseWriter, r *http.Request, _ []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := r.URL.Query().Get("path")
	e := cay.FileEntry{Name: path.Base(p), Path: p, Type: "directory", Mode: "0755", Owner: "user", Group: "user",
		ModifiedAt: time.Now()}
	if _, ok := f.files[p]; ok {
		e.Type = "file"
		answer(w, 200, e)
		return
	}
	for name := range f.files {
		if strings.HasPrefix(name, p+"/") {
			answer(w, 200, e)
			return
		}
	}
	refuse(w, 404, "file_not_found", "", "there is no such file")
}

func (f *fakeAPI) writeTree(w http.ResponseWriter, r *http.Request, body []byte) {
	in := tar.NewReader(bytes.NewReader(body))
	for {
		h, err := in.Next()
		if err == io.EOF {
			w.WriteHeader(204)
			return
		}
		if err != nil {
			refuse(w, 400, "invalid_tar", "", err.Error())
			return
		}
		b, _ := io.ReadAll(in) // from memory
		f.mu.Lock()
		if h.Typeflag == tar.TypeReg {
			f.files[path.Join(r.URL.Query().Get("path"), h.Name)] = b
		}
		f.mu.Unlock()
	}
}

// readTree packs a directory. From /data/evil it makes an archive that only a hostile sandbox would send.
func (f *fakeAPI) readTree(w http.ResponseWriter, r *http.Request, _ []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	dir := r.URL.Query().Get("path")
	out := tar.NewWriter(w)
	put := func(h tar.Header, b []byte) {
		h.Size, h.Mode = int64(len(b)), 0o644
		if err := out.WriteHeader(&h); err == nil {
			_, _ = out.Write(b) // fails after the client has gone
		}
	}
	if dir == "/data/evil" {
		put(tar.Header{Name: strings.TrimSpace(string(f.files["/data/evil/name"]))}, []byte("evil"))
	} else {
		for name, b := range f.files {
			if rel, ok := strings.CutPrefix(name, dir+"/"); ok {
				put(tar.Header{Name: rel}, b)
			}
		}
	}
	_ = out.Close() // fails after the client has gone
}
