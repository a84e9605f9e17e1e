package image

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
)

// TestHide fails for a field of the credentials, also for one that is added later, that errors show
// and that is not among the public ones.
func TestHide(t *testing.T) {
	public := []string{"Username", "AWSRegion"}
	var a Auth
	v := reflect.ValueOf(&a).Elem()
	for i := range v.NumField() {
		caytest.Fill(v.Field(i).Addr().Interface(), 100+i)
	}
	for i := range v.NumField() {
		name, value := v.Type().Field(i).Name, fmt.Sprint(v.Field(i).Interface())
		text := a.hide(errors.New("got " + value + " for nothing")).Error()
		if shown := text == "got "+value+" for nothing"; shown != slices.Contains(public, name) {
			t.Errorf("of the field %s an error shows %q", name, text)
		}
	}
}
