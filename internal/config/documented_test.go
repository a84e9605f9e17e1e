package config

import (
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// documented returns the defaults in the table of settings, by key.
func documented(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(text), "\n| key | default | meaning |\n")
	if !found {
		t.Fatal("docs/operating.md has no table of settings")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	defaults := map[string]string{}
	for row := range strings.Lines(table) {
		cells := strings.Split(row, "|")
		for key := range strings.SplitSeq(cells[1], ",") {
			defaults[strings.Trim(key, " `")] = strings.TrimSpace(cells[2])
		}
	}
	delete(defaults, "---")
	return defaults
}

// TestDefaultsAreDocumented compares the table of settings in docs/operating.md with the defaults.
func TestDefaultsAreDocumented(t *testing.T) {
	inWords := map[string]string{ // where the server finds the value itself, or the default is long
		"network.range": "chosen", "network.nameservers": "the host's", "sandbox.sizes": "the eight of `GET /v1/sizes`",
	}
	defaults := documented(t)
	quoted := regexp.MustCompile("`[^`]*`")
	var compare func(v reflect.Value, path string)
	compare = func(v reflect.Value, path string) {
		for i := range v.NumField() {
			key, field := path+v.Type().Field(i).Tag.Get("toml"), v.Field(i)
			if field.Kind() == reflect.Struct {
				compare(field, key+".")
				continue
			}
			text, ok := defaults[key]
			delete(defaults, key)
			want := reflect.New(field.Type()).Elem()
			switch {
			case !ok:
				t.Errorf("the table lacks %s", key)
				continue
			case inWords[key] != "":
				if text != inWords[key] {
					t.Errorf("the table says of %s %q, want %q", key, text, inWords[key])
				}
				continue
			case text != "none":
				var values []string
				for _, value := range quoted.FindAllString(text, -1) {
					values = append(values, strings.Trim(value, "`"))
				}
				if err := setText(want, strings.Join(values, ",")); err != nil {
					t.Errorf("the default of %s in the table: %v", key, err)
					continue
				}
			}
			if !reflect.DeepEqual(want.Interface(), field.Interface()) {
				t.Errorf("the default of %s is %v, the table says %s", key, field.Interface(), text)
			}
		}
	}
	compare(reflect.ValueOf(Default()), "")
	for key := range defaults {
		t.Errorf("the table has %s, which is no setting", key)
	}
}
