package config

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

// Read returns the defaults with the settings of the file, unless its name is empty, and of the environment. It
// refuses keys that do not exist, which are typing mistakes. [Config.Check] checks the values.
func Read(file string, environ []string) (Config, error) {
	c := Default()
	// Decoding over the default sizes would mix them into the file's sizes.
	c.Sandbox.Sizes = nil
	if file != "" {
		meta, err := toml.DecodeFile(file, &c)
		if err != nil {
			return c, fmt.Errorf("reading %s: %w", file, err)
		}
		if unknown := meta.Undecoded(); len(unknown) > 0 {
			return c, fmt.Errorf("reading %s: there is no setting %s", file, unknown[0])
		}
	}
	if len(c.Sandbox.Sizes) == 0 {
		c.Sandbox.Sizes = defaultSizes()
	}
	env := map[string]string{}
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		env[name] = value
	}
	return c, overlay(reflect.ValueOf(&c).Elem(), "CAY", env)
}

// overlay sets the fields of v from the variables that are named by the path of their toml keys.
func overlay(v reflect.Value, path string, env map[string]string) error {
	for i := range v.NumField() {
		name := path + "_" + strings.ToUpper(v.Type().Field(i).Tag.Get("toml"))
		field := v.Field(i)
		if field.Kind() == reflect.Struct {
			if err := overlay(field, name, env); err != nil {
				return err
			}
			continue
		}
		text, ok := env[name]
		if !ok {
			continue
		}
		if err := setText(field, text); err != nil {
			return fmt.Errorf("reading %s=%q: %w", name, text, err)
		}
	}
	return nil
}

// setText sets a field from the text of a variable.
func setText(field reflect.Value, text string) (err error) {
	if u, ok := field.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return u.UnmarshalText([]byte(text))
	}
	switch field.Kind() {
	case reflect.String:
		field.SetString(text)
	case reflect.Bool:
		var v bool
		if v, err = strconv.ParseBool(text); err == nil {
			field.SetBool(v)
		}
	case reflect.Int:
		var v int64
		if v, err = strconv.ParseInt(text, 10, 64); err == nil {
			field.SetInt(v)
		}
	case reflect.Float64:
		var v float64
		if v, err = strconv.ParseFloat(text, 64); err == nil {
			field.SetFloat(v)
		}
	default:
		if list, ok := field.Addr().Interface().(*[]string); ok {
			*list = nil
			if text != "" {
				*list = strings.Split(text, ",")
			}
			return nil
		}
		return errors.New("can only be set in the file")
	}
	return err
}
