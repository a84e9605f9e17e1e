package cli

import "testing"

func TestEscapes(t *testing.T) {
	for _, c := range []struct {
		typed []string
		want  string
		leave bool
	}{
		{[]string{"~."}, "", true},
		{[]string{"~", "."}, "", true},
		{[]string{"a~.\r"}, "a~.\r", false},
		{[]string{"ls\r~.more"}, "ls\r", true},
		{[]string{"~~."}, "~.", false},
		{[]string{"~\r~."}, "~\r", true},
		{[]string{"~x\n", "~", "~"}, "~x\n~", false},
		{[]string{"", "x", "~."}, "x~.", false},
	} {
		e := escapes{lineStart: true}
		got, leave := "", false
		for _, b := range c.typed {
			keys, left := e.take([]byte(b))
			got += string(keys)
			leave = leave || left
		}
		if got != c.want || leave != c.leave {
			t.Errorf("%q: %q, left %t; want %q, %t", c.typed, got, leave, c.want, c.leave)
		}
	}
}

func TestShellLine(t *testing.T) {
	for want, args := range map[string][]string{"": nil, `exec 'top'`: {"top"},
		`exec 'a b' 'it'\''s' ''`: {"a b", "it's", ""}} {
		if got := shellLine(args); got != want {
			t.Errorf("%q: %s, want %s", args, got, want)
		}
	}
}
