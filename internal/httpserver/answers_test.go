package httpserver

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"
)

// big is the size of large bodies, in bytes.
const big = 20 << 20

// pattern returns a byte stream that shows whether pieces were lost, repeated or swapped.
func pattern(size int64) io.Reader { return io.LimitReader(&patterned{}, size) }

type patterned struct{ at int64 }

func (p *patterned) Read(b []byte) (int, error) {
	for n := 0; n < len(b); {
		n += copy(b[n:], patternBlock[(p.at+int64(n))%int64(len(patternBlock)):])
	}
	p.at += int64(len(b))
	return len(b), nil
}

// patternBlock is repeated. Its length, a prime number, is that of no buffer.
var patternBlock = func() []byte {
	b := make([]byte, 1048573)
	_, _ = rand.NewChaCha8([32]byte{}).Read(b) // never fails
	return b
}()

// sameAs reads a stream to its end and returns how many bytes it has, or where it is not the pattern.
func sameAs(r io.Reader) string {
	want, at := &patterned{}, int64(0)
	got, expected := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := r.Read(got)
		_, _ = want.Read(expected[:n])
		if !bytes.Equal(got[:n], expected[:n]) {
			return fmt.Sprintf("wrong bytes after %d", at)
		}
		at += int64(n)
		if err != nil {
			return fmt.Sprintf("%d bytes, %v", at, err)
		}
	}
}

// answers are the handlers of the node in TestForward, by path.
var answers = map[string]http.HandlerFunc{
	"/json": func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.Copy(w, io.MultiReader(strings.NewReader(`{"you sent":`), r.Body, strings.NewReader("}\n")))
	},
	"/created": func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", "/v1/things/1?a=b")
		w.WriteHeader(http.StatusCreated)
	},
	"/nothing": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) },
	"/problem": func(w http.ResponseWriter, r *http.Request) {
		RefuseJSON(w, r, http.StatusNotFound, "sandbox_not_found", "application/problem+json", map[string]string{"code": "x"})
	},
	"/misdirected": func(w http.ResponseWriter, r *http.Request) { // an application's, not cay's
		w.Header().Set("Cay-Node", "n2")
		w.WriteHeader(http.StatusMisdirectedRequest)
	},
	"/down": func(w http.ResponseWriter, r *http.Request) { _, _ = io.Copy(w, pattern(big)) },
	"/up": func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.ContentLength, " ", sameAs(r.Body))
	},
	"/range": func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "x.txt", time.Unix(1_700_000_000, 0), bytes.NewReader(must(io.ReadAll(pattern(10_000)))))
	},
	"/trailers": func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Told")
		n, err := io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, n, " ", err, " ", r.Trailer)
		w.Header().Set("Told", "later")
		w.Header().Set(http.TrailerPrefix+"Untold", "too")
	},
	"/informed": func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Del("Link")
		w.WriteHeader(http.StatusProcessing)
		_, _ = io.WriteString(w, "after two")
	},
	"/refuse": func(w http.ResponseWriter, r *http.Request) {
		Refuse(w, r, http.StatusRequestEntityTooLarge, "body_too_large", []byte("too large"))
	},
	"/duplex": func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.Copy(flushing{w}, r.Body)
	},
	"/events": func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		stream := NewEventStream(w, r)
		defer stream.Close()
		more := bufio.NewReader(r.Body)
		for n := 0; ; n++ { // each event follows a byte of the caller, who has seen the event before
			if _, err := more.ReadByte(); err != nil {
				return
			}
			if err := stream.Send(fmt.Sprintf("data: %d\n\n", n)); err != nil {
				return
			}
		}
	},
	"/broken": func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	},
	"/zeros": func(w http.ResponseWriter, r *http.Request) {
		zeros := make([]byte, 64<<10)
		for range big / len(zeros) {
			_, _ = w.Write(zeros)
		}
	},
	"/drop": func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, r.Body, make([]byte, 64<<10))
	},
	"/upgrade": upgraded,
	"/grpc": func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/grpc")
		w.Header().Set("Trailer", "Grpc-Status")
		_, _ = io.Copy(flushing{w}, io.MultiReader(strings.NewReader(r.Proto+" "+r.Header.Get("Te")+" "), r.Body))
		w.Header().Set("Grpc-Status", "0")
	},
}

// nodeHandler answers the requests of TestForward.
func nodeHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.RequestURI, "/head") {
			showHead(w, r)
			return
		}
		answers[r.URL.Path](w, r)
	})
}

// showHead answers with the head of the request.
func showHead(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	for name, values := range r.Header {
		h["Got-"+name] = values
	}
	h.Set("Got", strings.Join([]string{r.Method, r.RequestURI, r.URL.RawPath, r.Host, r.Proto,
		fmt.Sprint(r.TLS != nil, r.ContentLength, r.TransferEncoding)}, "|"))
	h.Set("Got-Remote", strings.Split(r.RemoteAddr, ":")[0])
	h["Set-Cookie"] = []string{"a=1", "b=2"}
}

type flushing struct{ w http.ResponseWriter }

func (f flushing) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	return n, errors.Join(err, http.NewResponseController(f.w).Flush())
}

// upgraded answers 101, sends back what comes in capitals, and a last line when the other side has ended.
func upgraded(w http.ResponseWriter, r *http.Request) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+
		r.Header.Get("Upgrade")+"\r\nX-Own: yes\r\n\r\n")
	if r.URL.RawQuery == "close" { // the server ends its half first
		_, _ = io.WriteString(conn, "bye\n")
		_ = conn.(interface{ CloseWrite() error }).CloseWrite()
		_, _ = io.Copy(io.Discard, buffered)
		return
	}
	for lines := bufio.NewReader(buffered); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			_, _ = io.WriteString(conn, "the other side ended\n")
			_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			return
		}
		_, _ = io.WriteString(conn, strings.ToUpper(line))
	}
}
