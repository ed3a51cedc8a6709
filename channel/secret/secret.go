package secret

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

const (
	// MinLength is the least length of a secret that keys are derived from, in
	// bytes. Deriving does not make a short secret harder to guess.
	MinLength = 16
	// MaxKeys bounds the secrets that are valid at a time.
	MaxKeys = 16
	// maxFile is the size of the largest secret file, in bytes.
	maxFile = 64 << 10
)

// Text is a secret option. It prints as ***, whatever the verb and format. In
// configuration it is the secret itself, or better a reference: ${env:NAME} for
// an environment variable, ${file:/path} for the first line of a file that not
// everybody can read.
type Text struct{ value string }

// New makes a Text of its value.
func New(value string) Text { return Text{value} }

// Reveal returns the secret itself.
func (t Text) Reveal() string { return t.value }

// IsZero reports whether no secret is set.
func (t Text) IsZero() bool { return t.value == "" }

const hidden = "***"

// String returns ***, or nothing if there is no secret.
func (t Text) String() string {
	if t.value == "" {
		return ""
	}
	return hidden
}

// GoString returns what String returns.
func (t Text) GoString() string { return t.String() }

// Format prints what String returns, whatever the verb.
func (t Text) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, t.String()) }

// MarshalText returns what String returns.
func (t Text) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText takes the secret, or what a reference refers to. Its errors do
// not contain the secret.
func (t *Text) UnmarshalText(text []byte) error {
	s := string(text)
	if s == hidden {
		return errors.New("*** stands for a secret that was not shown: write the secret, or a reference like ${file:/path}")
	}
	if strings.HasPrefix(s, "${") && strings.HasSuffix(s, "}") {
		inner := s[len("${") : len(s)-len("}")]
		switch scheme, target, _ := strings.Cut(inner, ":"); scheme {
		case "env":
			v := os.Getenv(target)
			if v == "" {
				return fmt.Errorf("the environment variable %s is not set", target)
			}
			t.value = v
			return nil
		case "file":
			lines, err := File(target)
			if err != nil {
				return err
			}
			*t = lines[0]
			return nil
		}
	}
	t.value = s
	return nil
}

// File returns the secrets in a file, one per line; empty lines and those that
// begin with # do not count. A file that everybody can read is refused, and so
// is one without a secret.
func File(path string) ([]Text, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("the secret's file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat() // of what is open: the name may come to mean another file
	switch {
	case err != nil:
		return nil, fmt.Errorf("the secret's file: %w", err)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("the secret's file %s is no regular file", path)
	case info.Mode().Perm()&0o004 != 0:
		return nil, fmt.Errorf("the secret's file %s can be read by everybody on this machine (mode %04o): chmod 600 %s, and change the secret if others may have read it",
			path, info.Mode().Perm(), path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("the secret's file: %w", err)
	case len(data) > maxFile:
		return nil, fmt.Errorf("the secret's file %s is larger than %d bytes", path, maxFile)
	}
	var out []Text
	for line := range bytes.Lines(data) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		out = append(out, Text{string(line)})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("the secret's file %s is empty", path)
	}
	return out, nil
}

// List puts together the secrets that are valid: the current one, or else the
// first of the file, comes first; then the rest of the file and the old ones.
// Both a current secret and a file are refused, and so are secrets that are
// too short, given twice or too many. No secret at all is an empty list. The
// errors name the options by the given names.
func List(name string, current Text, file string, old []Text) ([]Text, error) {
	var all []Text
	switch {
	case !current.IsZero() && file != "":
		return nil, fmt.Errorf("%s and %s_file are both set: leave one of them out", name, name)
	case !current.IsZero():
		all = append(all, current)
	case file != "":
		lines, err := File(file)
		if err != nil {
			return nil, fmt.Errorf("%s_file: %w", name, err)
		}
		all = lines
	case len(old) > 0:
		return nil, fmt.Errorf("old_%ss: there are old ones, but no %s to use", name, name)
	}
	all = append(all[:len(all):len(all)], old...)
	if len(all) > MaxKeys {
		return nil, fmt.Errorf("%s: %d are valid at a time, the most is %d: remove old ones", name, len(all), MaxKeys)
	}
	seen := map[Text]int{}
	for i, t := range all {
		if j, dup := seen[t]; dup {
			return nil, fmt.Errorf("%s: number %d is the same as number %d: list each once", name, i+1, j+1)
		}
		seen[t] = i
	}
	return all, nil
}

// CheckLength refuses a secret that keys cannot be derived from.
func CheckLength(name string, all []Text) error {
	for i, t := range all {
		if n := len(t.value); n < MinLength {
			return fmt.Errorf("%s: number %d has %d bytes, at least %d are needed: make one with \"openssl rand -hex 32\"", name, i+1, n, MinLength)
		}
	}
	return nil
}
