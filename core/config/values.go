package config

import (
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
)

// Bytes is a number of bytes, written as 65536, 64KiB, 64MiB, 1GiB or, in
// powers of ten, 64kB, 64MB.
type Bytes int64

var units = []struct {
	name string
	size int64
}{
	{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10},
	{"GB", 1e9}, {"MB", 1e6}, {"kB", 1e3}, {"KB", 1e3}, {"B", 1},
}

// ParseBytes reads a number of bytes.
func ParseBytes(s string) (Bytes, error) {
	num, size := strings.TrimSpace(s), int64(1)
	for _, u := range units {
		if rest, ok := strings.CutSuffix(num, u.name); ok {
			num, size = strings.TrimSpace(rest), u.size
			break
		}
	}
	n, err := strconv.ParseInt(num, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%q is not a number of bytes", shorten(s))
	}
	if n > math.MaxInt64/size {
		return 0, fmt.Errorf("%q is too many bytes", shorten(s))
	}
	return Bytes(n * size), nil
}

// String returns the number with the biggest unit that divides it.
func (b Bytes) String() string {
	for _, u := range units[:3] {
		if b != 0 && int64(b)%u.size == 0 {
			return strconv.FormatInt(int64(b)/u.size, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// MarshalText writes the number as String does.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText reads what ParseBytes accepts.
func (b *Bytes) UnmarshalText(text []byte) error {
	v, err := ParseBytes(string(text))
	if err == nil {
		*b = v
	}
	return err
}

// redacted is how a secret prints.
const redacted = "***"

// ref is a reference to a secret.
type ref struct{ scheme, target string }

// reference recognises ${env:NAME} and ${file:/path}.
func reference(n *node) (ref, bool) {
	if n.kind != stringKind || n.secret {
		return ref{}, false
	}
	inner, ok := strings.CutPrefix(n.text, "${")
	if !ok {
		return ref{}, false
	}
	inner, ok = strings.CutSuffix(inner, "}")
	if !ok {
		return ref{}, false
	}
	scheme, target, ok := strings.Cut(inner, ":")
	return ref{scheme, target}, ok && (scheme == "env" || scheme == "file")
}

// maxSecret is the size of the biggest secret file, in bytes.
const maxSecret = 64 << 10

// resolve returns the secret that is meant.
func (r ref) resolve() (string, error) {
	if r.scheme == "env" {
		v, ok := os.LookupEnv(r.target)
		if !ok || v == "" {
			return "", fmt.Errorf("the environment variable %s is not set", r.target)
		}
		return v, nil
	}
	info, err := os.Stat(r.target)
	if err != nil {
		return "", fmt.Errorf("the secret's file: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() > maxSecret {
		return "", fmt.Errorf("the secret's file %s is not a file of at most %d bytes", r.target, maxSecret)
	}
	data, err := os.ReadFile(r.target)
	if err != nil {
		return "", fmt.Errorf("the secret's file: %w", err)
	}
	v := strings.TrimRight(string(data), "\r\n")
	if v == "" {
		return "", fmt.Errorf("the secret's file %s is empty", r.target)
	}
	return v, nil
}
