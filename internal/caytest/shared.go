package caytest

import "reflect"

// Shared returns the path of a map, list or pointer that a and b share, or "" if they share none.
// With it a test of a copy notices a field that is added later. Unexported fields are not looked at.
func Shared[T any](a, b T) string { return shared(reflect.ValueOf(a), reflect.ValueOf(b), "") }

func shared(a, b reflect.Value, path string) string {
	switch a.Kind() {
	case reflect.Pointer, reflect.Map, reflect.Slice:
		if a.IsNil() || b.IsNil() {
			return ""
		}
		if a.Pointer() == b.Pointer() {
			return path
		}
	}
	switch a.Kind() {
	case reflect.Pointer:
		return shared(a.Elem(), b.Elem(), path)
	case reflect.Slice:
		for i := range min(a.Len(), b.Len()) {
			if p := shared(a.Index(i), b.Index(i), path+"[]"); p != "" {
				return p
			}
		}
	case reflect.Map:
		for _, key := range a.MapKeys() {
			if of := b.MapIndex(key); of.IsValid() {
				if p := shared(a.MapIndex(key), of, path+"[]"); p != "" {
					return p
				}
			}
		}
	case reflect.Struct:
		for i := range a.NumField() {
			if f := a.Type().Field(i); f.IsExported() {
				if p := shared(a.Field(i), b.Field(i), path+"."+f.Name); p != "" {
					return p
				}
			}
		}
	}
	return ""
}
