package caytest

import (
	"reflect"
	"strings"
)

// EachWithout calls f with the name of each field below a value that full returns, and with such a
// value in which that field has its zero value. With it a test notices a field, also one that is
// added later, that makes no difference to the code under test. Fields of structs are named by
// their path, also behind pointers; elements of lists and maps are no fields of their own.
func EachWithout[T any](full func() T, f func(name string, without T)) {
	var names []string
	v := full()
	eachField(reflect.ValueOf(&v).Elem(), "", func(name string, _ reflect.Value) { names = append(names, name) })
	for i, name := range names {
		without, at := full(), 0
		eachField(reflect.ValueOf(&without).Elem(), "", func(_ string, field reflect.Value) {
			if at == i {
				field.SetZero()
			}
			at++
		})
		f(name, without)
	}
}

// ZeroFields returns the names of the fields of a value, as [EachWithout] names them, that have
// their zero value.
func ZeroFields(v any) (names []string) {
	of := reflect.New(reflect.TypeOf(v)).Elem()
	of.Set(reflect.ValueOf(v))
	eachField(of, "", func(name string, field reflect.Value) {
		if field.IsZero() {
			names = append(names, name)
		}
	})
	return names
}

// eachField calls f with each field below v that is no struct with exported fields, nor a pointer
// to one.
func eachField(v reflect.Value, path string, f func(name string, field reflect.Value)) {
	under := v
	for under.Kind() == reflect.Pointer && !under.IsNil() {
		under = under.Elem()
	}
	if under.Kind() != reflect.Struct || under.NumField() == 0 || !under.Type().Field(0).IsExported() {
		f(strings.TrimPrefix(path, "."), v)
		return
	}
	for i := range under.NumField() {
		eachField(under.Field(i), path+"."+under.Type().Field(i).Name, f)
	}
}
