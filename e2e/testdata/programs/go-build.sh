# A program, its tests, and a server.
mkdir -p /tmp/go-build && cd /tmp/go-build
export GOPROXY=off GOFLAGS=-mod=mod GOTOOLCHAIN=local HOME=/tmp/go-build
cat >go.mod <<'end'
module example.test/tried
go 1.19
end
cat >main.go <<'end'
package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
)

func Sum(n int) (sum int) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i := 1; i <= n; i++ {
		wg.Add(1)
		go func(i int) { defer wg.Done(); mu.Lock(); sum += i; mu.Unlock() }(i)
	}
	wg.Wait()
	return sum
}

func main() {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, Sum(1000)) }))
	defer s.Close()
	r, err := http.Get(s.URL)
	if err != nil {
		panic(err)
	}
	b, _ := io.ReadAll(r.Body)
	fmt.Println(string(b))
}
end
cat >main_test.go <<'end'
package main

import "testing"

func TestSum(t *testing.T) {
	if Sum(10) != 55 {
		t.Fatal("wrong")
	}
}
end
go build -o tried .
./tried | grep '^500500$'
go test -count=1 ./... | grep '^ok'
