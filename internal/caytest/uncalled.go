package caytest

import (
	"os"
	"reflect"
	"strings"
	"testing"
)

// Uncalled returns the methods of an interface that none of the source files calls on receiver. With
// it a contract suite fails for a method that it does not test.
func Uncalled(t testing.TB, contract reflect.Type, receiver string, files ...string) (missing []string) {
	t.Helper()
	var source strings.Builder
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		source.Write(text)
	}
	for method := range contract.Methods() {
		if !strings.Contains(source.String(), receiver+"."+method.Name+"(") {
			missing = append(missing, method.Name)
		}
	}
	return missing
}
